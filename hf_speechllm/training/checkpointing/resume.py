"""A `Trainer` that goes on from a checkpoint at the row where it was, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, set_seed

from ...formats import partial
from ...formats.checkpoint import CheckpointError
from ..arguments import SpeechLLMTrainingArguments
from ..freezing import part_of, trained_parts
from .position import Position
from .writer import frozen_tensors


class ResumableTrainer(Trainer):
    """Goes on by the `Position` of a checkpoint: nothing is loaded to be skipped, no row is seen twice or left out.

    Attributes:
        position: in the training rows; `None` for a stream, which has a state of its own.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(self, **kwargs):
        self.position: Position | None = None
        self._resumed_from: str | None = None  # folder of a checkpoint
        super().__init__(**kwargs)

    def load_position(self, folder: str) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: if it does not fit the data or the engine.
        """
        assert self.position is not None
        self.position.load(Path(folder))
        if self.is_deepspeed_enabled and self.position.saved_ranks != self.args.world_size:
            raise CheckpointError(
                f"{folder} was written by {self.position.saved_ranks} processes; with DeepSpeed a run goes on only "
                f"with as many, not with {self.args.world_size}"
            )

    def set_initial_training_values(self, args, dataloader):
        """As the parent's; of a resumed run, what its position leaves to do."""
        values = list(super().set_initial_training_values(args, dataloader))
        if self._resumed_from is None:
            return tuple(values)
        step = TrainerState.load_from_json(str(Path(self._resumed_from) / "trainer_state.json")).global_step
        if self.position is not None:
            values[0], values[-1] = self.position.plan(step)
        elif step >= self.args.max_steps:
            values[0] = 0  # a stream would go on for ever
        return tuple(values)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        epoch, steps = super()._init_training_state(*args, **kwargs)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and best.is_dir():  # the output folder has moved
            self.state.best_model_checkpoint = str(best)
        if self.position is None or self._resumed_from is None:
            return epoch, steps
        return self.position.epoch, 0  # the sampler leaves out what was dealt

    def _run_epoch(self, **kwargs) -> None:
        if self.position is not None:
            self.position.begin(kwargs["epoch"])
            left = self.position.num_left
            kwargs["steps_in_epoch"] = left
            kwargs["num_update_steps_per_epoch"] = -(-left // self.args.gradient_accumulation_steps)
        super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (Path(resume_from_checkpoint) / partial.REFERENCE_FILE).is_file():
            partial.check_base(Path(resume_from_checkpoint), frozen_tensors(self.model))

    def _issue_warnings_after_load(self, load_result) -> None:
        trained = trained_parts(self.model)  # of checkpoints of `--save_only_trained`, nothing else is expected
        tied = self.model.all_tied_weights_keys  # saved once, under their other name
        missing = [name for name in load_result.missing_keys if part_of(name) in trained and name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint) -> None:
        if self.position is None or checkpoint is None or self.position.saved_ranks == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:  # states of other ranks: a new beginning, but not that of the run
            set_seed(self.args.seed + self.state.global_step)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As the parent's; after a change of the number of ranks, for as many steps as these would do in all."""
        offset = self.position.schedule_offset if self.position is not None else 0
        return super().create_scheduler(num_training_steps + offset, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.position is not None and checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            ahead = self.position.schedule_offset - self.position.saved_offset
            if ahead:
                self.lr_scheduler.last_epoch += ahead - 1
                self.lr_scheduler.step()
