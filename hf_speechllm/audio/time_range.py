"""Parts of recordings, addressed by a path or URL with a temporal fragment: `talk.flac#t=12.5,17.25`.

The syntax is that of W3C Media Fragments: first and last second, counted from the start of the recording; without the
last one, the part ends with the recording. Loading cuts the part; no file is copied.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .decoders import AudioError, Block

LATEST = 1e12  # seconds; addresses may have times of hundreds of digits, which are infinite as floats
OVERSHOOT = 0.1  # seconds by which a part may end after its recording: times in lists are rounded
_FRAGMENT = re.compile(r"#t=(?P<start>[0-9]+(?:\.[0-9]+)?)(?:,(?P<end>[0-9]+(?:\.[0-9]+)?))?\Z")


@dataclass(frozen=True)
class TimeRange:
    """A part of a recording.

    Args:
        start: in seconds.
        end: in seconds; `None` for the end of the recording.
    """

    start: float
    end: float | None = None

    def samples(self, total: int, rate: int, name: str) -> tuple[int, int]:
        """Returns the first sample and the sample after the last.

        Args:
            total: samples of the whole recording.
            rate: in Hz.
            name: of the part, for messages.

        Raises:
            AudioError: if the part is not inside the recording, or has no sample.
        """
        first, stop = self._bounds(rate)
        if first >= total or (self.end is not None and stop > total + OVERSHOOT * rate):
            raise AudioError(f"{name}: outside the recording, which has {total / rate:.2f} s; correct the times")
        stop = min(stop, total)
        if stop <= first:
            raise AudioError(f"{name}: no samples; correct the times")
        return first, stop

    def cut(self, blocks: Iterable[Block], name: str) -> Iterator[Block]:
        """Yields the samples of the part from the blocks of the whole recording; reads no further than needed.

        Raises:
            AudioError: see `samples`; possibly after some blocks.
        """
        position = rate = 0
        for block, rate in blocks:
            first, stop = self._bounds(rate)
            inside = block[max(0, first - position) : max(0, stop - position)]
            if len(inside):
                yield inside, rate
            position += len(block)
            if position >= stop:
                return
        if rate:
            self.samples(position, rate, name)

    def _bounds(self, rate: int) -> tuple[int, int]:
        first, stop = (min(time, LATEST) for time in (self.start, math.inf if self.end is None else self.end))
        return round(first * rate), round(stop * rate)


def add_time_range(source: str, start: float, end: float | None = None) -> str:
    """Returns the address of a part of a recording.

    Args:
        start: in seconds.
        end: in seconds; `None` for the end of the recording.

    Raises:
        AudioError: if the times are negative or not finite, the end is not after the start, or `source` is a part.
    """
    if split_time_range(source)[1] is not None:
        raise AudioError(f"{source}: is a part of a recording already; name the whole recording")
    if not (math.isfinite(start) and start >= 0 and (end is None or (math.isfinite(end) and end > start))):
        raise AudioError(f"{source}: from {start:g} to {end} s is not a part of a recording; correct the times")
    return f"{source}#t={_decimal(start)}" + ("" if end is None else f",{_decimal(end)}")


def split_time_range(source: str | os.PathLike[str]) -> tuple[str, TimeRange | None]:
    """Splits the address of a part into the address of the whole recording and the part; `None` without a part."""
    name = os.fspath(source)
    match = _FRAGMENT.search(name) if "#t=" in name else None
    if match is None:
        return name, None
    end = match["end"]
    return name[: match.start()], TimeRange(float(match["start"]), None if end is None else float(end))


def time_range_hint(source: str) -> str:
    """Returns what is wrong with the part in a name that looks like the address of a part; otherwise an empty text."""
    part = source.rpartition("#t=")[2]
    if "#t=" not in source or _FRAGMENT.search(source) is not None:
        return ""
    return f"; #t={part} is not a part of a recording: write #t=START or #t=START,END, in seconds"


def _decimal(seconds: float) -> str:
    """Formats seconds with a precision of one microsecond, which is shorter than a sample."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")
