"""Unusable rows: collected with file, line and reason, and skipped up to the share that the user allows."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..audio.downloads import printable, redact
from ..files import atomic_write

logger = logging.getLogger(__name__)

FOLDER_OF_LIST = "the folder of the list, not at the working directory"
NUM_NAMED = 20  # bad rows listed in a message; the others are counted


class BadDataError(ValueError):
    """Unusable data; the message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class BadRow:
    """An unusable row.

    Args:
        file: list or JSONL that contains the row.
        line: line number, counted from 1; or another position in the file, as text.
        reason: error as "KIND: DETAILS", and how to fix it.
    """

    file: str
    line: int | str
    reason: str

    def __post_init__(self):
        # Text from data must not reveal passwords in URLs or contain control characters for the terminal.
        object.__setattr__(self, "reason", printable(redact(self.reason)))
        if isinstance(self.line, str):
            object.__setattr__(self, "line", printable(self.line))

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}: {self.reason}"


class BadRows:
    """Collects the bad rows of a run.

    Args:
        max_bad_fraction: allowed share of bad rows, from 0 to 1; above it, the run stops.
        report_file: file to which `check` writes all bad rows, one per line; not written without bad rows.

    Raises:
        ValueError: if `max_bad_fraction` is not between 0 and 1.
    """

    def __init__(self, max_bad_fraction: float = 0.0, report_file: str | os.PathLike[str] | None = None):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be from 0 to 1, not {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.report_file = report_file
        self._rows: list[BadRow] = []

    def add(self, file: str | os.PathLike[str], line: int | str, reason: str) -> None:
        """Adds a bad row; for arguments see `BadRow`."""
        self._rows.append(BadRow(os.fspath(file), line, reason))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BadRow]:
        """Iterates by file, in the order in which files were read, and by position in the file."""
        files = {file: index for index, file in enumerate(dict.fromkeys(row.file for row in self._rows))}
        return iter(sorted(self._rows, key=lambda row: (files[row.file], _position(row.line))))

    def kinds(self) -> Counter[str]:
        """Returns the number of bad rows of each kind; the kind is the text before the first colon of the reason."""
        return Counter(row.reason.partition(":")[0] for row in self._rows)

    def check(self, total: int, paths_start: str = FOLDER_OF_LIST) -> None:
        """Reports the bad rows: in a warning up to `max_bad_fraction`, otherwise in an error.

        Args:
            total: number of all rows, including bad rows.
            paths_start: folder at which relative paths of recordings start.

        Raises:
            BadDataError: if the share of bad rows exceeds `max_bad_fraction`; the message lists them.
        """
        if not self._rows:
            return
        named = [f"  {row}" for row in itertools.islice(self, NUM_NAMED)]
        if len(self) > NUM_NAMED:
            named.append(f"  and {len(self) - NUM_NAMED} more")
        if self.report_file is not None:
            with atomic_write(self.report_file) as file:
                file.writelines(f"{row}\n" for row in self)
            named.append(f"  full list: {os.fspath(self.report_file)}")
        named += path_hint((row.reason for row in self._rows), paths_start)
        fraction = len(self) / max(total, len(self))
        summary = f"{len(self)} of {total} rows are bad ({fraction:.2%})"
        if fraction > self.max_bad_fraction:
            advice = f"Fix these rows, or skip them with --max_bad_fraction {_rounded_up(fraction):g}"
            if fraction == 1:  # skipping would leave no rows
                files = list(dict.fromkeys(printable(row.file) for row in self))
                others = f" and {len(files) - 1} other files" if len(files) > 1 else ""
                advice = f"No row is usable: check the format, the columns and the paths of {files[0]}{others}"
            raise BadDataError(
                f"{summary}; --max_bad_fraction allows {self.max_bad_fraction:.2%}:\n"
                + "\n".join(named)
                + f"\n{advice}"
            )
        logger.warning("%s and skipped:\n%s", summary, "\n".join(named))


def _position(line: int | str) -> list[tuple[int, str]]:
    """Returns a key that sorts positions by their numbers, as in `train row 12`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(line))]


def path_hint(reasons: Iterable[str], paths_start: str = FOLDER_OF_LIST) -> list[str]:
    """Returns a hint on relative paths if recordings are missing; FunASR uses paths from the working directory."""
    missing = any("no such file" in reason for reason in reasons)
    return [f"Relative paths start at {paths_start}."] if missing else []


def _rounded_up(fraction: float) -> float:
    """Rounds up to three decimal places."""
    return -(-fraction * 1000 // 1) / 1000
