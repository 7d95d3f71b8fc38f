"""How far a run has come in its data, in a form that holds for any number of ranks."""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from ...data.sampler import BudgetBatchSampler, CompletedRun
from ...files import atomic_write
from ...formats.checkpoint import CheckpointError
from ..arguments import SpeechLLMTrainingArguments

POSITION_FILE = "position.json"  # in a checkpoint


class Position:
    """The place of training within the epochs, and what is left.

    Args:
        sampler: deals out the batches of this rank.
        args: of the run.

    Attributes:
        epoch: that is being dealt out.
        schedule_offset: by how many steps the learning rate's schedule is ahead of the run's own count of steps, after
            a change of the number of ranks or of accumulation in a run that is measured in epochs.
        saved_ranks: number of ranks of the checkpoint that it was loaded from.
    """

    def __init__(self, sampler: BudgetBatchSampler, args: SpeechLLMTrainingArguments):
        self.sampler = sampler
        self.args = args
        self.epoch = 0
        self.schedule_offset = self.saved_offset = 0
        self.saved_ranks = args.world_size
        self.skipped = 0  # batches of a rank under these settings, before the run was resumed
        self.consumed = 0  # and in all
        self._past: list[CompletedRun] = []
        self._before = 0.0  # share of the epoch that other settings have dealt
        self._length = len(sampler)

    @property
    def epochs(self) -> float:
        """Epochs that are done."""
        return self.epoch + self._before + (1 - self._before) * (self.consumed / self._length)

    def start_epoch(self, epoch: int) -> None:
        """Goes on to an epoch."""
        if epoch != self.epoch:
            self.epoch, self._past, self._before = epoch, [], 0.0
            self.consumed = self.skipped = 0
            self._length = len(self.sampler)

    @property
    def num_left(self) -> int:
        """Batches of a rank that are left of the epoch."""
        return self._length - self.consumed

    def last_batches(self, number: int) -> Callable[[], Iterator[list[int]]]:
        """Returns a function that gives the row indices of this rank's last batches, also when training has continued.

        Args:
            number: of batches.
        """
        sampler, epoch, end = copy.copy(self.sampler), self.epoch, self.consumed - self.skipped

        def row_indices() -> Iterator[list[int]]:
            sampler.set_epoch(epoch)
            return islice(iter(sampler), end - number, end)

        return row_indices

    def save(self, folder: Path) -> None:
        """Writes the position into a checkpoint."""
        current = CompletedRun(self.sampler.batch_seconds, self.sampler.num_replicas, self.consumed)
        state = {
            "epoch": self.epoch,
            "stretches": [
                [item.batch_seconds, item.num_replicas, item.batches]
                for item in [*self._past, current]
                if item.batches
            ],
            "before": self._before,
            "length": self._length,
            "ranks": self.args.world_size,
            "schedule_offset": self.schedule_offset,
            "data": self._data(),
        }
        with atomic_write(folder / POSITION_FILE) as file:
            json.dump(state, file)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint, in the sampler, too; with `--ignore_data_skip` from the epoch's first row.

        Raises:
            CheckpointError: if it was written by a run on other rows, or on a stream.
        """
        path = folder / POSITION_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: the run was a streaming one; go on as it was begun") from error
        consumed, length = (state["stretches"][-1][2] if state["stretches"] else 0), state["length"]
        self.saved_offset, self.saved_ranks = state["schedule_offset"], state["ranks"]
        if self.args.ignore_data_skip:
            self.start_epoch(state["epoch"] + (consumed == length))
            return
        if state["data"] != self._data():
            raise CheckpointError(
                f"{path}: the training rows, their weights or --data_seed are not those of the interrupted run, so "
                "nobody knows which rows it has seen: restore them, or begin the epoch anew with "
                "--ignore_data_skip true"
            )
        completed = [CompletedRun(*item) for item in state["stretches"]]
        self.epoch, self._before = state["epoch"], state["before"]
        if consumed == length:
            self.start_epoch(self.epoch + 1)
            return
        if not completed:
            return
        self.sampler.resume(self.epoch, completed)
        last = completed[-1]
        if (last.batch_seconds, last.num_replicas) == (self.sampler.batch_seconds, self.sampler.num_replicas):
            self._past, self.consumed = completed[:-1], consumed
        else:
            self._past = completed
            self._before += (1 - self._before) * consumed / length
        self.skipped = self.consumed
        self._length = self.consumed + self.sampler.num_left(self.epoch)

    def remaining_steps(self, global_step: int) -> tuple[int, int]:
        """What is left, for a run that has done some steps.

        Returns:
            The number of epochs, counting from the first, and of steps, counting from the run's beginning.
        """
        accumulation = self.args.gradient_accumulation_steps
        per_epoch = math.ceil(len(self.sampler) / accumulation)
        left = math.ceil(self.num_left / accumulation)
        if 0 < self.args.max_steps <= global_step:
            return self.epoch, self.args.max_steps
        if self.args.max_steps > 0:
            further = max(0, self.args.max_steps - global_step - left)
            return self.epoch + 1 + math.ceil(further / per_epoch), self.args.max_steps
        scheduled = math.ceil(self.args.num_train_epochs * per_epoch)
        steps = global_step + max(0, scheduled - per_epoch * (self.epoch + 1) + left)
        self.schedule_offset = scheduled - steps
        return math.ceil(self.args.num_train_epochs), steps

    def _data(self) -> int:
        seconds = zlib.crc32(np.ascontiguousarray(self.sampler.seconds).tobytes(), self.sampler.seed & 0xFFFFFFFF)
        return zlib.crc32(np.ascontiguousarray(self.sampler.weights).tobytes(), seconds)


class ShiftedSchedule(TrainerCallback):
    """Moves the learning rate's schedule of a resumed run to its place after a change of the number of ranks.

    Args:
        position: gives the place of training; `None` for a stream.
    """

    def __init__(self, position: Callable[[], Position | None]):
        self.position = position

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Moves the schedule."""
        position = self.position()
        if position is None or not isinstance(lr_scheduler, LambdaLR):
            return
        if ahead := position.schedule_offset - position.saved_offset:
            lr_scheduler.last_epoch += ahead - 1
            lr_scheduler.step()
