"""Padding-free rows: the rows of a batch are concatenated into a single row.

The model computes padding-free if a batch has the positions without padding and the parts have an attention that keeps
the rows apart. `fast.attention.enable_padding_free` sets this attention.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypedDict

import torch
from torch.nn import functional
from transformers import PretrainedConfig

# Names of attention implementations, registered by `fast.attention`: of padded rows, and of padding-free ones.
PADDED, PADDING_FREE = "sdpa_padded", "sdpa_padding_free"
KEEPS_ROWS_APART = (PADDED, PADDING_FREE, "flash_attention_2")
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2", PADDING_FREE)  # attention that is causal without a mask; eager is not
MASKS_BY_LAYER = ("qwen2", "qwen3")  # LLMs that take a mask for each kind of layer


class Positions(TypedDict, total=False):
    """Flat indices into a batch, computed on the host so that a GPU does not wait for the host.

    Attributes:
        labels: positions that need logits, see `loss.label_positions`; rows must be padded on the right.
        tokens: positions of `attention_mask` without padding. The LLM then computes padding-free; needs `labels`.
        frames: positions of `input_features_mask` without padding. Encoder and adaptor then compute padding-free.
    """

    labels: torch.Tensor
    tokens: torch.Tensor
    frames: torch.Tensor


def causal_masks(config: PretrainedConfig) -> dict[str, None] | None:
    """Returns what an LLM of this config takes for a causal mask alone.

    `None` makes transformers look for rows packed into one, which is a host-device sync; a dict, where an LLM takes
    one, does not.
    """
    full = config.model_type in MASKS_BY_LAYER and set(config.layer_types) == {"full_attention"}
    return {"full_attention": None} if full and config._attn_implementation in CAUSAL_BY_ITSELF else None


def require_padding_free(config: PretrainedConfig) -> None:
    """Checks that a part of this config attends within each of several rows that are packed into one.

    Raises:
        ValueError: if the part does not.
    """
    if config._attn_implementation not in KEEPS_ROWS_APART:
        raise ValueError(
            "positions of tokens and frames need a model that fast.attention.enable_padding_free has set up"
        )


def filled_positions(mask: torch.Tensor) -> torch.Tensor:
    """Returns the flat indices of what is not padding, shape = (filled,), computed where the mask is.

    On a GPU this is a host-device sync.

    Args:
        mask: shape = (rows, positions), 0 for padding.
    """
    return mask.flatten().nonzero().squeeze(-1)


class PackedRows:
    """Removes the padding of a batch, and puts it back.

    Args:
        mask: shape = (rows, positions), 0 for padding, which is on the right.
        positions: its `filled_positions`.
    """

    def __init__(self, mask: torch.Tensor, positions: torch.Tensor):
        self.mask = mask
        self.positions = positions

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Turns states of shape = (rows, positions, width) into shape = (1, filled, width)."""
        return states.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
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
        """Arguments of transformers' attention that name the ends of the rows."""
        ends = functional.pad(self.mask.sum(-1).cumsum(0), (1, 0)).int()
        longest = self.mask.shape[1]
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
