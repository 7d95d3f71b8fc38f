"""Which checkpoints are kept, when a run has forgotten too much, and whose weights remain at the end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerCallback

from ...formats.checkpoint import CheckpointError
from ..arguments import RETENTION_SET, SpeechLLMTrainingArguments
from .averaging import average_checkpoints
from .manifest import MANIFEST_FILE, checkpoint_folders

if TYPE_CHECKING:
    from ..trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

AVERAGED = "averaged"  # prefix of the mean's metrics, and its folder while it is tried
RETENTION_METRIC = f"eval_{RETENTION_SET}_cer"
_ROUNDING = 1e-9  # of percentage points: a loss of exactly the limit passes
History = Sequence[Mapping[str, float]]


class RetentionError(RuntimeError):
    """The model has forgotten too much before there was a checkpoint to go back to."""


class RetentionGuard(TrainerCallback):
    """Watches the CER of general speech: it must not rise too far over the base model's.

    The base model's is that of step 0 in the log, which checkpoints carry along; so a run that is resumed goes on
    with the same limit. All ranks see the same sums of errors, and decide alike.

    Args:
        max_loss: percentage points.
        stop: whether training ends where it has risen further; else there is a warning.
    """

    def __init__(self, max_loss: float, stop: bool):
        self.max_loss = max_loss
        self.stop = stop
        self.stopped = False

    def loss(self, cer: float, log_history: History) -> float:
        """By how many percentage points a CER (a fraction) is above the base model's."""
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
            "training ends" if self.stop else "training goes on (--retention_action stop would end it)",
        )  # fmt: skip
        if self.stop:
            self.stopped = control.should_training_stop = True


def set_up_selection(trainer: SpeechLLMTrainer) -> RetentionGuard | None:
    """Adds early stopping and the retention guard to a trainer, if they are asked for, and gives the guard.

    Raises:
        ValueError: if `--average_best` is asked for with DeepSpeed or FSDP.
    """
    args = trainer.args
    if args.average_best and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError(
            "--average_best: checkpoints of DeepSpeed and FSDP can't be averaged in the run; do it afterwards with "
            "recipes/average_checkpoints.py"
        )
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if args.retention_file is None:
        return None
    guard = RetentionGuard(args.max_retention_loss, args.retention_action == "stop")
    trainer.add_callback(guard)
    return guard


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


def check_resumable(args: SpeechLLMTrainingArguments, checkpoint: str | Path) -> None:
    """Sees to it that a checkpoint has what the options need.

    Raises:
        ValueError: if the base model's CER of --retention_file is not in it.
    """
    if args.retention_file is not None:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        base_cer(state["log_history"])


def metric_key(args: SpeechLLMTrainingArguments, prefix: str = "eval") -> str:
    """The full name of `--metric_for_best_model`, e.g. `eval_cer`."""
    return f"{prefix}_{str(args.metric_for_best_model).removeprefix('eval_')}"


