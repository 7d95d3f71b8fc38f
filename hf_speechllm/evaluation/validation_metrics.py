"""Metric names of validation sets in logs: `eval_loss`, `eval_NAME_cer`, ..."""

from __future__ import annotations

from collections.abc import Mapping

COUNTS = ("substitutions", "deletions", "insertions", "reference_tokens")  # fields of `ErrorCounts`, with `--eval_cer`


def metric_prefix(prefix: str, name: str) -> str:
    """Returns the prefix of the metric names of a validation set; the name of a single set is empty."""
    return f"{prefix}_{name}" if name else prefix


def set_names(metrics: Mapping[str, float], prefix: str = "eval") -> list[str]:
    """Returns the names of the validation sets in the metrics of an evaluation; the name of a single set is `""`."""
    keys = [key.removeprefix(prefix).removeprefix("_") for key in metrics if key.startswith(f"{prefix}_")]
    names = [key.removesuffix("loss").removesuffix("_") for key in keys if key == "loss" or key.endswith("_loss")]
    return [name for name in names if name] or names
