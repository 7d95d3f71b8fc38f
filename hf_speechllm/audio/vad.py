"""Voice activity detection: a long recording in, segments that the model can take out."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from .waveform import SAMPLE_RATE

MIN_SPEECH = 0.1  # seconds; anything shorter is a click
PADDING = 0.2  # seconds kept before and behind speech, for what is too soft to be detected
MAX_PAUSE = 5.0  # seconds; speech on both sides of a longer one is not decoded together
ENERGY_WINDOW = 0.1  # seconds over which loudness is measured to find the quietest point
ENERGY_SHIFT = 0.01  # seconds between two such points

Span = tuple[int, int]  # start and end, in samples


class VoiceDetector:
    """Finds speech with Silero VAD and makes segments of it.

    Speech is split where a stretch of it is too long, at its quietest point; neighbouring stretches are merged while
    they fit, parted at the longest pause. The model comes with the package `silero-vad`; nothing is downloaded.

    Args:
        max_seconds: the longest segment.
        threshold: from which probability on a window of 32 ms is speech.

    Raises:
        ValueError: if `max_seconds` is shorter than a second.
    """

    def __init__(self, max_seconds: float = 30.0, threshold: float = 0.5):
        if max_seconds < 1:
            raise ValueError(f"the longest segment must be at least 1 s, not {max_seconds:g} s")
        self.max_seconds = max_seconds
        self.threshold = threshold
        threads = torch.get_num_threads()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its model takes 16 kHz only
                import silero_vad

                self._model = silero_vad.load_silero_vad(sequence=True)
        finally:
            torch.set_num_threads(threads)  # silero_vad sets it to 1 for the whole process
        self._timestamps = silero_vad.get_speech_timestamps_from_probs

    def speech(self, waveform: np.ndarray) -> list[Span]:
        """Stretches of speech, parted by silences of 100 ms or more.

        Args:
            waveform: shape = (samples,), at 16 kHz.
        """
        probabilities = self._model.audio_forward(waveform)
        found = self._timestamps(
            probabilities.tolist(),
            threshold=self.threshold,
            min_speech_duration_ms=1000 * MIN_SPEECH,
            speech_pad_ms=0,
            audio_length_samples=len(waveform),
        )
        return [(int(stretch["start"]), int(stretch["end"])) for stretch in found]

    def segments(self, waveform: np.ndarray) -> list[Span]:
        """Segments, in order, that hold all speech of a recording; none is longer than `max_seconds`.

        Args:
            waveform: shape = (samples,), at 16 kHz.
        """
        padding = round(PADDING * SAMPLE_RATE)
        longest = int(self.max_seconds * SAMPLE_RATE) - 2 * padding
        stretches = [piece for span in self.speech(waveform) for piece in split(waveform, span, longest)]
        return pad(merge(stretches, longest, round(MAX_PAUSE * SAMPLE_RATE)), padding, len(waveform))


def split(waveform: np.ndarray, span: Span, longest: int) -> list[Span]:
    """Splits a stretch of speech at its quietest points into parts of at most `longest` samples."""
    start, end = span
    parts = []
    while end - start > longest:
        cut = quietest_point(waveform, start + longest // 2, min(start + longest, end - longest // 4))
        parts.append((start, cut))
        start = cut
    return [*parts, (start, end)]


def quietest_point(waveform: np.ndarray, low: int, high: int) -> int:
    """The sample from `low` to `high` around which 100 ms hold the least energy."""
    half = round(ENERGY_WINDOW * SAMPLE_RATE / 2)
    first = max(0, low - half)
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform[first : high + half], dtype=np.float64))])
    points = np.arange(low, high + 1, round(ENERGY_SHIFT * SAMPLE_RATE))
    left = np.maximum(points - half - first, 0)
    right = np.minimum(points + half - first, len(energy) - 1)
    return int(points[np.argmin((energy[right] - energy[left]) / (right - left))])


def merge(stretches: list[Span], longest: int, max_pause: int) -> list[Span]:
    """Merges neighbours into spans of at most `longest` samples without pauses of more than `max_pause`.

    Where a span is full, it ends at the longest pause of its second half, so that sentences stay whole.
    """
    merged: list[Span] = []
    current: list[Span] = []
    for stretch in stretches:
        if current and stretch[0] - current[-1][1] > max_pause:
            merged.append((current[0][0], current[-1][1]))
            current = []
        current.append(stretch)
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
    """Lengthens spans by `padding` samples on both sides, or to the middle of the pause between two of them."""
    padded = []
    for index, (start, end) in enumerate(spans):
        before = spans[index - 1][1] if index else None
        behind = spans[index + 1][0] if index + 1 < len(spans) else None
        earliest = 0 if before is None else before + (start - before) // 2
        latest = length if behind is None else end + (behind - end) // 2
        padded.append((max(start - padding, earliest), min(end + padding, latest)))
    return padded
