"""Rows to check, from everything that training and `prepare` read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..data.bad_rows import BadDataError, BadRow, BadRows
from ..data.file_lists import expand_paths
from ..data.jsonl import Row, parse_line, parse_object, recording_id
from ..data.preparation import RowMaker
from ..data.row_files import foreign_format
from ..data.shards import Shard, is_archive, read_shard
from ..data.sources import read_source
from ..data.sources.reading import Reading, language_code, split_of
from ..data.sources.tables import ROLES
from ..data.utterance import SPLITS, Utterance
from ..model import chat

MAX_LINE = 1 << 26  # bytes; a longer line of a JSONL is not a row


class DataRow(NamedTuple):
    """A row of training data.

    Args:
        id: ID in the data, or the name of the recording.
        file, line: position of the transcript.
        split: one of `SPLITS`.
        recordings: absolute paths, URLs and addresses.
        answers: transcripts, one per turn.
        prompt: text of the system and user before the first recording, without hotwords and context.
        has_id: whether the ID is in the data.
        language, speaker: `None` if unknown.
        speech_length, text_length: lengths in the row; `None` if missing.
        record: row to write.
    """

    id: str
    file: str
    line: int | str
    split: str
    recordings: list[str]
    answers: list[str]
    prompt: str
    has_id: bool
    language: str | None
    speaker: str | None
    speech_length: int | None
    text_length: int | None
    record: dict[str, Any]

    @property
    def text(self) -> str:
        """All answers."""
        return " ".join(self.answers)

    @property
    def hotwords(self) -> list[str]:
        """Hotwords of the row."""
        return self.record.get("hotwords", [])


class Problem(NamedTuple):
    """A row that cannot be read; `kind` is one of `kinds.KINDS`."""

    kind: str
    file: str
    line: int | str
    split: str
    detail: str


def read_rows(data: Sequence[str], report: Callable[[int], Any] = lambda count: None) -> list[DataRow | Problem]:
    """Reads all rows, in the order of the data.

    Args:
        data: files, folders and globs, each optionally as `SPLIT=PATH`. Otherwise the splits of the source, or the
            name of the file or folder decide: `train.jsonl` is train, `data/dev` is dev; others are train.
        report: called with the number of rows read.

    Raises:
        BadDataError: if the layout of a source is unknown.
        OSError, ValueError: if a file is missing, cannot be read, or is given twice.
    """
    rows: list[DataRow | Problem] = []
    for item in data:
        split, path = _parse(item)
        for file in _files(path):
            for row in _read_file(file, split):
                rows.append(row)
                report(1)
    return rows


def _parse(item: str) -> tuple[str | None, str]:
    name, mark, path = item.partition("=")
    split = split_of(name) if mark and re.fullmatch(r"\w+", name) and not os.path.exists(item) else None
    return (split, path) if split else (None, item)


def _files(path: str) -> Iterator[str]:
    """Yields the files or sources of an argument; a folder of `prepare` is its JSONL files."""
    prepared = [os.path.join(path, f"{split}.jsonl") for split in SPLITS]
    if found := [file for file in prepared if os.path.isfile(file)]:
        yield from map(os.path.abspath, found)
    elif os.path.isdir(path):
        yield os.path.abspath(path)
    else:
        yield from (file for files in expand_paths([path]) for file in files)


def _read_file(file: str, given: str | None) -> Iterator[DataRow | Problem]:
    name = os.path.basename(file)
    split = given or split_of(name) or split_of(os.path.basename(os.path.dirname(file))) or "train"
    if (format := foreign_format(file)) is not None:
        yield from _read_source(file, format, given, split)
    elif is_archive(file):
        for item in read_shard(Shard(file), embed=False):
            yield _problem(item.row, split) if isinstance(item.row, BadRow) else _from_columns(item.row, split)
    else:
        yield from _read_jsonl(file, split)


def _read_jsonl(file: str, split: str) -> Iterator[DataRow | Problem]:
    folder = os.path.dirname(file)
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE):
            number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            row = parse_line(line, folder, file, number)
            yield _problem(row, split) if isinstance(row, BadRow) else _from_row(row, parse_object(line), split)


def _read_source(file: str, format: str, given: str | None, split: str) -> Iterator[DataRow | Problem]:
    bad_rows = BadRows(1.0)
    maker = RowMaker(chat.transcription_prompt())
    for utterance in read_source(file, Reading(bad_rows), format):
        own = given or utterance.split or split
        try:
            yield _from_utterance(utterance, maker, own)
        except (BadDataError, chat.ChatError) as error:
            yield _problem(BadRow(utterance.transcript_file, utterance.transcript_line, str(error)), own)
    yield from (_problem(row, split) for row in bad_rows)


def _problem(row: BadRow, split: str) -> Problem:
    reason = row.reason
    kind = "bad-row"
    if "ID in one list only" in reason:
        kind = "unpaired-id"
    elif "duplicate ID" in reason:
        kind = "duplicate-id"
    elif re.search("empty transcript|transcript\\) is empty|no transcript", reason):
        kind = "empty-transcript"
    return Problem(kind, row.file, row.line, split, reason)


def _from_row(row: Row, record: dict[str, Any], split: str) -> DataRow:
    def value(role: str) -> str | None:
        names = [name for name in ROLES[role] if isinstance(record.get(name), (str, int))]
        return str(record[names[0]]) if names else None

    record = {**record, "messages": row.messages}
    record.pop("hist_context", None), record.pop("one_pass_result", None)  # now in the messages
    return _row(
        row.dialogue, record, row.recordings, row.file, row.line, split, value("id"), language_code(value("language")),
        value("speaker"), row.speech_length, row.text_length,
    )  # fmt: skip


def _from_columns(columns: dict[str, Any], split: str) -> DataRow:
    messages = json.loads(columns["messages"])
    dialogue = chat.parse_messages(messages)
    recordings = columns["recordings"]
    names = iter(recordings)
    record = {"messages": _with_recordings(messages, names), "hotwords": columns["hotwords"]}
    return _row(
        dialogue, record, recordings, columns["file"], columns["line"], split, None, None, None,
        columns["speech_length"], columns["text_length"],
    )  # fmt: skip


def _with_recordings(messages: list[dict], recordings: Iterator[str]) -> list[dict]:
    from ..data.jsonl import map_recordings

    return map_recordings(messages, lambda _: next(recordings))


def _from_utterance(utterance: Utterance, maker: RowMaker, split: str) -> DataRow:
    messages = maker.messages(utterance)
    record: dict[str, Any] = {"messages": messages}
    if utterance.hotwords:
        record["hotwords"] = utterance.hotwords
    return _row(
        chat.parse_messages(messages), record, utterance.recordings, utterance.transcript_file,
        utterance.transcript_line, split, utterance.id or None, utterance.language, utterance.speaker, None, None,
    )  # fmt: skip


def _row(
    dialogue: chat.Dialogue, record: dict[str, Any], recordings: list[str], file: str, line: int | str, split: str,
    id: str | None, language: str | None, speaker: str | None, speech_length: int | None, text_length: int | None,
) -> DataRow:  # fmt: skip
    messages = [{key: message[key] for key in message if key != "context"} for message in record["messages"]]
    plain = chat.parse_messages(messages)
    prompt = "".join(piece for piece in plain.turns[0].pieces if isinstance(piece, str))
    return DataRow(
        id or recording_id(recordings[0]), file, line, split, recordings,
        [turn.answer for turn in dialogue.turns if turn.answer is not None], f"{plain.system or ''}\n{prompt}",
        id is not None, language, speaker, speech_length, text_length, record,
    )  # fmt: skip
