"""Changes between a checkpoint and the run that resumes from the checkpoint: refused, reset, or reported."""

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
# Options in the state of the optimizer: a resumed run uses the values of the checkpoint.
OPTIMIZER_OPTIONS = (
    "learning_rate", "audio_encoder_learning_rate", "audio_adaptor_learning_rate", "llm_learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
SAME_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused"}  # implementations with the same state
# Reasons why a run cannot resume with another value; the first matching pattern counts.
MODEL, ROWS, SCORES = "the checkpoint does not fit another model", "the position in the epoch is unknown", "scores"
REFUSED = {
    "options.freeze_*": MODEL,
    "options.use_lora": MODEL,
    "options.ctc_head": MODEL,
    "options.ctc_vocabulary": MODEL,
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
    MODEL: "restore the value, or start a new run from these weights: --model_name_or_path {folder} and another "
    "--output_dir",
    ROWS: "restore the value, or start the epoch again with --ignore_data_skip true",
    SCORES: "earlier and later scores are not comparable; restore the value, or start a new run in another "
    "--output_dir",
}


@dataclass
class Changes:
    """Differences as text.

    Attributes:
        refused: differences that prevent resuming, by reason.
        reported: differences that are logged.
        kept: options that are reset to the value of the checkpoint: (value in the checkpoint, new value).
    """

    refused: dict[str, list[str]] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def check_options(args: SpeechLLMTrainingArguments, folder: Path) -> None:
    """Refuses options with which a run cannot resume from a checkpoint, before data and model are loaded.

    Raises:
        CheckpointError: one line lists all refused options.
    """
    if (saved := read_record(folder)) is not None:
        now = {"options": describe_options(args)}
        _refuse(compare({"options": saved["options"]}, now, args.ignore_data_skip), folder)


def check_dependencies(
    args: SpeechLLMTrainingArguments, now: Mapping[str, Any], folder: Path, rows: Any = None
) -> None:
    """Compares the dependencies of a run with the record of a checkpoint; the first rank broadcasts the result.

    Resets options of the optimizer in `args` to the values of the checkpoint, so that later records of the run are
    correct.

    Args:
        args: of the run; changed in place.
        now: result of `describe_run`; used on the first rank.
        folder: of the checkpoint.
        rows: training rows, to name a changed row.

    Raises:
        CheckpointError: on all ranks, in one line, if the run cannot resume from the checkpoint.
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
        logger.warning("%s has no record of data and options, so changes cannot be detected", folder)
        return {}
    changes = compare(saved, now, args.ignore_data_skip, rows)
    _refuse(changes, folder)
    if changes.kept:
        texts = [f"--{name} {new} (the checkpoint has {value})" for name, (value, new) in changes.kept.items()]
        logger.warning("ignored, because the optimizer state is from %s: %s", folder, ", ".join(texts))
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
    raise CheckpointError(f"{folder}: the run cannot resume after these changes: " + ". ".join(texts))


def compare(
    saved: Mapping[str, Any], now: Mapping[str, Any], restarts_epoch: bool = False, rows: Any = None
) -> Changes:
    """Classifies the differences between two records.

    Args:
        saved, now: records of `describe_run`, or parts of records.
        restarts_epoch: whether the epoch starts again, so that other rows are only reported.
        rows: rows of `now`, to name a changed row.
    """
    changes = Changes()
    other_release = saved.get("versions") != now.get("versions")  # which may lack options and settings
    has_optimizer = not saved["options"].get("save_only_model")
    before, after = dict(_flatten(_plain(saved))), dict(_flatten(_plain(now)))
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new or name.partition(".")[0] not in saved:  # records of earlier releases have fewer entries
            continue
        option = name.removeprefix("options.")
        text = f"{f'--{option}' if option != name else name} {_shown(old)} -> {_shown(new)}"
        if has_optimizer and option != name and option in OPTIMIZER_OPTIONS:
            changes.kept[option] = (old, new)
            continue
        is_known = name in before if option != name else not other_release or name in before.keys() & after.keys()
        reason = _reason(name, old, new) if is_known or name.startswith("data.") else None
        _add(changes, reason, text, restarts_epoch)
    if "recordings" in saved and "recordings" in now:
        _compare_recordings(changes, saved["recordings"], now["recordings"], restarts_epoch, rows)
    options = changes.refused.get(MODEL, [])
    if any(text.startswith("--") for text in options):  # other differences follow from these options
        changes.refused[MODEL] = [text for text in options if text.startswith("--")]
    return changes


def _add(changes: Changes, reason: str | None, text: str, restarts_epoch: bool) -> None:
    if reason is None or (reason == ROWS and restarts_epoch):
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
    """Returns why a run cannot resume with another value, or `None`."""
    reason = next((reason for pattern, reason in REFUSED.items() if fnmatchcase(name, pattern)), None)
    if name == "options.optim" and {old, new} <= SAME_OPTIMIZERS:
        return None
    if reason == SCORES and (old is None or new is None):  # no scores to compare
        return None
    return reason


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_hash else text if len(text) <= 80 else f"{text[:77]}..."


def _compare_recordings(changes: Changes, old: Mapping, new: Mapping, restarts_epoch: bool, rows: Any) -> None:
    if old["rows_of_block"] != new["rows_of_block"] or len(old["sizes"]) != len(new["sizes"]):
        return  # other rows, which are already reported
    total = len(new["sizes"])
    resized = [index for index in range(total) if old["sizes"][index] != new["sizes"][index]]
    touched = [index for index in range(total) if old["times"][index] != new["times"][index]]
    changed = resized or touched
    if not changed:
        return
    place = _place(rows, changed[0] * new["rows_of_block"])
    kind = "size" if resized else "modification time"
    share = f"{len(changed)} of {total}" + ("" if new["rows_of_block"] == 1 else f" blocks of {new['rows_of_block']}")
    text = f"recordings: another {kind} of {share}{place}"
    if not resized and len(touched) == total:  # for example after copying all recordings
        text += " (check that the recordings are the same)"
        changes.reported.append(text)
    else:
        _add(changes, REFUSED["recordings"], text, restarts_epoch)


def _place(rows: Any, index: int) -> str:
    if not {"recordings", "file", "line"} <= {*(getattr(rows, "column_names", None) or ())}:
        return ""
    row = rows.select_columns(["recordings", "file", "line"])[index]
    return f", first {row['recordings'][0]} ({row['file']}, line {row['line']})"
