"""Recordings inside tar and Parquet files, named by strings that stand where a path could.

`a.tar::utt1.wav@1536+44100` (first byte and size) and `a.parquet::17` (row). Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from ..files import open_regular

AUDIO_COLUMN = "audio"  # of a Parquet file: bytes, or the struct {bytes, path} of `datasets.Audio`
_TAR, _PARQUET = ".tar::", ".parquet::"
_PLACE = re.compile(r"@(?P<offset>[0-9]{1,19})\+(?P<size>[0-9]{1,19})\Z")
_ROW = re.compile(r"[0-9]{1,19}")


def tar_member(path: str, name: str, offset: int, size: int) -> str:
    """The name of a recording in a tar file.

    Args:
        name: of the member.
        offset: of its first byte in the file.
        size: in bytes.
    """
    return f"{path}::{name}@{offset}+{size}"


def parquet_member(path: str, row: int) -> str:
    """The name of the recording in a row, counted from 0, of a Parquet file."""
    return f"{path}::{row}"


def container_of(source: Any) -> str | None:
    """The tar or Parquet file that a source lies in; `None` for other sources."""
    if not isinstance(source, str):
        return None
    for mark in (_TAR, _PARQUET):
        if mark in source:
            return source[: source.index(mark) + len(mark) - 2]
    return None


def read_member(source: str, max_bytes: int | None = None) -> bytes:
    """The bytes of a recording in a tar or Parquet file.

    Args:
        max_bytes: the largest recording; default any.

    Raises:
        OSError: if the file can't be read, or is not a regular one.
        ValueError: if the source or the file is not well formed, has no such row, or the recording is too large.
    """
    path = container_of(source)
    if path is None:
        raise ValueError(f"{source}: not in a tar or Parquet file")
    place = source[len(path) + 2 :]
    if path.endswith(".parquet"):
        if not _ROW.fullmatch(place):
            raise ValueError(f"{place!r} is not the number of a row")
        data = _read_parquet(path, int(place))
        _check_size(len(data), max_bytes)
        return data
    match = _PLACE.search(place)
    if not match:
        raise ValueError("the place in the tar file is missing: ::NAME@FIRST_BYTE+SIZE")
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
        raise ValueError(f"{size / 1e9:.1f} GB; a recording in an archive has at most {max_bytes / 1e9:g} GB")


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
                raise ValueError(f"no bytes in column {AUDIO_COLUMN!r}; embed the recordings")
    except (pyarrow.ArrowException, KeyError) as error:  # KeyError: no such column
        raise ValueError(f"not a Parquet file with a column {AUDIO_COLUMN!r}, or damaged: {error}") from error
    raise ValueError(f"no row {row}")


@functools.lru_cache(maxsize=256)
def _row_group_starts(path: str, size: int, modified: int) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [sum(counts[:group]) for group in range(len(counts) + 1)]


@functools.lru_cache(maxsize=2)  # rows are mostly read in order, and a group can be large
def _row_group(path: str, size: int, modified: int, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return _Column(file.read_row_group(group, columns=[AUDIO_COLUMN]).column(AUDIO_COLUMN))


class _Column:
    """A column whose values become Python objects one by one."""

    def __init__(self, column):
        self.column = column

    def __getitem__(self, index: int):
        return self.column[index].as_py()
