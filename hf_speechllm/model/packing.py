"""Rows of a batch one after the other in a single row, without padding."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput


def filled_positions(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices of what is not padding, shape = (filled,), computed where the mask is: on a GPU the host waits.

    Args:
        mask: shape = (rows, positions), 0 for padding.
    """
    return mask.flatten().nonzero().squeeze(-1)


class PackedRows:
    """Takes the padding out of a batch, and puts it back.

    Args:
        mask: shape = (rows, positions), 0 for padding, which is on the right.
        positions: its `filled_positions`.
    """

    def __init__(self, mask: torch.Tensor, positions: torch.Tensor):
        self.mask = mask
        self.positions = positions

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """States of shape = (rows, positions, width) as shape = (1, filled, width)."""
        return states.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """States of shape = (1, filled, width) as shape = (rows, positions, width), with zeros for padding."""
        empty = states.new_zeros(self.mask.numel(), states.shape[-1])
        return empty.index_copy(0, self.positions, states[0]).view(*self.mask.shape, -1)

    @property
    def places(self) -> torch.Tensor:
        """At which place in its row each position is, from 0, shape = (1, filled)."""
        return (self.positions % self.mask.shape[1]).unsqueeze(0)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """In which row each position is, from 1, as 32-bit integers, shape = (1, filled)."""
        return (self.positions // self.mask.shape[1] + 1).int().unsqueeze(0)

    @cached_property
    def attention(self) -> dict[str, Any]:
        """What transformers' attention is told of the rows' ends."""
        ends = functional.pad(self.mask.sum(-1).cumsum(0), (1, 0)).int()
        longest = self.mask.shape[1]
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def encode_packed(
    encoder: Any,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor,
    frame_positions: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutput:
    """What transformers' SAN-M encoder computes, without padding if it is told where there is none.

    Args:
        encoder: with the memory blocks and the attention of `attention.allow_packing`.
        input_features: shape = (recordings, frames, feature size).
        input_features_mask: shape = (recordings, frames).
        frame_positions: its `filled_positions`.

    Returns:
        With `last_hidden_state`, shape = (recordings, frames, width); packed, padding is zero.
    """
    if frame_positions is None:
        return type(encoder).forward(encoder, input_features, input_features_mask, **kwargs)
    rows = PackedRows(input_features_mask, frame_positions)
    features = input_features.to(encoder.layers[0].input_layernorm.weight.dtype)
    states = rows.pack(features * encoder.scaling + encoder.position_embeddings(features))
    for layer in encoder.layers:
        states = layer(states, None, rows.numbers, **rows.attention)
    return BaseModelOutput(last_hidden_state=rows.unpack(states))
