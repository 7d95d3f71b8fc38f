"""Recordings measured and prepared ahead of the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ..audio.inputs import to_source
from ..audio.waveform import header_seconds, is_url, probe_audio

TRUSTED_HEADERS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")  # libsndfile's names of formats that announce their length

Item = TypeVar("Item")
Result = TypeVar("Result")


def measure_seconds(source: Any, sampling_rate: int) -> float:
    """Length of a recording in seconds, from its header where that can be trusted.

    Args:
        source: as of `audio.load_audio`.
        sampling_rate: of waveforms without a rate, in Hz.

    Raises:
        AudioError: if the recording can't be read.
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


def in_background(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[tuple[Item, float]], room: float
) -> Iterator[Result]:
    """Results of `function(item)` in order, computed by the threads of a pool ahead of what is taken.

    Args:
        items: each with its weight.
        room: no more is begun while the weights of what is ahead exceed this.
    """
    ahead: deque[tuple[Future[Result], float]] = deque()
    load = 0.0
    for item, weight in items:
        ahead.append((pool.submit(function, item), weight))
        load += weight
        while load > room:
            future, done = ahead.popleft()
            load -= done
            yield future.result()
    for future, _ in ahead:
        yield future.result()
