"""Compiled layers: fewer kernels between matrix products, and fewer kernel launches by the host."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.kv_cache import find_cache
from .versions import is_tested

# Layers per graph, at most. More layers take longer to compile; fewer layers mean more calls by the host.
LAYERS_PER_GRAPH = 2
# Limit of torch.compile for the variants of one function: first or last layers, trained or frozen, training or
# validation.
VARIANTS = 64
# Layers that return other values beside the hidden states, without type hints that say so; these stay uncompiled.
RETURN_TUPLES = (
    "Qwen3ASRAudioEncoderLayer", "WavLMEncoderLayer", "WavLMEncoderLayerStableLayerNorm", "BloomBlock",
    "FalconDecoderLayer", "MptBlock",
)  # fmt: skip
LAYER_TYPES = ("layer_types", "layers_block_type")  # settings that give each layer its own mask or positions


def compile_layers(model: nn.Module, backend: str = "inductor", single_layer_classes: Collection[str] = ()) -> int:
    """Compiles the layers of encoder, adaptor and LLM in small groups; groups of equal layers share one graph.

    A graph of the whole model would compile for a time proportional to the number of layers, and code outside of the
    layers may read tensor values. Names and parameters of the model do not change. Forward passes with a key-value
    cache are not compiled. Shapes are symbolic, because shapes differ between batches. Gradient checkpointing
    recomputes a group, not a layer.

    Args:
        model: before an engine wraps layers.
        backend: of `torch.compile`.
        single_layer_classes: class names of layers that must be compiled one by one, because an engine gathers the
            parameters of each layer before it calls the layer.

    Returns:
        Number of compiled groups; 0 if the installed torch or transformers is not tested.
    """
    if not is_tested("layer compilation"):
        return 0
    torch._dynamo.config.cache_size_limit = max(VARIANTS, torch._dynamo.config.cache_size_limit)
    torch._dynamo.config.optimize_ddp = False  # otherwise DDP's buckets split graphs, which are already short
    if hasattr(torch._inductor.config.triton, "mix_order_reduction_non_strict_mode"):
        # Otherwise torch compiles again, in the middle of a run, for batches of fewer than 4,096 frames or tokens.
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    graphs = 0
    configs = {
        stack: owner.config  # of the innermost model, which comes last
        for owner in model.modules() if isinstance(owner, PreTrainedModel)
        for stack in owner.modules() if isinstance(stack, nn.ModuleList)
    }  # fmt: skip
    for stack, config in configs.items():
        layers = [layer for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
        if not layers or len(layers) < len(stack) or type(layers[0]).__name__ in RETURN_TUPLES:
            continue
        mixed = any(len({*(getattr(config, name, None) or ())}) > 1 for name in LAYER_TYPES)
        single = mixed or type(layers[0]).__name__ in single_layer_classes or any(map(_may_return_tuple, layers))
        max_size = 1 if single else LAYERS_PER_GRAPH
        size = max(number for number in range(1, max_size + 1) if len(layers) % number == 0)
        for start in range(0, len(layers), size):
            first, *others = layers[start : start + size]
            first.forward = LayerGroup([first, *others], backend)
            for layer in others:
                layer.forward = GroupedLayer(layer)
            graphs += 1
    return graphs


def _may_return_tuple(layer: nn.Module) -> bool:
    """Whether the type hints name a tuple; Gemma 3 returns a tensor nevertheless. A group of one layer may do both."""
    return "tuple" in str(inspect.signature(type(layer).forward).return_annotation).lower()


class LayerGroup:
    """Runs a group of consecutive layers; replaces the forward pass of the first layer.

    Args:
        layers: in order; all get the same arguments, except for the hidden states.
        backend: of `torch.compile`.
    """

    def __init__(self, layers: list[nn.Module], backend: str):
        self.layers = layers
        self.compiled = torch.compile(_run_layers, dynamic=True, backend=backend)

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Runs the compiled group; in an uncompiled pass, the first layer only."""
        if _is_uncompiled(hidden_states, kwargs):
            return _run_layers(self.layers[:1], hidden_states, *args, **kwargs)
        return self.compiled(self.layers, hidden_states, *args, **kwargs)


class GroupedLayer:
    """Replaces the forward pass of every other layer of a group, which `LayerGroup` has already run.

    Args:
        layer: not the first layer of a group.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Returns the hidden states unchanged; in an uncompiled pass, runs the layer."""
        layers = [self.layer] if _is_uncompiled(hidden_states, kwargs) else []
        return _run_layers(layers, hidden_states, *args, **kwargs)


def _is_uncompiled(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this pass runs layers one by one, without compilation."""
    # torch.compile would compile again for a size of 1, in the middle of a run. Packed batches always have one row.
    sizes = hidden_states.shape[1:2] if "cu_seq_lens_q" in kwargs else hidden_states.shape[:2]
    # Hooks on layers record hidden states and attentions. A hook cannot see the layers within a group.
    recorded = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    return bool(recorded) or find_cache(kwargs) is not None or 1 in sizes


def _run_layers(layers: list[nn.Module], hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    for layer in layers:
        hidden_states = type(layer).forward(layer, hidden_states, *args, **kwargs)
    return hidden_states
