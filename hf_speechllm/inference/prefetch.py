"""Prefetching: measures and prepares recordings in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ..audio.inputs import to_source
from ..audio.waveform import header_seconds, is_url, probe_audio

TRUSTED_HEADERS = (
    "WAV",
    "WAVEX",
    "RF64",
    "FLAC",
    "OGG",
)  # libsndfile's names of formats with a reliable length in the header

Item = TypeVar("Item")
Result = TypeVar("Result")


def measure_seconds(source: Any, sampling_rate: int) -> float:
    """Returns the duration of a recording in seconds, from the header if the header is reliable.

    Args:
        source: see `audio.load_audio`.
        sampling_rate: of waveforms without a rate, in Hz.

    Raises:
        AudioError: if the recording cannot be read.
    """
    if not isinstance(source, (str, os.PathLike, bytes)):
        source = to_source(source, sampling_rate)
    if isinstance(source, np.ndarray):
        return len(source) / sampling_rate
    if isinstance(source, (str, os.PathLike)) and not is_url(source):
        seconds = header_seconds(os.fspath(source), TRUSTED_HEADERS)
        if seconds is not None:
            return seconds
    samples, rate = probe_audio(source)
    return samples / rate


def prefetch(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[tuple[Item, float]],
    max_weight: float,
) -> Iterator[Result]:
    """Yields `function(item)` in order; a thread pool computes results in advance.

    Args:
        pool: threads.
        function: computes a result.
        items: pairs of an item and a weight.
        max_weight: no further item starts while the total weight of pending items exceeds this.
    """
    pending: deque[tuple[Future[Result], float]] = deque()
    load = 0.0
    for item, weight in items:
        pending.append((pool.submit(function, item), weight))
        load += weight
        while load > max_weight:
            future, done = pending.popleft()
            load -= done
            yield future.result()
    for future, _ in pending:
        yield future.result()
