"""The start and the end of a training run: logging, where to go on, what is told of the data, what is saved."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import datasets
import transformers
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..data.dataset import row_seconds
from ..data.streaming import RowStream
from ..evaluation.validation_metrics import set_names
from ..hub.publishing import CURVE_FILE
from ..locks import acquire_output_lock
from .arguments import SpeechLLMTrainingArguments
from .checkpointing.course import RunFinished, check_unfinished, write_finished
from .checkpointing.manifest import checkpoint_folders, find_damage, last_complete
from .checkpointing.selection import check_resumable
from .checkpointing.writer import remove_partial_checkpoints
from .validation_files import TABLE_FILE

logger = logging.getLogger(__name__)


def set_up_logging(args: SpeechLLMTrainingArguments) -> None:
    """Messages of the first process at `--log_level`, only warnings of the others."""
    level = args.get_process_log_level()
    level = logging.INFO if level == logging.NOTSET or (level == logging.WARNING and args.should_log) else level
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    datasets.utils.logging.set_verbosity_warning()
    transformers.utils.logging.set_verbosity_warning()
    for noisy in ("httpx", "filelock", "fsspec", "torio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def find_checkpoint(args: SpeechLLMTrainingArguments) -> str | None:
    """Takes the output folder for this run, and finds the checkpoint to go on from.

    That is the one named by `--resume_from_checkpoint`, or with `last` (or `true`) the last complete one in the output
    folder, or with `auto` that if there is one. The first rank looks, the others are told.

    Returns:
        Its folder; `None` to begin anew.

    Raises:
        ValueError: if there is none, or it is damaged or lacks what the options need, or there are some and it was not
            asked to go on from them, or another run has the output folder.
        RunFinished: if nothing is left to train.
    """
    found: list[str | None] = [None, None, None]
    if args.process_index == 0:
        try:
            acquire_output_lock(args.output_dir)
            found[0] = _find_checkpoint(args)
        except (OSError, ValueError) as error:
            found[1] = str(error)
        except RunFinished as finished:
            found[2] = str(finished)
    if args.world_size > 1:
        broadcast_object_list(found)
    checkpoint, problem, end = found
    if problem is not None:
        raise ValueError(problem)
    if end is not None:
        raise RunFinished(end)
    return checkpoint


def _find_checkpoint(args: SpeechLLMTrainingArguments) -> str | None:
    asked = str(args.resume_from_checkpoint or "false")
    remove_partial_checkpoints(args.output_dir)
    if args.run_options.get("use_lora") or args.save_only_trained:
        _check_base(str(args.run_options.get("model_name_or_path", "")), args.output_dir)
    if asked.lower() == "false":
        if checkpoint_folders(args.output_dir):
            raise ValueError(
                f"{args.output_dir} holds checkpoints of an earlier run: go on from them with "
                "--resume_from_checkpoint true, or choose another --output_dir"
            )
        return None
    goes_back = asked.lower() not in ("true", "last", "auto")
    if not goes_back:
        last = last_complete(args.output_dir)
        if last is None:
            check_unfinished(args, None, goes_back)
        if last is None and asked.lower() != "auto":
            raise ValueError(f"--resume_from_checkpoint: {args.output_dir} has no checkpoint")
    else:
        last = Path(asked)
        if not (last / "trainer_state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint: {asked} is not a checkpoint folder")
        if (damage := find_damage(last)) is not None:
            raise ValueError(f"--resume_from_checkpoint: {asked} is damaged: {damage}")
    if last is None:
        logger.info("%s has no checkpoint yet: training begins", args.output_dir)
        return None
    check_unfinished(args, last, goes_back)
    check_resumable(args, last)
    logger.info("training goes on from %s", last)
    return str(last)


def _check_base(base: str, output_dir: str) -> None:
    """Refuses an output folder in which the base model of what is saved would be overwritten or deleted."""
    path = os.path.relpath(os.path.realpath(base), os.path.realpath(output_dir))
    if os.path.isdir(base) and (path == os.curdir or path.startswith(f"{PREFIX_CHECKPOINT_DIR}-")):
        raise ValueError(
            f"--model_name_or_path {base} lies in --output_dir, but what is saved there needs it as its base model; "
            "choose another --output_dir"
        )


def describe_data(train_rows, validation_rows: dict) -> None:
    """Logs rows and hours of every set."""
    for name, rows in {"training": train_rows, **validation_rows}.items():
        if isinstance(rows, RowStream):
            logger.info("%s: streamed, %d shards of %s", name, len(rows.shards), ", ".join(rows.files))
            continue
        seconds = row_seconds(rows)
        logger.info(
            "%s: %d rows, %.2f h of audio, %.1f s each (longest %.1f s)",
            name, len(rows), seconds.sum() / 3600, seconds.mean(), seconds.max(),
        )  # fmt: skip


def save_final(trainer, result: TrainOutput) -> None:
    """Saves model, processor, state, metrics and card into the output folder, and evaluates the model if that has not
    been done."""
    trainer.save_model(_internal_call=True)  # by itself it would push before there are scores for the card
    trainer.save_state()
    metrics = result.metrics
    if trainer.state.global_step == trainer.initial_step:  # only the end was missing: these would be zeros
        metrics = {key: value for key, value in metrics.items() if not key.startswith(("train_", "total_flos"))}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.current_scores or trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        write_finished(trainer.args, trainer.state.global_step, trainer.state.epoch)
        logger.info("model: %s", trainer.args.output_dir)
        logger.info("training curve: %s", os.path.join(trainer.args.output_dir, CURVE_FILE))
        if trainer.args.eval_cer:
            logger.info("validation: %s", os.path.join(trainer.args.output_dir, TABLE_FILE))
            _tell_scores(trainer)


def _tell_scores(trainer) -> None:
    if trainer.selection is not None:
        logger.info("saved: %s", trainer.selection)
    before = {key: value for entry in trainer.state.log_history if entry["step"] == 0 for key, value in entry.items()}
    for name in set_names(trainer.current_scores):
        key = f"eval_{name}_cer" if name else "eval_cer"
        told = f"{100 * before[key]:.2f} % before training, " if key in before else ""
        logger.info("CER of %s: %s%.2f %% after", name or "validation", told, 100 * trainer.current_scores[key])
