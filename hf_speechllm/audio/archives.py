"""Recordings inside tar and Parquet files, addressed by strings that replace a path.

Examples: `a.tar::utt1.wav@1536+44100` (first byte and size) and `a.parquet::17` (row). No file is unpacked to disk.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from ..files import open_regular

AUDIO_COLUMN = "audio"  # Parquet column with bytes, or with the struct {bytes, path} of `datasets.Audio`
_TAR, _PARQUET = ".tar::", ".parquet::"
_BYTE_RANGE = re.compile(r"@(?P<offset>[0-9]{1,19})\+(?P<size>[0-9]{1,19})\Z")
_ROW = re.compile(r"[0-9]{1,19}")


def tar_member(path: str, name: str, offset: int, size: int) -> str:
    """Returns the address of a recording in a tar file.

    Args:
        name: name of the member.
        offset: first byte of the member's content in the tar file.
        size: size of the content in bytes.
    """
    return f"{path}::{name}@{offset}+{size}"


def parquet_member(path: str, row: int) -> str:
    """Returns the address of a recording in a Parquet file; rows are counted from 0."""
    return f"{path}::{row}"


def find_archive(source: Any) -> str | None:
    """Returns the path of the tar or Parquet file that contains a source; `None` for other sources."""
    if not isinstance(source, str):
        return None
    for mark in (_TAR, _PARQUET):
        if mark in source:
            return source[: source.index(mark) + len(mark) - 2]
    return None


def read_member(source: str, max_bytes: int | None = None) -> bytes:
    """Reads the bytes of a recording in a tar or Parquet file.

    Args:
        max_bytes: maximum size of the recording; default: no limit.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
        ValueError: if the address or the file is invalid, the row is missing, or the recording is too large.
    """
    path = find_archive(source)
    if path is None:
        raise ValueError(f"{source}: not an address in a tar or Parquet file; write ARCHIVE::MEMBER")
    member = source[len(path) + 2 :]
    if path.endswith(".parquet"):
        if not _ROW.fullmatch(member):
            raise ValueError(f"{member!r} is not a row number")
        data = _read_parquet(path, int(member))
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


def _read_parquet(path: str, row: int) -> bytes:
    import pyarrow

    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    try:
        starts = _row_group_starts(path, status.st_size, status.st_mtime_ns)
        for group, start in enumerate(starts[:-1]):
            if start <= row < starts[group + 1]:
                value = _row_group(path, status.st_size, status.st_mtime_ns, group)[row - start]
                data = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(data, bytes):
                    return data
                raise ValueError(f"no bytes in column {AUDIO_COLUMN!r}; embed the recordings in the Parquet file")
    except (pyarrow.ArrowException, KeyError) as error:  # KeyError: the column is missing
        raise ValueError(f"not a Parquet file with a column {AUDIO_COLUMN!r}, or damaged: {error}") from error
    raise ValueError(f"no row {row}; the file has {starts[-1]} rows")


@functools.lru_cache(maxsize=256)
def _row_group_starts(path: str, size: int, modified: int) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [sum(counts[:group]) for group in range(len(counts) + 1)]


@functools.lru_cache(maxsize=2)  # rows are usually read in order, and a row group can be large
def _row_group(path: str, size: int, modified: int, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return _Column(file.read_row_group(group, columns=[AUDIO_COLUMN]).column(AUDIO_COLUMN))


class _Column:
    """A column that converts single values to Python objects on access."""

    def __init__(self, column):
        self.column = column

    def __getitem__(self, index: int):
        return self.column[index].as_py()
