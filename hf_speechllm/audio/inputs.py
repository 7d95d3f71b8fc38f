"""Conversion of Python objects to recordings: arrays, rows of `datasets`, bytes, file objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from .decoders import MAX_PEAK, MAX_RATE, MIN_RATE, AudioError, out_of_scale
from .resampling import resample
from .waveform import mix_channels

CONTENTS = ("bytes", "path")  # keys in `datasets.Audio(decode=False)`
SAMPLES = ("array", "raw")  # keys in `datasets.Audio` before version 4, and in transformers' pipelines


def as_list(recordings: Any) -> tuple[list[Any], bool]:
    """Returns one or several recordings as a list.

    Args:
        recordings: a recording, see `to_source`, or an iterable of recordings, for example a list or a data set.

    Returns:
        The list, and whether `recordings` is a single recording instead of an iterable.
    """
    alone = (
        isinstance(recordings, (str, bytes, bytearray, memoryview, os.PathLike, Mapping))
        or any(hasattr(recordings, name) for name in ("read", "__array__", "get_all_samples"))
        or _is_pair(recordings)
        or not hasattr(recordings, "__iter__")
    )
    return ([recordings], True) if alone else (list(recordings), False)


def to_source(recording: Any, sampling_rate: int, given_rate: int | None = None) -> str | bytes | np.ndarray:
    """Converts a recording to a source for `waveform.load_audio`.

    Args:
        recording: path, URL, bytes, or an open file; an array or tensor, shape = (samples,), or the pair
            `(array, rate)`; a row of `datasets` with a column `audio`, or a value of this column, decoded or not.
        sampling_rate: rate of the returned waveform in Hz.
        given_rate: rate of samples without a rate, in Hz; default: `sampling_rate`.

    Returns:
        A path or URL, the bytes of a file, or a waveform, float32, shape = (samples,), at `sampling_rate`.

    Raises:
        AudioError: if `recording` is no recording, or the scale of the samples is unknown.
    """
    if isinstance(recording, (str, os.PathLike)):
        return os.fspath(recording)
    if isinstance(recording, (bytes, bytearray, memoryview)):
        return bytes(recording)
    if isinstance(recording, Mapping):
        return _source_of_row(recording, sampling_rate)
    if hasattr(recording, "get_all_samples"):  # `torchcodec.decoders.AudioDecoder`, returned by datasets 4
        decoded = recording.get_all_samples()
        samples = mix_channels(decoded.data.detach().cpu().numpy().T, "the recording")
        return to_source(samples, sampling_rate, decoded.sample_rate)
    if hasattr(recording, "read"):
        if recording.seekable():  # files are read twice: for the length, and for the samples
            recording.seek(0)
        data = recording.read()
        if not isinstance(data, bytes):
            raise AudioError('the recording is a file opened in text mode; open the file with mode "rb"')
        return data
    if _is_pair(recording):
        samples, rate = recording if isinstance(recording[1], Real) else recording[::-1]
        if given_rate not in (None, rate):
            raise AudioError(
                f"sampling_rate is {given_rate} Hz, but the recording has {rate} Hz; give only one of the rates"
            )
        return to_source(samples, sampling_rate, rate)
    if not hasattr(recording, "__array__"):
        raise AudioError(
            f"a recording must not have the type {type(recording).__name__}; give a path, a URL, bytes, an array, "
            "(array, rate) or a row of datasets"
        )
    rate = sampling_rate if given_rate is None else _checked_rate(given_rate)
    return resample(to_waveform(recording), rate, sampling_rate)


def to_waveform(samples: Any) -> np.ndarray:
    """Converts samples to float32, shape = (samples,), in [-1, 1].

    Scales integers by the range of their type. Accepts a little clipping (up to `MAX_PEAK`).

    Args:
        samples: array or tensor, shape = (samples,), (1, samples) or (samples, 1).

    Raises:
        AudioError: if there are several channels or no samples, or samples are not finite or have an unknown scale.
    """
    if hasattr(samples, "detach"):  # a tensor; NumPy supports neither GPU tensors nor bfloat16
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    array = np.asarray(samples)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise AudioError(
            f"a waveform must have one dimension (samples,), got shape {array.shape}; average the channels"
        )
    if len(array) < 2:
        raise AudioError("the waveform: only one sample" if len(array) else "the waveform: no samples")
    if np.issubdtype(array.dtype, np.floating):
        peak = float(np.abs(array).max())
        if not np.isfinite(peak):
            raise AudioError("the waveform: contains samples that are not finite")
        if peak > MAX_PEAK:
            raise AudioError(f"the waveform: {out_of_scale(peak)}")
        return np.ascontiguousarray(array, dtype=np.float32)
    return _scale_integers(array)


def _scale_integers(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype not in (np.int8, np.int16, np.int32):
        raise AudioError(
            f"the waveform: samples of type {array.dtype} have no known scale; give int16, or floats in [-1, 1]"
        )
    scale = float(1 << (8 * array.dtype.itemsize - 1))
    # 16-bit samples in a wider type would become almost silent.
    if array.dtype == np.int32 and 0 < np.abs(array.astype(np.int64)).max() <= 1 << 15:
        raise AudioError("the waveform: int32 samples in the range of 16 bits; give int16, or floats in [-1, 1]")
    return (array / scale).astype(np.float32)


def _source_of_row(row: Mapping[str, Any], sampling_rate: int) -> str | bytes | np.ndarray:
    for name in SAMPLES:
        if row.get(name) is not None:
            if row.get("sampling_rate") is None:
                raise AudioError(f'a recording with {name!r} also needs "sampling_rate", in Hz')
            samples = row[name] if hasattr(row[name], "__array__") else np.asarray(row[name])
            return to_source(samples, sampling_rate, row["sampling_rate"])
    for name in CONTENTS:
        if row.get(name) is not None:
            return to_source(row[name], sampling_rate)
    if row.get("audio") is not None:
        return to_source(row["audio"], sampling_rate)
    raise AudioError(
        f'a row without a recording: the keys are {", ".join(map(str, row)) or "none"}; a row needs "audio", or '
        '"array" and "sampling_rate", or "bytes", or "path"'
    )


def _is_pair(value: Any) -> bool:
    """Returns whether a value is a pair of samples and rate, in either order."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return any(hasattr(one, "__array__") and _is_number(other) for one, other in (value, value[::-1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_rate(rate: Any) -> int:
    if not _is_number(rate) or not float(rate).is_integer() or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"a sampling rate must be a whole number of Hz, {MIN_RATE:,} to {MAX_RATE:,}, not {rate!r}")
    return int(rate)
