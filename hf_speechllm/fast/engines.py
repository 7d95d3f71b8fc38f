"""Settings of DDP, DeepSpeed and FSDP2 that a run gets without being asked."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType


def set_up_engine(accelerator: Accelerator, model: Any, fast: bool = True) -> None:
    """Sets an engine up, before it takes the model.

    Args:
        accelerator: of the trainer.
        model: to be trained.
        fast: whether to change what only costs time; otherwise only what would be wrong without it is changed.
    """
    if fast and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True  # otherwise each gradient is copied there and back
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        from .deepspeed import match_dtypes, prepare  # DeepSpeed need not be installed

        if plugin.zero_stage == 3:
            match_dtypes(model)
        if fast:
            prepare(model, plugin.deepspeed_config)
    elif accelerator.distributed_type == DistributedType.FSDP:
        from .fsdp import keep_outputs

        keep_outputs(accelerator.state.fsdp_plugin)
