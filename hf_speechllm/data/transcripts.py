"""Readers of transcripts and of Kaldi maps from an utterance ID to a language, data set or duration."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..audio.downloads import redact
from .bad_rows import BadDataError, BadRow
from .jsonl import read_jsonl

# A path, URL or command in a wav.scp.
_RECORDING = re.compile(r"^\S+\.(?:wav|flac|mp3|ogg|opus|m4a|aac|sph|pcm|ark:\d+)$|\|$", re.IGNORECASE)


@dataclass(frozen=True)
class Transcripts:
    """Transcripts of a file.

    Args:
        texts: transcripts by ID, in the order of the file; may be empty strings.
        recordings: paths or URLs by ID; only from JSONL.
        hotwords: hotwords by ID; only from JSONL.
    """

    texts: dict[str, str]
    recordings: dict[str, str] = field(default_factory=dict)
    hotwords: dict[str, list[str]] = field(default_factory=dict)


def _read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Reads line numbers and lines without line ends; skips empty lines.

    Raises:
        BadDataError: if a line is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8)  # in any line: `cat` joins lists
            try:
                text = line.decode("utf-8").strip("\r\n")  # keeps the tab before an empty text
            except UnicodeDecodeError as error:
                raise BadDataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert the file, for "
                    "example with `iconv -f GB18030 -t UTF-8`"
                ) from error
            if "\0" in text:
                raise BadDataError(f"{path}:{number}: zero bytes, as in UTF-16; convert the file to UTF-8 with iconv")
            if text.strip(" \t"):
                yield number, text


def split_line(line: str) -> tuple[str, str]:
    """Splits a line of a list into ID and value: at the first tab, otherwise at the first spaces.

    Lines that `decode` writes have a tab. IDs that are file names may contain spaces, including Unicode spaces.
    """
    line = line.strip("\r\n").lstrip(" \t")
    id_, value = (re.split(r" *\t" if "\t" in line else r" +", line, maxsplit=1) + [""])[:2]
    return id_, value.strip(" \t")


def read_map(path: str | os.PathLike[str], empty_values: bool = False) -> dict[str, str]:
    """Reads lines `ID VALUE`, separated by spaces or a tab, as in Kaldi's `text`, `utt2lang`, `utt2dur`.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        empty_values: whether values may be missing.

    Raises:
        BadDataError: if a line is not UTF-8, repeats an ID, or lacks the value.
        OSError: if the file cannot be read.
    """
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in _read_lines(path):
        id_, value = split_line(line)
        if id_ in values:
            raise BadDataError(
                f'{path}:{number}: duplicate ID: "{id_}" is in line {lines[id_]}, too; remove one of the lines'
            )
        if not value and not empty_values:
            raise BadDataError(f'{path}:{number}: one field only: "{id_}" has no value; write `ID VALUE`')
        values[id_], lines[id_] = value, number
    return values


def read_transcripts(path: str | os.PathLike[str], required: bool = False) -> Transcripts:
    """Reads transcripts from lines `ID TEXT`, or from training rows if the file name ends in .jsonl.

    The ID of a training row is its `key`, otherwise the stem of the name of the last recording, as in the output of
    `hf-speechllm decode`. The text is the last answer.

    Args:
        path: UTF-8 file, with or without a byte order mark. A line with an ID only is an empty transcript.
        required: whether the file must contain a transcript.

    Raises:
        BadDataError: if a line is not UTF-8, repeats an ID, or is no valid row; if a required transcript is missing;
            if most texts are names of recordings, as in a wav.scp.
        OSError: if the file cannot be read.
    """
    transcripts = _read_rows(path) if Path(path).suffix == ".jsonl" else Transcripts(read_map(path, empty_values=True))
    paths = [text for text in transcripts.texts.values() if _RECORDING.search(text)]
    if 2 * len(paths) > len(transcripts.texts):
        raise BadDataError(
            f'{path}: recordings ("{redact(paths[0])}") instead of transcripts; pass a list of lines `ID TEXT`'
        )
    if required and not transcripts.texts:
        raise BadDataError(f"{path}: no transcripts; pass a list of lines `ID TEXT`")
    return transcripts


def _read_rows(path: str | os.PathLike[str]) -> Transcripts:
    transcripts = Transcripts({})
    lines: dict[str, int] = {}
    for row in read_jsonl(path):
        if isinstance(row, BadRow):
            raise BadDataError(str(row))
        id_ = row.id
        if id_ in lines:
            origin = "a recording named" if row.key is None else "the key"
            raise BadDataError(
                f'{path}:{row.line}: duplicate ID: line {lines[id_]} also has {origin} "{id_}"; give each row its own '
                '"key"'
            )
        lines[id_] = row.line
        last = row.dialogue.turns[-1]
        transcripts.texts[id_] = last.prefix + (last.answer or "")
        transcripts.recordings[id_] = row.recordings[-1]
        transcripts.hotwords[id_] = row.hotwords
    return transcripts


def require_common_ids(
    reference: str, texts: Mapping[str, str], lists: Mapping[str | None, Mapping[str, Any]]
) -> None:
    """Refuses lists that have no ID in common with the references.

    Args:
        reference: name of the file of references.
        texts: reference transcripts by ID.
        lists: contents of other files by file name; the name `None` stands for an omitted file.

    Raises:
        BadDataError: if a list has no ID of a reference.
    """
    for name, values in lists.items():
        if name is not None and not texts.keys() & values.keys():
            first = f'the first ID of {name} is "{next(iter(values))}"' if values else f"{name} is empty"
            raise BadDataError(
                f"{name}: no ID in common with {reference}: {first}, the first ID of {reference} is "
                f'"{next(iter(texts))}"; pass lists of the same utterances, REF before HYP'
            )


def read_durations(path: str | os.PathLike[str]) -> dict[str, float]:
    """Reads a Kaldi `utt2dur`: lines `ID SECONDS`.

    Raises:
        BadDataError: see `read_map`; also if a value is not a positive number.
    """
    durations = {}
    for id_, value in read_map(path).items():
        if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) == 0:
            raise BadDataError(f'{path}: "{id_}" has no positive duration in seconds: "{value}"; correct the line')
        durations[id_] = float(value)
    return durations
