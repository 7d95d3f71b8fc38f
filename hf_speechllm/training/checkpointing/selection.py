"""Selection of the checkpoints to keep and of the final weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...formats.checkpoint import CheckpointError
from ..arguments import SpeechLLMTrainingArguments
from .averaging import average_checkpoints
from .comparison import check_options
from .manifest import MANIFEST_FILE, checkpoint_folders
from .retention import History, RetentionError, RetentionGuard, base_cer

logger = logging.getLogger(__name__)

AVERAGED = "averaged"  # prefix of the metrics of averaged weights, and name of their temporary folder


def check_resumable(args: SpeechLLMTrainingArguments, checkpoint: str | Path) -> None:
    """Checks that a run with these options can resume from a checkpoint.

    Raises:
        ValueError: if options have changed that must not change, or if the checkpoint lacks the base model's CER of
            --retention_file.
    """
    check_options(args, Path(checkpoint))
    if args.retention_file is not None:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        base_cer(state["log_history"])


def metric_key(args: SpeechLLMTrainingArguments, prefix: str = "eval") -> str:
    """Returns the full name of `--metric_for_best_model`, for example `eval_cer`."""
    return f"{prefix}_{str(args.metric_for_best_model).removeprefix('eval_')}"


def scores_at(log_history: History, step: int) -> dict[str, float] | None:
    """Returns the metrics of the first evaluation at a step; `None` without evaluation."""
    for entry in log_history:
        if entry["step"] == step and any(key.startswith("eval_") for key in entry):
            return {key: value for key, value in entry.items() if key != "step"}
    return None


def complete_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Returns the complete checkpoints of a run by step, in order."""
    folders = checkpoint_folders(output_dir)
    return {step: path for step, path in folders.items() if (path / MANIFEST_FILE).is_file()}


def best_steps(args: SpeechLLMTrainingArguments, log_history: History, steps: Collection[int]) -> list[int]:
    """Returns the steps of the best checkpoints, at most `--keep_best_checkpoints`; best first, earlier first if tied.

    Ignores checkpoints without an evaluation at the same step.
    """
    scores = {step: (scores_at(log_history, step) or {}).get(metric_key(args)) for step in steps}
    sign = -1 if args.greater_is_better else 1
    scored = [(sign * score, step) for step, score in scores.items() if score is not None]
    return [step for _, step in sorted(scored)[: args.keep_best_checkpoints]]


def restore_best(args: SpeechLLMTrainingArguments, state: TrainerState, checkpoint: Path) -> None:
    """Restores the best checkpoint in the state of a resumed run; a missing one is replaced by the next best.

    Args:
        args: of the run.
        state: state from the checkpoint; changed in place.
        checkpoint: checkpoint from which the run resumes.
    """
    if not state.best_global_step:
        return
    folders, best = complete_checkpoints(args.output_dir), int(state.best_global_step)
    sibling = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best}")  # for a checkpoint outside of the output folder
    folder = folders.get(best, sibling if (sibling / MANIFEST_FILE).is_file() else None)
    if folder is not None or not args.load_best_model_at_end:
        state.best_model_checkpoint = None if folder is None else str(folder)
        return
    steps = best_steps(args, state.log_history, folders)
    step = steps[0] if steps else None
    scores = scores_at(state.log_history, step) if step is not None else None
    state.best_global_step, state.best_metric = step or 0, scores[metric_key(args)] if scores else None
    state.best_model_checkpoint = None if step is None else str(folders[step])
    remaining = "no other scored checkpoint exists" if step is None else f"the next best is checkpoint-{step}"
    logger.warning("the best checkpoint, checkpoint-%d, is missing: %s", best, remaining)


def delete_checkpoints(args: SpeechLLMTrainingArguments, state: TrainerState, guard: RetentionGuard | None) -> None:
    """Deletes checkpoints except the n best, the latest and the last good checkpoint.

    Without `--keep_best_checkpoints`, `--save_total_limit` limits the number, as in transformers. Incomplete folders
    are not deleted and do not count.

    Args:
        args: of the run.
        state: of the run.
        guard: retention guard, if used.
    """
    folders = complete_checkpoints(args.output_dir)
    if not folders:
        return
    kept = {max(folders)}
    if state.best_model_checkpoint is not None:
        kept |= {step for step, path in folders.items() if path.name == Path(state.best_model_checkpoint).name}
    if (last_good := last_good_checkpoint(args, state, guard)) is not None:
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


def last_good_checkpoint(
    args: SpeechLLMTrainingArguments, state: TrainerState, guard: RetentionGuard | None
) -> int | None:
    """Returns the step of the latest checkpoint that is not after the last evaluation within the retention limit."""
    if guard is None or not guard.stop:
        return None
    limit = guard.last_good_step(state.log_history)
    return max((step for step in complete_checkpoints(args.output_dir) if step <= limit), default=None)


