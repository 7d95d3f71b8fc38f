"""Readers of dialogues: ChatML of FunASR, ms-swift, LLaMA-Factory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ...audio.waveform import resolve_source
from ...model import chat
from ..bad_rows import BadDataError, BadRow
from ..jsonl import hotwords_of, read_jsonl
from ..utterance import Utterance
from .reading import Reading, language_code, lists_in, read_records
from .tables import JSON_SUFFIXES, has_keys

AUDIO_TAG = "<audio>"  # placeholder for a recording of `audios`
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_chatml(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads the JSONL format of training, which is FunASR's format with `messages`."""
    for path, split in lists_in(source, (".jsonl",)):
        for row in read_jsonl(path):
            if isinstance(row, BadRow):
                reading.bad_rows.add(row.file, row.line, row.reason)
                continue
            yield Utterance(
                row.key or "", row.recordings[0], "", row.line, row.line, path, path, speaker=row.speaker,
                language=language_code(row.language), split=split, messages=row.messages, hotwords=row.hotwords,
            )  # fmt: skip


def is_chatml(source: str) -> bool:
    """Returns whether a source has the JSONL format of training."""
    return has_keys("messages")(source) and not is_dialogue(source)


def is_dialogue(source: str) -> bool:
    """Returns whether a source has dialogues with recordings in a list `audios`."""
    return has_keys("audios")(source)


def read_dialogues(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads dialogues with recordings in a list `audios` and a placeholder `<audio>` for each recording.

    The turns are in `messages`, in `conversations` (ShareGPT), in `query` and `response`, or in `instruction`, `input`
    and `output` (Alpaca).
    """
    for path, split in lists_in(source, JSON_SUFFIXES):
        folder = os.path.dirname(path)
        for line, record in read_records(path, reading.bad_rows):
            try:
                messages, recordings = _messages(record, folder)
                hotwords = hotwords_of(record)
            except BadDataError as error:
                reading.bad_rows.add(path, line, str(error))
                continue
            except (TypeError, ValueError) as error:  # values of a wrong type
                reading.bad_rows.add(path, line, f"bad dialogue: {error}")
                continue
            yield Utterance(
                "", recordings[0], "", line, line, path, path, split=split, messages=messages, hotwords=hotwords
            )


def _messages(record: dict, folder: str) -> tuple[list[dict], list[str]]:
    """Returns the messages of a row with recordings in place of `<audio>`, and the recordings.

    Raises:
        BadDataError: if the row is not a dialogue, or the numbers of placeholders and recordings differ.
    """
    audios = record.get("audios")
    audios = [audios] if isinstance(audios, str) else audios
    if not isinstance(audios, list) or not audios or not all(isinstance(audio, str) and audio for audio in audios):
        raise BadDataError('no recording: "audios" must be a list of paths or URLs')
    turns = _turns(record)
    recordings = [resolve_source(audio, folder) for audio in audios]
    if not any(AUDIO_TAG in text for role, text in turns if role == "user"):
        # As in ms-swift: without placeholders, the recordings precede the first message.
        first = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise BadDataError("no message of the user; add a message with the role user")
        turns[first] = ("user", AUDIO_TAG * len(recordings) + turns[first][1])
    left = iter(recordings)
    messages = []
    for role, text in turns:
        if role == "user":
            before, *after = text.split(AUDIO_TAG)
            for piece in after:
                recording = next(left, None)
                if recording is None:
                    raise BadDataError(f'more {AUDIO_TAG} in the messages than recordings in "audios"')
                before += f"{chat.SPEECH_START}!{recording}{chat.SPEECH_END}{piece}"
            text = before
        messages.append({"role": role, "content": text})
    if next(left, None) is not None:
        raise BadDataError(f'more recordings in "audios" than {AUDIO_TAG} in the messages')
    return messages, recordings


def _turns(record: dict) -> list[tuple[str, str]]:
    turns: list[tuple[Any, Any]]
    key = next((key for key in ("messages", "conversations") if key in record), None)
    if key is not None:
        if not isinstance(record[key], list) or not all(isinstance(turn, dict) for turn in record[key]):
            raise BadDataError(f'bad dialogue: "{key}" must be a list of objects')
        turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in record[key]]
    elif "response" in record:
        turns = [
            turn for pair in record.get("history") or [] for turn in zip(("user", "assistant"), pair, strict=True)
        ]
        turns += [("user", record.get("query", "")), ("assistant", record["response"])]
    elif "output" in record:
        asked = "\n".join(filter(None, (record.get("instruction"), record.get("input"))))
        turns = [("user", asked), ("assistant", record["output"])]
    else:
        raise BadDataError('no dialogue: a row needs "messages", "conversations", "response" or "output"')
    if record.get("system"):
        turns.insert(0, ("system", record["system"]))
    for role, text in turns:
        if role not in ROLES or not isinstance(text, str):
            raise BadDataError(
                f"bad dialogue: a turn of {role!r}; turns must be texts with the roles {', '.join(ROLES)}"
            )
    return [(ROLES[role], text) for role, text in turns]
