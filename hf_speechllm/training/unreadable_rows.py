"""Rows whose recordings can no longer be read: left out and counted; in training, too many end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio.waveform import AudioError
from ..data.bad_rows import BadDataError, BadRow
from ..data.collator import SpeechLLMCollator

logger = logging.getLogger(__name__)

UNREADABLE_ROWS = "unreadable_rows"  # key of a batch: rows that were left out, pairs of ((file, line), reason)


@dataclass
class SkipUnreadableCollator:
    """A collator that leaves out rows whose recordings can no longer be read, and names them in the batch.

    If a batch has no other row, silence without labels takes their place, so that all ranks do the same steps.

    Args:
        collator: computes the features of a row.
        build: builds batches by means of `collator`; default the collator itself.
    """

    collator: SpeechLLMCollator
    build: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Builds a batch as `build` does; with `unreadable_rows` if there are any."""
        build = self.build or self.collator
        try:
            return build(rows)
        except AudioError:
            unreadable, good = [], []
        for row in rows:
            try:
                self.collator.row_inputs(row)
                good.append(row)
            except AudioError as error:
                unreadable.append(((row["file"], row["line"]), str(error)))
        return {**build(good or [self._silence(rows[0])]), UNREADABLE_ROWS: unreadable}

    def _silence(self, row: dict[str, Any]) -> dict[str, Any]:
        size = self.collator.processor.feature_extractor.feature_size
        features = [np.zeros((frames, size), dtype=np.float32).tobytes() for frames in row["num_frames"]]
        return {**row, "features": features, "supervised": False}


@dataclass
class UnreadableRows:
    """Counts the rows that this rank could not read.

    Args:
        max_bad_fraction: share of all rows that may be unreadable.
        total: number of all rows.

    Attributes:
        places: file and line of each unreadable row.
    """

    max_bad_fraction: float
    total: int
    places: set[tuple[str, int]] = field(default_factory=set)

    def take(self, batch: dict[str, Any]) -> None:
        """Moves the unreadable rows from a batch into the count.

        Raises:
            BadDataError: if this rank alone has too many.
        """
        for place, reason in batch.pop(UNREADABLE_ROWS, ()):
            if place not in self.places:
                self.places.add(place)
                row = BadRow(place[0], place[1], reason)
                logger.warning("left out: %s", row)
                self.check(len(self.places), f", the last one: {row}")

    def check(self, count: int, last: str = "") -> None:
        """Ends the run if more rows are unreadable than allowed.

        Args:
            count: unreadable rows, of this rank or of all.
            last: text about the last one, for the message.

        Raises:
            BadDataError: if `count` is above the limit.
        """
        if count > self.max_bad_fraction * self.total:
            raise BadDataError(
                f"{count} of {self.total} rows became unreadable during training{last}\nRestore the recordings and "
                f"resume with --resume_from_checkpoint last, or raise --max_bad_fraction "
                f"(now {self.max_bad_fraction:g})"
            )
