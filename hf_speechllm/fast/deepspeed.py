"""DeepSpeed's ZeRO, by its public settings: whole layers are gathered at once, gradients are reduced early."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

BUCKET_SIZE = 200_000_000  # elements sent at once
PERSISTENT_SIZE = 10_000  # elements of a parameter that every rank keeps: biases, norms and the encoder's convolutions


def prepare(model: nn.Module, config: dict[str, Any]) -> None:
    """Sets a model and DeepSpeed up, before the engine is made.

    Stages 1 and 2 reduce gradients while others are still computed. Stage 3 gathers the parameters of a layer of
    encoder, adaptor or LLM at once, not those of every module in the layer, and does not copy each gradient before it
    reduces many of them.

    Args:
        model: to be trained.
        config: DeepSpeed's; what it sets remains.
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


def match_dtypes(model: nn.Module) -> None:
    """Gives adapters the dtype of the model, which DeepSpeed's stage 3 has loaded in its own before they were added.

    Stage 3 in bfloat16 otherwise ends at its start: peft adds adapters in float32.
    """
    dtype = next((parameter.dtype for parameter in model.parameters() if hasattr(parameter, "ds_id")), None)
    for parameter in model.parameters():
        if dtype is not None and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _require_input_gradient(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # DeepSpeed collects a leaf layer's gradients when the gradient has reached the layer's input. Without one there,
    # as before the encoder's first layer, it collects zeros.
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()
