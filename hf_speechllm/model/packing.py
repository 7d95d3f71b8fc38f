"""Padding-free computation: concatenates the rows of a batch into one row without padding.

The model computes padding-free if the batch contains the positions without padding and the attention implementation
keeps rows separate. `fast.attention.enable_padding_free` sets this implementation.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypedDict

import torch
from torch.nn import functional
from transformers import PretrainedConfig

# Attention implementations that `fast.attention` registers: with padding added internally, and without padding.
PADDED, PADDING_FREE = "sdpa_padded", "sdpa_padding_free"
PADDING_FREE_ATTENTION = (PADDED, PADDING_FREE, "flash_attention_2")
CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2", PADDING_FREE)  # eager attention needs a causal mask
MASKS_BY_LAYER = ("qwen2", "qwen3")  # LLMs that accept a dict with one mask per layer type
MASK_UNCHANGED = ("llama", "phi", "smollm3")  # LLMs that pass a four-dimensional mask on to the attention


class Positions(TypedDict, total=False):
    """Flat indices into a batch, computed on the host to avoid a host-device sync.

    Attributes:
        labels: positions that need logits, see `loss.label_positions`; rows must be padded on the right.
        tokens: positions in `attention_mask` without padding; makes the LLM padding-free and requires `labels`.
        frames: positions in `input_features_mask` without padding; makes encoder and adaptor padding-free.
        audio_seconds: of native speech LLMs: seconds of each recording, for the log.
    """

    labels: torch.Tensor
    tokens: torch.Tensor
    frames: torch.Tensor
    audio_seconds: torch.Tensor


def causal_masks(config: PretrainedConfig) -> dict[str, None] | None:
    """Returns the `attention_mask` argument for an LLM with a causal mask only.

    With `None`, transformers searches for packed rows, which is a host-device sync. A dict of masks avoids the search,
    but only some LLMs accept a dict.
    """
    full = config.model_type in MASKS_BY_LAYER and set(config.layer_types) == {"full_attention"}
    return {"full_attention": None} if full and config._attn_implementation in CAUSAL_WITHOUT_MASK else None


def packed_masks(
    config: PretrainedConfig, device: torch.device | str = "cpu"
) -> dict[str, None] | torch.Tensor | None:
    """Returns the `attention_mask` argument for an LLM with packed rows; `None` if packed rows are not supported.

    The padding-free attention reads the row boundaries and ignores masks. An empty mask of four dimensions keeps
    transformers from building one.
    """
    if (masks := causal_masks(config)) is not None:
        return masks
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    supported = config.model_type in MASK_UNCHANGED and full and config._attn_implementation in ("sdpa", PADDING_FREE)
    return torch.empty(1, 1, 0, 0, device=device) if supported else None


def padding_mask(
    config: PretrainedConfig, mask: torch.Tensor | None, inputs_embeds: torch.Tensor
) -> torch.Tensor | None:
    """Returns the `attention_mask` argument for an LLM with padded rows.

    After the prompt, a state-space model without attention has no padding to hide, and would multiply the new token by
    the whole mask.

    Args:
        mask: shape = (rows, tokens), of prompt and new tokens.
        inputs_embeds: shape = (rows, new tokens, width).
    """
    stateful = mask is not None and not hasattr(config, "num_attention_heads")
    return None if stateful and inputs_embeds.shape[1] < mask.shape[1] else mask


def require_padding_free(config: PretrainedConfig) -> None:
    """Checks that the attention implementation of a part keeps packed rows separate.

    Raises:
        ValueError: if it does not.
    """
    if config._attn_implementation not in PADDING_FREE_ATTENTION:
        raise ValueError(
            f"positions of tokens and frames do not work with the attention {config._attn_implementation!r}; "
            "call fast.attention.enable_padding_free(model) first"
        )


def non_padding_positions(mask: torch.Tensor) -> torch.Tensor:
    """Returns flat indices of the positions without padding, shape = (filled,). On a GPU this is a host-device sync.

    Args:
        mask: shape = (rows, positions), 0 for padding.
    """
    return mask.flatten().nonzero().squeeze(-1)


class PaddingFreeBatch:
    """Removes the padding of a batch and restores it.

    Args:
        mask: shape = (rows, positions), 0 for padding; padding must be on the right.
        positions: `non_padding_positions(mask)`.
    """

    def __init__(self, mask: torch.Tensor, positions: torch.Tensor):
        self.mask = mask
        self.positions = positions

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """Turns states of shape = (rows, positions, width) into shape = (1, filled, width)."""
        return states.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """Turns states of shape = (1, filled, width) into shape = (rows, positions, width), with zeros for padding."""
        empty = states.new_zeros(self.mask.numel(), states.shape[-1])
        return empty.index_copy(0, self.positions, states[0]).view(*self.mask.shape, -1)

    @property
    def position_ids(self) -> torch.Tensor:
        """Index of each position in its row, from 0, shape = (1, filled)."""
        return (self.positions % self.mask.shape[1]).unsqueeze(0)

    @cached_property
    def segment_ids(self) -> torch.Tensor:
        """Row of each position, from 1, as 32-bit integers, shape = (1, filled)."""
        return (self.positions // self.mask.shape[1] + 1).int().unsqueeze(0)

    @cached_property
    def attention(self) -> dict[str, Any]:
        """Keyword arguments with the row boundaries, for attention functions of transformers."""
        ends = functional.pad(self.mask.sum(-1).cumsum(0), (1, 0)).int()
        longest = self.mask.shape[1]
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
