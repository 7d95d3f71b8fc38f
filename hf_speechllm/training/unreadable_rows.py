"""Rows whose recordings become unreadable: skipped and counted; in training, too many end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio.front_ends import stored_width
from ..audio.waveform import AudioError
from ..data.bad_rows import BadDataError, BadRow
from ..data.collator import SpeechLLMCollator

logger = logging.getLogger(__name__)

UNREADABLE_ROWS = "unreadable_rows"  # key of a batch: skipped rows, pairs of ((file, line), reason)


@dataclass
class SkipUnreadableCollator:
    """A collator that skips rows with unreadable recordings and lists these rows in the batch.

    If all rows of a batch are unreadable, the batch contains silence without labels, so that all ranks do the same
    steps.

    Args:
        collator: computes the features of a row.
        build: builds batches with `collator`; default the collator.
    """

    collator: SpeechLLMCollator
    build: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Builds a batch with `build`; the batch has `unreadable_rows` if rows are unreadable."""
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
        size = stored_width(self.collator.processor.feature_extractor)
        features = [np.zeros((frames, size), dtype=np.float32).tobytes() for frames in row["num_frames"]]
        return {**row, "features": features, "supervised": False}


@dataclass
class UnreadableRows:
    """Counts the unreadable rows of this rank.

    Args:
        max_bad_fraction: largest share of unreadable rows.
        total: number of all rows.

    Attributes:
        places: file and line of each unreadable row.
    """

    max_bad_fraction: float
    total: int
    places: set[tuple[str, int]] = field(default_factory=set)

    def collect(self, batch: dict[str, Any]) -> None:
        """Removes `unreadable_rows` from a batch and counts these rows.

        Raises:
            BadDataError: if this rank has too many unreadable rows.
        """
        for place, reason in batch.pop(UNREADABLE_ROWS, ()):
            if place not in self.places:
                self.places.add(place)
                row = BadRow(place[0], place[1], reason)
                logger.warning("skipped an unreadable row: %s", row)
                self.check(len(self.places), f", the last one: {row}")

    def check(self, count: int, last: str = "") -> None:
        """Checks the number of unreadable rows.

        Args:
            count: number of unreadable rows, of this rank or of all ranks.
            last: text about the last row, for the message.

        Raises:
            BadDataError: if `count` is above the limit.
        """
        if count > self.max_bad_fraction * self.total:
            raise BadDataError(
                f"{count} of {self.total} rows became unreadable during training{last}\nRestore the recordings and "
                f"resume with --resume_from_checkpoint last, or raise --max_bad_fraction "
                f"(now {self.max_bad_fraction:g})"
            )
