"""Reading of tar shards (WebDataset's layout), Parquet files and blocks of a JSONL, from any row.

`datasets` also reads tar and Parquet files, but infers columns from the first samples and fails at a different sample.
Here, a damaged sample is one bad row.
"""

from __future__ import annotations

import codecs
import json
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..audio.archives import AUDIO_COLUMN, table_member, tar_member
from ..model import chat
from .bad_rows import BadDataError, BadRow
from .jsonl import CONTEXT, Row, add_context, hotwords_of, length_of, map_recordings, parse_line, parse_object

BLOCK_SIZE = 1 << 18  # bytes per shard of a JSONL: about 800 rows
AUDIO_SUFFIXES = ("wav", "flac", "ogg", "mp3", "opus", "m4a")
TEXT_SUFFIXES = ("json", "txt")
TEXT_COLUMNS = ("messages", "text", "sentence", "transcription")
OTHER_COLUMNS = ("hotwords", "asr_hotwords", *CONTEXT, "language", "speech_length", "text_length")
END = 1 << 62  # position after a shard that cannot be read further
MAX_MEMBER_BYTES = 1 << 30  # bytes of a recording in a tar file


@dataclass(frozen=True)
class Shard:
    """A part of a file that one worker reads sequentially.

    Args:
        file: absolute path of a JSONL, tar or Parquet file.
        start: first byte in a JSONL; a line belongs to the block in which it starts.
        stop: byte after the last byte.
    """

    file: str
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Item:
    """A row of a shard.

    Args:
        row: columns of `dataset.ROW_FEATURES` without `error`, or a `BadRow`.
        next: position from which `read_shard` resumes after this row.
    """

    row: dict[str, Any] | BadRow
    next: int


def is_archive(file: str) -> bool:
    """Returns whether a file contains recordings: tar or Parquet."""
    return file.endswith((".tar", ".parquet"))


def shards_of(file: str) -> list[Shard]:
    """Returns the shards of a file: blocks of a JSONL; a tar or Parquet file is one shard.

    Raises:
        OSError: if the file cannot be read.
        BadDataError: if the file is compressed.
    """
    size = os.path.getsize(file)
    if is_archive(file):
        return [Shard(file, 0, size)]
    if file.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip")):
        raise BadDataError(f"{file}: compressed; decompress it to a JSONL, .tar or .parquet file")
    return [Shard(file, start, min(start + BLOCK_SIZE, size)) for start in range(0, max(size, 1), BLOCK_SIZE)]


def read_shard(shard: Shard, position: int = 0, embed: bool = True) -> Iterator[Item]:
    """Reads the rows of a shard. Bad rows, and a shard that cannot be read, are `BadRow` objects.

    Args:
        shard: the shard.
        position: 0, or `next` of an item.
        embed: whether `recordings` in tar and Parquet files are bytes; otherwise they are addresses, see `archives`.
    """
    if position == END:
        return
    if shard.file.endswith(".tar"):
        read = _read_tar(shard.file, position, embed)
    elif shard.file.endswith(".parquet"):
        read = _read_parquet(shard.file, position, embed)
    else:
        read = _read_block(shard, position)
    try:
        yield from read
    except OSError as error:
        yield Item(BadRow(shard.file, "shard", f"cannot be read: {error.strerror or error}"), END)


def recordings_of_archive(file: str, suffixes: Collection[str]) -> Iterator[tuple[str, str] | BadRow]:
    """Finds the recordings in a tar or Parquet file, with or without transcripts, in order.

    Args:
        file: absolute path.
        suffixes: suffixes of recordings in a tar file, in lower case, with the dot.

    Yields:
        ID and address (see `archives`) of each recording. In a tar file, the ID is the member's name without suffix;
        in a Parquet file, the column `id`, the stem of the recording's path, or `FILE-ROW`. A `BadRow` reports a file
        without recordings, or the position from which a file cannot be read.
    """
    number = 0
    try:
        for item in _tar_recordings(file, suffixes) if file.endswith(".tar") else _parquet_recordings(file):
            number += 1
            yield item
    except OSError as error:
        number += 1
        yield BadRow(file, "archive", f"cannot be read: {error.strerror or error}")
    if not number:
        yield BadRow(file, "archive", "no recordings in the file")


def _tar_recordings(path: str, suffixes: Collection[str]) -> Iterator[tuple[str, str] | BadRow]:
    with open(path, "rb") as file, _open_tar(file, path) as tar:
        tar.offset = 0  # opening the file has read the first member
        while True:
            start = tar.offset
            try:
                member = _next_member(tar)
            except BadDataError as error:
                yield BadRow(path, f"byte {start}", str(error))
                return
            if member is None:
                return
            name = member.name.encode("utf-8", "replace").decode()
            stem, suffix = os.path.splitext(name)
            if member.isreg() and suffix.lower() in suffixes and not os.path.basename(name).startswith("."):
                yield stem.removeprefix("./"), tar_member(path, name, member.offset_data, member.size)


