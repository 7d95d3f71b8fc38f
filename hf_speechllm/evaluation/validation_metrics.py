"""Metrics of validation sets under the names that logs have for them: `eval_loss`, `eval_NAME_cer`, ..."""

from __future__ import annotations

from collections.abc import Mapping

COUNTS = ("substitutions", "deletions", "insertions", "reference_tokens")  # of `ErrorCounts`, with `--eval_cer`


def metric_prefix(prefix: str, name: str) -> str:
    """Returns the start of a set's metric names; a single set has no name."""
    return f"{prefix}_{name}" if name else prefix


def set_names(metrics: Mapping[str, float], prefix: str = "eval") -> list[str]:
    """Lists the sets of an evaluation by its metrics; a single set without a name is called `""`."""
    keys = [key.removeprefix(prefix).removeprefix("_") for key in metrics if key.startswith(f"{prefix}_")]
    names = [key.removesuffix("loss").removesuffix("_") for key in keys if key == "loss" or key.endswith("_loss")]
    return [name for name in names if name] or names
