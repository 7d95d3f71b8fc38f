"""DeepSpeed's ZeRO without work of the host for each of a thousand small modules and parameters.

At the released size a step computes for half a second on a GPU; what DeepSpeed does in Python around every module,
parameter and gradient takes longer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import nvtx
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, z3_leaf_module
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

BUCKET_SIZE = 200_000_000  # elements sent at once
PERSISTENT_SIZE = 10_000  # elements of a parameter that every rank keeps: biases, norms and the encoder's convolutions


def prepare(model: nn.Module, config: dict[str, Any]) -> None:
    """Sets a model and DeepSpeed up, before the engine is made.

    Stages 1 and 2 reduce gradients while others are still computed. Stage 3 gathers the parameters of a layer of
    encoder, adaptor or LLM at once, not those of every module in it, and doesn't copy each gradient before it reduces
    many of them. Adapters get the model's dtype: they are added when DeepSpeed has already loaded that in its own.

    Args:
        model: to be trained.
        config: DeepSpeed's; what it says remains.
    """
    nvtx.enable_nvtx = False  # marks for a profiler, around each of 12,000 calls in a step
    if torch.cuda.is_available():
        get_accelerator().current_stream = _current_stream
    zero = config.get("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", BUCKET_SIZE)
    if zero.get("stage") != 3:
        zero.setdefault("overlap_comm", True)
        zero.setdefault("allgather_bucket_size", BUCKET_SIZE)
        return
    zero.setdefault("contiguous_gradients", False)
    zero.setdefault("stage3_param_persistence_threshold", PERSISTENT_SIZE)
    dtype = next((parameter.dtype for parameter in model.parameters() if hasattr(parameter, "ds_id")), None)
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            set_z3_leaf_module(module, True)
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.register_forward_pre_hook(_want_gradient)
        module.__dict__.pop("remembered_parameters", None)
    partitioned_param_coordinator.get_all_parameters = _all_parameters
    # Messages for its developers, which are not printed, are made whenever a parameter comes or goes.
    partition_parameters.debug_param2name_id_shape_device = lambda parameter: ""
    partition_parameters.print_rank_0 = lambda message, debug=False, force=False: None


@cache
def _stream(*identity: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(**dict(zip(("stream_id", "device_index", "device_type"), identity, strict=True)))


def _current_stream(device_index: int | None = None) -> torch.cuda.Stream:
    """`torch.cuda.current_stream`, which DeepSpeed asks for several times for every parameter and gradient, without
    a search for the device."""
    device = torch.cuda.current_device() if device_index is None else device_index
    return _stream(*torch._C._cuda_getCurrentStream(device))


class _Linear(torch.autograd.Function):
    """What stage 3 has in place of `functional.linear`: the backward pass takes a weight as it is then, gathered anew.

    DeepSpeed's own adds the bias by a kernel of its own, and torch takes its signature apart at every call.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Args: shapes = (..., width in), (width out, width in), (width out,)."""
        ctx.save_for_backward(inputs, weight)
        return torch._C._nn.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """The gradients of `forward`."""
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        away = getattr(weight, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE
        if away:
            weight.all_gather()
        flat = gradient.reshape(-1, gradient.shape[-1])
        result = (
            gradient.matmul(weight) if needs_inputs else None,
            flat.t().matmul(inputs.reshape(-1, inputs.shape[-1])) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )
        if away:
            weight.partition()
        return result


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if torch.is_autocast_enabled(input.device.type):  # which the backward pass must know of
        return zero3_linear_wrap(input, weight, bias)
    return _Linear.apply(input, weight, bias)


def _want_gradient(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # DeepSpeed collects a layer's gradients when the gradient has reached its input. If none does, as before the
    # encoder's first layer, it collects zeros.
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()


def _all_parameters(module: Any, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """DeepSpeed's `get_all_parameters`, which looks for a layer's parameters several times in each pass, and twice in
    each step for all."""
    if not recurse and not z3_leaf_module(module):
        return chain(module.named_parameters(recurse=False), module.ds_external_parameters())
    if "remembered_parameters" not in module.__dict__:
        module.__dict__["remembered_parameters"] = tuple(module.named_parameters())
    return chain(module.__dict__["remembered_parameters"], module.ds_external_parameters())


class _WaitOnDevice(torch.cuda.Stream):
    """A stream for which not the host waits, but the stream that goes on with its results."""

    def synchronize(self) -> None:
        """Has the current stream wait."""
        torch.cuda.current_stream().wait_stream(self)


def prepare_optimizer(optimizer) -> None:
    """Has an engine's optimizer compute the norm of all gradients by a few kernels.

    Stages 1 and 2 no longer look for infinities, which the norm tells. Stage 3 doesn't wait for the end of the
    backward pass before it measures gradients, and gathers the small parameters, which every rank keeps, together.
    Nothing of that is changed if gradients are on the CPU. Linear layers are stage 3's as `_Linear` computes them.

    Args:
        optimizer: of the engine.
    """
    if functional.linear is zero3_linear_wrap:
        functional.linear = _linear
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda *args, **kwargs: None  # the norm, which follows, is checked as well
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        if isinstance(optimizer.reduce_and_partition_stream, torch.cuda.Stream):
            optimizer.reduce_and_partition_stream = _WaitOnDevice()
        if optimizer.persistent_parameters and optimizer.zero_hpz_partition_size == 1:  # no second copies
            first = optimizer.persistent_parameters[0]
            first.all_gather = partial(_gather, first)
        optimizer.partition_grads = partial(_keep_gradients, optimizer)
    else:
        return
    optimizer.get_grad_norm_direct = lambda gradients, params, norm_type=2: _norm(optimizer, gradients)


def _gather(parameter: Any, param_list: list[Any] | None = None) -> None:
    """Gathers a parameter, or all those of a list by one call; DeepSpeed's own makes one for each."""
    parameters = [parameter] if param_list is None else param_list
    missing: Any = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        # All of it happens on one stream, so that no tensor must be told of another.
        missing[0].all_gather_coalesced(missing).wait(handle_dependency=False)
        AllGatherCoalescedHandle.free_buffer()


def _keep_gradients(optimizer, parameters: list[Any], partitions: list[torch.Tensor]) -> None:
    """Stage 3's `partition_grads` by a few kernels: adds what this rank got of each gradient to what it has."""
    kept = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    stream = None if optimizer.reduce_and_partition_stream is None else torch.cuda.current_stream()
    targets, sources = [], []
    for parameter, partition in zip(parameters, partitions, strict=True):
        if parameter.partition_numel() * optimizer._get_param_partition_rank(parameter) < parameter.ds_numel:
            targets.append(kept[parameter.ds_id].narrow(0, 0, partition.numel()))
            sources.append(partition.view(-1))
        if stream is not None:
            parameter.grad.record_stream(stream)
        parameter.grad = None
    if targets:
        (torch._foreach_copy_ if optimizer.micro_step_id == 0 else torch._foreach_add_)(targets, sources)


def _norm(optimizer, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of gradients that are spread over ranks; -1, as DeepSpeed has it, if it is not finite."""
    gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = torch.zeros((), device=optimizer.device)
    if gradients:
        total = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    return torch.where(torch.isfinite(total), total.sqrt(), -1.0)