def _parquet_recordings(path: str) -> Iterator[tuple[str, str] | BadRow]:
    import pyarrow
    import pyarrow.parquet

    row, stem = 0, os.path.splitext(os.path.basename(path))[0]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if AUDIO_COLUMN not in schema.names:
                raise OSError(f"no column {AUDIO_COLUMN!r}; columns: {schema.names}")
            kind = schema.field(AUDIO_COLUMN).type
            has_path = pyarrow.types.is_struct(kind) and "path" in (field.name for field in kind)
            columns = ["id"] * ("id" in schema.names) + [f"{AUDIO_COLUMN}.path"] * has_path
            batches = file.iter_batches(1024, columns=columns) if columns else ()
            named = (record for batch in batches for record in batch.to_pylist())
            for row in range(file.metadata.num_rows):
                record: dict[str, Any] = next(named, {})
                name, id_ = (record.get(AUDIO_COLUMN) or {}).get("path"), record.get("id")
                if id_ is None:
                    id_ = os.path.splitext(os.path.basename(name))[0] if name else f"{stem}-{row}"
                yield str(id_), table_member(path, row)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield BadRow(path, f"row {row}", f"cannot be read from here on: {reason}")


def _read_block(shard: Shard, position: int) -> Iterator[Item]:
    folder = os.path.dirname(shard.file)
    with open(shard.file, "rb") as file:
        if position or not shard.start:
            file.seek(position)
        else:  # skips a line that starts in the previous block, but not a line that starts exactly at `start`
            file.seek(shard.start - 1)
            file.readline()
        while (start := file.tell()) < shard.stop:
            line = file.readline()
            if start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                row = parse_line(line, folder, shard.file, start)
                if isinstance(row, BadRow):
                    row = BadRow(shard.file, f"byte {start}", row.reason)
                yield Item(row if isinstance(row, BadRow) else as_columns(row), start + len(line))


def as_columns(row: Row) -> dict[str, Any]:
    """Converts a row of a JSONL to columns."""
    return {
        "messages": json.dumps(row.messages, ensure_ascii=False),
        "recordings": row.recordings,
        "hotwords": row.hotwords,
        "speech_length": row.speech_length,
        "text_length": row.text_length,
        "file": row.file,
        "line": row.line,
    }


def _read_tar(path: str, position: int, embed: bool) -> Iterator[Item]:
    """Reads members sequentially, without unpacking. Members with the same name up to the last dot form a sample."""
    key: str | None = None
    number = 0
    members: dict[str, bytes | str | BadDataError] = {}  # by suffix: content, address, or error
    with open(path, "rb") as file, _open_tar(file, path) as tar:
        tar.offset = position
        while True:
            start = tar.offset
            try:
                member, problem = _next_member(tar), None
            except BadDataError as error:
                member, problem = None, str(error)
            name = member.name.encode("utf-8", "replace").decode() if member else ""
            stem, _, suffix = name.rpartition(".")
            if key is not None and stem != key:
                number += 1
                yield Item(_tar_row(path, key, number, members), start)
                key, members = None, {}
            if problem:
                yield Item(BadRow(path, f"byte {start}", problem), END)
            if member is None:
                return
            suffix = suffix.lower()
            if not stem or os.path.basename(name).startswith(".") or suffix not in AUDIO_SUFFIXES + TEXT_SUFFIXES:
                continue
            key = stem
            if suffix in members:
                members[suffix] = BadDataError(f"duplicate member {name}")
            elif not member.isreg():
                members[suffix] = BadDataError(f"{name} is a link or device, not a file")
            elif member.size > MAX_MEMBER_BYTES:
                members[suffix] = BadDataError(f"{name} has {member.size} bytes; the maximum is {MAX_MEMBER_BYTES}")
            else:
                members[suffix] = tar_member(path, name, member.offset_data, member.size)
                if embed or suffix in TEXT_SUFFIXES:
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                    members[suffix] = data if len(data) == member.size else BadDataError(f"{name} is truncated")


