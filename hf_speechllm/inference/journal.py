"""Results of an unfinished run, which the next run does not compute again."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..audio.waveform import source_stamp
from ..data.bad_rows import NUM_NAMED
from ..model.chat import ChatError
from .alignment import Word
from .pieces import Transcript
from .requests import Request
from .segments import Segment

logger = logging.getLogger(__name__)


class Journal:
    """Results of a run in files `OUTPUT.partial-RANK.jsonl`; each result is written immediately, as one line.

    The first line of each file contains the settings of the run. Every line has a checksum: a damaged line is
    reported, and the request is decoded again. A key identifies the request: ID, prompt, and path, size and time of
    the recording. The journal does not contain failures, so that the next run tries again.

    Args:
        output_file: of the run.
        settings: settings that affect the results, besides the requests, as JSON values; `require` adds settings.
        rank: of this process, which writes one file, and reads the files of all ranks.
    """

    def __init__(self, output_file: str | os.PathLike[str], settings: dict[str, Any], rank: int = 0):
        self.prefix = f"{os.fspath(output_file)}.partial-"
        self.path = f"{self.prefix}{rank}.jsonl"
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rank = rank
        self._found: dict[str, dict[str, Any]] = {}  # settings by file
        self._file: BinaryIO | None = None

    def files(self) -> list[str]:
        """Returns the existing files of all ranks."""
        return sorted(glob.glob(glob.escape(self.prefix) + "[0-9]*.jsonl"))

    def read(self) -> dict[str, Transcript]:
        """Returns earlier results by `request_key`, without `index`.

        Rank 0 warns about damaged lines. Results of a file without settings are ignored.

        Raises:
            ValueError: if the results have other settings.
            OSError: if a file cannot be read.
        """
        results = {}
        self._found = {}
        damaged = []
        for path in self.files():
            lines = Path(path).read_bytes().split(b"\n")[:-1]  # without an incomplete last line
            for number, line in enumerate(lines, start=1):
                row = _parse(line)
                if row is None or (number == 1) != ("settings" in row):
                    lost = "its result is" if number > 1 else f"without settings, all {len(lines) - 1} results are"
                    damaged.append(f"{path}:{number}: damaged: {lost} ignored and decoded again")
                    if number == 1:
                        break
                elif number == 1:
                    self._found[path] = row["settings"]
                else:
                    results[row["key"]] = _transcript(row)
        if damaged and self.rank == 0:
            more = [f"and {len(damaged) - NUM_NAMED} more damaged lines"] if len(damaged) > NUM_NAMED else []
            logger.warning("%s", "\n".join(damaged[:NUM_NAMED] + more))
        self.require({})
        return results

    def require(self, settings: dict[str, Any]) -> None:
        """Adds settings that become known later, and compares all settings with those of earlier results.

        Raises:
            ValueError: if settings differ; the message names the settings.
        """
        self.settings |= json.loads(json.dumps(settings))
        for path, found in self._found.items():
            differing = [name for name, value in self.settings.items() if found.get(name) != value]
            if differing:
                changes = ", ".join(f"{name} ({found.get(name)!r}, now {self.settings[name]!r})" for name in differing)
                raise ValueError(
                    f"{path}: an unfinished run with other settings: {changes}. Use the same settings to resume, or "
                    "--overwrite to start again"
                )

    def add(self, key: str, transcript: Transcript) -> None:
        """Writes a result, which is then safe if this process ends.

        Raises:
            OSError: if the file cannot be written, for example because the disk is full.
        """
        segments = [dataclasses.astuple(segment) for segment in transcript.segments]
        self._write({"key": key, "text": transcript.text, "seconds": transcript.seconds, "segments": segments})

    def open(self) -> None:
        """Opens the file of this process, to append to earlier results.

        Raises:
            OSError: if the file cannot be written.
        """
        content = Path(self.path).read_bytes() if os.path.exists(self.path) else b""
        complete, end, _ = content.rpartition(b"\n")
        usable = "settings" in (_parse(complete.partition(b"\n")[0]) or ())
        if usable:
            os.truncate(self.path, len(complete) + len(end))
        # Without a buffer: written results are safe after a crash of the process, but not of the machine.
        self._file = open(self.path, "ab" if usable else "wb", buffering=0)  # noqa: SIM115
        if not usable:
            self._write({"settings": self.settings})

    def remove(self) -> None:
        """Removes the files of all ranks."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in self.files():
            Path(path).unlink(missing_ok=True)

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("the journal is not open")
        content = json.dumps({**row, "checksum": _checksum(row)}, ensure_ascii=False).encode() + b"\n"
        try:
            while content:  # a nearly full disk accepts only a part
                content = content[self._file.write(content) :]
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, ensure_ascii=False).encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parses a line; returns `None` if the line is damaged."""
    try:
        row = json.loads(line)
        checksum = row.pop("checksum")
        return row if checksum == _checksum(row) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _transcript(row: dict[str, Any]) -> Transcript:
    segments = tuple(
        Segment(start, end, text, looped, tuple(Word(*word) for word in words), *rest)
        for start, end, text, looped, words, *rest in row["segments"]
    )
    return Transcript(-1, row["text"], row["seconds"], segments=segments)


def request_key(request: Request) -> str:
    """Returns a hash of a request: ID, prompt, and path, size and time of each local recording."""
    try:
        recordings = request.dialogue.recordings
    except ChatError:  # measuring reports this error, and the journal does not contain failures
        recordings = []
    stamps = [source_stamp(source) for source in recordings if isinstance(source, str)]
    content = json.dumps([request.id, request.messages, request.hotwords, stamps], default=_json)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return os.fspath(value)
