"""The retention guard: the model must not forget general speech while it learns the user's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import TrainerCallback

from ..options import RETENTION_SET

logger = logging.getLogger(__name__)

RETENTION_METRIC = f"eval_{RETENTION_SET}_cer"
_ROUNDING = 1e-9  # percentage points: a loss of exactly the limit passes
History = Sequence[Mapping[str, float]]


class RetentionError(RuntimeError):
    """The model has forgotten too much before there was a checkpoint to go back to."""


class RetentionGuard(TrainerCallback):
    """Watches the CER of general speech, which must not rise too far above the base model's.

    The base model's CER is that of step 0 in the log, which checkpoints carry along; so a resumed run keeps the limit.
    All ranks see the same sums of errors, and decide alike.

    Args:
        max_loss: percentage points.
        stop: whether training ends when the CER has risen further; otherwise there is a warning.

    Attributes:
        stopped: whether the guard has ended training.
        best: best metric and its step, before the evaluation that ended training.
    """

    def __init__(self, max_loss: float, stop: bool):
        self.max_loss = max_loss
        self.stop = stop
        self.stopped = False
        self.best: tuple[float | None, int | None] = None, None

    def loss(self, cer: float, log_history: History) -> float:
        """Percentage points by which a CER (a fraction) is above the base model's."""
        return 100 * (cer - base_cer(log_history))

    def passes(self, cer: float, log_history: History) -> bool:
        """Whether a CER (a fraction) is within the limit."""
        return self.loss(cer, log_history) <= self.max_loss + _ROUNDING

    def last_good_step(self, log_history: History) -> int:
        """The step of the latest evaluation that was within the limit; 0 is the base model."""
        steps = [
            entry["step"]
            for entry in log_history
            if RETENTION_METRIC in entry and self.passes(entry[RETENTION_METRIC], log_history)
        ]
        return int(max(steps))

    def forgot(self, scores: Mapping[str, float], log_history: History) -> bool:
        """Whether an evaluation shows a loss of retention that ends training."""
        if not self.stop or RETENTION_METRIC not in scores:
            return False
        return not self.passes(scores[RETENTION_METRIC], log_history)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Warns, or ends training."""
        cer = metrics.get(RETENTION_METRIC)
        if cer is None or self.passes(cer, state.log_history):
            return
        level = logging.WARNING if state.is_world_process_zero else logging.DEBUG
        logger.log(
            level,
            "retention: at step %d the CER of %s is %.2f %%, %.2f points above the base model's (at most %g): %s",
            state.global_step, args.retention_file, 100 * cer, self.loss(cer, state.log_history), self.max_loss,
            "training ends" if self.stop else "training continues (--retention_action stop would end it)",
        )  # fmt: skip
        if self.stop:
            self.stopped = control.should_training_stop = True
            self.best = state.best_metric, state.best_global_step  # the evaluation that stops training is never best


def base_cer(log_history: History) -> float:
    """The CER of general speech before training, a fraction.

    Raises:
        ValueError: if the run began without it.
    """
    for entry in log_history:
        if entry["step"] == 0 and RETENTION_METRIC in entry:
            return entry[RETENTION_METRIC]
    raise ValueError(
        "the run that is resumed began without --retention_file, so the base model's CER is not known; begin a new "
        "run, or leave --retention_file out"
    )
