"""Padding-free attention, and on a GPU attention without host-device syncs.

By default transformers and torch stall the GPU in every batch: transformers reads the values of each mask on the host,
and cuDNN's attention makes a new plan for every shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoder

from ..model.native_families import is_native
from ..model.packing import (
    MASK_UNCHANGED,
    MASKS_BY_LAYER,
    PADDED,
    PADDING_FREE,
    PaddingFreeBatch,
    causal_masks,
    packed_masks,
)
from .fsmn import use_fsmn, use_transformers_fsmn
from .versions import is_tested

BIDIRECTIONAL = ("fun_asr_nano_encoder", "speech_llm_audio_adaptor")  # model types of encoder and adaptor


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs
) -> torch.Tensor | None:
    """Builds the mask of bidirectional attention over padded rows, without a host-device sync.

    The function of transformers omits the mask of a batch without padding, for which the host waits for the GPU.

    Args:
        batch_size, q_length, kv_length: unused; `transformers.masking_utils` passes them.
        attention_mask: shape = (batch, keys), 0 for padding.

    Returns:
        Shape = (batch, 1, 1, keys), false for padding.
    """
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]


def padding_free_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Computes attention within each row of a packed batch; without `cu_seq_lens_q`, calls transformers' `sdpa`.

    Args:
        query, key, value: shape = (1, heads, tokens of all rows, head size); keys and values may have fewer heads.
        cu_seq_lens_q: start of each row and end of the last row, int32, shape = (rows + 1,).
        max_length_q: length of the longest row, or an upper bound.

    Returns:
        Shape = (1, tokens, heads, head size), and `None` instead of attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # Not `nn.attention.varlen`: torch 2.11 requires as many key heads as query heads there, and later releases
        # choose cuDNN's attention.
        result = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, dropout, module.is_causal,
            False, scale=scaling,
        )[0]  # fmt: skip
        return result.unsqueeze(0), None
    attend = partial(
        functional.scaled_dot_product_attention,
        dropout_p=dropout, is_causal=bool(module.is_causal), scale=scaling, enable_gqa=True,
    )  # fmt: skip
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*row) for row in rows], dim=1).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(PADDED, padding_free_attention)
AttentionMaskInterface.register(PADDED, padding_mask)
AttentionInterface.register(PADDING_FREE, padding_free_attention)
AttentionMaskInterface.register(PADDING_FREE, sdpa_mask)


def disable_host_syncs(model: nn.Module) -> None:
    """Prepares a model for padded batches without host-device syncs.

    Encoder and adaptor use `padding_mask`. The encoder also uses the FSMN kernel. Other parts do not change.
    """
    use_fsmn(model)
    _attend_to_padded_rows(model)


def enable_host_syncs(model: nn.Module) -> None:
    """Undoes `disable_host_syncs`: the parts compute as transformers has them."""
    use_transformers_fsmn(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == PADDED:
            module.set_attn_implementation("sdpa")


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disables cuDNN's attention while the block runs.

    torch prefers cuDNN's attention on Hopper GPUs. cuDNN makes a new plan for every batch shape, and planning takes
    longer than the attention.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def enable_padding_free(model: Any) -> None:
    """Prepares a speech LLM for padding-free batches, see `model.packing`.

    Args:
        model: with or without peft adapters.

    Raises:
        ValueError: if the LLM or its attention implementation cannot separate packed rows, or the GPU has no kernel.
    """
    if not is_tested("padding-free attention"):
        raise ValueError(
            "--padding_free is not tested with the installed torch or transformers; remove the option, or install "
            "releases in the declared ranges"
        )
    if torch.cuda.is_available() and not (
        torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    ):
        raise ValueError(
            "--padding_free requires a GPU of compute capability 8.0 or more, and a torch build with flash attention; "
            "remove the option"
        )
    config = model.llm.config
    types, masks = (
        (MASKS_BY_LAYER, causal_masks) if is_native(model) else (MASKS_BY_LAYER + MASK_UNCHANGED, packed_masks)
    )
    if masks(config) is None:
        raise ValueError(
            f"--padding_free requires an LLM of type {' or '.join(types)} with full attention, and the attention "
            f"implementation sdpa (Qwen: or flash_attention_2); this LLM is {config.model_type} with "
            f"{config._attn_implementation}; remove the option"
        )
    if config._attn_implementation == "sdpa":
        model.llm.set_attn_implementation(PADDING_FREE)
    disable_host_syncs(model)
    for module in model.modules():
        if isinstance(module, FunAsrNanoEncoder):
            module.forward = partial(encode_padding_free, module)


def encode_padding_free(
    encoder: Any,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor,
    frame_positions: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutput:
    """Replaces the forward pass of transformers' SAN-M encoder; padding-free if `frame_positions` are passed.

    Args:
        encoder: prepared by `enable_padding_free`.
        input_features: shape = (recordings, frames, feature size).
        input_features_mask: shape = (recordings, frames), 0 for padding.
        frame_positions: `non_padding_positions` of the mask.

    Returns:
        `last_hidden_state`, shape = (recordings, frames, width). A padding-free pass returns zeros for padding.
    """
    if frame_positions is None:
        return type(encoder).forward(encoder, input_features, input_features_mask, **kwargs)
    packing = PaddingFreeBatch(input_features_mask, frame_positions)
    features = input_features.to(encoder.layers[0].input_layernorm.weight.dtype)
    states = packing.unpad(features * encoder.scaling + encoder.position_embeddings(features))
    for layer in encoder.layers:
        states = layer(states, None, packing.segment_ids, **packing.attention)
    return BaseModelOutput(last_hidden_state=packing.pad(states))


def _attend_to_padded_rows(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.config.model_type not in BIDIRECTIONAL:
            continue
        if module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(PADDED)
