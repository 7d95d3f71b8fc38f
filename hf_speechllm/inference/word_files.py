"""Formats of word times: subtitles with short cues, CTM, TextGrid, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from .alignment import Word
from .segments import Segment

MAX_CUE_SECONDS, MAX_LINE, MAX_LINES = 7.0, 42, 2
MAX_PAUSE = 1.0  # seconds; a longer pause ends a cue
SENTENCE_ENDS = (".", "?", "!", "。", "？", "！", "…")


def cues(words: Sequence[Word]) -> list[Segment]:
    """Groups words into cues of at most 7 s and 2 lines of 42 characters.

    A cue ends with a sentence or before a long pause. The text of a cue has a line feed between its lines.
    """
    result: list[Segment] = []
    group: list[Word] = []
    for word in chain.from_iterable(map(_parts, words)):
        if group and not _fits(group, word):
            result.append(_cue(group))
            group = []
        group.append(word)
    return [*result, _cue(group)] if group else result


def _parts(word: Word) -> Iterator[Word]:
    """Yields parts of a word, such as a long address, that fit into a cue; times follow the number of characters."""
    size, rate = MAX_LINE * MAX_LINES, (word.end - word.start) / len(word.text)
    for at in range(0, len(word.text), size):
        part = word.text[at : at + size]
        start = word.start + at * rate
        yield replace(word, text=part, start=start, end=start + len(part) * rate, spaced=word.spaced and not at)


def _fits(group: Sequence[Word], word: Word) -> bool:
    if word.start - group[-1].end > MAX_PAUSE or word.end - group[0].start > MAX_CUE_SECONDS:
        return False
    ended = group[-1].text.rstrip("\"'”’)」』").endswith(SENTENCE_ENDS)
    lines = _lines([*group, word])
    return len(lines) <= MAX_LINES and not (ended and len(lines) > 1)


def _cue(group: Sequence[Word]) -> Segment:
    # A single word may last longer than a cue.
    return Segment(group[0].start, min(group[-1].end, group[0].start + MAX_CUE_SECONDS), "\n".join(_lines(group)))


def _lines(words: Sequence[Word]) -> list[str]:
    lines = [""]
    for word in words:
        joined = f"{lines[-1]} {word.text}" if word.spaced and lines[-1] else lines[-1] + word.text
        if len(joined) > MAX_LINE and lines[-1]:
            lines.append("")
            joined = word.text
        while len(joined) > MAX_LINE:
            lines[-1], joined = joined[:MAX_LINE], joined[MAX_LINE:]
            lines.append("")
        lines[-1] = joined
    return lines


def ctm(id_: str, words: Sequence[Word]) -> Iterator[str]:
    """Yields lines of a NIST CTM file: ID, channel, start, duration, word, confidence."""
    name = "_".join(id_.split())
    for word in words:
        confidence = "" if word.confidence is None else f" {word.confidence:.3f}"
        yield f"{name} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text}{confidence}\n"


def textgrid(words: Sequence[Word], seconds: float) -> str:
    """Returns a TextGrid of Praat with one tier of words; pauses are empty intervals."""
    seconds = max(seconds, words[-1].end if words else 0.0)
    intervals: list[tuple[float, float, str]] = []
    position = 0.0
    for word in words:
        if word.end <= max(position, word.start):  # Praat refuses empty intervals
            continue
        if word.start > position:
            intervals.append((position, word.start, ""))
        intervals.append((max(position, word.start), word.end, word.text))
        position = word.end
    if seconds > position or not intervals:
        intervals.append((position, seconds, ""))
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {seconds:.3f}",
        "tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"',
        '        name = "words"', "        xmin = 0", f"        xmax = {seconds:.3f}",
        f"        intervals: size = {len(intervals)}",
    ]  # fmt: skip
    for number, (start, end, text) in enumerate(intervals, start=1):
        quoted = text.replace('"', '""')
        lines += [
            f"        intervals [{number}]:", f"            xmin = {start:.3f}", f"            xmax = {end:.3f}",
            f'            text = "{quoted}"',
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def word_rows(words: Sequence[Word]) -> list[dict[str, Any]]:
    """Returns JSON objects of words; an unknown probability is null."""
    return [
        {
            "word": word.text,
            "start": word.start,
            "end": word.end,
            **{
                name: None if (value := getattr(word, name)) is None else round(value, 4)
                for name in ("confidence", "ctc", "llm")
            },
        }
        for word in words
    ]