def scores_at(log_history: History, step: int) -> dict[str, float] | None:
    """The metrics of the first evaluation at a step, if there was one."""
    for entry in log_history:
        if entry["step"] == step and any(key.startswith("eval_") for key in entry):
            return {key: value for key, value in entry.items() if key != "step"}
    return None


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, in order."""
    folders = checkpoint_folders(output_dir)
    return {step: path for step, path in folders.items() if (path / MANIFEST_FILE).is_file()}


def best_steps(args: SpeechLLMTrainingArguments, log_history: History, steps: Collection[int]) -> list[int]:
    """The best of some checkpoints, at most `--keep_best_checkpoints`, best first; the earlier one of two alike.

    Checkpoints without an evaluation at their step are left out.
    """
    scores = {step: (scores_at(log_history, step) or {}).get(metric_key(args)) for step in steps}
    sign = -1 if args.greater_is_better else 1
    scored = [(sign * score, step) for step, score in scores.items() if score is not None]
    return [step for _, step in sorted(scored)[: args.keep_best_checkpoints]]


def delete_checkpoints(trainer: SpeechLLMTrainer) -> None:
    """Deletes what need not be kept: not the n best, the latest, the last good one.

    Without `--keep_best_checkpoints`, `--save_total_limit` says how many remain, as in transformers. Folders that are
    not complete are left alone, and don't count.
    """
    args, state = trainer.args, trainer.state
    folders = checkpoints(args.output_dir)
    if not folders:
        return
    kept = {max(folders)}
    if state.best_model_checkpoint is not None:
        kept |= {step for step, path in folders.items() if path.name == Path(state.best_model_checkpoint).name}
    if (last_good := last_good_checkpoint(trainer)) is not None:
        kept.add(last_good)
    if args.keep_best_checkpoints:
        kept |= set(best_steps(args, state.log_history, folders))
    elif args.save_total_limit:
        others = [step for step in reversed(folders) if step not in kept]
        kept |= set(others[: max(args.save_total_limit - len(kept), 0)])
    else:
        return
    for step, path in folders.items():
        if step not in kept:
            shutil.rmtree(path, ignore_errors=True)


def last_good_checkpoint(trainer: SpeechLLMTrainer) -> int | None:
    """The step of the latest checkpoint that is not younger than the last evaluation within the retention limit."""
    guard = trainer.retention_guard
    if guard is None or not guard.stop:
        return None
    limit = guard.last_good_step(trainer.state.log_history)
    return max((step for step in checkpoints(trainer.args.output_dir) if step <= limit), default=None)


def settle(trainer: SpeechLLMTrainer) -> dict[str, float]:
    """Chooses the weights that remain once training has ended: last good, best, or the mean of the best.

    Returns:
        What was chosen, for the results.

    Raises:
        RetentionError: if training was stopped before there was a good checkpoint.
    """
    if trainer.retention_guard is not None and trainer.current_scores is None:
        trainer.evaluate()  # steps after the last evaluation may have gone too far
    if trainer.retention_guard is not None and trainer.retention_guard.stopped:
        _go_back(trainer)
    return _try_average(trainer) if trainer.args.average_best else {}


def _go_back(trainer: SpeechLLMTrainer) -> None:
    args, state = trainer.args, trainer.state
    good = last_good_checkpoint(trainer)
    if good is None:
        raise RetentionError(
            f"retention: training was ended at step {state.global_step}, before there was a checkpoint within "
            f"--max_retention_loss {args.max_retention_loss:g}; nothing is saved, and {args.model_name_or_path} "
            "remains the best model. Evaluate and save more often, or train more gently: a lower learning rate, LoRA, "
            "frozen parts"
        )
    folder = checkpoints(args.output_dir)[good]
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        folder = Path(state.best_model_checkpoint)  # among those within the limit, and loaded already
    else:
        trainer.load_checkpoint(folder)
    trainer.selection = f"{folder.name}, since later ones lost too much of {Path(str(args.retention_file)).name}"
    logger.warning("retention: the model that remains is that of %s", folder)


def _try_average(trainer: SpeechLLMTrainer) -> dict[str, float]:
    args, state = trainer.args, trainer.state
    folders = checkpoints(args.output_dir)
    good = [step for step in folders if not _forgot(trainer, scores_at(state.log_history, step) or {})]
    steps = sorted(best_steps(args, state.log_history, good))
    if len(steps) < 2 or state.best_model_checkpoint is None:
        logger.warning("--average_best: there are not two scored checkpoints; nothing is averaged")
        return {}
    mean, error = Path(args.output_dir) / AVERAGED, None
    if args.should_save:
        shutil.rmtree(mean, ignore_errors=True)  # of a run that broke off
        try:
            average_checkpoints([folders[step] for step in steps], mean)
        except (CheckpointError, OSError) as caught:
            error = str(caught)
    if args.world_size > 1:
        error = broadcast_object_list([error])[0]
    if error is not None:
        logger.error("--average_best: %s; the best checkpoint remains", error)
        return {}
    trainer.load_checkpoint(mean)
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        shutil.rmtree(mean)
    metrics = trainer.score(metric_key_prefix=AVERAGED)
    trainer.log(metrics)
    best, averaged = float(state.best_metric or 0.0), metrics[metric_key(args, AVERAGED)]
    scores = {f"eval_{key.removeprefix(f'{AVERAGED}_')}": value for key, value in metrics.items() if key != "epoch"}
    won = averaged > best if args.greater_is_better else averaged < best
    won = won and not _forgot(trainer, scores)
    names = ", ".join(map(str, steps))
    text = f"mean of the checkpoints of steps {names} ({args.metric_for_best_model} {averaged:.5f})"
    single = f"{Path(state.best_model_checkpoint).name} ({args.metric_for_best_model} {best:.5f})"
    if won:
        trainer.current_scores = scores
    else:
        trainer.load_checkpoint(Path(state.best_model_checkpoint))
    trainer.selection = f"{text}, better than {single}" if won else f"{single}, not beaten by the {text}"
    logger.info("the model that remains: %s", trainer.selection)
    measure = metric_key(args).removeprefix("eval_")
    return {f"best_{measure}": best, f"{AVERAGED}_{measure}": averaged, "averaged_remains": float(won)}


def _forgot(trainer: SpeechLLMTrainer, scores: Mapping[str, float]) -> bool:
    """Whether an evaluation shows a loss of retention that ends training."""
    guard = trainer.retention_guard
    if guard is None or not guard.stop or RETENTION_METRIC not in scores:
        return False
    return not guard.passes(scores[RETENTION_METRIC], trainer.state.log_history)
