"""Training data as JSONL: a dialogue a line, with its recordings' paths relative to the file."""

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

from ..audio.downloads import is_url
from ..audio.waveform import resolve_source
from ..files import atomic_write
from ..model import chat
from .bad_rows import BadDataError, BadRow

KEYS = ("messages", "speech_length", "text_length")  # of a row, in the order in which they are written
# Keys of Fun-ASR that say what is known of a recording, and its words for them.
CONTEXT = {"hist_context": "历史转写结果：", "one_pass_result": "一遍解码结果："}
LONGEST = 1 << 31  # frames or tokens; what is longer is a mistake
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_MARKED_PATH = re.compile(f"(?<={re.escape(chat.SPEECH_START)}!).*?(?={re.escape(chat.SPEECH_END)})", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A row of a JSONL.

    Args:
        dialogue: the messages, parsed, with the row's hotwords in the first prompt.
        messages: as they stand in the file, with absolute paths.
        recordings: absolute paths and URLs, in the order of their places.
        hotwords: of this row alone.
        speech_length: fbank frames of 10 ms of all recordings; `None` if the file does not say.
        text_length: tokens of all answers; `None` if the file does not say.
        file: the JSONL.
        line: counted from 1.
    """

    dialogue: chat.Dialogue
    messages: list[dict]
    recordings: list[str]
    hotwords: list[str]
    speech_length: int | None
    text_length: int | None
    file: str
    line: int


def recording_id(source: str) -> str:
    """The ID of a recording that has no other: the stem of its file name, without the query of a URL."""
    return PurePosixPath(urlsplit(source).path if is_url(source) else source).stem


def read_jsonl(path: str | os.PathLike[str], require_answers: bool = True) -> Iterator[Row | BadRow]:
    """Reads a JSONL row by row, so that the memory needed does not grow with the file.

    Args:
        path: UTF-8, with or without a byte order mark; empty lines are passed over.
        require_answers: whether the last turn must have its answer, as training needs it and decoding does not.

    Yields:
        A `Row`, or a `BadRow` for a line that cannot be used.

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
    """A line of a JSONL.

    Args:
        folder: where relative paths start, absolute.
        file: the JSONL, for messages.
        number: of the line, for messages.
        require_answers: as for `read_jsonl`.
    """
    try:
        return _parse_row(parse_object(line), require_answers, folder, file, number)
    except (BadDataError, chat.ChatError) as error:
        kind = "bad dialogue: " if isinstance(error, chat.ChatError) else ""
        return BadRow(file, number, f"{kind}{error}")


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes rows as JSONL, all or nothing.

    Args:
        rows: each with `messages`; `speech_length` and `text_length` follow unless they are `None`, then other keys.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        file.writelines(json_line(row) for row in rows)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of a JSONL, with the line end; `row` is as for `write_jsonl`."""
    ordered = {key: row[key] for key in KEYS if row.get(key) is not None}
    return _ENCODER.encode({**ordered, **{k: row[k] for k in row if k not in KEYS}}) + "\n"


def parse_object(line: bytes) -> dict:
    """A JSON object in UTF-8.

    Raises:
        BadDataError: if it is none.
    """
    try:
        record = json.loads(line.decode("utf-8"))
        # JSON may spell half a surrogate pair, which is no character: no tokenizer takes it.
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(f"not UTF-8: byte {error.start + 1} of the line; save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise BadDataError("not a character: half a surrogate pair (\\ud800 to \\udfff); remove it") from error
    except json.JSONDecodeError as error:
        raise BadDataError(
            f"not JSON: {error.msg} at column {error.colno}; a row is one object on one line"
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise BadDataError(f"not JSON: {str(error).partition(';')[0]}") from error
    except RecursionError as error:
        raise BadDataError("not JSON: nested too deeply; a row is one object on one line") from error
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
            f"no recording: write {chat.SPEECH_START}!PATH{chat.SPEECH_END} into the user message, '!' included"
        )
    if not all(isinstance(source, str) for source in dialogue.recordings):
        raise BadDataError("bad recording: must be a string, the path or URL")
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
    )


def map_recordings(messages: Any, function: Callable[[str], str]) -> Any:
    """A copy of messages in which the path of each recording, as a string, is replaced by `function(path)`.

    What is not well formed stays as it is, for `chat.parse_messages` to find.

    Raises:
        BadDataError: if a text part has no text.
    """

    def in_text(text: str) -> str:
        # A path of spaces, or none, stays too: it must not become the folder's.
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
    """Messages whose first prompt has the `hist_context` and `one_pass_result` of a row as its `context`.

    Raises:
        BadDataError: if one of them is no string.
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
    """The hotwords of a row: its `asr_hotwords`, as in Fun-ASR, or its `hotwords`.

    Raises:
        BadDataError: if they are neither strings nor a string, or hold a token that dialogues are made of.
    """
    return _parse_hotwords(record, "asr_hotwords") or _parse_hotwords(record, "hotwords")


def _parse_hotwords(record: dict, key: str) -> list[str]:
    hotwords = record.get(key)
    if isinstance(hotwords, list) and not all(isinstance(word, str) for word in hotwords):
        raise BadDataError(f'bad "{key}": each must be a string')
    if not isinstance(hotwords, (list, str, type(None))):
        raise BadDataError(f'bad "{key}": must be a list of strings, or a string with commas between them')
    try:
        return chat.parse_hotwords(hotwords)
    except chat.ChatError as error:
        raise BadDataError(f'bad "{key}": {error}') from error


def length_of(record: dict, key: str) -> int | None:
    """A length that a row gives, or `None`.

    Raises:
        BadDataError: if it is no whole number, or beyond all measure.
    """
    length = record.get(key)
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < LONGEST:
        raise BadDataError(f'bad "{key}": {repr(length)[:40]}; must be a whole number, or left out')
    return length
