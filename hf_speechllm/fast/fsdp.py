"""FSDP2: outputs as the model gives them; clipping and the optimizer's step on the shards of a rank, as they are.

torch takes each tensor of a thousand apart by itself, in Python, which takes a tenth of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor


def keep_outputs(plugin: FullyShardedDataParallelPlugin) -> None:
    """Has FSDP leave outputs as they are: Accelerate has it round them, and so the loss, to bfloat16.

    Args:
        plugin: of the accelerator, before it prepares the model.
    """
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def step_on_shards(optimizer: torch.optim.Optimizer) -> None:
    """Has Adam work on the shards of its parameters and of its state.

    Args:
        optimizer: others than Adam and AdamW are left alone.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    parent = optimizer._init_group

    def init_group(group, *lists):
        result = parent(group, *lists)
        for tensors in lists:
            tensors[:] = [_shard(tensor) for tensor in tensors]
        return result

    optimizer._init_group = init_group  # type: ignore[method-assign]


def clip_shards(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor | None:
    """What `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: of FSDP2.
        max_norm: the Euclidean norm that all gradients have together at most.

    Returns:
        Their norm before that; `None`, and nothing is done, if they are not all sharded over one row of ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or not isinstance(gradients[0], DTensor):
        return None
    mesh = gradients[0].device_mesh
    if mesh.ndim != 1 or any(
        not isinstance(item, DTensor) or item.device_mesh is not mesh or not item.placements[0].is_shard()
        for item in gradients
    ):
        return None
    shards = [_shard(gradient) for gradient in gradients]
    if shards[0].device.type != mesh.device_type:  # offloaded
        return None
    total = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square().sum()
    torch.distributed.all_reduce(total, group=mesh.get_group())
    norm = total.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
