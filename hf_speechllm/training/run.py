"""Start and end of a training run: logging, choice of the checkpoint, summary of the data, final results."""

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
from .checkpointing.lineage import RunFinished, check_unfinished, write_finished
from .checkpointing.manifest import checkpoint_folders, find_damage, last_complete
from .checkpointing.selection import check_resumable
from .checkpointing.writer import remove_partial_checkpoints
from .validation_files import TABLE_FILE

logger = logging.getLogger(__name__)


def set_up_logging(args: SpeechLLMTrainingArguments) -> None:
    """Logs messages of the first process at `--log_level`, and only warnings of other processes."""
    level = args.get_process_log_level()
    level = logging.INFO if level == logging.NOTSET or (level == logging.WARNING and args.should_log) else level
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    datasets.utils.logging.set_verbosity_warning()
    transformers.utils.logging.set_verbosity_warning()
    for noisy in ("httpx", "filelock", "fsspec", "torio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def find_checkpoint(args: SpeechLLMTrainingArguments) -> str | None:
    """Locks the output folder for this run, and finds the checkpoint of `--resume_from_checkpoint`.

    `last` (or `true`) is the last complete checkpoint in the output folder. `auto` is the same, or no checkpoint if
    none exists. The first rank searches and broadcasts the result.

    Returns:
        Folder of the checkpoint; `None` to start fresh.

    Raises:
        ValueError: if the checkpoint is missing, damaged or does not fit the options; if checkpoints exist, but
            `--resume_from_checkpoint` is not set; if another run uses the output folder.
        RunFinished: if no training steps are left.
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
    option = str(args.resume_from_checkpoint or "false")
    remove_partial_checkpoints(args.output_dir)
    if args.run_options.get("use_lora") or args.save_only_trained:
        _check_base(str(args.run_options.get("model_name_or_path", "")), args.output_dir)
    if option.lower() == "false":
        if checkpoint_folders(args.output_dir):
            raise ValueError(
                f"{args.output_dir} contains checkpoints of an earlier run: resume with "
                "--resume_from_checkpoint true, or choose another --output_dir"
            )
        return None
    is_folder = option.lower() not in ("true", "last", "auto")
    if not is_folder:
        checkpoint = last_complete(args.output_dir)
        if checkpoint is None:
            check_unfinished(args, None, is_folder)
        if checkpoint is None and option.lower() != "auto":
            raise ValueError(
                f"--resume_from_checkpoint {option}: {args.output_dir} has no checkpoint; leave the option out to "
                "start fresh"
            )
    else:
        checkpoint = Path(option)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ValueError(
                f"--resume_from_checkpoint {option} is not a checkpoint folder; name a folder checkpoint-STEP, or last"
            )
        if (damage := find_damage(checkpoint)) is not None:
            raise ValueError(f"--resume_from_checkpoint {option} is damaged: {damage}; resume from another checkpoint")
    if checkpoint is None:
        logger.info("%s has no checkpoint: training starts fresh", args.output_dir)
        return None
    check_unfinished(args, checkpoint, is_folder)
    check_resumable(args, checkpoint)
    logger.info("training resumes from %s", checkpoint)
    return str(checkpoint)


def _check_base(base: str, output_dir: str) -> None:
    """Refuses an output folder in which a run would overwrite or delete the base model of the checkpoints."""
    path = os.path.relpath(os.path.realpath(base), os.path.realpath(output_dir))
    if os.path.isdir(base) and (path == os.curdir or path.startswith(f"{PREFIX_CHECKPOINT_DIR}-")):
        raise ValueError(
            f"--model_name_or_path {base} is in --output_dir, where the run would overwrite or delete the base model; "
            "choose another --output_dir"
        )


def describe_data(train_rows, validation_rows: dict) -> None:
    """Logs rows and hours of the training data and of every validation set."""
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
    """Saves model, processor, state, metrics and model card into the output folder; evaluates the final weights unless
    scores exist."""
    trainer.save_model(_internal_call=True)  # otherwise transformers pushes the model before the card has scores
    trainer.save_state()
    metrics = result.metrics
    if trainer.state.global_step == trainer.initial_step:  # no steps were done: these metrics would be zeros
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
            _log_scores(trainer)


def _log_scores(trainer) -> None:
    if trainer.selection is not None:
        logger.info("saved: %s", trainer.selection)
    before = {key: value for entry in trainer.state.log_history if entry["step"] == 0 for key, value in entry.items()}
    for name in set_names(trainer.current_scores):
        key = f"eval_{name}_cer" if name else "eval_cer"
        base = f"{100 * before[key]:.2f} % before training, " if key in before else ""
        logger.info("CER of %s: %s%.2f %% after", name or "validation", base, 100 * trainer.current_scores[key])
