"""Measurements of a recording in one pass: levels, clipping, spectrum, channels, speech, and a hash of the samples."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from ..audio.decoders import Block
from ..audio.inputs import mix_channels
from ..audio.resampling import resample
from ..audio.waveform import SAMPLE_RATE, AudioError, read_blocks
from .repeated_sound import find_repetition

if TYPE_CHECKING:
    from ..audio.vad import VoiceDetector

FRAME = 0.02  # seconds; frame of the levels
WINDOW = 0.25  # seconds; spectra have at least this length, for a resolution of 4 Hz
QUIET = -120.0  # dBFS; levels below are raised to it; 22 dB below the noise of 16 bits
ACTIVE_RANGE = 35.0  # dB below the level of speech; louder frames are active
MAX_DELAY = 0.025  # seconds between two microphones that hear one speaker: 8 m
FADE = 0.005  # seconds before and after a gap, where its edges are measured
GAP = 0.01  # seconds; shorter runs of equal samples occur in coarsely quantised speech
GAP_EDGE = -20.0  # dB relative to the level of speech; both edges of a gap inside speech are louder
MAX_GAIN, SPEECH_PEAK = 1000.0, 0.5  # largest gain before VAD, and largest sample after it
MIN_WINDOWS, TONE_PROMINENCE = 4, 15.0  # windows in which a tone must be, and dB above its neighbours
FINGERPRINT_POINTS = 48
SMOOTH = np.array([1, 4, 6, 4, 1]) / 16  # weights of neighbouring frames in a fingerprint
FINGERPRINT_RANGE = 20.0  # dB below the loudest frame
EDGE_ENERGY = 0.02  # share of the energy before and after the sounding part
CLIP_RUN = 3  # equal samples at the peak
EDGE_BAND = (100.0, 600.0)  # Hz below an edge of the spectrum, where the content next to it is measured
EDGE_WIDTH = 0.3  # of the edge's frequency: transition band of a short resampling filter
EDGE_DROP, EMPTY = 20.0, 55.0  # dB from this band to all above, and from the loudest band to all above
MIN_EDGE, MAX_EDGE = 1500.0, 0.72  # Hz, and share of half the sampling rate, between which an edge is searched


@dataclass
class Measurement:
    """Properties of a recording.

    Args:
        source: path, URL or address.
        seconds, rate, channels: length, sampling rate in Hz, number of channels.
        digest: hash of the samples, as 16 bits, mono, without zeros at both ends.
        peak: largest absolute sample.
        level: RMS of the loud frames (95th percentile of frames of 20 ms), dBFS.
        quiet_level: 10th percentile of the frames, dBFS.
        spread: difference between the 95th and 5th percentile of the frames, dB.
        edge_levels: level of the first and of the last frame, dBFS.
        clipped: share of samples in runs of equal samples at the peak.
        flat_top: share of samples above 70 % of the peak of their frame, in the loudest tenth of the frames; 0.5 for a
            sine, above for waves that a lossy codec has clipped.
        offset: mean of the samples.
        gap_seconds: total length of runs of equal samples inside sound; gaps: their number. Both are 0 if pauses have
            longer digital silence.
        repeated: seconds of the longest part of the sound that is repeated exactly.
        active_seconds: time in frames that are at most `ACTIVE_RANGE` below `level`.
        lead, tail, pause: seconds before the first and after the last sound or speech, and the longest pause between.
        speech_seconds, speech_probability: length of speech, and highest probability of speech in a window of 32 ms;
            `None` without VAD.
        bandwidth: frequency above which the spectrum is empty, Hz; `None` if it has no edge.
        flatness: geometric by arithmetic mean of the power spectrum; 1 for white noise.
        tone: frequency in Hz and level in dBFS of a constant tone; `None` without one.
        dead_channel: number of a channel without signal, counted from 1; `None` if there is none.
        correlation: correlation of the first two channels; `None` for mono.
        similarity: their largest correlation over shifts of up to `MAX_DELAY`; `None` for mono.
        fingerprint: unit vector that is similar for copies with other gain, codec or padding.
        error: why the recording is unusable; the other values are then meaningless.
    """

    source: str
    seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    digest: str = ""
    peak: float = 0.0
    level: float = QUIET
    quiet_level: float = QUIET
    spread: float = 0.0
    edge_levels: tuple[float, float] = (QUIET, QUIET)
    clipped: float = 0.0
    flat_top: float = 0.0
    offset: float = 0.0
    gap_seconds: float = 0.0
    gaps: int = 0
    repeated: float = 0.0
    active_seconds: float = 0.0
    lead: float = 0.0
    tail: float = 0.0
    pause: float = 0.0
    speech_seconds: float | None = None
    speech_probability: float | None = None
    bandwidth: float | None = None
    flatness: float = 0.0
    tone: tuple[float, float] | None = None
    dead_channel: int | None = None
    correlation: float | None = None
    similarity: float | None = None
    fingerprint: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    error: str | None = None

    @property
    def sounding_seconds(self) -> float:
        """Time of speech; time of sound without VAD, or if VAD finds no speech (`no-speech` says if there is none)."""
        return self.speech_seconds or self.active_seconds


def measure_recording(source: str, detector: VoiceDetector | None = None) -> Measurement:
    """Decodes and measures a recording with little memory.

    Args:
        source: path, URL, part of a recording or member of an archive.
        detector: finds speech; `None` measures sound instead.
    """
    try:
        blocks = read_blocks(source)
        first, rate = next(blocks)
        return _Meter(source, first, rate, detector).measure(chain([(first, rate)], blocks))
    except AudioError as error:
        return Measurement(source, error=str(error).removeprefix(f"{source}: "))


def decibels(power: np.ndarray | float) -> np.ndarray:
    """Returns 10 log10 of a power, at least `QUIET`."""
    return 10 * np.log10(np.maximum(power, 10 ** (QUIET / 10)))


class _Meter:
    """Sums over the blocks of a recording."""

    def __init__(self, source: str, first: np.ndarray, rate: int, detector: VoiceDetector | None):
        self.result = Measurement(source, rate=rate, channels=first.shape[1])
        self.detector = detector
        self.frame = max(1, round(FRAME * rate))
        self.window = 1 << math.ceil(math.log2(WINDOW * rate))
        self.hann = _hann(self.window)
        self.samples, self.total, self.loud_frames, self.flat_top = 0, 0.0, 0, 0.0
        self.block_peaks: list[tuple[float, int]] = []  # peak, and samples in flat runs at this peak
        self.started, self.zeros = False, 0  # whether a sample was not 0, and zeros since the last
        self.digest = hashlib.blake2b(digest_size=16)
        self.powers: list[np.ndarray] = []  # mean square of each frame
        self.bright: list[np.ndarray] = []  # mean square of the differences of its samples
        self.gaps: list[tuple[float, float]] = []  # seconds, and mean square at the quieter edge
        self.repetitions: list[tuple[float, float]] = []  # seconds, and mean square
        self.spectrum = np.zeros(self.window // 2 + 1)
        self.weakest = np.full_like(self.spectrum, np.inf)
        self.windows = 0
        self.spans: list[tuple[float, float]] = []
        self.probability = 0.0

    def measure(self, blocks: Iterator[Block]) -> Measurement:
        """Measures the blocks of the recording."""
        for block, _ in blocks:
            self._add(block)
        self._finish()
        return self.result

    def _add(self, block: np.ndarray) -> None:
        result = self.result
        if block.shape[1] > 1 and result.correlation is None:
            self._compare_channels(block)
        mono = mix_channels(block, result.source) if block.shape[1] > 1 else block[:, 0]
        samples = (mono * 32768).round().clip(-32768, 32767).astype("<i2")
        self._add_to_digest(samples)
        if (repetition := find_repetition(samples, result.rate)) is not None:
            self.repetitions.append(repetition)
        peak = max(-float(block.min()), float(block.max()))
        self.block_peaks.append((peak, _count_clipped(block, peak)))
        self.total += float(mono.sum(dtype=np.float64))
        start = self.samples / result.rate
        frames = len(mono) // self.frame
        if frames or not self.powers:  # a recording shorter than a frame is one frame
            size = self.frame if frames else len(mono)
            shaped = mono[: max(1, frames) * size].reshape(-1, size)
            self.powers.append(powers := np.einsum("ij,ij->i", shaped, shaped) / size)
            loud = np.abs(shaped[powers >= np.percentile(powers, 90)])
            self.flat_top += float(np.count_nonzero(loud > 0.7 * loud.max(axis=1, keepdims=True))) / size
            self.loud_frames += len(loud)
            change = np.diff(shaped, axis=1)
            self.bright.append(np.einsum("ij,ij->i", change, change) / size)
        self._add_spectra(mono)
        self._add_gaps(mono)
        if self.detector is not None:
            # Silero does not find quiet speech; noise stays noise at any level.
            wave = resample(mono, result.rate, SAMPLE_RATE) * min(MAX_GAIN, SPEECH_PEAK / (peak or 1.0))
            probabilities = self.detector.probabilities(wave)
            self.probability = max(self.probability, *probabilities)
            regions = self.detector.regions(probabilities, len(wave))
            self.spans += [(start + first / SAMPLE_RATE, start + last / SAMPLE_RATE) for first, last in regions]
        self.samples += len(mono)

    def _add_to_digest(self, samples: np.ndarray) -> None:
        """Adds samples to the hash, without zeros at the start and the end of the recording."""
        sound = np.flatnonzero(samples)
        if not len(sound):
            self.zeros += len(samples)
            return
        if self.started:
            self.digest.update(bytes(2 * self.zeros))
        first = 0 if self.started else int(sound[0])
        self.digest.update(samples[first : int(sound[-1]) + 1].tobytes())
        self.started, self.zeros = True, len(samples) - int(sound[-1]) - 1

    def _add_spectra(self, mono: np.ndarray) -> None:
        count = len(mono) // self.window
        if count:
            hop = self.window // (2 if count < 2 * MIN_WINDOWS else 1)  # short recordings have few windows
            shaped = np.lib.stride_tricks.sliding_window_view(mono, self.window)[::hop]
        elif self.windows:
            return
        else:
            shaped = np.pad(mono, (0, self.window - len(mono)))[None]
        for start in range(0, len(shaped), 64):  # small parts stay in the processor's cache
            power = np.abs(np.fft.rfft(shaped[start : start + 64] * self.hann)) ** 2
            self.spectrum += power.sum(axis=0)
            np.minimum(self.weakest, power.min(axis=0), out=self.weakest)
        self.windows += len(shaped)

    def _add_gaps(self, mono: np.ndarray) -> None:
        """Finds runs of equal samples."""
        rate = self.result.rate
        changes = np.flatnonzero(mono[1:] != mono[:-1])
        if len(changes) < 2:
            return
        lengths = np.diff(changes)
        edge = max(2, round(FADE * rate))
        for index in np.flatnonzero(lengths > GAP * rate):
            first, last = int(changes[index]) + 1, int(changes[index + 1]) + 1
            before, after = mono[max(0, first - edge) : first], mono[last : last + edge]
            if len(before) == len(after) == edge:
                edges = [float(np.mean(part * part)) for part in (before, after)]
                self.gaps.append(((last - first) / rate, min(edges)))

    def _compare_channels(self, block: np.ndarray) -> None:
        energies = np.einsum("ij,ij->j", np.diff(block, axis=0), np.diff(block, axis=0))
        loudest = float(energies.max())
        if not loudest:
            return
        weakest = int(energies.argmin())
        if energies[weakest] < 1e-5 * loudest:
            self.result.dead_channel = weakest + 1
            return
        left, right = (np.diff(block[:, channel]) for channel in (0, 1))
        norm = math.sqrt(float(left @ left) * float(right @ right)) or 1.0
        size = 1 << (2 * len(left)).bit_length()
        shifted = np.fft.irfft(np.fft.rfft(left, size) * np.conj(np.fft.rfft(right, size)), size) / norm
        delay = round(MAX_DELAY * self.result.rate)
        self.result.correlation = float(shifted[0])
        self.result.similarity = float(np.abs(np.concatenate([shifted[: delay + 1], shifted[-delay:]])).max())

    def _finish(self) -> None:
        result = self.result
        result.seconds = self.samples / result.rate
        result.digest = self.digest.hexdigest()
        result.peak = max(peak for peak, _ in self.block_peaks)
        result.offset = self.total / self.samples
        result.clipped = sum(flat for peak, flat in self.block_peaks if peak >= 0.98 * result.peak) / self.samples
        result.flat_top = self.flat_top / self.loud_frames
        powers = np.concatenate(self.powers)
        levels = decibels(powers)
        low, tenth, high = np.percentile(levels, (5, 10, 95))
        result.level, result.quiet_level, result.spread = float(high), float(tenth), float(high - low)
        result.edge_levels = float(levels[0]), float(levels[-1])
        active = levels > max(high - ACTIVE_RANGE, QUIET)
        result.active_seconds = min(float(np.count_nonzero(active)) * FRAME, result.seconds)
        edge = 10 ** ((high + GAP_EDGE) / 10)
        gaps = [seconds for seconds, power in self.gaps if power > edge]
        # Pauses without any noise are those of synthetic or gated sound; there, gaps between sounds are no faults.
        silence = float(np.count_nonzero(powers == 0)) * FRAME - sum(gaps)
        if sum(gaps) >= silence:
            result.gap_seconds, result.gaps = sum(gaps), len(gaps)
        result.repeated = max((seconds for seconds, power in self.repetitions if power > edge), default=0.0)
        spans = self.spans
        if self.detector is None:
            spans = _runs(active)
        else:
            result.speech_seconds = sum(end - start for start, end in spans)
            result.speech_probability = self.probability
        if spans:
            result.lead, result.tail = spans[0][0], max(0.0, result.seconds - spans[-1][1])
            pauses = (after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False))
            result.pause = max(pauses, default=0.0)
        self._finish_spectrum()
        result.fingerprint = _fingerprint(levels, decibels(np.concatenate(self.bright)))

    def _finish_spectrum(self) -> None:
        result = self.result
        if result.peak == 0:
            return
        power = self.spectrum / self.windows
        bands = _bands(power, 8)[1:-1] + 1e-20
        result.flatness = float(np.exp(np.mean(np.log(bands))) / np.mean(bands))
        hertz = result.rate / self.window
        result.bandwidth = _edge(power, hertz)
        if self.windows >= MIN_WINDOWS:
            result.tone = self._find_tone(hertz)

    def _find_tone(self, hertz: float) -> tuple[float, float] | None:
        """Finds the strongest line in the weakest power of each frequency; only a constant tone never stops."""
        weakest = 10 * np.log10(self.weakest + 1e-12)
        prominence = weakest - _local_median(weakest, round(200 / hertz))
        prominence[: math.ceil(30 / hertz)] = 0
        prominence[-2:] = 0
        lines = np.flatnonzero(prominence > TONE_PROMINENCE)
        if not len(lines):
            return None
        best = int(lines[np.argmax(weakest[lines])])
        # A sine of amplitude a has the power a^2 / 2, and the peak (a * sum(hann) / 2)^2.
        return best * hertz, float(decibels(self.weakest[best] / (self.hann.sum() ** 2 / 2)))


@functools.lru_cache(maxsize=8)
def _hann(size: int) -> np.ndarray:
    return np.hanning(size).astype(np.float32)


def _count_clipped(block: np.ndarray, peak: float) -> int:
    """Returns the number of samples in runs of equal samples at the peak, in the channel with most of them."""
    most = 0
    for channel in block.T:
        at_peak = np.abs(channel) >= 0.98 * peak
        if peak and np.count_nonzero(at_peak) >= CLIP_RUN:
            same = at_peak[1:] & (channel[1:] == channel[:-1])
            most = max(most, int(np.count_nonzero(same[1:] & same[:-1])))
    return most


def _runs(active: np.ndarray) -> list[tuple[float, float]]:
    """Returns start and end of the runs of active frames, in seconds."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    return [(start * FRAME, end * FRAME) for start, end in changes.reshape(-1, 2).tolist()]


