"""Recordings inside tar, Parquet and Arrow files, addressed by strings that replace a path.

Examples: `a.tar::utt1.wav@1536+44100` (first byte and size), `a.parquet::17` (row) and `a.arrow::clip:17` (column and
row). No file is unpacked to disk.
"""

from __future__ import annotations

import bisect
import functools
import os
import posixpath
import re
from typing import Any

from ..files import open_regular

AUDIO_COLUMN = "audio"  # column with bytes, or with the struct {bytes, path} of `datasets.Audio`
_MARKS = (".tar::", ".parquet::", ".arrow::")
_BYTE_RANGE = re.compile(r"@(?P<offset>[0-9]{1,19})\+(?P<size>[0-9]{1,19})\Z")
_ROW = re.compile(r"(?:(?P<column>.+):)?(?P<row>[0-9]{1,19})", re.DOTALL)


def tar_member(path: str, name: str, offset: int, size: int) -> str:
    """Returns the address of a recording in a tar file.

    Args:
        name: name of the member.
        offset: first byte of the member's content in the tar file.
        size: size of the content in bytes.
    """
    return f"{path}::{name}@{offset}+{size}"


def table_member(path: str, row: int, column: str = AUDIO_COLUMN) -> str:
    """Returns the address of a recording in a Parquet or Arrow file; rows are counted from 0."""
    return f"{path}::{row}" if column == AUDIO_COLUMN else f"{path}::{column}:{row}"


def find_archive(source: Any) -> str | None:
    """Returns the path of the tar, Parquet or Arrow file that contains a source; `None` for other sources."""
    if not isinstance(source, str):
        return None
    for mark in _MARKS:
        if mark in source:
            return source[: source.index(mark) + len(mark) - 2]
    return None


def member_id(source: str) -> str:
    """Returns an ID for a recording in an archive: the name without suffix in a tar file, otherwise `FILE-ROW`."""
    path = str(find_archive(source))
    member = source[len(path) + 2 :]
    if path.endswith(".tar"):
        return posixpath.splitext(_BYTE_RANGE.sub("", member))[0].removeprefix("./")
    return f"{os.path.splitext(os.path.basename(path))[0]}-{member.rpartition(':')[2]}"


def read_member(source: str, max_bytes: int | None = None) -> bytes:
    """Reads the bytes of a recording in a tar, Parquet or Arrow file.

    Args:
        max_bytes: maximum size of the recording; default: no limit.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
        ValueError: if the address or the file is invalid, the row is missing, or the recording is too large.
    """
    path = find_archive(source)
    if path is None:
        raise ValueError(f"{source}: not an address in a tar, Parquet or Arrow file; write ARCHIVE::MEMBER")
    member = source[len(path) + 2 :]
    if not path.endswith(".tar"):
        if not (match := _ROW.fullmatch(member)):
            raise ValueError(f"{member!r} is not a row number")
        data = _read_table(path, match["column"] or AUDIO_COLUMN, int(match["row"]))
        _check_size(len(data), max_bytes)
        return data
    match = _BYTE_RANGE.search(member)
    if not match:
        raise ValueError("the byte range in the tar file is missing; write ::NAME@FIRST_BYTE+SIZE")
    offset, size = int(match["offset"]), int(match["size"])
    with open_regular(path) as file:
        present = os.fstat(file.fileno()).st_size - offset
        if present < size:
            raise ValueError(f"truncated: {max(0, present)} of {size} bytes")
        _check_size(size, max_bytes)
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"truncated: {len(data)} of {size} bytes")
    return data


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise ValueError(
            f"size of {size / 1e9:.1f} GB; the limit for recordings in archives is {max_bytes / 1e9:g} GB"
        )


def num_arrow_rows(path: str) -> int:
    """Returns the number of rows of an Arrow file.

    Raises:
        OSError, pyarrow.ArrowException: if the file cannot be read.
    """
    status = os.stat(path)
    return _arrow_table(path, status.st_size, status.st_mtime_ns).num_rows


def _read_table(path: str, column: str, row: int) -> bytes:
    import pyarrow

    kind = "Parquet" if path.endswith(".parquet") else "Arrow"
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    stamp = path, status.st_size, status.st_mtime_ns
    try:
        if kind == "Arrow":
            values: Any = _arrow_table(*stamp).column(column)
            num_rows, place = len(values), row
        else:
            starts = _row_group_starts(*stamp)
            num_rows, group = starts[-1], bisect.bisect(starts, row) - 1
            if row < num_rows:
                values, place = _row_group(*stamp, group, column), row - starts[group]
        if row >= num_rows:
            raise ValueError(f"no row {row}; the file has {num_rows} rows")
        value = values[place].as_py()
    except (pyarrow.ArrowException, KeyError) as error:  # KeyError: the column is missing
        raise ValueError(
            f"not {'a ' if kind == 'Parquet' else 'an '}{kind} file with a column {column!r}, or damaged: {error}"
        ) from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"no bytes in column {column!r}; embed the recordings in the file")
    return data


@functools.lru_cache(maxsize=256)
def _row_group_starts(path: str, size: int, modified: int) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [sum(counts[:group]) for group in range(len(counts) + 1)]


@functools.lru_cache(maxsize=2)  # rows are usually read in order, and a row group can be large
def _row_group(path: str, size: int, modified: int, group: int, column: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)


@functools.lru_cache(maxsize=256)
def _arrow_table(path: str, size: int, modified: int) -> Any:
    """Returns the table of an Arrow stream, which is mapped to memory: only values that are used are read."""
    import pyarrow

    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
        return reader.read_all()
