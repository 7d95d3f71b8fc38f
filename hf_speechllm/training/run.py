"""Start and end of a training run: logging, choice of the checkpoint, summary of the data, final results."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..console import command, format_seconds, print_summary, quiet_transformers, show_log
from ..data.dataset import row_seconds
from ..data.streaming import RowStream
from ..hub.publishing import CURVE_FILE
from ..locks import acquire_output_lock
from .arguments import SpeechLLMTrainingArguments
from .checkpointing.lineage import RunFinished, check_unfinished, write_finished
from .checkpointing.manifest import checkpoint_folders, find_damage, last_complete
from .checkpointing.selection import check_resumable
from .checkpointing.writer import remove_partial_checkpoints
from .progress_lines import validation_lines
from .validation_files import TABLE_FILE

logger = logging.getLogger(__name__)


def set_up_logging(args: SpeechLLMTrainingArguments) -> None:
    """Logs messages of the first process at `--log_level`, and only warnings of other processes."""
    level = args.get_process_log_level()
    level = logging.INFO if level == logging.NOTSET or (level == logging.WARNING and args.should_log) else level
    show_log(level, timestamps=True)
    quiet_transformers()
    datasets.utils.logging.set_verbosity_warning()
    if not args.should_log:
        datasets.disable_progress_bars()


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
                "--resume_from_checkpoint auto, or choose another --output_dir"
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


def save_final(trainer, result: TrainOutput, validation_files: Mapping[str, str] | None = None) -> None:
    """Saves model, processor, state, metrics and model card into the output folder; evaluates the final weights unless
    scores exist; prints a summary with the commands to run next.

    Args:
        trainer: after training.
        result: of `train`.
        validation_files: files by name of the validation set, for the summary.
    """
    trainer.save_model(_internal_call=True)  # otherwise transformers pushes the model before the card has scores
    trainer.save_state()
    metrics = result.metrics
    if trainer.state.global_step == trainer.initial_step:  # no steps were done: these metrics would be zeros
        metrics = {key: value for key, value in metrics.items() if not key.startswith(("train_", "total_flos"))}
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.current_scores or trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        write_finished(trainer.args, trainer.state.global_step, trainer.state.epoch)
        print_summary(
            _results(trainer, result.metrics), _next_commands(trainer.args.output_dir, validation_files or {})
        )


def _results(trainer, metrics: Mapping[str, float]) -> dict[str, Any]:
    state, args = trainer.state, trainer.args
    trained = f"{state.global_step} steps, {state.epoch or 0:.2f} epochs"
    if "train_runtime" in metrics:
        trained += f", {format_seconds(metrics['train_runtime'])}"
    if "peak_memory_gb" in metrics:
        trained += f", {metrics['peak_memory_gb']} GB of GPU memory"
    facts: dict[str, Any] = {"trained": trained, "saved": trainer.selection}
    before = [entry for entry in state.log_history if entry["step"] == 0]
    scores = {**(trainer.current_scores or {}), "step": state.global_step}
    facts["score"] = validation_lines(scores, trainer.validator.rate_names, before)
    facts["model"] = args.output_dir
    facts["curve"] = os.path.join(args.output_dir, CURVE_FILE)
    if args.eval_cer:
        facts["table"] = os.path.join(args.output_dir, TABLE_FILE)
    return facts


def _next_commands(folder: str, validation_files: Mapping[str, str]) -> list[str]:
    decode: dict[str, Any] = {"model_name_or_path": folder}
    listed = [(name, file) for name, file in validation_files.items() if file.endswith(".jsonl")]
    if listed:
        name, file = listed[-1]
        line = command("decode", **decode, jsonl_file=file, output_file=os.path.join(folder, f"{name}.txt"))
    else:
        line = command("decode", "RECORDING", **decode, output_file=os.path.join(folder, "texts.txt"))
    return [line, command("push", input=folder, hub_model_id="USER/NAME")]
