"""Which configuration of `recipes/configs` fits which amount of training data.

Sources: FunASR's docs/finetune.md trains the adaptor below 1,000 h, encoder and adaptor below 5,000 h, and all parts
above 10,000 h. LoRA trains the LLM, as FunASR's finetune.sh does, with less memory (Hu et al. 2021, arXiv 2106.09685).
Under 10 h, the guide huggingface.co/blog/fine-tune-whisper trains for many epochs and selects by the error rate of a
validation set; SpecAugment (Park et al. 2019, arXiv 1904.08779) delays overfitting. The limit of 10 h is a convention.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Recommendation:
    """A configuration and its use.

    Args:
        name: YAML file in `recipes/configs`, without suffix.
        data: for whom, as text for tables.
        trains: trained parts, as text for tables.
        hours: recommended from the first (included) to the second number of hours; `None` if the amount of data does
            not decide.
        reason: why, as text for a plan.
    """

    name: str
    data: str
    trains: str
    hours: tuple[float, float] | None = None
    reason: str = ""


# In the order of trained capacity: if a configuration does not fit into memory, an earlier one replaces it.
RECOMMENDATIONS = (
    Recommendation("adaptor_only", "up to 1,000 h, least memory", "the adaptor"),
    Recommendation(
        "few_hours",
        "under 10 h",
        "small LoRA adapters on the LLM, and the adaptor; SpecAugment; early stopping on `--validation_file`",
        (0, 10),
        "few trained parameters, augmentation, and validation that ends training before overfitting",
    ),
    Recommendation(
        "lora",
        "10 to 1,000 h, one GPU",
        "LoRA adapters on the LLM, and the adaptor",
        (10, 1000),
        "enough data for LoRA; too little to train the encoder without forgetting",
    ),
    Recommendation(
        "encoder_adaptor",
        "1,000 to 10,000 h, or new acoustics",
        "encoder and adaptor",
        (1000, 10_000),
        "enough data to train the encoder; the LLM keeps its language",
    ),
    Recommendation(
        "llm_only",
        "new words and styles (FunASR's `finetune.sh`)",
        "the LLM",
    ),
    Recommendation(
        "all", "over 10,000 h", "all parameters", (10_000, math.inf), "enough data to train all parameters"
    ),
)


def recommend(hours: float, fitting: Collection[str]) -> Recommendation | None:
    """Chooses the configuration for an amount of data.

    Args:
        hours: of training audio.
        fitting: names of the configurations that fit into memory.

    Returns:
        The recommended configuration; if it does not fit, the one with the next smaller capacity that fits; `None` if
        there is none.
    """
    wanted = next(item for item in RECOMMENDATIONS if item.hours and item.hours[0] <= hours < item.hours[1])
    smaller = RECOMMENDATIONS[: RECOMMENDATIONS.index(wanted) + 1]
    return next((item for item in reversed(smaller) if item.name in fitting), None)


def markdown_table() -> str:
    """Returns the table of the documentation: configurations by amount of data."""
    order = sorted(RECOMMENDATIONS, key=lambda item: item.hours[0] if item.hours else math.inf)
    rows = [f"| {item.data} | `{item.name}` | {item.trains} |" for item in order]
    return "\n".join(["| your data | configuration | trains |", "|---|---|---|", *rows])
