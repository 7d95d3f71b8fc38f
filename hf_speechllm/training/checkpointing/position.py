"""Position of a run in the training data, valid for any number of ranks."""

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
    """Position of training within the epochs, and the remaining batches and steps.

    Args:
        sampler: assigns the batches to this rank.
        args: of the run.

    Attributes:
        epoch: current epoch.
        schedule_offset: number of steps by which the learning rate schedule is ahead of the run's count of steps,
            after a change of the number of ranks or of gradient accumulation in a run measured in epochs.
        skipped: batches of this rank that were consumed with the current settings before the run was resumed.
        consumed: batches of this rank that were consumed with the current settings.
    """

    def __init__(self, sampler: BudgetBatchSampler, args: SpeechLLMTrainingArguments):
        self.sampler = sampler
        self.args = args
        self.epoch = 0
        self.schedule_offset = self.saved_offset = 0
        self.skipped = self.consumed = 0
        self._past: list[CompletedRun] = []
        self._past_share = 0.0  # share of the epoch that was consumed with other settings
        self._length = len(sampler)

    @property
    def epochs(self) -> float:
        """Completed epochs, including the fraction of the current epoch."""
        return self.epoch + self._past_share + (1 - self._past_share) * (self.consumed / self._length)

    def start_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, unless this is the current epoch."""
        if epoch != self.epoch:
            self.epoch, self._past, self._past_share = epoch, [], 0.0
            self.consumed = self.skipped = 0
            self._length = len(self.sampler)

    @property
    def num_left(self) -> int:
        """Remaining batches of this rank in the epoch."""
        return self._length - self.consumed

    def last_batches(self, number: int) -> Callable[[], Iterator[list[int]]]:
        """Returns a function that returns the row indices of this rank's last batches, even after training continues.

        Args:
            number: number of batches.
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
            "before": self._past_share,
            "length": self._length,
            "ranks": self.args.world_size,
            "schedule_offset": self.schedule_offset,
            "data": self._data(),
        }
        with atomic_write(folder / POSITION_FILE) as file:
            json.dump(state, file)

    def load(self, folder: Path, same_ranks: bool = False) -> None:
        """Restores the position of a checkpoint and of the sampler; with `--ignore_data_skip`, the start of the epoch.

        Args:
            folder: of the checkpoint.
            same_ranks: whether the number of ranks must not change.

        Raises:
            CheckpointError: if the checkpoint is from other rows, from a stream, or, with `same_ranks`, from another
                number of ranks.
        """
        path = folder / POSITION_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is missing: the run used --streaming true; resume with this option"
            ) from error
        if same_ranks and state["ranks"] != self.args.world_size:
            raise CheckpointError(
                f"{folder} was written by {state['ranks']} processes, but this run has {self.args.world_size}; with "
                "DeepSpeed, resume with the same number of processes"
            )
        consumed, length = (state["stretches"][-1][2] if state["stretches"] else 0), state["length"]
        self.saved_offset = state["schedule_offset"]
        if self.args.ignore_data_skip:
            self.start_epoch(state["epoch"] + (consumed == length))
            return
        if state["data"] != self._data():
            raise CheckpointError(
                f"{path}: the training rows, sampling weights or --data_seed have changed, so the position in the "
                "epoch is unknown: restore them, or start the epoch again with --ignore_data_skip true"
            )
        completed = [CompletedRun(*item) for item in state["stretches"]]
        self.epoch, self._past_share = state["epoch"], state["before"]
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
            self._past_share += (1 - self._past_share) * consumed / length
        self.skipped = self.consumed
        self._length = self.consumed + self.sampler.num_left(self.epoch)

    def remaining_steps(self, global_step: int) -> tuple[int, int]:
        """Computes the end of a run that has done `global_step` steps.

        Returns:
            Number of epochs and number of steps of the whole run, counted from the start of the run.
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
    """Corrects the learning rate schedule of a resumed run after a change of the number of ranks.

    Args:
        position: returns the position of training; `None` for a stream.
    """

    def __init__(self, position: Callable[[], Position | None]):
        self.position = position

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Moves the schedule by the difference of the offsets."""
        position = self.position()
        if position is None or not isinstance(lr_scheduler, LambdaLR):
            return
        if ahead := position.schedule_offset - position.saved_offset:
            lr_scheduler.last_epoch += ahead - 1
            lr_scheduler.step()