def _open_tar(file: BinaryIO, path: str) -> tarfile.TarFile:
    if not file.read(1):
        raise OSError("the file is empty")
    file.seek(0)
    try:
        return tarfile.TarFile(fileobj=file, mode="r", errorlevel=1)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise OSError(f"not a tar file: {error}") from error


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Reads the member at `tar.offset`; returns `None` at the end.

    Python's iteration over a tar file silently stops at a damaged header.
    """
    start = tar.offset
    assert tar.fileobj is not None
    tar.fileobj.seek(start)
    try:
        member = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, OSError) as error:
        if isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise BadDataError("truncated: the archive has no end mark") from error
        raise BadDataError(f"damaged: the rest of the file cannot be read: {error}") from error
    if member.size < 0 or tar.offset <= start:
        raise BadDataError("damaged: the rest of the file cannot be read: a member has a negative size")
    return member


def _tar_row(path: str, key: str, number: int, members: dict) -> dict[str, Any] | BadRow:
    try:
        for problem in members.values():
            if isinstance(problem, BadDataError):
                raise problem
        audio = [suffix for suffix in AUDIO_SUFFIXES if suffix in members]
        if len(audio) != 1:
            given = " and ".join(f"{key}.{suffix}" for suffix in audio) or "none"
            raise BadDataError(f"a sample must have one recording, found {given}")
        if "json" in members:
            record = parse_object(members["json"])
        elif "txt" in members:
            try:
                record = {"text": members["txt"].decode("utf-8").strip()}
            except UnicodeDecodeError as error:
                raise BadDataError(f"not UTF-8: {key}.txt") from error
        else:
            raise BadDataError(f"no transcript: {key}.txt or {key}.json must directly precede or follow the recording")
        return _archive_row(record, f"{key}.{audio[0]}", members[audio[0]], path, number)
    except (BadDataError, chat.ChatError) as error:
        return BadRow(path, key, str(error))


def _archive_row(record: dict, name: str, recording: Any, file: str, number: int) -> dict[str, Any]:
    """Builds a row with one recording, which replaces the path in the messages."""
    hotwords = hotwords_of(record)
    if "messages" in record:
        messages = map_recordings(record["messages"], lambda _: name)
    else:
        text, language = record.get("text"), record.get("language")
        if not isinstance(text, str) or not isinstance(language, (str, type(None))):
            raise BadDataError('"text" must be a string, and "language" a string or missing')
        try:
            prompt = chat.transcription_prompt(language)
        except ValueError as error:
            raise BadDataError(str(error)) from error
        messages = chat.transcription_messages(name, prompt, text)
    messages = add_context(messages, record)
    dialogue = chat.parse_messages(messages, hotwords)
    if len(dialogue.recordings) != 1:
        raise BadDataError(f"the messages must contain exactly one recording, found {len(dialogue.recordings)}")
    if dialogue.turns[-1].answer is None:
        raise BadDataError("no answer: the last message must be the assistant's, with the transcript")
    try:
        text = json.dumps(messages, ensure_ascii=False)
    except TypeError as error:  # Parquet has types that JSON does not have
        raise BadDataError(f"bad dialogue: {error}") from error
    return {
        "messages": text,
        "recordings": [recording],
        "hotwords": hotwords,
        "speech_length": length_of(record, "speech_length"),
        "text_length": length_of(record, "text_length"),
        "file": file,
        "line": number,
    }


def _read_parquet(path: str, position: int, embed: bool) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    row = position
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            text = next((name for name in TEXT_COLUMNS if name in names), None)
            if AUDIO_COLUMN not in names or text is None:
                raise OSError(f"no column {AUDIO_COLUMN!r} or none of {', '.join(TEXT_COLUMNS)}; columns: {names}")
            others = [name for name in OTHER_COLUMNS if name in names]
            first = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row < first + count:
                    columns = [AUDIO_COLUMN, text, *others] if embed else [text, *others]
                    batches = file.iter_batches(16, row_groups=[group], columns=columns)
                    seen = first
                    for batch in batches:
                        for index in range(max(0, row - seen), len(batch)):
                            record = {name: batch.column(name)[index].as_py() for name in columns}
                            yield Item(_parquet_row(record, text, path, row, embed), row + 1)
                            row += 1
                        seen += len(batch)
                first += count
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Item(BadRow(path, f"row {row}", f"cannot be read from here on: {reason}"), END)


def _parquet_row(record: dict, text: str, path: str, row: int, embed: bool) -> dict[str, Any] | BadRow:
    try:
        value = record.pop(AUDIO_COLUMN, None)
        if embed:
            value = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(value, bytes) or not value:
                raise BadDataError(f"no bytes in column {AUDIO_COLUMN!r}; embed the recordings in the Parquet file")
        content = record.pop(text)
        if text != "messages":
            record["text"] = content
        else:
            record["messages"] = (
                parse_object(b'{"m": %s}' % content.encode("utf-8", "surrogatepass"))["m"]
                if isinstance(content, str)
                else content
            )
        recording = value if embed else table_member(path, row)
        return _archive_row(record, f"row-{row}", recording, path, row + 1)
    except (BadDataError, chat.ChatError) as error:
        return BadRow(path, f"row {row}", str(error))
