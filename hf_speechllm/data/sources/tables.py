"""Readers of lists with named columns: CSV, TSV, JSONL and JSON (NeMo, FunASR, Qwen3-ASR, Common Voice, ...)."""

from __future__ import annotations

import csv
import functools
import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...audio.waveform import header_seconds, is_url, resolve_source
from ..bad_rows import BadDataError
from ..jsonl import recording_id
from ..utterance import Utterance
from .named_files import is_sidecar
from .reading import Reading, find_lists, first_record, lists_in, read_records, split_of

# Names of columns by role, the most specific first.
ROLES = {
    "audio": (
        "audio_filepath", "audio_path", "audio_file", "audio", "file_name", "filename", "file_path", "path", "file",
        "wav", "wav_path", "wav_file", "wav_filename", "source", "recording", "音频", "录音",
    ),
    "text": (
        "text", "sentence", "transcript", "transcription", "target", "txt", "normalized_text", "raw_text",
        "normalized_transcription", "raw_transcription", "utterance", "words", "wrd", "文本",
    ),
    "id": ("id", "key", "utt_id", "utterance_id", "segment_id"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk", "spk_id", "speaker_name", "speakerid"),
    "language": ("language", "lang", "locale", "text_language"),
    "start": ("start", "offset", "start_time", "begin_time"),
    "end": ("end", "end_time"),
    "duration": ("duration",),
    "split": ("split", "subset", "partition"),
    "hotwords": ("hotwords",),
}  # fmt: skip
FOLDERS = ("", "clips", "wavs", "wav", "audio", "audios", "data")  # folders of recordings, relative to the list
SUFFIXES = ("", ".wav", ".flac", ".mp3", ".opus", ".m4a", ".ogg")  # suffixes that a list may omit
NEMO_AUDIO = "audio_filepath"
LONGER = 0.5  # seconds; a recording that exceeds the duration of its row by more than this is cut
DELIMITERS = ",;|"  # of a CSV; the most frequent one in the header line is taken
JSON_SUFFIXES = (".jsonl", ".json", ".manifest", ".list")


def find_columns(names: Iterable[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Finds the columns by role.

    Args:
        names: names of all columns.
        given: names by role, from the user.
        where: path of the list, for messages.

    Raises:
        BadDataError: if a given column is missing, or the column of recordings or transcripts is not found.
    """
    names = list(names)
    by_lower = {re.sub(r"[\s-]+", "_", name.lower()): name for name in reversed(names)}
    found = {role: by_lower[known] for role in ROLES for known in reversed(ROLES[role]) if known in by_lower}
    if missing := [repr(name) for name in given.values() if name not in names]:
        raise BadDataError(f"{where}: no column {', '.join(missing)}; the columns are {', '.join(names)}")
    found |= given
    if missing := [role for role in ("audio", "text") if role not in found]:
        if any(name.lower().endswith(SUFFIXES[1:]) for name in names):
            raise BadDataError(
                f"{where}: the first line has a recording instead of the names of the columns; add a line with a name "
                "for each column, such as audio and text"
            )
        contents = " and no column of ".join({"audio": "recordings", "text": "transcripts"}[role] for role in missing)
        raise BadDataError(
            f"{where}: no column of {contents} found; use --columns {' '.join(f'{role}=NAME' for role in missing)} "
            f"(the columns, from the first line, are {', '.join(names)})"
        )
    return found


def utterance_of_record(
    reading: Reading, record: Mapping[str, Any], columns: Mapping[str, str], file: str, line: int | str,
    folder: str, split: str | None, audio: Any = None, original: str | None = None,
) -> Utterance | None:  # fmt: skip
    """Builds an utterance from a row of a table; returns `None` for a bad row, which `bad_rows` collects.

    Args:
        reading: options; collects bad rows.
        record: values by column name.
        columns: column names by role.
        file, line: position of the row.
        folder: base folder of relative paths, absolute.
        split: split of the whole list; `None` without a split.
        audio: address of the recording, instead of the value of the column.
        original: path of a recording that is stored as bytes; its stem is the ID of a row without ID.
    """
    values = {role: record.get(name) for role, name in columns.items()}
    audio = values["audio"] if audio is None else audio
    if not isinstance(audio, str) or not audio.strip():
        reading.bad_rows.add(file, line, f"no recording: {columns['audio']!r} is {str(audio)[:60]!r}")
        return None
    try:
        start, end, duration = (_seconds(values.get(role)) for role in ("start", "end", "duration"))
    except (TypeError, ValueError) as error:
        reading.bad_rows.add(file, line, f"bad time: {error}; write seconds")
        return None
    if start is None and duration is not None and columns["audio"] == NEMO_AUDIO:  # NeMo also cuts here
        seconds = header_seconds(resolve_source(audio, folder))
        start = 0.0 if seconds is not None and seconds > duration + LONGER else None
    if start is not None and end is None and duration is not None:
        end = start + duration
    names = {
        role: None if values.get(role) in (None, "") else str(values[role]) for role in ("id", "speaker", "split")
    }
    return reading.utterance(
        file, line, audio, values["text"], folder=folder, start=start, end=end,
        id=names["id"] or (recording_id(original) if original else ""), speaker=names["speaker"],
        language=values.get("language"), hotwords=values.get("hotwords"),
        split=split or (split_of(names["split"]) if names["split"] else None),
    )  # fmt: skip


def _seconds(value: Any) -> float | None:
    seconds = None if value in (None, "") else float(value)
    if seconds is not None and not math.isfinite(seconds):
        raise ValueError(f"{value} is not a time")
    return seconds


def _read_table(
    rows: Iterable[tuple[int, dict]], path: str, split: str | None, reading: Reading
) -> Iterator[Utterance]:
    folder = os.path.dirname(path)
    columns: dict[tuple[str, ...], dict[str, str]] = {}  # objects of a JSONL may have different keys
    place: Callable[[str], str] | None = None
    for line, record in rows:
        names = tuple(record)
        if names not in columns:
            try:
                columns[names] = find_columns(names, reading.columns, path)
            except BadDataError as error:
                if not columns:
                    raise
                reading.bad_rows.add(path, line, str(error))
                continue
        audio = record.get(columns[names]["audio"])
        audio = audio.get("path") if isinstance(audio, dict) else audio  # of `datasets`
        if isinstance(audio, str) and audio.strip():
            place = place or _find_place(folder, audio)
            audio = place(audio) if place else audio
        item = utterance_of_record(reading, record, columns[names], path, line, folder, split, audio)
        if item is not None:
            yield item


def _find_place(folder: str, audio: str) -> Callable[[str], str] | None:
    """Returns a function that adds a folder and a suffix to the paths of a list, as this path needs.

    Returns:
        `None` if the recording is missing or a URL: the next path decides.
    """
    if is_url(audio):
        return None
    separators = ("\\", "/") if "\\" in audio else ("\\",)  # paths of Windows are read everywhere
    for below in FOLDERS:
        for suffix in SUFFIXES:
            for separator in separators:
                if os.path.isfile(os.path.join(folder, below, audio.replace("\\", separator) + suffix)):
                    return lambda path: os.path.join(below, path.replace("\\", separator) + suffix)
    return None


def read_delimited(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads CSV and TSV lists with a header line."""
    for path, split in lists_in(source, (".csv", ".tsv")):
        # Invalid UTF-8 is kept, so that the error can name the row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.readline()
            file.seek(0)
            if "\0" in head:
                raise BadDataError(f"{path}: not UTF-8: save the list as UTF-8")
            tabs = path.lower().endswith(".tsv") or "\t" in head
            reader = csv.DictReader(file, **_style(head, tabs))
            _name_columns(reader, path)
            find_columns(reader.fieldnames or (), reading.columns, path)  # an error also without rows
            yield from _read_table(_lines(reader, path, reading, tabs), path, split, reading)


def _style(head: str, tabs: bool) -> dict[str, Any]:
    """Returns the style of a CSV or TSV with this first line, for `csv.reader`."""
    # Quotation marks in a TSV usually belong to the text; a single quotation mark must not join lines.
    if tabs:
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    return {"delimiter": max(DELIMITERS, key=head.count), "strict": True}


def _name_columns(reader: csv.DictReader, path: str) -> None:
    """Removes spaces around the names of columns. A column without a name is allowed: pandas writes its index so.

    Raises:
        BadDataError: if the file is empty, or two columns have one name.
    """
    if reader.fieldnames is None:
        raise BadDataError(f"{path}: the file is empty")
    names = [name.strip() for name in reader.fieldnames]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise BadDataError(f"{path}: two columns are called {twice[0]!r}; rename one")
    reader.fieldnames = names


def _lines(reader: csv.DictReader, path: str, reading: Reading, tabs: bool) -> Iterator[tuple[int, dict]]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadDataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
        if None in row:
            reading.bad_rows.add(
                path, reader.line_num, "more fields than names; quote fields that contain the delimiter"
            )
            continue
        yield reader.line_num, {name: _unquoted(value) for name, value in row.items()} if tabs else row


def _unquoted(value: Any) -> Any:
    """Removes quotation marks around a field that a CSV writer has added."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        inner = value[1:-1].replace('""', "")
        return value[1:-1].replace('""', '"') if '"' not in inner else value
    return value


def read_json_table(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads JSONL and JSON lists of objects with named values: NeMo, FunASR, Qwen3-ASR, `metadata.jsonl`."""
    for path, split in lists_in(source, JSON_SUFFIXES):
        yield from _read_table(read_records(path, reading.bad_rows), path, split, reading)


def read_ljspeech(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `metadata.csv` of LJSpeech: `ID|text|normalized text`, without a header line; recordings `wavs/ID.wav`."""
    names = ("id", "text", "normalized_text")
    path = os.path.abspath(os.path.join(source, "metadata.csv") if os.path.isdir(source) else source)
    reading.columns = {"audio": "id", **reading.columns}
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = []
        for number, line in enumerate(file, start=1):
            fields = line.rstrip("\r\n").split("|")
            if len(fields) > len(names):
                reading.bad_rows.add(path, number, "more fields than ID|text|normalized text; remove the others")
            elif line.strip():
                rows.append((number, dict(zip(names, fields, strict=False))))
        yield from _read_table(rows, path, None, reading)


def _records(source: str) -> dict | None:
    """Returns the first record of the JSON lists of a source."""
    return next((record for path, _ in find_lists(source, JSON_SUFFIXES) if (record := first_record(path))), None)


def has_keys(*keys: str) -> Callable[[str], bool]:
    """Returns a detector of JSON lists whose first record has the given keys."""
    return functools.partial(_has_keys, keys)


def _has_keys(keys: tuple[str, ...], source: str) -> bool:
    record = _records(source)
    return record is not None and all(key in record for key in keys)


def is_qwen3_asr(source: str) -> bool:
    """Returns whether a source is a JSONL of Qwen3-ASR."""
    return has_keys("audio", "text")(source) and "<asr_text>" in str((_records(source) or {})["text"])


def is_json_table(source: str) -> bool:
    """Returns whether a source is a JSON list with named columns of recordings and transcripts."""
    record = _records(source)
    try:
        return record is not None and bool(find_columns(record, {}, source))
    except BadDataError:
        return False


def is_common_voice(source: str) -> bool:
    """Returns whether a source is the folder of a language in Common Voice, or a list in this folder."""
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    lists = glob.glob(f"{glob.escape(source)}/*.tsv") if os.path.isdir(source) else [source]
    return os.path.isdir(os.path.join(folder, "clips")) and any(path.endswith(".tsv") for path in lists)


def is_ljspeech(source: str) -> bool:
    """Returns whether a source is the folder or list of LJSpeech."""
    path = os.path.join(source, "metadata.csv") if os.path.isdir(source) else source
    if not path.endswith(".csv") or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().count("|") in (1, 2) and os.path.isdir(os.path.join(os.path.dirname(path), "wavs"))


def is_delimited(source: str) -> bool:
    """Returns whether a source is a CSV or TSV list, or a folder with such lists."""
    lists = find_lists(source, (".csv", ".tsv"))
    # Beside transcripts in files, such as those of LibriTTS, are tables of speakers.
    return bool(lists) and (any(_has_columns(path) for path, _ in lists) or not is_sidecar(source))


def _has_columns(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        head = file.readline()
    try:
        names = next(csv.reader([head], **_style(head, path.lower().endswith(".tsv") or "\t" in head)))
        return bool(find_columns(names, {}, path))
    except (BadDataError, StopIteration, csv.Error):
        return False
