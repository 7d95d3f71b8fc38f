"""Gradient checkpointing of parts of which some are frozen."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def require_gradient(states: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """Makes the input of a trained part require a gradient where layers of the part are checkpointed.

    Reentrant checkpointing gives the parameters of a layer no gradients, silently, unless an input of the layer
    requires one. The input of the encoder is data, and that of other parts may come from a frozen part.
    """
    if not torch.is_grad_enabled() or states.requires_grad or not _checkpointed_layers(part):
        return states
    trained = any(parameter.requires_grad for parameter in part.parameters())
    return states.detach().requires_grad_() if trained else states


def allow_checkpointing(part: PreTrainedModel) -> None:
    """Lets gradient checkpointing work in a frozen part, through which gradients flow to a trained one before it.

    transformers' layers recompute only in training mode. A layer's own flag is set where that changes nothing else: if
    the part has no dropout; the modules inside stay in eval mode.
    """
    layers = _checkpointed_layers(part)
    # The Trainer sets training mode in every step, so the config is looked at only where there is something to set.
    if layers and not any("drop" in name and value for name, value in part.config.to_dict().items()):
        for layer in layers:
            layer.training = True


def _checkpointed_layers(part: nn.Module) -> list[GradientCheckpointingLayer]:
    return [
        module
        for module in part.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
