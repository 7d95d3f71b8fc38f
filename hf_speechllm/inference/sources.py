"""Sources of recordings: files, URLs, folders, Parquet and tar files."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..audio.downloads import is_url, redact_url
from ..audio.time_range import time_range_hint
from ..audio.waveform import AUDIO_SUFFIXES, local_path
from ..data.bad_rows import BadRow, BadRows
from ..data.jsonl import recording_id
from ..data.shards import is_archive, recordings_of_archive

logger = logging.getLogger(__name__)

_WHITE_SPACE = re.compile(r"\s+")


class Source(NamedTuple):
    """A recording.

    Args:
        id: ID of the recording.
        name: longer name, for recordings with equal IDs.
        recording: path, URL, or address in an archive.
    """

    id: str
    name: str
    recording: str


def find_recordings(sources: Sequence[str], bad_rows: BadRows) -> list[Source]:
    """Lists the recordings of sources in order; recordings of a folder are in alphabetical order.

    The ID of a file is the stem of the name; in a folder, the relative path without the suffix. The ID of a Parquet
    row is the column `id`, the stem of the path of the recording, or `FILE-ROW`. The ID of a tar member is the name
    without the suffix. White space in an ID becomes `_`. Recordings with equal IDs get their whole paths as IDs.

    Args:
        sources: files, URLs, folders (searched recursively), `.parquet` and `.tar` files.
        bad_rows: collects archives, or parts of archives, that cannot be read.

    Raises:
        OSError: if a file or folder is missing or cannot be read.
        ValueError: if a source is of an unsupported kind, or a folder has no recordings.
    """
    found = [item for source in sources for item in _expand(source, bad_rows)]
    counts = Counter(item.id for item in found)
    return [item if counts[item.id] == 1 else item._replace(id=_as_id(item.name)) for item in found]


def _expand(source: str, bad_rows: BadRows) -> Iterator[Source]:
    if is_url(source):
        yield Source(_as_id(recording_id(source)), redact_url(source), source)
    elif os.path.isdir(source):
        yield from _in_folder(source, bad_rows)
    elif source.endswith((".jsonl", ".scp")):
        option = "--jsonl_file" if source.endswith(".jsonl") else "--scp_file"
        raise ValueError(f"{source} is a list; pass the list with {option}")
    elif source.endswith((".csv", ".tsv", ".json", ".txt")):
        raise ValueError(f"{source} is no recording; `hf-speechllm prepare` converts tables for --jsonl_file")
    elif source.endswith((".zip", ".gz", ".tgz", ".zst", ".bz2", ".xz", ".7z", ".rar")):
        raise ValueError(f"{source} is compressed; unpack the file, and pass the folder, recording or .tar file")
    elif not os.path.exists(local_path(source)):
        raise FileNotFoundError(f"{source}: no such file{time_range_hint(source)}")
    elif is_archive(source):
        yield from _in_archive(source, bad_rows)
    else:
        yield Source(_as_id(recording_id(Path(source).as_posix())), source, os.path.abspath(source))


def _in_folder(folder: str, bad_rows: BadRows) -> Iterator[Source]:
    def refuse(error: OSError):
        raise error

    number, others = 0, Counter[str]()
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if is_archive(name):
                yield from _in_archive(path, bad_rows)
            elif suffix in AUDIO_SUFFIXES:
                below = Path(os.path.relpath(path, folder)).with_suffix("").as_posix()
                yield Source(_as_id(below), path, os.path.abspath(path))
            else:
                others[suffix or name] += 1
                continue
            number += 1
    if not number:
        raise ValueError(
            f"{folder}: no recordings (.wav, .flac, .mp3, ...), .tar or .parquet files; pass another folder"
        )
    if others:
        logger.info("%s: %d other files are skipped (%s)", folder, others.total(), ", ".join(others))


def _in_archive(path: str, bad_rows: BadRows) -> Iterator[Source]:
    for item in recordings_of_archive(os.path.abspath(path), AUDIO_SUFFIXES):
        if isinstance(item, BadRow):
            bad_rows.add(item.file, item.line, item.reason)
        else:
            id_, recording = item
            yield Source(_as_id(id_), f"{path}::{recording.rpartition('::')[2]}", recording)


def _as_id(name: str) -> str:
    return _WHITE_SPACE.sub("_", name)
