"""Gradient checkpointing of a model whose parts may be frozen."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def require_gradient(states: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """Makes the input of a trained part require a gradient if layers of the part are checkpointed.

    Reentrant checkpointing silently computes no parameter gradients of a layer unless an input of the layer requires a
    gradient. The encoder's input is data; the input of another part may come from a frozen part.
    """
    if not torch.is_grad_enabled() or states.requires_grad or not _checkpointed_layers(part):
        return states
    trained = any(parameter.requires_grad for parameter in part.parameters())
    return states.detach().requires_grad_() if trained else states


def enable_frozen_checkpointing(part: PreTrainedModel) -> None:
    """Enables gradient checkpointing in a frozen part, through which gradients flow to an earlier trained part.

    Layers of transformers recompute only in training mode. This function sets the `training` flag of the checkpointed
    layers, but not of the modules inside. A part with dropout is left unchanged.
    """
    layers = _checkpointed_layers(part)
    # The Trainer sets training mode in every step, so the config is read only if there are checkpointed layers.
    if layers and not any("drop" in name and value for name, value in part.config.to_dict().items()):
        for layer in layers:
            layer.training = True


def _checkpointed_layers(part: nn.Module) -> list[GradientCheckpointingLayer]:
    return [
        module
        for module in part.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
