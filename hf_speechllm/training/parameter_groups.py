"""Parameter groups of the optimizer: learning rates of the parts, weight decay."""

from __future__ import annotations

from collections.abc import Collection

from .arguments import SpeechLLMTrainingArguments
from .freezing import part_of


def learning_rate(args: SpeechLLMTrainingArguments, part: str) -> float:
    """Returns the learning rate of a part of the model."""
    rate = getattr(args, f"{part}_learning_rate")
    return args.learning_rate if rate is None else rate


def optimized_parts(model) -> list[str]:
    """Returns the names of the trained parts, in the order of `parameter_groups`."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return list(dict.fromkeys(map(part_of, names)))


def parameter_groups(model, args: SpeechLLMTrainingArguments, decayed: Collection[str]) -> list[dict]:
    """Returns parameter groups: for each part of the model, one with and one without weight decay.

    Args:
        args: learning rates and weight decay.
        decayed: names of the parameters with weight decay.
    """
    decayed = set(decayed)
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decay = part_of(name), name in decayed
        group = groups.setdefault(
            (part, decay),
            {
                "params": [],
                "lr": learning_rate(args, part),
                "weight_decay": args.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
