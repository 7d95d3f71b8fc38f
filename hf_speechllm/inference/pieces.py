"""Data classes of decoding: pieces of a batch, and transcripts of requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .alignment import Word
from .segments import Segment, is_spaced


@dataclass(frozen=True)
class Transcript:
    """Result of a request.

    Args:
        index: index of the request.
        text: recognised text; empty without speech, or after an error.
        seconds: duration of the audio.
        error: error message; `None` without error.
        segments: decoded segments in order; without voice detection, one segment for the whole recording.
    """

    index: int
    text: str = ""
    seconds: float = 0.0
    error: str | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def words(self) -> tuple[Word, ...]:
        """Words of all segments, with times in the recording; empty without word times."""
        words: list[Word] = []
        for segment in self.segments:
            for word in segment.words:
                if word is segment.words[0] and words:
                    word = replace(word, spaced=is_spaced(words[-1].text, word.text))
                words.append(word)
        return tuple(words)

    @property
    def looped(self) -> bool:
        """Whether a loop was cut from the text."""
        return any(segment.looped for segment in self.segments)


@dataclass(frozen=True)
class Piece:
    """One row of a batch: a whole request, or a segment of the recording.

    Args:
        index: index of the request.
        start, end: in the recording, in seconds.
        pieces: number of pieces of the request.
        waveform: shape = (samples,); `None` before loading.
    """

    index: int
    start: float
    end: float
    pieces: int = 1
    waveform: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end - self.start
