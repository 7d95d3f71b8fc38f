"""Public settings of DeepSpeed ZeRO: gathers whole layers and reduces gradients early."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

BUCKET_SIZE = 200_000_000  # elements per message
# Largest parameter, in elements, that every rank keeps: biases, norms and convolutions of the encoder.
PERSISTENT_SIZE = 10_000


def set_zero_defaults(model: nn.Module, config: dict[str, Any]) -> None:
    """Sets defaults of ZeRO, before the engine is created.

    Stages 1 and 2 reduce gradients while the backward pass runs. Stage 3 gathers the parameters of a whole layer of
    encoder, adaptor or LLM at once, not of every module in the layer, and does not copy each gradient before the
    reduction.

    Args:
        model: to be trained.
        config: of DeepSpeed; values in the config take precedence.
    """
    zero = config.get("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", BUCKET_SIZE)
    if zero.get("stage") != 3:
        zero.setdefault("overlap_comm", True)
        zero.setdefault("allgather_bucket_size", BUCKET_SIZE)
        return
    zero.setdefault("contiguous_gradients", False)
    zero.setdefault("stage3_param_persistence_threshold", PERSISTENT_SIZE)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            set_z3_leaf_module(module, True)
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.register_forward_pre_hook(_require_input_gradient)


def match_adapter_dtypes(model: nn.Module) -> None:
    """Converts adapters to the dtype in which ZeRO-3 has loaded the model.

    Otherwise ZeRO-3 in bfloat16 fails at the start, because peft adds adapters in float32.
    """
    dtype = next((parameter.dtype for parameter in model.parameters() if hasattr(parameter, "ds_id")), None)
    for parameter in model.parameters():
        if dtype is not None and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _require_input_gradient(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # DeepSpeed collects the gradients of a leaf layer when the gradient of the layer's input is ready. If the input
    # has no gradient, as in the first layer of the encoder, DeepSpeed collects zeros.
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()
