"""Freezing and counting of the parts of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..formats.funasr_tensors import to_funasr_name
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import ALL_PARTS, CTC_HEAD, PARTS, is_native, part_of

# Parts of parameter names that peft adds.
_PEFT = re.compile(r"^base_model\.model\.|\.(?:modules_to_save\.default|original_module|base_layer)(?=\.)")


def freeze_parts(
    model: SpeechLLMForConditionalGeneration,
    audio_encoder: bool = False,
    audio_adaptor: bool = False,
    llm: bool = False,
) -> None:
    """Freezes whole parts: no gradient, no optimizer state, and eval mode even after `model.train()`.

    Args:
        audio_encoder, audio_adaptor, llm: whether to freeze the part.
    """
    for name, frozen in zip(PARTS, (audio_encoder, audio_adaptor, llm), strict=True):
        if frozen or (name == "audio_encoder" and is_native(model) and model.family.frozen_encoder):
            for module in part_modules(model, name):
                module.requires_grad_(False)
    model.train(model.training)


def freeze_parameters(model, prefixes: Sequence[str]) -> None:
    """Freezes parameters by prefixes of their names: no gradient and no optimizer state; dropout does not change.

    Args:
        model: with or without adapters.
        prefixes: names of modules or parameters, in this project (`audio_encoder.layers.0`) or in FunASR
            (`audio_encoder.encoders0`).

    Raises:
        ValueError: if a prefix matches no parameter, or no trained parameters are left.
    """
    is_funasr = not is_native(model) and model.config.audio_encoder_config.model_type == "fun_asr_nano_encoder"
    found = set()
    for full_name, parameter in model.named_parameters():
        name = _PEFT.sub("", full_name)
        names = {name, to_funasr_name(name, model.config)} if is_funasr else {name}
        for prefix in prefixes:
            if any(f"{item}.".startswith(f"{prefix}.") for item in names):
                parameter.requires_grad_(False)
                found.add(prefix)
    if unknown := [prefix for prefix in prefixes if prefix not in found]:
        raise ValueError(
            f"--freeze_param: no parameter name starts with {', '.join(unknown)}; an example is audio_encoder.layers.0"
        )
    if prefixes and not trained_parts(model):
        raise ValueError("--freeze_param and the other options freeze all parameters; freeze fewer parameters")
    model.train(model.training)


def part_modules(model, part: str) -> list[torch.nn.Module]:
    """Returns the modules of a part; a native speech LLM may have several."""
    return model.part(part) if is_native(model) else [getattr(model, part)]


def part_names(model, part: str) -> list[str]:
    """Returns the names of `part_modules` in the model."""
    modules = part_modules(model, part)
    return [name for name, module in model.named_modules() if any(module is item for item in modules)]


def count_parameters(model) -> dict[str, tuple[int, int]]:
    """Counts the parameters of each part: (trained, total)."""
    counts = dict.fromkeys(ALL_PARTS if getattr(model, CTC_HEAD, None) is not None else PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft's copy of a fully trained part
            continue
        part = part_of(name)
        trained, total = counts[part]
        size = size_of(parameter)
        counts[part] = (trained + size * parameter.requires_grad, total + size)
    return counts


def size_of(parameter: torch.Tensor) -> int:
    """Returns the number of elements of a parameter, including the shards of other ranks (ZeRO-3)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def trained_parts(model) -> set[str]:
    """Returns the parts with trained parameters."""
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
