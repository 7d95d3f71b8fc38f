"""What goes into a batch, and what comes of a request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .segments import Segment


@dataclass(frozen=True)
class Transcript:
    """A result.

    Args:
        index: position of the request.
        text: what was said; empty if it failed, or nothing was said.
        seconds: of audio.
        error: why it failed; `None` if it did not.
        segments: the stretches that were decoded, in order; one, the whole recording, without voice detection.
    """

    index: int
    text: str = ""
    seconds: float = 0.0
    error: str | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def looped(self) -> bool:
        """Whether a loop was cut from the text."""
        return any(segment.looped for segment in self.segments)


@dataclass(frozen=True)
class Piece:
    """What is decoded at once: a request, or a segment of its recording.

    Args:
        index: of the request.
        start, end: in the recording, in seconds.
        pieces: number of pieces of the request.
        waveform: shape = (samples,); `None` where the recordings are still to be loaded.
    """

    index: int
    start: float
    end: float
    pieces: int = 1
    waveform: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start