def _bands(power: np.ndarray, size: int) -> np.ndarray:
    """Returns the mean power of bands of `size` bins."""
    count = len(power) // size
    return power[: count * size].reshape(count, size).mean(axis=1)


def _edge(power: np.ndarray, hertz: float) -> float | None:
    """Returns the frequency above which a spectrum is empty; `None` without a sharp edge."""
    bins = max(1, round(50 / hertz))
    bands, width = decibels(_bands(power, bins)), bins * hertz
    above = np.maximum.accumulate(bands[::-1])[::-1]  # loudest band from each band upwards
    near, far = (round(distance / width) for distance in EDGE_BAND)
    centers = np.arange(max(round(MIN_EDGE / width), far), int(MAX_EDGE * len(bands)))
    if not len(centers):
        return None
    sums = np.concatenate([[0.0], np.cumsum(bands)])
    below = (sums[centers - near] - sums[centers - far]) / (far - near)
    rest = above[np.minimum((centers * (1 + EDGE_WIDTH)).astype(int), len(bands) - 1)]
    drops = np.where(rest < bands.max() - EMPTY, np.maximum(below - rest, 0), 0)
    best = int(np.argmax(drops))
    if drops[best] < EDGE_DROP:
        return None
    middle = (below[best] + rest[best]) / 2
    return float((np.flatnonzero(bands > middle)[-1] + 1) * width)


