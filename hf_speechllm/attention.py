"""Attention on a GPU without waits of the host: what transformers and torch do by default stalls it in every batch."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PADDED = "sdpa_padded"  # name of the attention implementation
BIDIRECTIONAL = ("fun_asr_nano_encoder", "speech_llm_audio_adaptor")  # parts whose rows are padded
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2")  # attention that is causal without a mask; eager is not
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


AttentionInterface.register(PADDED, sdpa_attention_forward)
AttentionMaskInterface.register(PADDED, padding_mask)


def causal_masks(config: PretrainedConfig) -> dict[str, None] | None:
    """What an LLM of this config takes for a causal mask alone.

    `None` has transformers look for rows packed into one, for which the host waits for the GPU; a dict, where an LLM
    takes one, does not.
    """
    full = config.model_type in MASKS_BY_LAYER and set(config.layer_types) == {"full_attention"}
    return {"full_attention": None} if full and config._attn_implementation in CAUSAL_BY_ITSELF else None


def spare_the_host(model: nn.Module) -> None:
    """Sets a model up for batches that each have a shape of their own, on a GPU.

    The encoder and the adaptor get `padding_mask`. cuDNN's attention, which torch prefers on Hopper GPUs, is turned
    off in this process: it plans anew for every shape, which takes longer than the attention itself.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.config.model_type not in BIDIRECTIONAL:
            continue
        if module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(PADDED)
