"""The training loss: cross-entropy of the next token, with logits at supervised positions only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .chat import IGNORE_INDEX

# Positions whose logits exist at once: with 150,000 words, 5 GB for a chunk and its gradient.
POSITIONS_PER_CHUNK = 4096


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where logits are needed: flat indices of the positions whose next token is supervised, shape = (supervised,).

    Args:
        labels: shape = (batch, tokens), -100 where not supervised.
    """
    needed = torch.zeros_like(labels, dtype=torch.bool)
    needed[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return needed.flatten().nonzero().squeeze(-1)


def supervised_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token.

    Where there are many supervised positions, they go through the head in chunks, whose logits are computed again for
    the gradient: memory then does not grow with the batch.

    Args:
        hidden_states: shape = (batch, tokens, width).
        labels: shape = (batch, tokens), -100 where not supervised.
        head: maps width to vocabulary.
        num_items_in_batch: what to divide the summed loss by; default the supervised tokens of this batch.
        positions: of `label_positions`, if known: to find them here, the host must wait for the GPU.

    Returns:
        Loss, number of supervised tokens, and the share of them that is predicted right.
    """
    if positions is None:
        positions = label_positions(labels)
    targets = labels.flatten()[positions + 1]
    states = hidden_states.flatten(0, 1)[positions]
    count = torch.full((), len(positions), device=labels.device)  # filled there: a copy would stall the host
    if len(positions) <= POSITIONS_PER_CHUNK:
        total, correct = _sums(states, targets, head)
    else:
        sums = [
            checkpoint(_sums, chunk, target, head, use_reentrant=False, preserve_rng_state=False)
            for chunk, target in zip(
                states.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True
            )
        ]
        total, correct = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    items = count.clamp(min=1)
    return total / (items if num_items_in_batch is None else num_items_in_batch), count, correct / items


def _sums(states: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    # Upcast as transformers' own loss does: bf16 log-sum-exp over 150,000 words loses digits.
    logits = head(states).float()
    with torch.no_grad():
        correct = (logits.argmax(-1) == targets).sum()
    return functional.cross_entropy(logits, targets, reduction="sum"), correct