class FinishedRun(Protocol):
    """Interface of the trainer for the selection of the final weights."""

    args: SpeechLLMTrainingArguments
    state: TrainerState
    retention_guard: RetentionGuard | None
    current_scores: dict[str, float] | None
    selection: str | None
    accelerator: Any

    def evaluate(self) -> dict[str, float]: ...

    def score(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]: ...

    def log(self, logs: dict[str, float]) -> None: ...

    def load_checkpoint(self, folder: Path) -> None: ...


def select_final_weights(run: FinishedRun) -> dict[str, float]:
    """Selects the final weights after training: last, last good, best, or the mean of the best.

    Args:
        run: the trainer; loads the weights, and stores scores and description.

    Returns:
        Metrics of the selection, for the results.

    Raises:
        RetentionError: if the retention guard has ended training, and no good checkpoint exists.
    """
    guard = run.retention_guard
    if guard is not None and run.current_scores is None:
        run.evaluate()  # steps after the last evaluation may have exceeded the limit
    if guard is not None and guard.stopped:
        run.state.best_metric, run.state.best_global_step = guard.best
        _restore_last_good(run, guard)
    return _try_average(run) if run.args.average_best else {}


def _restore_last_good(run: FinishedRun, guard: RetentionGuard) -> None:
    args, state = run.args, run.state
    good = last_good_checkpoint(args, state, guard)
    if good is None:
        raise RetentionError(
            f"retention: training ended at step {state.global_step}, before a checkpoint within "
            f"--max_retention_loss {args.max_retention_loss:g} existed; nothing is saved, and "
            f"{args.run_options.get('model_name_or_path', 'the base model')} remains the best model. Evaluate and "
            "save more often, lower the learning rate, use LoRA, or freeze more parts"
        )
    folder = complete_checkpoints(args.output_dir)[good]
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        folder = Path(state.best_model_checkpoint)  # within the limit, and already loaded
    else:
        run.load_checkpoint(folder)
    run.selection = f"{folder.name}, because later ones exceed the limit for {Path(str(args.retention_file)).name}"
    logger.warning("retention: the final weights are those of %s", folder)


def _try_average(run: FinishedRun) -> dict[str, float]:
    args, state, guard = run.args, run.state, run.retention_guard
    folders = complete_checkpoints(args.output_dir)

    def exceeds_limit(scores: dict[str, float]) -> bool:
        return guard is not None and guard.must_stop(scores, state.log_history)

    good = [step for step in folders if not exceeds_limit(scores_at(state.log_history, step) or {})]
    steps = sorted(best_steps(args, state.log_history, good))
    if len(steps) < 2 or state.best_model_checkpoint is None:
        logger.warning("--average_best: nothing is averaged, because there are fewer than two scored checkpoints")
        return {}
    mean, error = Path(args.output_dir) / AVERAGED, None
    if args.should_save:
        shutil.rmtree(mean, ignore_errors=True)  # of an interrupted run
        try:
            average_checkpoints([folders[step] for step in steps], mean)
        except (CheckpointError, OSError) as caught:
            error = str(caught)
    if args.world_size > 1:
        error = broadcast_object_list([error])[0]
    if error is not None:
        logger.error("--average_best: %s; the best checkpoint stays the final one", error)
        return {}
    run.load_checkpoint(mean)
    run.accelerator.wait_for_everyone()
    if args.should_save:
        shutil.rmtree(mean)
    metrics = run.score(metric_key_prefix=AVERAGED)
    run.log(metrics)
    best, averaged = float(state.best_metric or 0.0), metrics[metric_key(args, AVERAGED)]
    scores = {f"eval_{key.removeprefix(f'{AVERAGED}_')}": value for key, value in metrics.items() if key != "epoch"}
    is_better = averaged > best if args.greater_is_better else averaged < best
    is_better = is_better and not exceeds_limit(scores)
    names = ", ".join(map(str, steps))
    text = f"mean of the checkpoints of steps {names} ({args.metric_for_best_model} {averaged:.5f})"
    single = f"{Path(state.best_model_checkpoint).name} ({args.metric_for_best_model} {best:.5f})"
    if is_better:
        run.current_scores = scores
    else:
        run.load_checkpoint(Path(state.best_model_checkpoint))
    run.selection = f"{text}, better than {single}" if is_better else f"{single}, kept instead of the {text}"
    logger.info("final weights: %s", run.selection)
    measure = metric_key(args).removeprefix("eval_")
    return {f"best_{measure}": best, f"{AVERAGED}_{measure}": averaged, "averaged_remains": float(is_better)}
