"""Freeze flags, mapped onto `requires_grad`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..formats.funasr_tensors import to_funasr_name
from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration

# What peft adds to the name of a parameter.
_PEFT = re.compile(r"^base_model\.model\.|\.(?:modules_to_save\.default|original_module|base_layer)(?=\.)")


def freeze_parts(
    model: SpeechLLMForConditionalGeneration,
    audio_encoder: bool = False,
    audio_adaptor: bool = False,
    llm: bool = False,
) -> None:
    """Freezes whole parts: no gradient, no optimizer state, and eval mode even after `model.train()`.

    Args:
        audio_encoder, audio_adaptor, llm: which parts to leave as they are.
    """
    for name, frozen in zip(PARTS, (audio_encoder, audio_adaptor, llm), strict=True):
        if frozen:
            getattr(model, name).requires_grad_(False)
    model.train(model.training)


def freeze_parameters(model, prefixes: Sequence[str]) -> None:
    """Freezes parameters by the start of their names: no gradient and no optimizer state; dropout stays as it is.

    Args:
        model: with or without adapters.
        prefixes: names of modules or parameters, here (`audio_encoder.layers.0`) or in FunASR
            (`audio_encoder.encoders0`).

    Raises:
        ValueError: if a prefix fits no parameter, or nothing is left to train.
    """
    is_funasr = model.config.audio_encoder_config.model_type == "fun_asr_nano_encoder"
    found = set()
    for full_name, parameter in model.named_parameters():
        name = _PEFT.sub("", full_name)
        names = {name, to_funasr_name(name, model.config)} if is_funasr else {name}
        for prefix in prefixes:
            if any(f"{item}.".startswith(f"{prefix}.") for item in names):
                parameter.requires_grad_(False)
                found.add(prefix)
    if unknown := [prefix for prefix in prefixes if prefix not in found]:
        raise ValueError(f"--freeze_param: no parameter's name starts with {', '.join(unknown)}")
    if prefixes and not trained_parts(model):
        raise ValueError("nothing is left to train: --freeze_param and the other options freeze all parameters")
    model.train(model.training)


def count_parameters(model) -> dict[str, tuple[int, int]]:
    """Parameters of each part: trained and in all."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # what peft keeps of a part that is trained whole
            continue
        part = part_of(name)
        trained, total = counts[part]
        size = size_of(parameter)
        counts[part] = (trained + size * parameter.requires_grad, total + size)
    return counts


def size_of(parameter: torch.Tensor) -> int:
    """Elements of a parameter, also of one that DeepSpeed's stage 3 has spread over the ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to, whatever wraps the model (peft, DDP, FSDP)."""
    for piece in parameter_name.split("."):
        if piece in PARTS:
            return piece
    raise ValueError(f"{parameter_name} belongs to none of {', '.join(PARTS)}")


def trained_parts(model) -> set[str]:
    """The parts that have anything to train."""
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
