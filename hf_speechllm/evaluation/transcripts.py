"""Reading what is scored: transcripts by ID, and Kaldi's maps from an ID to a language, a data set or a duration."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.bad_rows import BadDataError, BadRow
from ..data.jsonl import read_jsonl, recording_id

# A path, a URL or a command of a wav.scp.
_RECORDING = re.compile(r"^\S+\.(?:wav|flac|mp3|ogg|opus|m4a|aac|sph|pcm|ark:\d+)$|\|$", re.IGNORECASE)


@dataclass(frozen=True)
class Transcripts:
    """Transcripts of a file.

    Args:
        texts: by ID, in the order of the file; may be empty strings.
        recordings: by ID, paths or URLs; only a JSONL has them.
        hotwords: by ID; only a JSONL has them.
    """

    texts: dict[str, str]
    recordings: dict[str, str] = field(default_factory=dict)
    hotwords: dict[str, list[str]] = field(default_factory=dict)


def _read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Numbers and lines without their ends; empty ones are passed over.

    Raises:
        BadDataError: at a line that is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = line.decode("utf-8").strip("\r\n")  # not tabs: one may stand before an empty text
            except UnicodeDecodeError as error:
                raise BadDataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert the file, for "
                    "example with iconv -f GB18030 -t UTF-8"
                ) from error
            if "\0" in text:
                raise BadDataError(f"{path}:{number}: zero bytes, as in UTF-16; convert the file with iconv")
            if text.strip(" \t"):
                yield number, text


def split_line(line: str) -> tuple[str, str]:
    """Splits a line of a list into its ID and the rest: at the first tab, otherwise at the first spaces.

    Lines that `decode` writes have a tab, and IDs that are file names may hold spaces, also those of Unicode.
    """
    line = line.strip("\r\n").lstrip(" \t")
    id_, value = (re.split(r" *\t" if "\t" in line else r" +", line, maxsplit=1) + [""])[:2]
    return id_, value.strip(" \t")


def read_map(path: str | os.PathLike[str], empty_values: bool = False) -> dict[str, str]:
    """Reads lines of an ID and a value, with spaces or a tab between them, as Kaldi's `text`, `utt2lang`, `utt2dur`.

    Args:
        path: UTF-8, with or without a byte order mark.
        empty_values: whether a line may have an ID only.

    Raises:
        BadDataError: at a line that is not UTF-8, repeats an ID, or lacks the value.
        OSError: if the file can't be read.
    """
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in _read_lines(path):
        id_, value = split_line(line)
        if id_ in values:
            raise BadDataError(
                f'{path}:{number}: duplicate ID: "{id_}" is in line {lines[id_]}, too; every ID must be there once'
            )
        if not value and not empty_values:
            raise BadDataError(f'{path}:{number}: one field only: "{id_}" has no value')
        values[id_], lines[id_] = value, number
    return values


def read_transcripts(path: str | os.PathLike[str], required: bool = False) -> Transcripts:
    """Reads transcripts: lines `ID TEXT`, or, if the name ends in .jsonl, rows as for training.

    A row's ID is the stem of its last recording's name, as in what `hf-speechllm decode` writes; its text is the last
    answer.

    Args:
        path: UTF-8, with or without a byte order mark. A line with an ID only is an empty transcript.
        required: whether there must be any.

    Raises:
        BadDataError: at a line that is not UTF-8, repeats an ID, or is no row; if there are none and must be; if most
            of the texts are recordings, as in a wav.scp.
        OSError: if the file can't be read.
    """
    transcripts = _read_rows(path) if Path(path).suffix == ".jsonl" else Transcripts(read_map(path, empty_values=True))
    paths = [text for text in transcripts.texts.values() if _RECORDING.search(text)]
    if 2 * len(paths) > len(transcripts.texts):
        raise BadDataError(f'{path}: recordings ("{paths[0]}"), not transcripts; give a list of lines `ID TEXT`')
    if required and not transcripts.texts:
        raise BadDataError(f"{path}: no transcripts")
    return transcripts


def _read_rows(path: str | os.PathLike[str]) -> Transcripts:
    transcripts = Transcripts({})
    lines: dict[str, int] = {}
    for row in read_jsonl(path):
        if isinstance(row, BadRow):
            raise BadDataError(str(row))
        id_ = recording_id(row.recordings[-1])
        if id_ in lines:
            raise BadDataError(
                f'{path}:{row.line}: duplicate ID: line {lines[id_]} has a recording called "{id_}", too; score lines '
                "`ID TEXT` instead"
            )
        lines[id_] = row.line
        transcripts.texts[id_] = row.dialogue.turns[-1].answer or ""
        transcripts.recordings[id_] = row.recordings[-1]
        transcripts.hotwords[id_] = row.hotwords
    return transcripts


def require_common_ids(
    reference: str, texts: Mapping[str, str], lists: Mapping[str | None, Mapping[str, Any]]
) -> None:
    """Refuses lists that have nothing to do with the references.

    Args:
        reference: file name.
        texts: its transcripts, by ID.
        lists: contents of other files, by file name and ID; `None` for a file that is not given.

    Raises:
        BadDataError: if a file has no ID of the references.
    """
    for name, values in lists.items():
        if name is not None and not texts.keys() & values.keys():
            first = f'"{next(iter(values))}"' if values else "no ID at all"
            raise BadDataError(
                f'{name} has no ID of {reference}: {first} there, "{next(iter(texts))}" here; give lists of the same '
                "utterances, REF before HYP"
            )


def read_durations(path: str | os.PathLike[str]) -> dict[str, float]:
    """Reads Kaldi's `utt2dur`: lines of an ID and seconds.

    Raises:
        BadDataError: as `read_map`, and at a value that is not a positive number.
    """
    durations = {}
    for id_, value in read_map(path).items():
        if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) == 0:
            raise BadDataError(f'{path}: "{id_}" has no duration in seconds but "{value}"')
        durations[id_] = float(value)
    return durations
