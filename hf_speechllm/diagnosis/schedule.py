"""Numbers of steps, evaluations and checkpoints of a run, from its options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..training.arguments import SpeechLLMTrainingArguments


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run, from its options.

    Args:
        max_steps, epochs, accumulation: of the options.
        eval_strategy, save_strategy: `no`, `steps` or `epoch`.
        eval_steps, save_steps: below 1: share of the run.
        eval_on_start: whether an evaluation precedes the first step.
        has_validation: whether there is a validation set.
    """

    max_steps: int
    num_epochs: float
    accumulation: int
    eval_strategy: str
    save_strategy: str
    eval_steps: float
    save_steps: float
    eval_on_start: bool
    has_validation: bool

    @classmethod
    def of(cls, args: SpeechLLMTrainingArguments, has_validation: bool) -> Schedule:
        """Returns the schedule of a run."""
        return cls(
            args.max_steps, args.num_train_epochs, args.gradient_accumulation_steps, str(args.eval_strategy.value),
            str(args.save_strategy.value), args.eval_steps or args.logging_steps, args.save_steps, args.eval_on_start,
            has_validation,
        )  # fmt: skip

    def steps(self, batches: int) -> tuple[int, int]:
        """Returns the optimizer steps of an epoch and of the run.

        Args:
            batches: of a process and an epoch.
        """
        per_epoch = max(1, math.ceil(batches / self.accumulation))
        return per_epoch, self.max_steps if self.max_steps > 0 else math.ceil(self.num_epochs * per_epoch)

    def evaluations(self, steps: int) -> int:
        """Returns the number of evaluations, with the one of the final weights."""
        if not self.has_validation:
            return 0
        return self.eval_on_start + max(1, self._events(self.eval_strategy, self.eval_steps, steps))

    def checkpoints(self, steps: int) -> int:
        """Returns the number of checkpoints."""
        return self._events(self.save_strategy, self.save_steps, steps)

    def _events(self, strategy: str, every: float, steps: int) -> int:
        if strategy == "steps":
            return math.ceil(steps / (math.ceil(steps * every) if every < 1 else every))
        return math.ceil(self.num_epochs) if strategy == "epoch" else 0
