"""Attention without padding, and on a GPU without waits of the host: what transformers and torch do by default stalls
it in every batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoder

from ..model.packing import encode_packed
from .fsmn import use_memory_blocks

# Names of attention implementations; without packed rows they are transformers' sdpa, but for the first one's mask.
PADDED, PACKED = "sdpa_padded", "sdpa_packed"
BIDIRECTIONAL = ("fun_asr_nano_encoder", "speech_llm_audio_adaptor")  # parts whose rows are padded
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2", PACKED)  # attention that is causal without a mask; eager is not
MASKS_BY_LAYER = ("qwen2", "qwen3")  # LLMs that take a mask for each kind of layer


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs
) -> torch.Tensor | None:
    """The mask of bidirectional attention over padded rows, built without looking at its values.

    transformers' own leaves the mask out where there is no padding, and has the host wait for the GPU to know.

    Args:
        batch_size, q_length, kv_length: as in `transformers.masking_utils`.
        attention_mask: shape = (batch, keys), 0 for padding.

    Returns:
        Shape = (batch, 1, 1, keys), true where attention may look.
    """
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]


def packed_attention(
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
    """Attention of rows that lie one after the other in one; without `cu_seq_lens_q`, transformers' `sdpa`.

    Args:
        query, key, value: shape = (1, heads, tokens of all rows, width of a head); keys may have fewer heads.
        cu_seq_lens_q: where rows begin and the last ends, 32-bit integers, shape = (rows + 1,).
        max_length_q: at least the length of the longest row.

    Returns:
        Shape = (1, tokens, heads, width of a head).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # Not `nn.attention.varlen`: in torch 2.11 it needs as many heads of keys, and later takes cuDNN's attention.
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


AttentionInterface.register(PADDED, packed_attention)
AttentionMaskInterface.register(PADDED, padding_mask)
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def causal_masks(config: PretrainedConfig) -> dict[str, None] | None:
    """What an LLM of this config takes for a causal mask alone.

    `None` has transformers look for rows packed into one, for which the host waits for the GPU; a dict, where an LLM
    takes one, does not.
    """
    full = config.model_type in MASKS_BY_LAYER and set(config.layer_types) == {"full_attention"}
    return {"full_attention": None} if full and config._attn_implementation in CAUSAL_BY_ITSELF else None


def spare_the_host(model: nn.Module) -> None:
    """Sets a model up for batches that each have a shape of their own, on a GPU.

    The encoder and the adaptor get `padding_mask`, the encoder also the kernel of `memory_block`. cuDNN's attention,
    which torch prefers on Hopper GPUs, is turned off in this process: it plans anew for every shape, which takes
    longer than the attention itself.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    use_memory_blocks(model)
    _attend_to_padded_rows(model)


def allow_packing(model: Any) -> None:
    """Sets a speech LLM up for batches without padding, see `packing`.

    Args:
        model: with or without adapters of peft.

    Raises:
        ValueError: if the LLM, or the attention that was asked for, can't tell rows apart, or the GPU has no kernel.
    """
    if torch.cuda.is_available() and not (
        torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    ):
        raise ValueError(
            "--padding_free is for GPUs of compute capability 8.0 or more, and a torch with flash attention"
        )
    config = model.llm.config
    if causal_masks(config) is None:
        raise ValueError(
            f"--padding_free is for LLMs of the types {' and '.join(MASKS_BY_LAYER)} with full attention, and for the "
            f"attention sdpa or flash_attention_2; this one is {config.model_type} with {config._attn_implementation}"
        )
    if config._attn_implementation == "sdpa":
        model.llm.set_attn_implementation(PACKED)
    use_memory_blocks(model)
    _attend_to_padded_rows(model)
    for module in model.modules():
        if isinstance(module, FunAsrNanoEncoder):
            module.forward = partial(encode_packed, module)


def check_packing(config: PretrainedConfig) -> None:
    """Sees to it that a part of this config attends within each of several rows that are packed into one.

    Raises:
        ValueError: if it does not.
    """
    if config._attn_implementation not in (PADDED, PACKED, "flash_attention_2"):
        raise ValueError("frame_positions and token_positions are for a model that attention.allow_packing has set up")


def _attend_to_padded_rows(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.config.model_type not in BIDIRECTIONAL:
            continue
        if module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(PADDED)
