"""Readers of lhotse cuts, in manifests and in Shar; lhotse parses the files."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from ..bad_rows import BadDataError, BadRow
from ..shards import recordings_of_archive
from ..utterance import Utterance
from .reading import Reading, split_of

SUFFIXES = (".jsonl", ".jsonl.gz")
SHAR_AUDIO = {".flac", ".wav", ".opus", ".mp3", ".ogg"}
WHOLE = 0.001  # seconds; a part shorter than the recording by less than this is the whole recording
_SHAR = re.compile(r"cuts\.(\d+)\.jsonl(\.gz)?\Z")


def is_cuts(source: str) -> bool:
    """Returns whether a source is a manifest of cuts, or a folder with manifests."""
    return bool(_manifests(source))


def is_shar(source: str) -> bool:
    """Returns whether a source is a Shar folder, or contains Shar folders named after splits."""
    return bool(_shar_folders(source))


def read_cuts(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads manifests of cuts. Each supervision is an utterance."""
    for path, split in _manifests(source):
        for number, cut in _cuts(path):
            yield from _utterances(cut, path, number, split, reading)


def read_shar(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads Shar: `cuts.000000.jsonl.gz` and `recording.000000.tar`. Recordings are not copied."""
    for folder, split in _shar_folders(source):
        for path in sorted(glob.glob(f"{glob.escape(folder)}/cuts.*.jsonl*")):
            match = _SHAR.search(path)
            if match is None:
                continue
            tar = os.path.join(folder, f"recording.{match[1]}.tar")
            if not os.path.isfile(tar):
                raise BadDataError(
                    f"{tar}: no such file, but {path} requires the file; other Shar fields are not supported"
                )
            recordings = {}
            for item in recordings_of_archive(tar, SHAR_AUDIO):
                if isinstance(item, BadRow):
                    reading.bad_rows.add(item.file, item.line, item.reason)
                else:
                    recordings[item[0]] = item[1]
            for number, cut in _cuts(path):
                yield from _utterances(cut, path, number, split, reading, recordings)


def _utterances(
    cut, path: str, number: int, split: str | None, reading: Reading, recordings: dict[str, str] | None = None
) -> Iterator[Utterance]:
    """Yields the utterances of a cut. `recordings` has the recordings of a Shar folder by the ID of the cut."""
    try:
        source = _recording_of(cut, os.path.dirname(path)) if recordings is None else recordings.get(cut.id)
        if source is None:
            raise BadDataError("no recording in the tar file of the shard")
        _check_supported(cut)
        if not cut.supervisions:
            raise BadDataError("no supervision, therefore no transcript")
        # Times of a supervision are relative to the cut. A supervision may be longer than the cut.
        times = [
            (cut.start + max(0.0, item.start), cut.start + min(cut.duration, item.end)) for item in cut.supervisions
        ]
        length = float(cut.recording.duration)
    except (BadDataError, TypeError, ValueError) as error:
        reading.bad_rows.add(path, number, f"cut {cut.id}: {error}")
        return
    for supervision, (start, end) in zip(cut.supervisions, times, strict=True):
        whole = start < WHOLE and end > length - WHOLE
        item = reading.utterance(
            path, number, source, supervision.text, start=None if whole else start, end=None if whole else end,
            id=supervision.id, speaker=supervision.speaker, language=supervision.language, split=split,
            origin=None if recordings is None else cut.recording.id,
        )  # fmt: skip
        if item is not None:
            yield item


def _recording_of(cut, folder: str) -> str:
    if not cut.has_recording:
        raise BadDataError("no recording")
    sources = getattr(cut, "recording", None) and cut.recording.sources
    if not sources or len(sources) > 1 or sources[0].type not in ("file", "url"):
        raise BadDataError("the recording is not a single file or URL; save the cuts with CutSet.save_audios")
    source = sources[0].source
    if sources[0].type == "url":
        return source
    beside = os.path.join(folder, source)
    return beside if os.path.exists(beside) else os.path.abspath(source)  # for lhotse, from the working directory


def _check_supported(cut) -> None:
    if type(cut).__name__ != "MonoCut" or cut.recording.num_channels > 1:
        raise BadDataError("a mixed, padded or multi-channel cut; save the cuts with CutSet.save_audios")
    if cut.recording.transforms:
        raise BadDataError("lhotse would transform the recording on loading; save the cuts with CutSet.save_audios")


def _cuts(path: str) -> Iterator[tuple[int, Any]]:
    """Yields the cuts of a manifest with their lines.

    Raises:
        BadDataError: if a line is not a cut; lhotse cannot read the lines after it.
    """
    from lhotse import CutSet

    number = 0
    try:
        for number, cut in enumerate(CutSet.from_file(path), start=1):
            yield number, cut
    except (AssertionError, AttributeError, EOFError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise BadDataError(f"{path}:{number + 1}: not a cut of lhotse, or damaged: {error}") from error


def _manifests(source: str) -> list[tuple[str, str | None]]:
    if os.path.isfile(source):
        return [(os.path.abspath(source), None)] if _has_cuts(source) else []
    files = [path for suffix in SUFFIXES for path in sorted(glob.glob(f"{glob.escape(source)}/*{suffix}"))]
    named = [
        (os.path.abspath(path), split_of(os.path.basename(path)))
        for path in files
        if not _SHAR.search(path) and _has_cuts(path)
    ]
    return [item for item in named if item[1]] or named


def _shar_folders(source: str) -> list[tuple[str, str | None]]:
    def is_one(folder: str) -> bool:
        return any(map(_SHAR.search, glob.glob(f"{glob.escape(folder)}/cuts.*"))) and bool(
            glob.glob(f"{glob.escape(folder)}/recording.*.tar")
        )

    if is_one(source):
        return [(os.path.abspath(source), None)]
    named = ((folder, split_of(os.path.basename(folder))) for folder in sorted(glob.glob(f"{glob.escape(source)}/*")))
    return [(os.path.abspath(folder), split) for folder, split in named if split and is_one(folder)]


def _has_cuts(path: str) -> bool:
    if not path.endswith(SUFFIXES):
        return False
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            record = json.loads(file.readline(1 << 24))
    except (OSError, ValueError, EOFError):
        return False
    return isinstance(record, dict) and ("supervisions" in record or record.get("type") in ("MixedCut", "PaddingCut"))
