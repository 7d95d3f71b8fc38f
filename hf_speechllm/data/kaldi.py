"""Kaldi lists (`wav.scp` and `text`: one ID and value per line), joined by ID, and lengths of speech and text."""

from __future__ import annotations

import codecs
import logging
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from ..audio.downloads import redact
from ..audio.time_range import add_time_range
from ..audio.waveform import AudioError, check_root, display_name, is_url, probe_audio, resolve_source
from .bad_rows import BadRows
from .utterance import Utterance

logger = logging.getLogger(__name__)

FRAME_LENGTH = 25  # ms
FRAME_SHIFT = 10  # ms
TEXTS_AT_ONCE = 128  # texts per call of the tokenizer; a single call for all texts takes 1/3 longer and more memory
_SPACES = re.compile(rb"[ \t]+")
_PATH = re.compile(r"[/\\|]|\.\w{2,5}(\W|$)")  # a separator, a command of Kaldi, or a file extension
_ARCHIVE = re.compile(r"\.ark(\.gz)?(:\d+)?(\[[^]]*\])?$")


class Entry(NamedTuple):
    """A line of a list: ID, value, and line number counted from 1."""

    id: str
    value: str
    line: int


@dataclass(frozen=True)
class KaldiList:
    """The entries of a list, in order, and the IDs of bad lines, which are not in `entries`."""

    file: str
    entries: list[Entry]
    bad_ids: set[str]


def read_list(path: str | os.PathLike[str], bad_rows: BadRows, content: str = "value") -> KaldiList:
    """Reads a list with an ID, spaces or tabs, and a value in each line.

    Args:
        path: UTF-8 file, with or without a byte order mark, Unix or Windows line ends; empty lines are skipped.
        bad_rows: receives lines that are not UTF-8, lack the value, or repeat an ID (the first line is kept).
        content: name of the values in messages.

    Raises:
        OSError: if the file cannot be read.
    """
    result = KaldiList(os.fspath(path), [], set())
    lines: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8)  # in any line: `cat` joins lists
            # `split()` would also split at Unicode spaces, which a path or transcript may contain.
            id_, value = (_SPACES.split(raw.strip(b" \t\r\n"), maxsplit=1) + [b""])[:2]
            if not id_:
                continue
            try:
                entry = Entry(id_.decode("utf-8"), value.decode("utf-8"), number)
            except UnicodeDecodeError:
                bad_rows.add(path, number, "not UTF-8: save the list as UTF-8")
                result.bad_ids.add(id_.decode("utf-8", "replace"))
                continue
            if entry.id in lines:
                bad_rows.add(path, number, f'duplicate ID: "{entry.id}" is in line {lines[entry.id]}, too')
                continue
            lines[entry.id] = number
            if entry.value.strip():
                result.entries.append(entry)
            else:
                bad_rows.add(
                    path, number, f'one field only: "{entry.id}" has an empty {content}; write "ID {content}"'
                )
                result.bad_ids.add(entry.id)
    return result


def require_transcripts(transcripts: KaldiList) -> None:
    """Checks that a list of transcripts is not a list of recordings.

    Raises:
        ValueError: if the first values are all URLs or existing files.
    """
    folder = os.path.dirname(os.path.abspath(transcripts.file))
    values = [entry.value for entry in transcripts.entries[:10]]
    if values and all(is_url(value) or os.path.isfile(os.path.join(folder, value)) for value in values):
        raise ValueError(
            f"{transcripts.file}: {redact(values[0])} is a recording, not a transcript; check that --scp_file and "
            "--transcript_file are not swapped"
        )


def _require_recordings(scp: KaldiList, folder: str) -> None:
    """Checks that a list of recordings is not a list of transcripts.

    Raises:
        ValueError: if none of the first values is a URL, an existing file, or a text that could be a path.
    """
    values = [entry.value for entry in scp.entries[:10]]
    if values and not any(
        is_url(value) or _PATH.search(value) or os.path.exists(os.path.join(folder, value)) for value in values
    ):
        raise ValueError(
            f'{scp.file}: "{values[0]}" is not a URL, a path or an existing file; give a list of recordings '
            "(wav.scp), not of transcripts"
        )


def read_scp(path: str | os.PathLike[str], bad_rows: BadRows, audio_root: str | None = None) -> KaldiList:
    """Reads a `wav.scp` and makes paths, which are relative to the list's folder, absolute.

    Args:
        path: see `read_list`.
        bad_rows: receives bad lines (see `read_list`), and commands and archives, which only Kaldi can read.
        audio_root: folder that must contain all recordings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the list contains transcripts.
    """
    scp = read_list(path, bad_rows, "path")
    folder = os.path.dirname(os.path.abspath(scp.file))
    _require_recordings(scp, folder)
    entries = []
    for entry in scp.entries:
        if entry.value.startswith("|") or entry.value.endswith("|"):
            reason = f'not a file: "{entry.value}" is a command; write its output to a file and give the file\'s path'
        elif _ARCHIVE.search(entry.value):
            reason = (
                f'not a file: "{entry.value}" is a Kaldi archive; write each recording to a file and give its path'
            )
        else:
            source = resolve_source(entry.value, folder)
            try:
                if audio_root is not None:
                    check_root(source, audio_root)
                entries.append(entry._replace(value=source))
                continue
            except AudioError as error:
                reason = str(error)
        bad_rows.add(path, entry.line, reason)
        scp.bad_ids.add(entry.id)
    return KaldiList(scp.file, entries, scp.bad_ids)


