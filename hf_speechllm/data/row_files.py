"""Reads rows of training files: JSONL, tar and Parquet files, and other sources (see `sources`)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from ..model import chat
from .bad_rows import BadDataError, BadRow, BadRows
from .jsonl import read_jsonl
from .preparation import RowMaker
from .shards import Shard, as_columns, is_archive, read_shard
from .sources import read_source, recognize, unknown_layout
from .sources.reading import Reading
from .utterance import Utterance

logger = logging.getLogger(__name__)

ROWS_VERSION = 3  # increase if the same files result in other rows, to invalidate old caches
ROW_FEATURES = Features(
    {
        "messages": Value("large_string"),  # as JSON, so dialogues of any structure fit one column
        "recordings": List(Value("string")),
        "hotwords": List(Value("string")),
        "speech_length": Value("int64"),
        "text_length": Value("int64"),
        "file": Value("string"),
        "line": Value("int64"),
        "error": Value("string"),
    }
)


def foreign_format(file: str | os.PathLike[str]) -> str | None:
    """Returns the format of a source; `None` for files that training reads without conversion.

    Raises:
        BadDataError: if the format of a folder is not detected.
    """
    name = os.fspath(file)
    if is_archive(name) and os.path.isfile(name):
        return None
    format = recognize(name)
    if format is None and os.path.isdir(name):
        raise unknown_layout(name, "unknown layout of a folder; pass a JSONL, or see `hf-speechllm prepare --help`")
    return None if format == "chatml" and os.path.isfile(name) else format


def require_row_file(file: str) -> None:
    """Checks that a file can be streamed without `hf-speechllm prepare`.

    Raises:
        BadDataError: if the file must be prepared; the message contains the command.
    """
    if (format := foreign_format(file)) is not None:
        raise BadDataError(
            f"{file} has the format {format}; --streaming supports only JSONL, tar and Parquet files; {_command(file)}"
        )


def _command(file: str | Path) -> str:
    return f"use `hf-speechllm prepare {file} --output_dir DIR`"


def generator_arguments(file: str | Path, split: str) -> dict[str, str]:
    """Returns the arguments of `generate_rows` for a file. The arguments change if the rows change.

    Args:
        file: JSONL, tar or Parquet file, or another source.
        split: split of a source with splits, `train` or `dev`.

    Raises:
        BadDataError: if the source requires `hf-speechllm prepare`.
        OSError: if the source cannot be read.
    """
    # Not `resolve`: paths in a list are relative to the folder of the given path, not of the link target.
    path = os.path.abspath(file)
    if (format := foreign_format(path)) is None:
        status = os.stat(path)
        return {"file": path, "stamp": f"{ROWS_VERSION}-{status.st_size}-{status.st_mtime_ns}"}
    digest = hashlib.sha256(f"{ROWS_VERSION}".encode())
    reading = Reading(BadRows(1.0))
    try:
        found = _of_split(list(read_source(path, reading, format)), split)
    except BadDataError as error:
        raise BadDataError(f"{error}; {_command(file)}") from error
    for utterance in found:
        digest.update(repr(utterance).encode("utf-8", "replace"))
    for row in reading.bad_rows:
        digest.update(repr(row).encode("utf-8", "replace"))
    logger.info("%s: %s, %d rows", file, format, len(found))
    for reason, count in reading.left_out.items():
        logger.info("%s: %d %s are skipped", file, count, reason)
    return {"file": path, "stamp": digest.hexdigest(), "format": format, "split": split}


def generate_rows(file: str, stamp: str, format: str | None = None, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a file as columns of `ROW_FEATURES`; bad rows have an `error`.

    Args:
        file: absolute path of the file or source.
        stamp: changes if the rows change; used only by the cache.
        format: format of a source; `None` for a JSONL, tar or Parquet file.
        split: split of a source with splits.
    """
    rows: Iterable[Any]
    if format is not None:
        rows = _rows_of_source(file, format, split)
    elif is_archive(file):
        rows = (item.row for item in read_shard(Shard(file), embed=False))
    else:
        rows = read_jsonl(file)
    empty = True
    for number, row in enumerate(rows, start=1):
        empty = False
        if not isinstance(row, BadRow):
            yield {**(row if isinstance(row, dict) else as_columns(row)), "error": None}
        elif isinstance(row.line, int):
            yield {**dict.fromkeys(ROW_FEATURES), "file": row.file, "line": row.line, "error": row.reason}
        else:
            error = f"{row.line}: {row.reason}"
            yield {**dict.fromkeys(ROW_FEATURES), "file": row.file, "line": number, "error": error}
    if empty:  # `datasets` does not support a generator without rows
        yield {**dict.fromkeys(ROW_FEATURES), "file": file, "line": 1, "error": "no rows: the file is empty"}


def weight_of(file: str, weights: dict[str, float]) -> float:
    """Returns the weight of a file, or of the folder that contains it."""
    path = file
    while path not in weights:
        if path == (parent := os.path.dirname(path)):
            raise KeyError(file)
        path = parent
    return weights[path]


def _rows_of_source(file: str, format: str, split: str) -> Iterator[dict[str, Any] | BadRow]:
    reading = Reading(BadRows(1.0))
    maker = RowMaker(chat.transcription_prompt())
    for number, utterance in enumerate(_of_split(list(read_source(file, reading, format)), split), start=1):
        place = (utterance.transcript_file, utterance.transcript_line)
        try:
            messages = maker.messages(utterance)
        except (BadDataError, chat.ChatError) as error:
            yield BadRow(*place, str(error))
            continue
        yield {
            "messages": json.dumps(messages, ensure_ascii=False),
            "recordings": utterance.recordings,
            "hotwords": utterance.hotwords or [],
            "speech_length": None,
            "text_length": None,
            "file": place[0],
            "line": place[1] if isinstance(place[1], int) else number,
        }
    yield from reading.bad_rows


def _of_split(utterances: list[Utterance], split: str) -> list[Utterance]:
    """Returns the utterances of a split; all utterances if the source has fewer than two splits."""
    found = {utterance.split for utterance in utterances}
    return utterances if len(found) < 2 else [item for item in utterances if item.split in (split, None)]
