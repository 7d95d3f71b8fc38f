"""Retention guard: checks that the model does not forget general speech during fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import TrainerCallback

from ..options import RETENTION_SET

logger = logging.getLogger(__name__)

RETENTION_METRIC = f"eval_{RETENTION_SET}_cer"
_ROUNDING = 1e-9  # percentage points; a rise of exactly the limit passes
History = Sequence[Mapping[str, float]]


class RetentionError(RuntimeError):
    """The retention guard has ended training, and no good checkpoint exists."""


class RetentionGuard(TrainerCallback):
    """Checks the rise of the CER of general speech over the CER of the base model.

    The CER of the base model is in the log at step 0. Checkpoints contain the log, so a resumed run keeps the limit.
    All ranks have the same error counts and take the same decision.

    Args:
        max_loss: largest rise, in percentage points.
        stop: whether to end training above the limit; otherwise the guard logs a warning.

    Attributes:
        stopped: whether the guard has ended training.
        best: best metric and step of the best metric, before the evaluation that ended training.
    """

    def __init__(self, max_loss: float, stop: bool):
        self.max_loss = max_loss
        self.stop = stop
        self.stopped = False
        self.best: tuple[float | None, int | None] = None, None

    def loss(self, cer: float, log_history: History) -> float:
        """Returns the rise of a CER (a fraction) over the base model's, in percentage points."""
        return 100 * (cer - base_cer(log_history))

    def passes(self, cer: float, log_history: History) -> bool:
        """Whether a CER (a fraction) is within the limit."""
        return self.loss(cer, log_history) <= self.max_loss + _ROUNDING

    def last_good_step(self, log_history: History) -> int:
        """Returns the step of the latest evaluation within the limit; 0 is the base model."""
        steps = [
            entry["step"]
            for entry in log_history
            if RETENTION_METRIC in entry and self.passes(entry[RETENTION_METRIC], log_history)
        ]
        return int(max(steps))

    def must_stop(self, scores: Mapping[str, float], log_history: History) -> bool:
        """Whether training must end because an evaluation is above the limit."""
        if not self.stop or RETENTION_METRIC not in scores:
            return False
        return not self.passes(scores[RETENTION_METRIC], log_history)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Logs a warning or ends training, if the CER is above the limit."""
        cer = metrics.get(RETENTION_METRIC)
        if cer is None or self.passes(cer, state.log_history):
            return
        level = logging.WARNING if state.is_world_process_zero else logging.DEBUG
        logger.log(
            level,
            "retention: at step %d the CER of %s is %.2f %%, %.2f points above the base model's (limit %g): %s",
            state.global_step, args.retention_file, 100 * cer, self.loss(cer, state.log_history), self.max_loss,
            "training ends" if self.stop else "training continues (use --retention_action stop to end training)",
        )  # fmt: skip
        if self.stop:
            self.stopped = control.should_training_stop = True
            self.best = state.best_metric, state.best_global_step  # this evaluation must not become the best


def base_cer(log_history: History) -> float:
    """Returns the CER of general speech before training, a fraction.

    Raises:
        ValueError: if the run started without --retention_file.
    """
    for entry in log_history:
        if entry["step"] == 0 and RETENTION_METRIC in entry:
            return entry[RETENTION_METRIC]
    raise ValueError(
        "--retention_file: the resumed run started without --retention_file, so the CER of the base model is unknown; "
        "start a new run, or leave the option out"
    )
