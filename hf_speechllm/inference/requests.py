"""Requests for transcripts, from lists, files or archives."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.bad_rows import BadRow, BadRows
from ..data.jsonl import read_jsonl
from ..data.kaldi import read_scp, read_segments, warn_of_unused_segments
from ..model import chat
from .sources import find_recordings

_NOT_IN_ID = re.compile(r"[\0\t\r\n]")


@dataclass(frozen=True)
class Request:
    """A request for one transcript.

    Args:
        id: of the recording.
        messages: dialogue that requests the transcript; the last turn has no answer.
        hotwords: listed before the first prompt.
    """

    id: str
    messages: list[dict]
    hotwords: tuple[str, ...] = ()

    @property
    def dialogue(self) -> chat.Dialogue:
        """Parsed messages."""
        return chat.parse_messages(self.messages, self.hotwords)


def requests_of_scp(
    path: str | os.PathLike[str], prompt: str, bad_rows: BadRows, segments: str | os.PathLike[str] | None = None
) -> list[Request]:
    """Reads requests for the recordings of a `wav.scp`.

    Args:
        path: of the list.
        prompt: from `chat.transcription_prompt`.
        bad_rows: collects unusable lines.
        segments: Kaldi's `segments`, to transcribe these parts of the recordings; default: whole recordings.

    Raises:
        OSError: if the list cannot be read.
    """
    recordings = read_scp(path, bad_rows)
    if segments is None:
        warn_of_unused_segments(recordings)
    else:
        recordings = read_segments(segments, recordings, bad_rows)
    return [Request(entry.id, chat.transcription_messages(entry.value, prompt)) for entry in recordings.entries]


def requests_of_sources(sources: Sequence[str], prompt: str, bad_rows: BadRows) -> list[Request]:
    """Returns requests for files, URLs, folders and archives; see `sources.find_recordings`.

    Args:
        sources: names of files, URLs, folders and archives.
        prompt: from `chat.transcription_prompt`.
        bad_rows: collects unreadable parts of archives.

    Raises:
        OSError: if a file or folder is missing or cannot be read.
        ValueError: if a source is of an unsupported kind, or a folder has no recordings.
    """
    requests = []
    for item in find_recordings(sources, bad_rows):
        if problem := _problem_of_id(item.id):
            folder, name = os.path.split(item.name)
            bad_rows.add(folder or ".", name, problem)
        else:
            requests.append(Request(item.id, chat.transcription_messages(item.recording, prompt)))
    return requests


def requests_of_jsonl(path: str | os.PathLike[str], prompt: str | None, bad_rows: BadRows) -> list[Request]:
    """Reads requests from the rows of a JSONL, for the answer of the last turn; rows may lack this answer.

    The ID of a request is `key` of the row, otherwise the stem of the name of the last recording.

    Args:
        path: of the list.
        prompt: prompt for the last recording of each row; `None` keeps dialogue and hotwords of the row.
        bad_rows: collects unusable rows.

    Raises:
        OSError: if the list cannot be read.
    """
    requests = []
    for row in read_jsonl(path, require_answers=False):
        if isinstance(row, BadRow):
            bad_rows.add(row.file, row.line, row.reason)
            continue
        if problem := _problem_of_id(row.id, "file name" if row.key is None else "key"):
            bad_rows.add(row.file, row.line, problem)
            continue
        if prompt is not None:
            requests.append(Request(row.id, chat.transcription_messages(row.recordings[-1], prompt)))
        else:
            messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
            requests.append(Request(row.id, messages, tuple(row.hotwords)))
    return requests


def _problem_of_id(id_: str, origin: str = "file name") -> str | None:
    """Returns an error message if an ID cannot be written to a list and read back; otherwise `None`.

    Args:
        origin: of the ID, for the message.
    """
    if not id_:
        return "bad ID: the file name is empty apart from spaces and the suffix; rename the file"
    if _NOT_IN_ID.search(id_):
        noun = origin.partition(" ")[0]
        return f"bad ID: the {origin} {id_!r} contains a tab, a line end or a zero byte; rename the {noun}"
    try:
        id_.encode("utf-8")
    except UnicodeEncodeError:
        return f"bad ID: the {origin} {id_!r} is not UTF-8; rename the {origin.partition(' ')[0]}"
    return None
