"""Measures some batches of a validation set, to tell how long an evaluation takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.arguments import SpeechLLMTrainingArguments
from ..training.dataloaders import eval_loader

SAMPLE_BATCHES = 4  # at most


@dataclass(frozen=True)
class BatchSample:
    """Some batches of a set, at equal distances of length.

    Args:
        rows: rows of the batches.
        parts: rows of each batch.
        total: number of batches of the set.
    """

    rows: Any
    parts: list[Any]
    total: int

    @classmethod
    def of(
        cls, rows: Any, args: SpeechLLMTrainingArguments, collator: Any, with_features: Callable[[Any], Any]
    ) -> BatchSample:
        """Chooses batches.

        Args:
            rows: of the set.
            args: of the run; the sizes of the batches.
            collator: of the run.
            with_features: adds the features to chosen rows.
        """
        batches = batches_of(rows, args, collator)
        places = np.linspace(0, len(batches) - 1, min(len(batches), SAMPLE_BATCHES)).round().astype(int)
        sample = with_features(rows.select(np.concatenate([batches[place] for place in places]).tolist()))
        parts = [sample.select(batch) for batch in batches_of(sample, args, collator)]
        return cls(sample, parts, len(batches))

    def measure(self, score: Callable[[Any], Any]) -> tuple[float, float]:
        """Measures scoring, which has a cost per call (loader processes), and a cost per batch.

        Args:
            score: scores rows.

        Returns:
            What the first call takes longer than later ones, and the expected time of a later call for the whole set,
            in seconds.
        """
        number = len(self.parts)
        first, single = (_seconds(score, self.parts[number // 2]) for _ in range(2))
        whole = _seconds(score, self.rows) if number > 1 else single
        per_batch = max(0.0, whole - single) / max(1, number - 1)
        return max(0.0, first - single), whole + per_batch * (self.total - number)


def batches_of(rows: Any, args: SpeechLLMTrainingArguments, collator: Any) -> list[np.ndarray]:
    """Returns the rows of each batch of an evaluation."""
    return eval_loader(args, rows, collator).batch_sampler.batches(0)


def _seconds(score: Callable[[Any], Any], rows: Any) -> float:
    started = time.perf_counter()
    score(rows)
    return time.perf_counter() - started
