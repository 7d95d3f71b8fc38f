"""Samples of a run for a probe: representative batches with their features, and totals from two measured parts."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..data.bad_rows import BadRows
from ..data.dataset import add_features, decoding_limit, row_seconds
from ..data.sampler import ROW_COST, BudgetBatchSampler
from ..options import usable_cores
from ..training.assembly import RunData, encode_rows
from ..training.options import FinetuningOptions

FIRST_BATCHES = 3  # of a probe: before the moments of the optimizer exist; the longest row; the most rows


class ChosenBatches(BudgetBatchSampler):
    """A sampler of given batches, in the given order.

    Args:
        seconds: seconds of audio of each row, shape = (rows,).
        chosen: row indices of each batch.
        seed: seeds augmentation.
    """

    def __init__(self, seconds: np.ndarray, chosen: Sequence[np.ndarray], seed: int):
        super().__init__(seconds, float(seconds.sum()) + ROW_COST, seed=seed)
        self.chosen = list(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def _assign(self, epoch: int) -> tuple[list[np.ndarray], int]:
        return self.chosen, 0


def batch_cost(seconds: np.ndarray, batch: np.ndarray, row_cost: float) -> float:
    """Returns the cost of a batch in seconds of audio, as `BudgetBatchSampler` counts it."""
    return float(seconds[batch].sum()) + row_cost * len(batch)


def representative_batches(seconds: np.ndarray, batches: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Chooses batches such that every beginning of the result represents all batches.

    The first is usual, and creates the moments of the optimizer. The next two need the most memory: the batch of the
    longest row, and the batch with the most rows. The others are spread evenly over the lengths, in the order of the
    van der Corput sequence.

    Args:
        seconds: seconds of audio of each row, shape = (rows,).
        batches: row indices of all batches of an epoch.
        number: length of the result, at least `FIRST_BATCHES`; a batch may repeat.
    """
    order = sorted(range(len(batches)), key=lambda index: float(seconds[batches[index]].max()))
    extremes = [order[-1], max(order, key=lambda index: len(batches[index]))]
    spread = [order[int(_van_der_corput(place) * len(order))] for place in range(1, 1 + number - FIRST_BATCHES)]
    return [batches[index] for index in [order[len(order) // 2], *extremes, *spread]]


def _van_der_corput(number: int) -> float:
    """Mirrors the binary digits at the point: 1/2, 1/4, 3/4, 1/8, ..."""
    value, share = 0.0, 0.5
    while number:
        value += share * (number & 1)
        number >>= 1
        share /= 2
    return value


@dataclass
class Work:
    """Work that grows linearly with the audio, measured on two parts.

    Args:
        audio_seconds: of both parts, in the order of measurement.
        times: in seconds.
    """

    audio_seconds: list[float]
    times: list[float]

    def total(self, *audio_seconds: float) -> float:
        """Returns the time for amounts of audio, each with a start of processes.

        The rate is between the rate of the second part alone and a quarter of it, so that noise does not dominate.
        """
        first, second = self.times
        alone = second / max(self.audio_seconds[1], 1e-9)
        rate = (second - first) / max(self.audio_seconds[1] - self.audio_seconds[0], 1e-9)
        rate = min(max(rate, alone / 4), alone)
        start = max(second - rate * self.audio_seconds[1], 0.0)
        return sum(start + rate * amount for amount in audio_seconds)


@dataclass
class Sample:
    """Rows of some batches, prepared as training prepares all rows.

    Args:
        rows: with features and, if wanted, outputs of frozen parts.
        batches: batches as indices of `rows`.
        features, encoding: measured work; `None` if there is none.
    """

    rows: Any
    batches: list[np.ndarray]
    features: Work | None = None
    encoding: Work | None = None


def prepare_sample(
    rows: Any, chosen: Sequence[np.ndarray], data: RunData, options: FinetuningOptions, model: Any, folder: str
) -> Sample:
    """Computes the features of the rows of some batches, and the outputs of frozen parts, as training does.

    Args:
        rows: all rows, with lengths.
        chosen: row indices of each batch.
        data: of the run.
        options: of the run.
        model: with frozen parts.
        folder: temporary folder for caches.
    """
    indices = np.unique(np.concatenate(chosen))
    sample = rows.select(indices.tolist())
    if options.data.feature_cache == "off":
        return Sample(sample, [np.searchsorted(indices, batch) for batch in chosen])
    datasets.disable_caching()  # the caches of an earlier plan would hide the work
    sample = sample.add_column("place", indices)
    parts, features = _in_two_parts(sample, lambda part: with_features(part, data, options))
    options = copy.copy(options)
    options.data = dataclasses.replace(options.data, cache_dir=folder)
    encoded, encoding = _in_two_parts(parts[1], lambda part: encode_rows(part, model, data.processor, options))
    sample = encoded[1]
    place = {index: position for position, index in enumerate(sample["place"])}  # without unreadable rows
    batches = [np.array([place[index] for index in batch.tolist() if index in place]) for batch in chosen]
    return Sample(
        sample.remove_columns("place"),
        [batch for batch in batches if len(batch)],
        features,
        None if sample is parts[1] else encoding,
    )


def with_features(rows: Any, data: RunData, options: FinetuningOptions) -> Any:
    """Returns the rows with features, without unreadable rows; unchanged with `--feature_cache off`."""
    if options.data.feature_cache == "off":
        return rows
    limit = decoding_limit(data.processor, data.max_feature_frames)
    workers = options.data.preprocessing_num_workers or usable_cores()
    return add_features(rows, data.processor, BadRows(1.0), options.data.feature_cache, workers, limit)


def _in_two_parts(rows: Any, work: Callable[[Any], Any]) -> tuple[list[Any], Work]:
    """Does the work for an eighth of the rows, then for all rows."""
    results, measured = [], Work([], [])
    for part in (rows.select(range(0, len(rows), 8)), rows):
        started = time.perf_counter()
        results.append(work(part))
        measured.times.append(time.perf_counter() - started)
        measured.audio_seconds.append(float(row_seconds(part).sum()))
    return results, measured
