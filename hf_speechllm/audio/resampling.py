"""Resampling, block by block: with the original's resampler (torchaudio) if that is cheap, otherwise with FFmpeg."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

# Maximum size of torchaudio's filter bank: 4 MB of float32. All common rates need less (the largest is 11,025 Hz to
# 16 kHz with 0.3 million values). 48,001 Hz, without a common factor, would need 768 million values.
MAX_FILTER_VALUES = 1 << 20
FILTER_WIDTH, ROLLOFF = 6, 0.99  # torchaudio's defaults: zero crossings on each side, and cutoff as a share of Nyquist
FFMPEG_TAIL = 64  # samples at the lower of the two rates; twice the length of FFmpeg's filter


def resample(waveform: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """Resamples a waveform.

    Args:
        waveform: float32, shape = (samples,).
        rate: rate of the waveform in Hz.
        sampling_rate: rate of the result in Hz.

    Returns:
        float32, shape = (ceil(samples * sampling_rate / rate),).
    """
    return np.concatenate(list(resample_blocks([waveform], rate, sampling_rate)))


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Resamples a waveform given in blocks; for arguments and result see `resample`.

    Memory and time of the original's resampler, torchaudio's windowed sinc, grow with the product of both rates after
    division by their greatest common divisor. Above a limit, FFmpeg interpolates between 1024 filters instead.
    """
    common = math.gcd(rate, sampling_rate)
    step, new = rate // common, sampling_rate // common
    half = math.ceil(FILTER_WIDTH * step / (min(step, new) * ROLLOFF))
    if step == new:
        return iter(blocks)
    if new * (step + 2 * half) <= MAX_FILTER_VALUES:
        return _resample_as_original(blocks, step, new, half)
    return _resample_with_ffmpeg(blocks, rate, sampling_rate)


@functools.lru_cache(maxsize=16)
def _resampler(step: int, new: int):
    from torchaudio.transforms import Resample

    return Resample(step, new)


def _resample_as_original(blocks: Iterable[np.ndarray], step: int, new: int, half: int) -> Iterator[np.ndarray]:
    """Resamples `step` samples to `new` samples with torchaudio.

    Args:
        half: number of samples that the filter covers on each side.
    """
    import torch

    margin = (half // step + 2) * step  # a multiple of `step`, so a cut does not shift the result
    held, start = np.zeros(0, np.float32), 0  # samples still needed, and index of the first to resample

    def resampled(end: int | None) -> np.ndarray:
        result = _resampler(step, new)(torch.from_numpy(held)).numpy()
        return result[start // step * new : None if end is None else end // step * new]

    for block in blocks:
        end = (len(held) - margin) // step * step
        if end > start:
            yield resampled(end)
            cut = max(0, end - margin)
            held, start = held[cut:], end - cut
        held = np.concatenate([held, block]) if len(held) else np.ascontiguousarray(block)
    yield resampled(None)


def _resample_with_ffmpeg(blocks: Iterable[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    import av
    from av.filter import Graph

    graph = Graph()
    source = graph.add(
        "abuffer", sample_rate=str(rate), sample_fmt="flt", channel_layout="mono", time_base=f"1/{rate}"
    )
    graph.link_nodes(source, graph.add("aresample", f"{sampling_rate}:linear_interp=1"), graph.add("abuffersink"))
    graph.configure()

    def pull() -> Iterator[np.ndarray]:
        while True:
            try:
                yield graph.pull().to_ndarray()[0]
            except (av.BlockingIOError, av.EOFError):
                return

    samples = given = 0
    for block in blocks:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block)[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, samples
        graph.push(frame)
        samples += len(block)
        for result in pull():
            given += len(result)
            yield result
    # FFmpeg holds back samples until the filter is full; for a short waveform, all samples. Silence flushes them.
    tail = np.zeros((1, FFMPEG_TAIL * (1 + rate // sampling_rate)), np.float32)
    frame = av.AudioFrame.from_ndarray(tail, format="flt", layout="mono")
    frame.sample_rate, frame.pts = rate, samples
    graph.push(frame)
    graph.push(None)
    rest = np.concatenate(list(itertools.chain(pull(), [np.zeros(0, np.float32)])))
    yield rest[: -(-samples * sampling_rate // rate) - given]
