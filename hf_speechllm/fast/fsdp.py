"""FSDP2: outputs in the dtype of the model; gradient clipping and AdamW on the local shards of a rank.

torch dispatches each of about 1,000 sharded tensors (`DTensor`) in Python, which takes a tenth of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor

from .versions import is_tested


def keep_output_dtype(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keeps the dtype of outputs and loss, which Accelerate otherwise has FSDP2 round to bfloat16.

    Args:
        plugin: of the accelerator, before the accelerator prepares the model.
    """
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


class AdamWOnShards(torch.optim.AdamW):
    """AdamW that computes on the local shards of FSDP2's parameters and of the optimizer state."""

    def _init_group(self, group, *lists):
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [_shard(tensor) for tensor in tensors]
        return result


def sharded_optimizer(optimizer_class: type) -> type:
    """Returns the class to use with FSDP2: `AdamWOnShards` for AdamW, any other class unchanged."""
    return AdamWOnShards if optimizer_class is torch.optim.AdamW and is_tested("FSDP2 on shards") else optimizer_class


def clip_shards(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor | None:
    """Clips gradients of FSDP2 to the same values as `torch.nn.utils.clip_grad_norm_`.

    Args:
        parameters: of a model that FSDP2 shards.
        max_norm: largest Euclidean norm of all gradients together.

    Returns:
        Norm before clipping. `None`, without any change, if some gradients are not sharded over a one-dimensional
        device mesh.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or not isinstance(gradients[0], DTensor) or not is_tested("FSDP2 on shards"):
        return None
    mesh = gradients[0].device_mesh
    if mesh.ndim != 1 or any(
        not isinstance(item, DTensor) or item.device_mesh is not mesh or not item.placements[0].is_shard()
        for item in gradients
    ):
        return None
    shards = [_shard(gradient) for gradient in gradients]
    if shards[0].device.type != mesh.device_type:  # offloaded to the CPU
        return None
    total = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square().sum()
    torch.distributed.all_reduce(total, group=mesh.get_group())
    norm = total.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
