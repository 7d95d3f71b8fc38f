"""What has changed between a checkpoint and the run that resumes from it: refused, kept as it was, or reported."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ...formats.checkpoint import CheckpointError
from ..arguments import SpeechLLMTrainingArguments
from .dependencies import describe_options, read_record

logger = logging.getLogger(__name__)

MAX_NAMED = 8  # changes in one message
# The optimizer's state in a checkpoint holds these: they are taken from there.
OPTIMIZER_OPTIONS = (
    "learning_rate", "audio_encoder_learning_rate", "audio_adaptor_learning_rate", "llm_learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
SAME_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused"}  # implementations with one state
# By the first pattern that fits, the reason why a run can't go on with another value.
MODEL, ROWS, SCORES = "the checkpoint does not fit another model", "nobody knows which rows it has seen", "scores"
REFUSED = {
    "options.freeze_*": MODEL,
    "options.use_lora": MODEL,
    "options.lora_r": MODEL,
    "options.lora_alpha": MODEL,
    "options.lora_target_modules": MODEL,
    "options.optim": MODEL,
    "options.streaming": MODEL,
    "options.metric_for_best_model": SCORES,
    "options.greater_is_better": SCORES,
    "validation.retention": SCORES,
    "model.adapter.*dropout*": None,
    "model.config.*dropout*": None,
    "model.config.use_cache": None,
    "model.*": MODEL,
    "engine": MODEL,
    "dialogues.*": MODEL,
    "tokenizer.*": MODEL,
    "features.*": MODEL,
    "data.files.*": None,
    "data.*": ROWS,
    "recordings": ROWS,
}
ADVICE = {
    MODEL: "restore it, or begin a new run from these weights: --model_name_or_path {folder} and another --output_dir",
    ROWS: "restore it, or begin the epoch again with --ignore_data_skip true",
    SCORES: "scores before and after can't be compared; restore it, or begin a new run in another --output_dir",
}


@dataclass
class Changes:
    """What is different, as text; `kept` are options that go back to the values of the checkpoint."""

    refused: dict[str, list[str]] = field(default_factory=dict)  # by reason
    reported: list[str] = field(default_factory=list)
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # in the checkpoint, asked for


def check_options(args: SpeechLLMTrainingArguments, folder: Path) -> None:
    """Refuses options that a checkpoint can't be resumed with, before data and model are loaded.

    Raises:
        CheckpointError: in one line, with all of them.
    """
    if (saved := read_record(folder)) is not None:
        now = {"options": describe_options(args)}
        _refuse(compare({"options": saved["options"]}, now, args.ignore_data_skip), folder)


def check_dependencies(
    args: SpeechLLMTrainingArguments, now: Mapping[str, Any], folder: Path, rows: Any = None
) -> None:
    """Compares what a run depends on with a checkpoint's record, on the first rank; the others are told.

    Options of the optimizer are set to the values of the checkpoint in `args`, so that what is written about the run
    afterwards is true.

    Args:
        now: of `describe_run`; used on the first rank.
        rows: the training rows, to name one that has changed.

    Raises:
        CheckpointError: in one line, if the run can't go on from the checkpoint, on all ranks alike.
    """
    result: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            result[0] = _compare_and_report(args, now, folder, rows)
        except CheckpointError as error:
            result[1] = str(error)
    if args.world_size > 1:
        broadcast_object_list(result)
    kept, problem = result
    if problem is not None:
        raise CheckpointError(problem)
    for name, value in kept.items():
        setattr(args, name, value)


def _compare_and_report(
    args: SpeechLLMTrainingArguments, now: Mapping[str, Any], folder: Path, rows: Any
) -> dict[str, Any]:
    saved = read_record(folder)
    if saved is None:
        logger.warning("%s has no record of its data and options; changes can't be found", folder)
        return {}
    changes = compare(saved, now, args.ignore_data_skip, rows)
    _refuse(changes, folder)
    if changes.kept:
        texts = [f"--{name} {asked} (the checkpoint has {value})" for name, (value, asked) in changes.kept.items()]
        logger.warning("ignored, since the optimizer is that of %s: %s", folder, ", ".join(texts))
    if changes.reported:
        logger.warning("changed since %s was written: %s", folder, ", ".join(changes.reported))
    return {name: value for name, (value, _) in changes.kept.items()}


def _refuse(changes: Changes, folder: Path) -> None:
    if not changes.refused:
        return
    texts = []
    for reason, names in changes.refused.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        cause = "" if reason == SCORES else f"{reason}; "
        texts.append(f"{', '.join(names[:MAX_NAMED])}{more}: {cause}{ADVICE[reason].format(folder=folder)}")
    raise CheckpointError(f"{folder} can't be resumed, since this has changed: " + ". ".join(texts))


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], begins_epoch: bool = False, rows: Any = None) -> Changes:
    """Sorts the differences between two records.

    Args:
        saved, now: of `describe_run`, or parts of it.
        begins_epoch: whether the epoch begins again, so that other rows are only reported.
        rows: the rows of `now`, to name one that has changed.
    """
    changes = Changes()
    other_release = saved.get("versions") != now.get("versions")
    has_optimizer = not saved["options"].get("save_only_model")
    before, after = dict(_flatten(_plain(saved))), dict(_flatten(_plain(now)))
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new or name.partition(".")[0] not in saved:  # a record of an earlier release has less
            continue
        option = name.removeprefix("options.")
        text = f"{f'--{option}' if option != name else name} {_shown(old)} -> {_shown(new)}"
        if has_optimizer and option != name and option in OPTIMIZER_OPTIONS:
            changes.kept[option] = (old, new)
            continue
        # Releases add options and settings, whose defaults change nothing.
        is_new = name not in before if option != name else other_release and not {name} <= before.keys() & after.keys()
        reason = None if is_new and not name.startswith("data.") else _reason(name, old, new)
        _add(changes, reason, text, begins_epoch)
    if "recordings" in saved and "recordings" in now:
        _compare_recordings(changes, saved["recordings"], now["recordings"], begins_epoch, rows)
    options = changes.refused.get(MODEL, [])
    if any(text.startswith("--") for text in options):  # the rest follows from them
        changes.refused[MODEL] = [text for text in options if text.startswith("--")]
    return changes


def _add(changes: Changes, reason: str | None, text: str, begins_epoch: bool) -> None:
    if reason is None or (reason == ROWS and begins_epoch):
        changes.reported.append(text)
    else:
        changes.refused.setdefault(reason, []).append(text)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("recordings", "version")}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _reason(name: str, old: Any, new: Any) -> str | None:
    """Why a run can't go on with another value; `None` if it can."""
    reason = next((reason for pattern, reason in REFUSED.items() if fnmatchcase(name, pattern)), None)
    if name == "options.optim" and {old, new} <= SAME_OPTIMIZERS:
        return None
    if reason == SCORES and (old is None or new is None):  # nothing that could be compared
        return None
    return reason


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_hash else text if len(text) <= 80 else f"{text[:77]}..."