def _local_median(values: np.ndarray, size: int) -> np.ndarray:
    """Returns the median of the part of `size` values around each value; parts do not overlap."""
    medians = np.median(values[: len(values) // size * size].reshape(-1, size), axis=1)
    return medians[np.minimum(np.arange(len(values)) // size, len(medians) - 1)]


def _fingerprint(levels: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Returns the contour of level and brightness of the sounding part as a unit vector."""
    power = 10 ** (levels / 10)
    # Shares of the energy: a level from which a frame sounds would move by several frames for a padded copy.
    first, last = np.interp((EDGE_ENERGY, 1 - EDGE_ENERGY), np.cumsum(power) / power.sum(), np.arange(len(levels)))
    if last - first < 8:
        return np.zeros(0, np.float32)
    part = slice(int(first), int(last) + 2)
    places = np.linspace(first, last, FINGERPRINT_POINTS)
    contours = []
    for values in (levels, bright - levels):
        values = np.convolve(np.pad(values, 2, mode="edge"), SMOOTH, "valid")  # copies may be shifted by half a frame
        contour = np.interp(places, np.arange(len(levels)), np.maximum(values, values[part].max() - FINGERPRINT_RANGE))
        contours.append(contour - contour.mean())
    vector = np.concatenate(contours)
    return (vector / max(float(np.linalg.norm(vector)), 1e-9)).astype(np.float32)
