"""The loader of a stream: batches of a rank, and a state that a checkpoint can hold."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..files import atomic_write
from .streaming import Place, RowStream

STATE_FILE = "stream_rank{rank}.json"  # in a checkpoint


def _as_it_is(batch: Any) -> Any:
    return batch


class StreamLoader(DataLoader):
    """Batches of a rank from a `RowStream`, and how far it has come.

    Args:
        stream: the rows.
        num_workers: processes that read and compute features.
        **options: of `DataLoader`.
    """

    def __init__(self, stream: RowStream, num_workers: int = 0, **options):
        # A generator of its own: the default one is the model's, and must be left as a checkpoint has it.
        super().__init__(
            stream,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            generator=torch.Generator(),
            **options,
        )
        self.places = [Place()] * max(1, num_workers)
        self.batches = 0  # handed out so far

    def __iter__(self):
        stream: RowStream = self.dataset
        stream.places, stream.first_worker = list(self.places), self.batches % len(self.places)
        for batch, place in super().__iter__():
            self.places[self.batches % len(self.places)] = place
            self.batches += 1
            yield batch

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the state of this rank into a checkpoint."""
        stream: RowStream = self.dataset
        state = {
            **self._identity(),
            "batches": self.batches,
            "places": [asdict(place) for place in self.places],
        }
        with atomic_write(os.path.join(folder, STATE_FILE.format(rank=stream.rank))) as file:
            json.dump(state, file, indent=1)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint: the batches that follow are those of an uninterrupted run.

        Raises:
            ValueError: if the checkpoint has no state of a stream, or that of other data or another number of
                processes.
        """
        stream: RowStream = self.dataset
        path = os.path.join(folder, STATE_FILE.format(rank=stream.rank))
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: the run was not a streaming one, or had fewer processes; go on as it was begun"
            ) from error
        differing = [key for key, value in self._identity().items() if state.get(key) != value]
        if differing:
            told = ", ".join(f"{key} (was {state.get(key)}, is {self._identity()[key]})" for key in differing)
            raise ValueError(
                f"{path}: a stream goes on only with the same data, options and processes; changed: {told}"
            )
        self.batches = state["batches"]
        self.places = [Place(**place) for place in state["places"]]

    @property
    def bad_rows(self) -> int:
        """Rows of this rank that were left out, up to the windows of the last batches."""
        return sum(place.bad_rows + place.bad_recordings for place in self.places)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the state to mean the same."""
        stream: RowStream = self.dataset
        return {
            "ranks": stream.num_ranks,
            "workers": len(self.places),
            "seed": stream.seed,
            "window_rows": stream.window_rows,
            "batch_seconds": stream.batch_seconds,
            "data": zlib.crc32(repr([(os.path.basename(s.file), s.start, s.stop) for s in stream.shards]).encode()),
            "weights": zlib.crc32(repr(stream.parts).encode()),
        }
