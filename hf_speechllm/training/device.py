"""Copies of batches to the device of training."""

from __future__ import annotations

from typing import Any

import torch


def to_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies the tensors of a batch to a device.

    Pinned tensors are copied without a host-device sync. Other copies wait until the GPU has finished all queued work.

    Args:
        batch: tensors by name, or dicts of tensors; other values do not change.
        device: target device.
        dtype: target dtype of floating-point tensors; default unchanged.
    """
    copies = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            value = to_device(value, device, dtype)
        elif isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=value.is_pinned())
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        copies[name] = value
    return copies
