"""Lineage of checkpoints: which checkpoints of an output folder belong to a run, and whether the run is finished."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainerCallback

from ...files import atomic_write
from ..arguments import SpeechLLMTrainingArguments
from .manifest import checkpoint_folders
from .selection import restore_best

logger = logging.getLogger(__name__)

LINEAGE_FILE = "course.json"  # in a checkpoint: IDs of the checkpoint and the ancestors
FINISHED_FILE = "finished.json"  # in an output folder: steps and epochs of a finished run
ABANDONED = "abandoned"  # prefix of folders, in an output folder, for checkpoints that were moved
JOURNAL_FILE = ".set_aside.json"  # in an output folder, while checkpoints are moved


class RunFinished(Exception):
    """No training steps are left; the message says why."""


class CheckpointLineage(TrainerCallback):
    """Limits the checkpoints of an output folder to the ancestors of the run.

    Each checkpoint has an ID and lists the IDs of all ancestors. When training starts, other checkpoints of the output
    folder are moved to `abandoned-N/checkpoint-STEP`, and never deleted. The last checkpoint of the run is then the
    checkpoint with the highest step.

    Attributes:
        checkpoint: folder from which the run resumes; `None` for a new run.
    """

    def __init__(self):
        self.checkpoint: Path | None = None
        self._ids: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Moves checkpoints that are no ancestors; on all ranks, after the checkpoint was loaded.

        Raises:
            OSError: on all ranks, if a folder cannot be renamed.
        """
        problem = None
        self._ids = _read_ids(self.checkpoint) if self.checkpoint is not None else []
        if args.should_save:
            try:
                abandon_checkpoints(args.output_dir, self.checkpoint, state.global_step)
                (Path(args.output_dir) / FINISHED_FILE).unlink(missing_ok=True)
            except OSError as error:
                problem = str(error)
        for text in gather_object([problem]) if args.world_size > 1 else [problem]:
            if text is not None:
                raise OSError(f"{args.output_dir}: checkpoints of another run cannot be moved: {text}")
        if self.checkpoint is not None:
            restore_best(args, state, self.checkpoint)

    def save(self, folder: Path) -> None:
        """Writes the IDs of a new checkpoint and the ancestors into the checkpoint."""
        self._ids.append(secrets.token_hex(6))
        with atomic_write(folder / LINEAGE_FILE) as file:
            json.dump({"checkpoints": self._ids}, file)


def abandon_checkpoints(output_dir: str | Path, checkpoint: Path | None, step: int = 0) -> None:
    """Moves the checkpoints of an output folder that are not ancestors of a run to `abandoned-N`.

    Args:
        output_dir: the folder.
        checkpoint: checkpoint from which the run resumes, in this folder or elsewhere; `None` for a new run.
        step: of the checkpoint.

    Raises:
        OSError: if a folder cannot be renamed; the next start of the run tries again.
    """
    folders = checkpoint_folders(output_dir)
    ancestors = set(_read_ids(checkpoint)) if checkpoint is not None else set()
    names = [
        path.name
        for number, path in folders.items()
        if checkpoint is None or not _is_ancestor(checkpoint, step, ancestors, path, number)
    ]
    if not names:
        return
    number = 1 + max((int(number) for number in _numbers(output_dir)), default=0)
    with atomic_write(Path(output_dir) / JOURNAL_FILE) as file:
        json.dump({"folder": f"{ABANDONED}-{number}", "names": names}, file)
    finish_abandoning(output_dir)
    logger.warning(
        "%s: moved %s to %s, which you may delete",
        f"training returns to {checkpoint}" if checkpoint is not None else "training starts fresh",
        ", ".join(names), Path(output_dir) / f"{ABANDONED}-{number}",
    )  # fmt: skip


def finish_abandoning(output_dir: str | Path) -> None:
    """Moves the checkpoints in the journal of an output folder; completes a move that was interrupted by a kill."""
    journal = Path(output_dir) / JOURNAL_FILE
    if not journal.is_file():
        return
    plan = json.loads(journal.read_text(encoding="utf-8"))
    target = journal.with_name(plan["folder"])
    target.mkdir(exist_ok=True)
    for name in plan["names"]:
        if journal.with_name(name).exists():
            journal.with_name(name).rename(target / name)
    journal.unlink()


def _numbers(output_dir: str | Path) -> list[str]:
    names = [path.name.removeprefix(f"{ABANDONED}-") for path in Path(output_dir).glob(f"{ABANDONED}-*")]
    return [name for name in names if name.isdecimal()]


def _read_ids(checkpoint: Path) -> list[str]:
    try:
        return json.loads((checkpoint / LINEAGE_FILE).read_text(encoding="utf-8"))["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the file is missing or damaged


def _is_ancestor(checkpoint: Path, step: int, ancestors: Collection[str], folder: Path, number: int) -> bool:
    """Whether `folder` (step `number`) is `checkpoint` (step `step`) or an ancestor of `checkpoint`."""
    if os.path.realpath(folder) == os.path.realpath(checkpoint):
        return True
    if ancestors and (ids := _read_ids(folder)):
        return ids[-1] in ancestors
    # Without IDs, earlier checkpoints in the same folder count as ancestors.
    return os.path.realpath(folder.parent) == os.path.realpath(checkpoint.parent) and number < step


def write_finished(args: SpeechLLMTrainingArguments, step: int, epoch: float) -> None:
    """Records in the output folder that a run is finished; must be called after all results are written."""
    plan = {"step": step, "epoch": epoch, "max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    with atomic_write(Path(args.output_dir) / FINISHED_FILE) as file:
        json.dump(plan, file, indent=1)


def check_unfinished(args: SpeechLLMTrainingArguments, checkpoint: Path | None, is_named: bool) -> None:
    """Checks that training steps are left in a resumed run.

    Args:
        checkpoint: checkpoint from which the run would resume; `None` if none exists.
        is_named: whether the user has named the checkpoint, which allows a finished run to return to an earlier step.

    Raises:
        RunFinished: if the run is finished, or the checkpoint is after the end according to the options.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")) if checkpoint else None
    finished = Path(args.output_dir) / FINISHED_FILE
    if finished.is_file():
        plan = json.loads(finished.read_text(encoding="utf-8"))
        earlier = is_named and state is not None and state["global_step"] < plan["step"]
        if not earlier and not _extends(args, plan):
            raise RunFinished(
                f"{args.output_dir}: the run is finished ({plan['step']} steps); nothing changes. Raise "
                "--num_train_epochs or --max_steps to train longer, or choose another --output_dir"
            )
    if state is None:
        return
    if 0 < args.max_steps < state["global_step"]:
        end = f"--max_steps {args.max_steps}"
    elif args.max_steps <= 0 and (state.get("epoch") or 0) > args.num_train_epochs:
        end = f"--num_train_epochs {args.num_train_epochs:g}"
    else:
        return
    raise RunFinished(
        f"{checkpoint} (step {state['global_step']}, epoch {state.get('epoch') or 0:g}) is past {end}: no training "
        "steps are left; nothing changes"
    )


def _extends(args: SpeechLLMTrainingArguments, plan: dict) -> bool:
    if args.max_steps > 0:
        return args.max_steps > plan["step"] and args.max_steps != plan["max_steps"]
    same = plan["max_steps"] <= 0 and args.num_train_epochs == plan["num_train_epochs"]
    return not same and args.num_train_epochs > plan["epoch"]
