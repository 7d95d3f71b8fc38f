"""Writing of checkpoints in all layouts, and conversion."""

from __future__ import annotations

import os
from pathlib import Path

from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from . import families, funasr, native
from .checkpoint import (
    MAX_SHARD_SIZE,
    Checkpoint,
    CheckpointError,
    new_folder,
    widest,
    write_ctc_tensors,
    write_safetensors,
)
from .loading import CTC_FILE, FUNASR, LAYOUTS, NATIVE, OWN


def write_checkpoint(
    checkpoint: Checkpoint | families.FamilyCheckpoint,
    processor: SpeechLLMProcessor,
    output: str | os.PathLike[str],
    layout: str,
    force: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Writes a checkpoint in a layout. The output folder appears when it is complete.

    Args:
        output: folder; must not exist.
        layout: `speech_llm`, `native` or `funasr`.
        force: whether to write a model that would give different results in the target library.
        max_shard_size: maximum size of a safetensors file; ignored for FunASR's `model.pt`.

    Raises:
        CheckpointError: if the layout does not support the model, or the model would give different results.
        FileExistsError: if `output` exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if isinstance(checkpoint, families.FamilyCheckpoint) and layout != OWN:
        raise CheckpointError(
            f"a {checkpoint.config.model_type} model stays in the layout of transformers; {layout} is not possible"
        )
    with new_folder(output) as folder:
        if layout == FUNASR and isinstance(checkpoint, Checkpoint):
            funasr.write(checkpoint, processor, folder, force)
        else:
            write_files(checkpoint, processor, folder, layout, force, max_shard_size)


def write_files(
    checkpoint: Checkpoint | families.FamilyCheckpoint,
    processor: SpeechLLMProcessor | None,
    folder: Path,
    layout: str,
    force: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Writes a checkpoint, and a processor if given, to an existing folder in the own or native layout.

    A `FamilyCheckpoint` keeps its layout.
    """
    if isinstance(checkpoint, families.FamilyCheckpoint):
        checkpoint.write(processor, folder, max_shard_size)
        return
    if layout == NATIVE:
        native.write(checkpoint, processor, folder, force, max_shard_size)
        return
    config = checkpoint.config
    config.architectures = [SpeechLLMForConditionalGeneration.__name__]
    config.dtype = widest(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point())
    config.save_pretrained(folder)
    checkpoint.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    write_safetensors(checkpoint.tensors, folder, max_shard_size)
    write_ctc_tensors(checkpoint.ctc_tensors, folder / CTC_FILE)


def save_native(model, processor: SpeechLLMProcessor, folder: str | os.PathLike[str], force: bool = False) -> None:
    """Saves a model and its processor for transformers' `fun_asr_nano`; see `write_checkpoint`."""
    write_checkpoint(Checkpoint.of(model), processor, folder, NATIVE, force)


def save_funasr(model, processor: SpeechLLMProcessor, folder: str | os.PathLike[str], force: bool = False) -> None:
    """Saves a model and its processor for FunASR; see `write_checkpoint`."""
    write_checkpoint(Checkpoint.of(model), processor, folder, FUNASR, force)
