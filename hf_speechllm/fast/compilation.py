"""Compiled layers: fewer kernels between two matrix products, and few calls of the host instead of thousands."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.kv_cache import find_cache
from .versions import is_tested

# Layers of a graph, at most: more take longer to compile, fewer leave more work to the host.
LAYERS_PER_GRAPH = 2
# Graphs of one kind: first and last of a stack, trained or frozen, training and validation.
VARIANTS = 64


def compile_layers(model: nn.Module, backend: str = "inductor", alone: Collection[str] = ()) -> int:
    """Compiles the layers of encoder, adaptor and LLM, a few at a time; stacks of equal layers share the graphs.

    Not the whole model: compilation would take as long as there are layers, and what surrounds them may look at
    values. Names and parameters stay as they are, and so do forward passes with a key-value cache, which are not
    compiled. Shapes are symbolic, since every batch has its own. Gradient checkpointing recomputes a graph, not a
    layer.

    Args:
        model: in which no engine has wrapped layers yet.
        backend: of `torch.compile`.
        alone: names of the classes whose layers each get a graph of their own, since an engine gathers the parameters
            of each before it is called.

    Returns:
        Number of graphs that a forward pass calls; 0 if the installed torch or transformers is not tested.
    """
    if not is_tested("layer compilation"):
        return 0
    torch._dynamo.config.cache_size_limit = max(VARIANTS, torch._dynamo.config.cache_size_limit)
    torch._dynamo.config.optimize_ddp = False  # it would split graphs at DDP's buckets; they are short enough
    if hasattr(torch._inductor.config.triton, "mix_order_reduction_non_strict_mode"):
        # Else batches of less than 4,096 frames or tokens get graphs of their own, compiled in the middle of a run.
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    graphs = 0
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        layers = [layer for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
        if not layers or len(layers) < len(stack):
            continue
        most = 1 if type(layers[0]).__name__ in alone else LAYERS_PER_GRAPH
        size = max(number for number in range(1, most + 1) if len(layers) % number == 0)
        for start in range(0, len(layers), size):
            first, *others = layers[start : start + size]
            first.forward = LayerGroup([first, *others], backend)
            for layer in others:
                layer.forward = FurtherLayer(layer)
            graphs += 1
    return graphs


class LayerGroup:
    """Runs several layers in a row; stands in for the forward pass of the first.

    Args:
        layers: that get the same arguments, but for the hidden states.
        backend: of `torch.compile`.
    """

    def __init__(self, layers: list[nn.Module], backend: str):
        self.layers = layers
        self.compiled = torch.compile(_run, dynamic=True, backend=backend)

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As the layers one after the other."""
        if _is_plain(hidden_states, kwargs):
            return _run(self.layers[:1], hidden_states, *args, **kwargs)
        return self.compiled(self.layers, hidden_states, *args, **kwargs)


class FurtherLayer:
    """Stands in for the forward pass of a layer behind the first of a group.

    Args:
        layer: whose group has already run it, unless the pass is plain.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As the layer, or nothing."""
        layers = [self.layer] if _is_plain(hidden_states, kwargs) else []
        return _run(layers, hidden_states, *args, **kwargs)


def _is_plain(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether layers run one by one, not compiled."""
    # A size of one would be compiled anew, in the middle of a run. Packed rows are always one.
    sizes = hidden_states.shape[1:2] if "cu_seq_lens_q" in kwargs else hidden_states.shape[:2]
    # Hooks on layers record hidden states and attentions, and see nothing of a group.
    recorded = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    return bool(recorded) or find_cache(kwargs) is not None or 1 in sizes


def _run(layers: list[nn.Module], hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    for layer in layers:
        hidden_states = type(layer).forward(layer, hidden_states, *args, **kwargs)
    return hidden_states
