"""Training data as JSONL: one dialogue per line; paths of recordings are relative to the file."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ..audio.archives import find_archive, member_id
from ..audio.downloads import is_url
from ..audio.time_range import split_time_range
from ..audio.waveform import resolve_source
from ..files import atomic_write
from ..model import chat
from .bad_rows import BadDataError, BadRow

KEYS = ("messages", "speech_length", "text_length")  # keys of a row that are written first, in this order
# Fun-ASR's keys for the context of a recording, and their titles in the prompt.
CONTEXT = {"hist_context": "历史转写结果：", "one_pass_result": "一遍解码结果："}
MAX_LENGTH = 1 << 31  # frames or tokens; larger values are errors
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_MARKED_PATH = re.compile(f"(?<={re.escape(chat.SPEECH_START)}!).*?(?={re.escape(chat.SPEECH_END)})", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A row of a JSONL.

    Args:
        dialogue: parsed messages, with the row's hotwords in the first prompt.
        messages: messages in the file, with absolute paths.
        recordings: absolute paths and URLs, in order of appearance.
        hotwords: hotwords of this row.
        speech_length: 10 ms fbank frames of all recordings; `None` if not in the file.
        text_length: tokens of all answers; `None` if not in the file.
        file: path of the JSONL.
        line: line number, counted from 1.
        key, speaker, language: as `prepare` and FunASR write them; `None` if not in the file.
    """

    dialogue: chat.Dialogue
    messages: list[dict]
    recordings: list[str]
    hotwords: list[str]
    speech_length: int | None
    text_length: int | None
    file: str
    line: int
    key: str | None = None
    speaker: str | None = None
    language: str | None = None

    @property
    def id(self) -> str:
        """ID of the row: `key`, otherwise the default ID of the last recording."""
        return self.key or recording_id(self.recordings[-1])


def recording_id(source: str) -> str:
    """Returns the default ID of a recording: the stem of the file name, without the query of a URL.

    Spaces and byte order marks around the stem are removed; they would be lost when a list is read back. The ID of a
    part of a recording ends with its times: `talk#t=12.5,17.25`. For recordings in archives see `archives.member_id`.
    """
    whole = split_time_range(source)[0]
    if find_archive(whole):
        stem = member_id(whole)
    else:
        stem = PurePosixPath(urlsplit(whole).path if is_url(whole) else whole).stem
    return stem.strip(" \ufeff") + source[len(whole) :]


def read_jsonl(path: str | os.PathLike[str], require_answers: bool = True) -> Iterator[Row | BadRow]:
    """Reads a JSONL row by row, with constant memory.

    Args:
        path: UTF-8 file, with or without a byte order mark; empty lines are skipped.
        require_answers: whether the last turn must have an answer: true for training, false for decoding.

    Yields:
        A `Row`, or a `BadRow` for an unusable line.

    Raises:
        OSError: if the file cannot be read.
    """
    name = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(name))
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            yield parse_line(line, folder, name, number, require_answers)


def parse_line(line: bytes, folder: str, file: str, number: int, require_answers: bool = True) -> Row | BadRow:
    """Parses a line of a JSONL to a `Row`, or a `BadRow` if the line is unusable.

    Args:
        line: content of the line.
        folder: absolute path of the folder to which relative paths refer.
        file: path of the JSONL, for messages.
        number: line number, for messages.
        require_answers: see `read_jsonl`.
    """
    try:
        return _parse_row(parse_object(line), require_answers, folder, file, number)
    except (BadDataError, chat.ChatError) as error:
        kind = "bad dialogue: " if isinstance(error, chat.ChatError) else ""
        return BadRow(file, number, f"{kind}{error}")


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes rows as JSONL, atomically.

    Args:
        rows: rows with `messages`, and optionally `speech_length`, `text_length` (left out if `None`) and other keys.
        path: file to write.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        file.writelines(json_line(row) for row in rows)


