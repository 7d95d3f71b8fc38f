"""Data loader of a stream, with a state that is saved in checkpoints."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..files import atomic_write
from .streaming import RowStream, StreamState

STATE_FILE = "stream_rank{rank}.json"  # in a checkpoint folder


def _return_unchanged(batch: Any) -> Any:
    return batch


class StreamLoader(DataLoader):
    """Loads the batches of a rank from a `RowStream` and keeps track of the position.

    Args:
        stream: stream of batches.
        num_workers: number of processes that read rows and compute features.
        **options: options of `DataLoader`.
    """

    def __init__(self, stream: RowStream, num_workers: int = 0, **options):
        # A separate generator: using the default generator would change the random state that a checkpoint restores.
        super().__init__(
            stream,
            batch_size=None,
            collate_fn=_return_unchanged,
            num_workers=num_workers,
            generator=torch.Generator(),
            **options,
        )
        self.states = [StreamState()] * max(1, num_workers)
        self.batches = 0  # number of yielded batches

    def __iter__(self):
        stream: RowStream = self.dataset
        stream.states, stream.first_worker = list(self.states), self.batches % len(self.states)
        for batch, state in super().__iter__():
            self.states[self.batches % len(self.states)] = state
            self.batches += 1
            yield batch

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the state of this rank to a checkpoint."""
        stream: RowStream = self.dataset
        state = {
            **self._identity(),
            "batches": self.batches,
            "places": [asdict(state) for state in self.states],
        }
        with atomic_write(os.path.join(folder, STATE_FILE.format(rank=stream.rank))) as file:
            json.dump(state, file, indent=1)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Resumes from a checkpoint: the next batches equal those of an uninterrupted run.

        Raises:
            ValueError: if the checkpoint has no stream state for this rank, or the state belongs to different data,
                options or numbers of processes.
        """
        stream: RowStream = self.dataset
        path = os.path.join(folder, STATE_FILE.format(rank=stream.rank))
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: the run did not use --streaming, or had fewer processes; use the same options"
            ) from error
        differing = [key for key, value in self._identity().items() if state.get(key) != value]
        if differing:
            changes = ", ".join(f"{key} (was {state.get(key)}, is {self._identity()[key]})" for key in differing)
            raise ValueError(
                f"{path}: --streaming resumes only with the same data, options and processes; changed: {changes}"
            )
        self.batches = state["batches"]
        self.states = [StreamState(**item) for item in state["places"]]

    @property
    def bad_rows(self) -> int:
        """Skipped rows of this rank, counted up to the windows of the last batches."""
        return sum(state.bad_rows + state.bad_recordings for state in self.states)

    def _identity(self) -> dict[str, Any]:
        """Returns the settings that must be unchanged on resume."""
        stream: RowStream = self.dataset
        return {
            "ranks": stream.num_ranks,
            "workers": len(self.states),
            "seed": stream.seed,
            "window_rows": stream.window_rows,
            "batch_seconds": stream.batch_seconds,
            "data": zlib.crc32(repr([(os.path.basename(s.file), s.start, s.stop) for s in stream.shards]).encode()),
            "weights": zlib.crc32(repr(stream.parts).encode()),
        }
