"""The training loss: cross-entropy of the next token, with logits only at supervised positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .chat import IGNORE_INDEX
from .packing import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Positions per chunk of logits. A chunk and its gradient need 5 GB with a vocabulary of 150,000 (float32).
POSITIONS_PER_CHUNK = 4096


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Returns flat indices of the positions whose next token is supervised, shape = (supervised,).

    Args:
        labels: shape = (batch, tokens), -100 for tokens that are not supervised.
    """
    needed = torch.zeros_like(labels, dtype=torch.bool)
    needed[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return needed.flatten().nonzero().squeeze(-1)


class LogitScaling(NamedTuple):
    """What an LLM does with the output of its head: `cap * tanh(scale * output / cap)`, without `tanh` if uncapped.

    Source: `forward` of the LLMs in transformers (Granite, MiniCPM3, HyperCLOVA X, Cohere, Falcon-H1, Gemma).

    Args:
        scale: factor of the output.
        cap: largest absolute value of a logit; `None` is unlimited.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, llm_config: PreTrainedConfig) -> LogitScaling:
        """Returns the scaling of an LLM from its config."""
        scale = getattr(llm_config, "logits_scaling", None) or 1.0
        if llm_config.model_type.startswith(("granite", "minicpm")):
            scale = 1 / scale
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= getattr(llm_config, name, None) or 1.0
        return cls(scale, getattr(llm_config, "final_logit_softcapping", None))

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Returns the logits for the output of the head."""
        logits = output if self.scale == 1.0 else output * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def gradient(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Returns the derivative of the logits with respect to the output of the head."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


UNSCALED = LogitScaling()


def count_labels(labels: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Returns the number of supervised tokens, at least 1, as a scalar; without a host-device sync.

    Args:
        labels: shape = (batch, tokens), -100 for tokens that are not supervised.
        positions: see `packing.Positions`.
    """
    if "labels" in positions:
        return torch.full((), max(1, len(positions["labels"])), device=labels.device)
    return (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)


def supervised_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    positions: torch.Tensor | None = None,
    scaling: LogitScaling = UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the cross-entropy of the next token.

    A plain linear head processes the supervised positions in chunks and computes the gradient of each chunk with the
    loss. Memory for logits does not grow with the batch, and no logits are computed twice. Any other head (with
    adapters, a bias, or a replaced forward method) is called once with all supervised positions.

    Args:
        hidden_states: shape = (batch, tokens, width).
        labels: shape = (batch, tokens), -100 for tokens that are not supervised.
        head: maps width to vocabulary.
        num_items_in_batch: divisor of the summed loss; default: supervised tokens in this batch.
        positions: result of `label_positions`; computing them here costs a host-device sync.
        scaling: of the head's output.

    Returns:
        Loss, number of supervised tokens, and token accuracy.
    """
    if positions is None:
        positions = label_positions(labels)
    targets = labels.flatten()[positions + 1]
    states = hidden_states.flatten(0, 1)[positions]
    count = torch.full((), len(positions), device=labels.device)  # a copy would be a host-device sync
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    if plain and not torch.compiler.is_compiling():  # the compiler cannot trace `_call_with_forward`
        total, correct = _call_with_forward(
            head, lambda states: _LinearCrossEntropy.apply(states, head.weight, targets, scaling), states
        )
    else:
        logits = scaling(head(states).float())
        total = functional.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.detach().argmax(-1) == targets).sum()
    items = count.clamp(min=1)
    return total / (items if num_items_in_batch is None else num_items_in_batch), count, correct / items


def _call_with_forward(module: nn.Module, forward: Callable, *args) -> Any:
    """Calls a module once, with `forward` in place of the module's forward method.

    DeepSpeed and FSDP gather the module's weight in each call. All ranks must make the same number of calls.
    """
    module.forward = forward
    try:
        return module(*args)
    finally:
        del module.forward


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `scaling(states @ weight.T)`, and the number of correct predictions."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scaling: LogitScaling):
        """Args: shapes = (positions, width), (vocabulary, width), (positions,)."""
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        cast = weight.to(dtype)
        total = torch.zeros((), device=states.device)
        correct = torch.zeros((), dtype=torch.long, device=states.device)
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), POSITIONS_PER_CHUNK):
                chunk = slice(start, start + POSITIONS_PER_CHUNK)
                inputs, target = states[chunk].to(dtype), targets[chunk].unsqueeze(-1)
                # Upcast to float32, as transformers' loss does: bf16 log-sum-exp over 150,000 entries is inaccurate.
                logits = scaling((inputs @ cast.T).float())
                correct += (logits.argmax(-1) == targets[chunk]).sum()
                normalizer = logits.logsumexp(-1, keepdim=True)
                total += (normalizer - logits.gather(-1, target)).sum()
                if not (needs_states or needs_weight):
                    continue
                slope = None if scaling == UNSCALED else scaling.gradient(logits)
                # Gradient of the logits: probabilities, minus 1 at the target.
                grad = logits.sub_(normalizer).exp_()
                grad.scatter_add_(-1, target, torch.full_like(target, -1, dtype=grad.dtype))
                grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
                if grad_states is not None:
                    grad_states[chunk] = (grad @ cast).to(states.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ inputs
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor, _):
        """Scales the gradients that `forward` computed."""
        grad_states, grad_weight = ctx.saved_tensors
        if grad_states is not None:
            grad_states = grad_states * grad_total.to(grad_states.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_states, grad_weight, None, None
