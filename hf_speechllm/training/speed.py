"""Enables the fast paths of a run according to options and device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator, DistributedType

from ..data.collator import SpeechLLMCollator
from ..fast.attention import disable_host_syncs, enable_padding_free, without_cudnn_attention
from ..fast.compilation import compile_layers
from ..fast.engines import set_up_engine
from ..model.encoders import encoder_family
from ..model.native_families import is_native
from .arguments import SpeechLLMTrainingArguments


def enable_fast_paths(
    args: SpeechLLMTrainingArguments, model: Any, accelerator: Accelerator, collators: Sequence[SpeechLLMCollator]
) -> None:
    """Prepares model, engine and collators for fast paths, before the engine wraps the model.

    Args:
        args: of the run; `--fast off` disables all fast paths.
        model: to be trained.
        accelerator: of the trainer.
        collators: of training and validation; `padding_free` is set for padding-free batches.

    Raises:
        ValueError: for `--compile_layers` with ZeRO-3, or if `--padding_free` is not supported.
    """
    on_gpu = _on_gpu(args)
    if is_native(model) and args.compile_layers:
        raise ValueError(f"--compile_layers does not support {model.config.model_type} models; leave it out")
    if on_gpu:
        disable_host_syncs(model)
    wanted = args.padding_free or (args.padding_free is None and on_gpu and (args.bf16 or args.fp16))
    if wanted and args.fast == "auto":
        try:
            enable_padding_free(model)
            for collator in collators:
                collator.padding_free = True
        except ValueError:
            if args.padding_free:
                raise
    set_up_engine(accelerator, model, args.fast == "auto")
    if args.compile_layers and args.fast == "auto":
        deepspeed = accelerator.state.deepspeed_plugin
        if deepspeed is not None and deepspeed.zero_stage == 3:
            raise ValueError("--compile_layers is not supported with ZeRO-3, which removes parameters; leave it out")
        gathered = model._no_split_modules if accelerator.distributed_type == DistributedType.FSDP else ()
        compile_layers(model, single_layer_classes=gathered)


def check_encoder_passes(model: Any, accelerator: Accelerator) -> None:
    """Checks that all processes run the encoder equally often, if it gathers its parameters in each pass.

    Raises:
        ValueError: if the number of passes depends on the batch: the processes would wait for each other forever.
    """
    deepspeed = accelerator.state.deepspeed_plugin
    gathers = accelerator.distributed_type == DistributedType.FSDP or (deepspeed and deepspeed.zero_stage == 3)
    if not gathers or is_native(model):
        return
    encoder = model.config.audio_encoder_config
    if encoder_family(encoder).passes(encoder):
        raise ValueError(
            f"the {encoder.model_type} encoder runs once for each length of recordings, which FSDP and ZeRO-3 do not "
            "support; freeze it and use --cache_level encoder, or use DDP or ZeRO-2"
        )


def attention_context(args: SpeechLLMTrainingArguments) -> AbstractContextManager:
    """Returns the context in which training and validation run: without cuDNN's attention on a GPU."""
    return without_cudnn_attention() if _on_gpu(args) else nullcontext()


def _on_gpu(args: SpeechLLMTrainingArguments) -> bool:
    return args.fast == "auto" and args.device.type == "cuda" and not args.plain_attention
