"""DeepSpeed's ZeRO without work of the host for each of a thousand small modules and parameters.

At the released size a step computes for half a second on a GPU; what DeepSpeed does in Python around every module,
parameter and gradient takes longer than that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import nvtx
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

BUCKET_SIZE = 200_000_000  # elements sent at once


def prepare(model: nn.Module, config: dict[str, Any]) -> None:
    """Sets a model and DeepSpeed up, before the engine is made.

    Stages 1 and 2 reduce gradients while others are still computed. Stage 3 gathers the parameters of a layer of
    encoder, adaptor or LLM at once, not those of every module in it, nor after each step every small parameter.

    Args:
        model: to be trained.
        config: DeepSpeed's; what it says remains.
    """
    nvtx.enable_nvtx = False  # marks for a profiler, around each of 12,000 calls in a step
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        for key, value in (
            ("overlap_comm", True), ("reduce_bucket_size", BUCKET_SIZE), ("allgather_bucket_size", BUCKET_SIZE)
        ):  # fmt: skip
            zero.setdefault(key, value)
        return
    zero.setdefault("stage3_param_persistence_threshold", 0)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            set_z3_leaf_module(module, True)
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.register_forward_pre_hook(_want_gradient)
            module.__dict__.pop("remembered_parameters", None)
    partitioned_param_coordinator.get_all_parameters = _all_parameters
    # torch asks for it at every call, and else takes the function apart.
    LinearFunctionForZeroStage3.forward.__signature__ = inspect.signature(LinearFunctionForZeroStage3.forward)


def _want_gradient(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # DeepSpeed collects a layer's gradients when the gradient has reached its input. If none does, as before the
    # encoder's first layer, it collects zeros.
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()


def _all_parameters(module: nn.Module, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """DeepSpeed's `get_all_parameters`, which looks for a layer's parameters several times in each pass."""
    if not z3_leaf_module(module):
        return chain(module.named_parameters(recurse=recurse), module.ds_external_parameters())  # type: ignore[operator]
    if "remembered_parameters" not in module.__dict__:
        module.__dict__["remembered_parameters"] = tuple(module.named_parameters())
    return chain(module.__dict__["remembered_parameters"], module.ds_external_parameters())  # type: ignore[operator]


def measure_gradients_at_once(optimizer) -> None:
    """Has stages 1 and 2 compute the norm of all gradients by a few kernels, and look for infinities in it alone.

    They go through the gradients one by one, twice. Nothing is changed if gradients are on the CPU.

    Args:
        optimizer: of the engine.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda *args, **kwargs: None  # the norm, which follows, is checked as well
        optimizer.get_grad_norm_direct = lambda gradients, params, norm_type=2: _norm(optimizer, gradients)


def _norm(optimizer: DeepSpeedZeroOptimizer, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of gradients that are spread over ranks; -1, as DeepSpeed has it, if it is not finite."""
    gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = torch.zeros((), device=optimizer.device)
    if gradients:
        total = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    return torch.where(torch.isfinite(total), total.sqrt(), -1.0)
