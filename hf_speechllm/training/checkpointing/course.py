"""The course of a run: which checkpoints of an output folder belong to it, and whether it is finished."""

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

COURSE_FILE = "course.json"  # in a checkpoint: the checkpoints that led to it
FINISHED_FILE = "finished.json"  # in an output folder: what a run that has ended had trained
ABANDONED = "abandoned"  # prefix of the folders, in an output folder, of checkpoints that are set aside
JOURNAL_FILE = ".set_aside.json"  # in an output folder, while checkpoints are set aside


class RunFinished(Exception):
    """Nothing is left to train; the message says why."""


class Course(TrainerCallback):
    """Keeps the checkpoints of an output folder to those of one course of training.

    Each checkpoint has an identity and lists those of its ancestors. When training starts, the checkpoints of the
    output folder that are not among them are set aside: renamed to `abandoned-N/checkpoint-STEP`, never deleted. The
    last checkpoint of the run is then the one with the highest step.

    Attributes:
        checkpoint: folder that the run is resumed from; `None` for a new run.
    """

    def __init__(self):
        self.checkpoint: Path | None = None
        self._identities: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Sets aside what the run does not build on; on all ranks, after the checkpoint was loaded.

        Raises:
            OSError: if a folder can't be renamed, on all ranks alike.
        """
        problem = None
        self._identities = _identities(self.checkpoint) if self.checkpoint is not None else []
        if args.should_save:
            try:
                set_aside(args.output_dir, self.checkpoint, state.global_step)
                (Path(args.output_dir) / FINISHED_FILE).unlink(missing_ok=True)
            except OSError as error:
                problem = str(error)
        for text in gather_object([problem]) if args.world_size > 1 else [problem]:
            if text is not None:
                raise OSError(f"{args.output_dir}: checkpoints can't be set aside: {text}")
        if self.checkpoint is not None:
            restore_best(args, state, self.checkpoint)

    def save(self, folder: Path) -> None:
        """Writes the identities of a new checkpoint and of its ancestors into it."""
        self._identities.append(secrets.token_hex(6))
        with atomic_write(folder / COURSE_FILE) as file:
            json.dump({"checkpoints": self._identities}, file)


def set_aside(output_dir: str | Path, checkpoint: Path | None, step: int = 0) -> None:
    """Renames the checkpoints of an output folder that a run does not build on.

    Args:
        output_dir: the folder.
        checkpoint: that the run is resumed from, in this folder or elsewhere; `None` for a new run.
        step: of that checkpoint.

    Raises:
        OSError: if a folder can't be renamed; the next start goes on with it.
    """
    folders = checkpoint_folders(output_dir)
    ancestors = set(_identities(checkpoint)) if checkpoint is not None else set()
    names = [
        path.name
        for number, path in folders.items()
        if checkpoint is None or not _leads_to(checkpoint, step, ancestors, path, number)
    ]
    if not names:
        return
    number = 1 + max((int(number) for number in _numbers(output_dir)), default=0)
    with atomic_write(Path(output_dir) / JOURNAL_FILE) as file:
        json.dump({"folder": f"{ABANDONED}-{number}", "names": names}, file)
    finish_setting_aside(output_dir)
    logger.warning(
        "%s: %s set aside in %s, which may be deleted",
        f"training goes back to {checkpoint}" if checkpoint is not None else "training starts from the beginning",
        ", ".join(names), Path(output_dir) / f"{ABANDONED}-{number}",
    )  # fmt: skip


def finish_setting_aside(output_dir: str | Path) -> None:
    """Renames what the journal of an output folder lists, also after a kill in the middle."""
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


def _identities(checkpoint: Path) -> list[str]:
    try:
        return json.loads((checkpoint / COURSE_FILE).read_text(encoding="utf-8"))["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of a checkpoint that has none, or is damaged


def _leads_to(checkpoint: Path, step: int, ancestors: Collection[str], folder: Path, number: int) -> bool:
    """Whether a folder, of step `number`, is a checkpoint, of step `step`, or one of its ancestors."""
    if os.path.realpath(folder) == os.path.realpath(checkpoint):
        return True
    if ancestors and (own := _identities(folder)):
        return own[-1] in ancestors
    # Without identities, those before it in the same folder are taken for its ancestors.
    return os.path.realpath(folder.parent) == os.path.realpath(checkpoint.parent) and number < step


def write_finished(args: SpeechLLMTrainingArguments, step: int, epoch: float) -> None:
    """Notes in the output folder that a run is over, once all its results are written."""
    plan = {"step": step, "epoch": epoch, "max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    with atomic_write(Path(args.output_dir) / FINISHED_FILE) as file:
        json.dump(plan, file, indent=1)


def check_unfinished(args: SpeechLLMTrainingArguments, checkpoint: Path | None, goes_back: bool) -> None:
    """Sees to it that something is left to do for a run that is resumed.

    Args:
        checkpoint: that it would be resumed from; `None` if there is none.
        goes_back: whether the checkpoint was named, so that a finished run starts again from an earlier step.

    Raises:
        RunFinished: if the run is finished, or the checkpoint is past the end that the options give.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")) if checkpoint else None
    finished = Path(args.output_dir) / FINISHED_FILE
    if finished.is_file():
        plan = json.loads(finished.read_text(encoding="utf-8"))
        earlier = goes_back and state is not None and state["global_step"] < plan["step"]
        if not earlier and not _asks_for_more(args, plan):
            raise RunFinished(
                f"{args.output_dir}: the run is finished ({plan['step']} steps); its results stay as they are. Raise "
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
        f"{checkpoint} (step {state['global_step']}, epoch {state.get('epoch') or 0:g}) is past {end}: nothing "
        "is left to train, and everything stays as it is"
    )


def _asks_for_more(args: SpeechLLMTrainingArguments, plan: dict) -> bool:
    if args.max_steps > 0:
        return args.max_steps > plan["step"] and args.max_steps != plan["max_steps"]
    same = plan["max_steps"] <= 0 and args.num_train_epochs == plan["num_train_epochs"]
    return not same and args.num_train_epochs > plan["epoch"]
