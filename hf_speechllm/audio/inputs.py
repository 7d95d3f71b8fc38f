"""Recordings as Python code hands them over: arrays, rows of `datasets`, bytes, file objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from .decoders import MAX_PEAK, MAX_RATE, MIN_RATE, AudioError
from .resampling import resample

CONTENTS = ("bytes", "path")  # of `datasets.Audio(decode=False)`
SAMPLES = ("array", "raw")  # of `datasets.Audio` before version 4, and of transformers' pipelines


def as_list(recordings: Any) -> tuple[list[Any], bool]:
    """A list of recordings from one or several.

    Args:
        recordings: a recording as of `to_source`, or an iterable of them, such as a list or a data set.

    Returns:
        The recordings, and whether there is one only, which was not in a list.
    """
    alone = (
        isinstance(recordings, (str, bytes, bytearray, memoryview, os.PathLike, Mapping))
        or any(hasattr(recordings, name) for name in ("read", "__array__", "get_all_samples"))
        or _is_pair(recordings)
        or not hasattr(recordings, "__iter__")
    )
    return ([recordings], True) if alone else (list(recordings), False)


def to_source(recording: Any, sampling_rate: int, given_rate: int | None = None) -> str | bytes | np.ndarray:
    """What `waveform.load_audio` takes, from whatever holds a recording.

    Args:
        recording: path, URL, bytes, an open file; samples, shape = (samples,), as an array or tensor, alone or with
            their rate as `(array, rate)`; a row of `datasets` with a column `audio`, or the value of that column,
            decoded or not.
        sampling_rate: of the waveform that is returned, in Hz.
        given_rate: of samples that come without a rate, in Hz; default `sampling_rate`.

    Returns:
        A path or URL, the bytes of a file, or a waveform, float32, shape = (samples,), at `sampling_rate`.

    Raises:
        AudioError: if it holds no recording, or samples whose scale is not known.
    """
    if isinstance(recording, (str, os.PathLike)):
        return os.fspath(recording)
    if isinstance(recording, (bytes, bytearray, memoryview)):
        return bytes(recording)
    if isinstance(recording, Mapping):
        return _source_of_row(recording, sampling_rate)
    if hasattr(recording, "get_all_samples"):  # `torchcodec.decoders.AudioDecoder`, as of datasets 4
        decoded = recording.get_all_samples()
        return to_source(decoded.data.mean(0), sampling_rate, decoded.sample_rate)
    if hasattr(recording, "read"):
        if recording.seekable():  # it is read twice: for its length, then for its samples
            recording.seek(0)
        data = recording.read()
        if not isinstance(data, bytes):
            raise AudioError('a recording is an open file of text; open it with mode "rb"')
        return data
    if _is_pair(recording):
        samples, rate = recording if isinstance(recording[1], Real) else recording[::-1]
        if given_rate not in (None, rate):
            raise AudioError(
                f"sampling_rate is {given_rate} Hz, but a recording comes with {rate} Hz; give one of them"
            )
        return to_source(samples, sampling_rate, rate)
    if not hasattr(recording, "__array__"):
        raise AudioError(
            f"a recording can't be of the type {type(recording).__name__}; give a path, a URL, bytes, an array, "
            "(array, rate) or a row of datasets"
        )
    rate = sampling_rate if given_rate is None else _checked_rate(given_rate)
    return resample(to_waveform(recording), rate, sampling_rate)


def to_waveform(samples: Any) -> np.ndarray:
    """Samples as float32, shape = (samples,), in [-1, 1].

    Integers are scaled by the range of their type. A little clipping (up to `MAX_PEAK`) passes.

    Args:
        samples: array or tensor, shape = (samples,), (1, samples) or (samples, 1).

    Raises:
        AudioError: if there are several channels, no samples, or samples that are not finite or of unknown scale.
    """
    if hasattr(samples, "detach"):  # a tensor: NumPy knows neither those of a GPU nor bfloat16
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    array = np.asarray(samples)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise AudioError(
            f"a waveform must have one dimension (samples,), got shape {array.shape}; average its channels"
        )
    if len(array) < 2:
        raise AudioError("the waveform: a single sample" if len(array) else "the waveform: no samples")
    if np.issubdtype(array.dtype, np.floating):
        peak = float(np.abs(array).max())
        if not np.isfinite(peak):
            raise AudioError("the waveform: holds samples that are not finite")
        if peak > MAX_PEAK:
            raise AudioError(
                f"the waveform: samples up to {peak:g}, where [-1, 1] is expected; divide them by their scale "
                "(32768 for 16 bits)"
            )
        return np.ascontiguousarray(array, dtype=np.float32)
    return _scaled(array)


def _scaled(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype not in (np.int8, np.int16, np.int32):
        raise AudioError(
            f"the waveform: samples of the type {array.dtype} have no known scale; give int16, or floats in [-1, 1]"
        )
    scale = float(1 << (8 * array.dtype.itemsize - 1))
    # 16-bit samples in a wider type would be silence.
    if array.dtype == np.int32 and 0 < np.abs(array.astype(np.int64)).max() <= 1 << 15:
        raise AudioError(
            "the waveform: int32 samples in the range of 16 bits; give them as int16, or as floats in [-1, 1]"
        )
    return (array / scale).astype(np.float32)


def _source_of_row(row: Mapping[str, Any], sampling_rate: int) -> str | bytes | np.ndarray:
    for name in SAMPLES:
        if row.get(name) is not None:
            if row.get("sampling_rate") is None:
                raise AudioError(f'a recording with {name!r} needs its "sampling_rate", in Hz')
            samples = row[name] if hasattr(row[name], "__array__") else np.asarray(row[name])
            return to_source(samples, sampling_rate, row["sampling_rate"])
    for name in CONTENTS:
        if row.get(name) is not None:
            return to_source(row[name], sampling_rate)
    if row.get("audio") is not None:
        return to_source(row["audio"], sampling_rate)
    raise AudioError(
        f'a row without a recording: its keys are {", ".join(map(str, row)) or "none"}; it needs "audio", or "array" '
        'and "sampling_rate", "bytes", or "path"'
    )


def _is_pair(value: Any) -> bool:
    """Whether it is samples with their rate, in either order."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return any(hasattr(one, "__array__") and _is_number(other) for one, other in (value, value[::-1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_rate(rate: Any) -> int:
    if not _is_number(rate) or not float(rate).is_integer() or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"a sampling rate must be a whole number of Hz, {MIN_RATE:,} to {MAX_RATE:,}, not {rate!r}")
    return int(rate)