def warn_of_unused_segments(recordings: KaldiList) -> None:
    """Warns if a file `segments` next to a `wav.scp` is ignored."""
    segments = os.path.join(os.path.dirname(os.path.abspath(recordings.file)), "segments")
    if os.path.isfile(segments):
        logger.warning("%s is ignored: the whole recordings of %s are used", segments, recordings.file)


def read_segments(path: str | os.PathLike[str], recordings: KaldiList, bad_rows: BadRows) -> KaldiList:
    """Reads Kaldi's `segments`: each line has utterance, recording, first and last second.

    Args:
        path: path of the list.
        recordings: content of the `wav.scp`.
        bad_rows: collects bad lines (see `read_list`), unknown recordings and invalid times.

    Returns:
        The utterances, with addresses of parts of recordings (see `audio.time_range`). As in Kaldi, the last second -1
        means the end of the recording.

    Raises:
        OSError: if the file cannot be read.
    """
    segments = read_list(path, bad_rows, "recording, start and end")
    sources = {entry.id: entry.value for entry in recordings.entries}
    entries = []
    for entry in segments.entries:
        recording, *times = entry.value.split()
        try:
            start, end = map(float, times)
            if recording in sources:
                part = add_time_range(sources[recording], start, None if end == -1 else end)
                entries.append(entry._replace(value=part))
                continue
            reason = f'unknown recording: "{recording}" is not in {recordings.file}'
        except AudioError as error:
            reason = f"bad segment: {error}"
        except ValueError:
            reason = f'bad segment: "{entry.value}"; write UTTERANCE RECORDING START END, with times in seconds'
        segments.bad_ids.add(entry.id)
        if recording not in recordings.bad_ids:
            bad_rows.add(path, entry.line, reason)
    return KaldiList(segments.file, entries, segments.bad_ids)


def join(scp: KaldiList, transcripts: KaldiList, bad_rows: BadRows) -> list[Utterance]:
    """Joins recordings and transcripts with the same ID, in the order of the scp.

    Args:
        scp: list of recordings.
        transcripts: list of transcripts.
        bad_rows: receives IDs that are only in one list, unless the line in the other list is already bad.
    """
    texts = {entry.id: entry for entry in transcripts.entries}
    recordings = {entry.id for entry in scp.entries}
    for entry in scp.entries:
        if entry.id not in texts and entry.id not in transcripts.bad_ids:
            bad_rows.add(scp.file, entry.line, f'ID in one list only: "{entry.id}" is not in {transcripts.file}')
    for entry in transcripts.entries:
        if entry.id not in recordings and entry.id not in scp.bad_ids:
            bad_rows.add(transcripts.file, entry.line, f'ID in one list only: "{entry.id}" is not in {scp.file}')
    return [
        Utterance(
            entry.id, entry.value, texts[entry.id].value, entry.line, texts[entry.id].line, scp.file, transcripts.file
        )
        for entry in scp.entries
        if entry.id in texts
    ]


def speech_length(num_samples: int, sampling_rate: int) -> int:
    """Returns the fbank frames of a recording: `int((duration_ms - 25) // 10 + 1)`, as Fun-ASR's `tools/scp2jsonl.py`.

    Args:
        num_samples: samples per channel.
        sampling_rate: rate in Hz.

    Returns:
        The number of frames; 0 or less if the recording is shorter than one frame, 25 ms.
    """
    beyond_first = 1000 * num_samples - FRAME_LENGTH * sampling_rate
    return beyond_first // (FRAME_SHIFT * sampling_rate) + 1


def measure_recording(source: str) -> tuple[float, int]:
    """Returns the duration in seconds and the `speech_length` of a recording.

    Raises:
        AudioError: if the recording cannot be decoded to the end, or is shorter than 25 ms.
    """
    num_samples, sampling_rate = probe_audio(source)
    length = speech_length(num_samples, sampling_rate)
    if length < 1:
        duration = 1000 * num_samples / sampling_rate
        raise AudioError(f"{display_name(source)}: shorter than {FRAME_LENGTH} ms: {duration:.1f} ms")
    return num_samples / sampling_rate, length


def add_text_lengths(rows: list[dict], tokenizer) -> None:
    """Adds `text_length` to rows: the tokens of the answers, as in Fun-ASR's `tools/scp2jsonl.py`.

    Args:
        rows: rows with `messages`; changed in place.
        tokenizer: tokenizer of the model.
    """
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        batch = rows[start : start + TEXTS_AT_ONCE]
        answers = [_answers(row["messages"]) for row in batch]
        encoded = tokenizer(sum(answers, []), add_special_tokens=False, return_attention_mask=False)
        counts = map(len, encoded["input_ids"])
        for row, texts in zip(batch, answers, strict=True):
            row["text_length"] = sum(next(counts) for _ in texts)


def _answers(messages: list[dict]) -> list[str]:
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    return [text if isinstance(text, str) else "".join(part["text"] for part in text) for text in contents]