def json_line(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of a JSONL, with line end; for `row` see `write_jsonl`."""
    ordered = {key: row[key] for key in KEYS if row.get(key) is not None}
    return _ENCODER.encode({**ordered, **{k: row[k] for k in row if k not in KEYS}}) + "\n"


def parse_object(line: bytes) -> dict:
    """Parses a JSON object in UTF-8.

    Raises:
        BadDataError: if the line is not a JSON object in UTF-8.
    """
    try:
        record = json.loads(line.decode("utf-8"))
        # JSON can escape half a surrogate pair, which is not a character; tokenizers reject it.
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(f"not UTF-8: byte {error.start + 1} of the line; save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise BadDataError("not a character: half a surrogate pair (\\ud800 to \\udfff); remove it") from error
    except json.JSONDecodeError as error:
        kaldi = b"{" not in line and len(line.split(maxsplit=1)) == 2
        advice = "; hf-speechllm prepare converts Kaldi lists, and decode reads --scp_file" if kaldi else ""
        raise BadDataError(
            f"not JSON: {error.msg} at column {error.colno}; a row is one object on one line{advice}"
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise BadDataError(f"not JSON: {str(error).partition(';')[0]}") from error
    except RecursionError as error:
        raise BadDataError("not JSON: too many nested lists and objects; a row is one object on one line") from error
    if not isinstance(record, dict):
        raise BadDataError('not an object: a row is {"messages": [...], ...}')
    return record


def _parse_row(record: dict, require_answers: bool, folder: str, name: str, number: int) -> Row:
    if "messages" not in record:
        raise BadDataError('no "messages": a row is {"messages": [...], ...}')
    hotwords = hotwords_of(record)
    messages = map_recordings(record["messages"], lambda source: resolve_source(source, folder))
    messages = add_context(messages, record)
    dialogue = chat.parse_messages(messages, hotwords)
    if not dialogue.recordings:
        raise BadDataError(
            f"no recording: write {chat.SPEECH_START}!PATH{chat.SPEECH_END} in the user message, including the '!'"
        )
    if not all(isinstance(source, str) for source in dialogue.recordings):
        raise BadDataError("bad recording: must be a path or URL, as a string")
    if require_answers and dialogue.turns[-1].answer is None:
        raise BadDataError("no answer: the last message must be the assistant's, with the transcript")
    return Row(
        dialogue,
        messages,
        dialogue.recordings,
        hotwords,
        length_of(record, "speech_length"),
        length_of(record, "text_length"),
        name,
        number,
        _key_of(record),
        *(_name_of(record, key) for key in ("speaker", "language")),
    )


def _key_of(record: dict) -> str | None:
    """Returns the key of a row.

    Raises:
        BadDataError: if the key is neither text nor a whole number.
    """
    key = record.get("key")
    if key is not None and (isinstance(key, bool) or not isinstance(key, (str, int))):
        raise BadDataError(f'bad "key": {repr(key)[:40]}; must be text or a whole number, or left out')
    return _name_of(record, "key")


def _name_of(record: dict, key: str) -> str | None:
    """Returns a text or number of a row as text without spaces at both ends; `None` for other values."""
    value = record.get(key)
    is_name = isinstance(value, (str, int)) and not isinstance(value, bool)
    return (str(value).strip(" \ufeff") or None) if is_name else None


def map_recordings(messages: Any, function: Callable[[str], str]) -> Any:
    """Returns a copy of messages in which each path of a recording is replaced by `function(path)`.

    Invalid messages stay unchanged; `chat.parse_messages` reports them.

    Raises:
        BadDataError: if a text part has no text.
    """

    def in_text(text: str) -> str:
        # An empty or blank path stays unchanged: it must not become the path of the folder.
        return _MARKED_PATH.sub(lambda match: function(match[0]) if match[0].strip() else match[0], text)

    def in_part(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if ("text" in part or part.get("type") == "text") and not isinstance(part.get("text"), str):
            raise BadDataError('bad dialogue: a text part needs "text", a string')
        if part.get("type") != "audio":
            return {**part, "text": in_text(part["text"])} if "text" in part else part
        sources = {key: part[key] for key in ("audio", "path", "url") if isinstance(part.get(key), str)}
        return {**part, **{key: function(source) for key, source in sources.items()}}

    def in_message(message: Any) -> Any:
        if not isinstance(message, dict) or message.get("role") != "user":
            return message
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": in_text(content)}
        return {**message, "content": [in_part(part) for part in content]} if isinstance(content, list) else message

    return [in_message(message) for message in messages] if isinstance(messages, list) else messages


def add_context(messages: Any, record: dict) -> Any:
    """Adds `hist_context` and `one_pass_result` of a row as `context` to the first user message.

    Raises:
        BadDataError: if one of them is not a string.
    """
    lines = []
    for key, title in CONTEXT.items():
        text = record.get(key)
        if not isinstance(text, (str, type(None))):
            raise BadDataError(f'bad "{key}": must be a string')
        lines += [f"{title}{text}"] if text else []
    if not lines or not isinstance(messages, list):
        return messages
    first = next((i for i, item in enumerate(messages) if isinstance(item, dict) and item.get("role") == "user"), None)
    return [
        {**message, "context": "\n".join(lines)} if index == first else message
        for index, message in enumerate(messages)
    ]


def hotwords_of(record: dict) -> list[str]:
    """Returns the hotwords of a row: `asr_hotwords`, as in Fun-ASR, or `hotwords`.

    Raises:
        BadDataError: if they are neither a list of strings nor a string, or contain a special token of dialogues.
    """
    return _parse_hotwords(record, "asr_hotwords") or _parse_hotwords(record, "hotwords")


def _parse_hotwords(record: dict, key: str) -> list[str]:
    hotwords = record.get(key)
    if isinstance(hotwords, list) and not all(isinstance(word, str) for word in hotwords):
        raise BadDataError(f'bad "{key}": each must be a string')
    if not isinstance(hotwords, (list, str, type(None))):
        raise BadDataError(f'bad "{key}": must be a list of strings, or a string with commas between hotwords')
    try:
        return chat.parse_hotwords(hotwords)
    except chat.ChatError as error:
        raise BadDataError(f'bad "{key}": {error}') from error


def length_of(record: dict, key: str) -> int | None:
    """Returns a length from a row, or `None` if missing.

    Raises:
        BadDataError: if the length is not a whole number, or is too large.
    """
    length = record.get(key)
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < MAX_LENGTH:
        raise BadDataError(f'bad "{key}": {repr(length)[:40]}; must be a whole number below 2^31, or left out')
    return length
