"""Voice activity detection: splits a long recording into segments that the model can decode."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from .waveform import SAMPLE_RATE

MIN_SPEECH = 0.1  # seconds; shorter sounds are clicks
PADDING = 0.2  # seconds kept before and after speech, because soft speech is not detected
MAX_PAUSE = 5.0  # seconds; longer pauses always separate segments
ENERGY_WINDOW = 0.1  # seconds; window of the energy that defines the quietest point
ENERGY_SHIFT = 0.01  # seconds between two windows

Span = tuple[int, int]  # start and end, in samples


class VoiceDetector:
    """Detects speech with Silero VAD and builds segments.

    Splits a speech region that is too long at the quietest point. Merges neighbouring regions up to the maximum length
    and separates segments at the longest pause. The model is part of the package `silero-vad`; nothing is downloaded.

    Args:
        max_seconds: maximum length of a segment.
        threshold: minimum speech probability of a window of 32 ms.

    Raises:
        ValueError: if `max_seconds` is below 1.
    """

    def __init__(self, max_seconds: float = 30.0, threshold: float = 0.5):
        if max_seconds < 1:
            raise ValueError(f"max_seconds is {max_seconds:g} s; the maximum length of a segment must be at least 1 s")
        self.max_seconds = max_seconds
        self.threshold = threshold
        threads = torch.get_num_threads()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the warning that the model supports only 16 kHz
                import silero_vad

                self._model = silero_vad.load_silero_vad(sequence=True)
        finally:
            torch.set_num_threads(threads)  # silero_vad sets it to 1 for the whole process
        self._timestamps = silero_vad.get_speech_timestamps_from_probs

    def speech_regions(self, waveform: np.ndarray) -> list[Span]:
        """Detects regions of speech, separated by silences of 100 ms or more.

        Args:
            waveform: shape = (samples,), at 16 kHz.
        """
        return self.regions(self.probabilities(waveform), len(waveform))

    def probabilities(self, waveform: np.ndarray) -> list[float]:
        """Returns the speech probability of each window of 32 ms; for `waveform` see `speech_regions`."""
        return self._model.audio_forward(waveform).tolist()

    def regions(self, probabilities: list[float], num_samples: int) -> list[Span]:
        """Returns the regions of speech of a waveform with `num_samples` samples from its `probabilities`."""
        found = self._timestamps(
            probabilities,
            threshold=self.threshold,
            min_speech_duration_ms=1000 * MIN_SPEECH,
            speech_pad_ms=0,
            audio_length_samples=num_samples,
        )
        return [(int(region["start"]), int(region["end"])) for region in found]

    def segments(self, waveform: np.ndarray) -> list[Span]:
        """Returns segments of at most `max_seconds`, in order, that contain all speech of a recording.

        Args:
            waveform: shape = (samples,), at 16 kHz.
        """
        padding = round(PADDING * SAMPLE_RATE)
        longest = int(self.max_seconds * SAMPLE_RATE) - 2 * padding
        regions = [part for span in self.speech_regions(waveform) for part in split(waveform, span, longest)]
        return pad(merge(regions, longest, round(MAX_PAUSE * SAMPLE_RATE)), padding, len(waveform))


def split(waveform: np.ndarray, span: Span, longest: int) -> list[Span]:
    """Splits a speech region at the quietest points into parts of at most `longest` samples."""
    start, end = span
    parts = []
    while end - start > longest:
        cut = quietest_point(waveform, start + longest // 2, min(start + longest, end - longest // 4))
        parts.append((start, cut))
        start = cut
    return [*parts, (start, end)]


def quietest_point(waveform: np.ndarray, low: int, high: int) -> int:
    """Returns the sample between `low` and `high` at the center of the 100 ms with the lowest mean energy."""
    half = round(ENERGY_WINDOW * SAMPLE_RATE / 2)
    first = max(0, low - half)
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform[first : high + half], dtype=np.float64))])
    points = np.arange(low, high + 1, round(ENERGY_SHIFT * SAMPLE_RATE))
    left = np.maximum(points - half - first, 0)
    right = np.minimum(points + half - first, len(energy) - 1)
    return int(points[np.argmin((energy[right] - energy[left]) / (right - left))])


def merge(regions: list[Span], longest: int, max_pause: int) -> list[Span]:
    """Merges neighbouring regions into spans of at most `longest` samples without pauses longer than `max_pause`.

    A full span ends at the longest pause in its second half, to keep sentences together.
    """
    merged: list[Span] = []
    current: list[Span] = []
    for region in regions:
        if current and region[0] - current[-1][1] > max_pause:
            merged.append((current[0][0], current[-1][1]))
            current = []
        current.append(region)
        while current[-1][1] - current[0][0] > longest:
            middle = current[0][0] + longest // 2
            late = [index for index in range(1, len(current)) if current[index - 1][1] >= middle]
            cut = max(late or [len(current) - 1], key=lambda index: current[index][0] - current[index - 1][1])
            merged.append((current[0][0], current[cut - 1][1]))
            current = current[cut:]
    if current:
        merged.append((current[0][0], current[-1][1]))
    return merged


def pad(spans: list[Span], padding: int, length: int) -> list[Span]:
    """Extends spans by `padding` samples on both sides, but at most to the middle of the pause between two spans."""
    padded = []
    for index, (start, end) in enumerate(spans):
        previous_end = spans[index - 1][1] if index else None
        next_start = spans[index + 1][0] if index + 1 < len(spans) else None
        earliest = 0 if previous_end is None else previous_end + (start - previous_end) // 2
        latest = length if next_start is None else end + (next_start - end) // 2
        padded.append((max(start - padding, earliest), min(end + padding, latest)))
    return padded