def _compare_recordings(changes: Changes, old: Mapping, new: Mapping, begins_epoch: bool, rows: Any) -> None:
    if old["rows_of_block"] != new["rows_of_block"] or len(old["sizes"]) != len(new["sizes"]):
        return  # other rows, which is told already
    total = len(new["sizes"])
    resized = [index for index in range(total) if old["sizes"][index] != new["sizes"][index]]
    touched = [index for index in range(total) if old["times"][index] != new["times"][index]]
    changed = resized or touched
    if not changed:
        return
    place = _place(rows, changed[0] * new["rows_of_block"])
    what = "size" if resized else "time of modification"
    share = f"{len(changed)} of {total}" + ("" if new["rows_of_block"] == 1 else f" blocks of {new['rows_of_block']}")
    text = f"recordings: another {what} of {share}{place}"
    if not resized and len(touched) == total:  # as when all are copied
        text += " (are they the same recordings?)"
        changes.reported.append(text)
    else:
        _add(changes, REFUSED["recordings"], text, begins_epoch)


def _place(rows: Any, index: int) -> str:
    if not {"recordings", "file", "line"} <= {*(getattr(rows, "column_names", None) or ())}:
        return ""
    row = rows.select_columns(["recordings", "file", "line"])[index]
    return f", first {row['recordings'][0]} ({row['file']}, line {row['line']})"
