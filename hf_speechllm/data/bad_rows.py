"""Rows that cannot be used: collected with file, line and reason, and only left out as far as the user allows it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..audio.downloads import redact
from ..files import atomic_write

logger = logging.getLogger(__name__)

NUM_NAMED = 20  # bad rows that are named in a message; the others are counted


class BadDataError(ValueError):
    """Data that cannot be used; the message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Args:
        file: list or JSONL that has it.
        line: counted from 1; or another place in the file, as text.
        reason: what is wrong, as "KIND: DETAILS", and how to mend it.
    """

    file: str
    line: int | str
    reason: str

    def __post_init__(self):
        # What comes from data must neither give away the password in a URL nor steer the terminal.
        object.__setattr__(self, "reason", _printable(redact(self.reason)))
        if isinstance(self.line, str):
            object.__setattr__(self, "line", _printable(self.line))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows:
    """The bad rows of a run.

    Args:
        max_bad_fraction: the share of all rows, from 0 to 1, that may be bad without stopping the run.
        report_file: where `check` writes all of them, a line each; written only if there are any.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """

    def __init__(self, max_bad_fraction: float = 0.0, report_file: str | os.PathLike[str] | None = None):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be from 0 to 1, not {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.report_file = report_file
        self._rows: list[BadRow] = []

    def add(self, file: str | os.PathLike[str], line: int | str, reason: str) -> None:
        """Notes a bad row; arguments as `BadRow`."""
        self._rows.append(BadRow(os.fspath(file), line, reason))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BadRow]:
        return iter(self._rows)

    def kinds(self) -> Counter[str]:
        """How many there are of each kind, the words before the first colon of a reason."""
        return Counter(row.reason.partition(":")[0] for row in self._rows)

    def check(self, total: int) -> None:
        """Names the bad rows, in a warning if they are few enough to go on.

        Args:
            total: number of all rows, the bad ones included.

        Raises:
            BadDataError: if their share is over `max_bad_fraction`; the message names them.
        """
        if not self._rows:
            return
        named = [f"  {row}" for row in self._rows[:NUM_NAMED]]
        if len(self) > NUM_NAMED:
            named.append(f"  and {len(self) - NUM_NAMED} more")
        if self.report_file is not None:
            with atomic_write(self.report_file) as file:
                file.writelines(f"{row}\n" for row in self._rows)
            named.append(f"  all of them: {os.fspath(self.report_file)}")
        named += path_hint(row.reason for row in self._rows)
        fraction = len(self) / max(total, len(self))
        summary = f"{len(self)} of {total} rows are bad ({fraction:.2%})"
        if fraction > self.max_bad_fraction:
            raise BadDataError(
                f"{summary}; --max_bad_fraction allows {self.max_bad_fraction:.2%}:\n"
                + "\n".join(named)
                + f"\nMend them, or leave them out with --max_bad_fraction {_rounded_up(fraction):g}"
            )
        logger.warning("%s and left out:\n%s", summary, "\n".join(named))


def path_hint(reasons: Iterable[str]) -> list[str]:
    """A line on relative paths, which FunASR takes from the working directory, if recordings are missing."""
    missing = any("no such file" in reason for reason in reasons)
    return ["Relative paths start at the folder of the list, not at the working directory."] if missing else []


def _rounded_up(fraction: float) -> float:
    """To a number of few digits that is not smaller."""
    return -(-fraction * 1000 // 1) / 1000


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
