"""Segments of a recording, and joining of their texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .alignment import Word

# Scripts without spaces between words: CJK punctuation, kana, Han (with extensions), full-width forms; Thai, Lao,
# Burmese, Khmer.
UNSPACED_RANGES = (
    (0x2E80, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF), (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),
)  # fmt: skip
UNSPACED_PUNCTUATION = (
    "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\u300b\u300d\u300f\u3011"  # closing punctuation in CJK
)


@dataclass(frozen=True)
class Segment:
    """A decoded segment of a recording.

    Args:
        start, end: in the recording, in seconds.
        text: recognised text; empty without speech.
        looped: whether a loop at the end of the text was cut.
        words: with word times, the words of the text.
        confidence: mean of the words' confidence, from 0 to 1; `None` if unknown.
        contradicted: whether the CTC head contradicts the text (of the LLM, if the guard has replaced it).
    """

    start: float
    end: float
    text: str = ""
    looped: bool = False
    words: tuple[Word, ...] = ()
    confidence: float | None = None
    contradicted: bool = False


def join_texts(texts: Iterable[str]) -> str:
    """Joins consecutive texts: with a space, except within a script without spaces between words."""
    joined = ""
    for text in texts:
        text = text.strip()
        if not text:
            continue
        joined += f" {text}" if joined and is_spaced(joined, text) else text
    return joined


def is_spaced(text: str, following: str) -> bool:
    """Whether a space is written between two consecutive texts, which are not empty."""
    return not is_unspaced(text[-1]) or not (is_unspaced(following[0]) or text[-1] in UNSPACED_PUNCTUATION)


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return any(first <= ord(character) <= last for first, last in UNSPACED_RANGES)
