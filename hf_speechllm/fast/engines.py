"""Default settings of DDP, DeepSpeed and FSDP2."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType


def set_up_engine(accelerator: Accelerator, model: Any, fast: bool = True) -> None:
    """Sets defaults of the engine, before the accelerator prepares the model.

    Args:
        accelerator: of the trainer.
        model: to be trained.
        fast: whether to change settings for speed; otherwise only settings for correct results change.
    """
    if fast and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True  # otherwise DDP copies each gradient twice
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        from .deepspeed import match_adapter_dtypes, set_zero_defaults  # DeepSpeed is optional

        if plugin.zero_stage == 3:
            match_adapter_dtypes(model)
        if fast:
            set_zero_defaults(model, plugin.deepspeed_config)
    elif accelerator.distributed_type == DistributedType.FSDP:
        from .fsdp import keep_output_dtype

        keep_output_dtype(accelerator.state.fsdp_plugin)
