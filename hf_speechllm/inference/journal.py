"""The results of an unfinished run, so that they are not computed again."""

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
from .pieces import Transcript
from .requests import Request
from .segments import Segment

logger = logging.getLogger(__name__)


class Journal:
    """Results of a run beside its output file, `OUTPUT.partial-RANK.jsonl`, a line for each as soon as there is one.

    The first line of each file has the run's settings. Every line has a checksum: one that is damaged is reported, and
    its request decoded again. A result belongs to a request as a whole: ID, prompt, and the path, size and time of the
    recording. Failures are not kept, so that they are tried again.

    Args:
        output_file: of the run.
        settings: what the results depend on, besides the requests; of JSON's types. More can be added with `require`.
        rank: of this process; each writes a file of its own, and reads those of all.
    """

    def __init__(self, output_file: str | os.PathLike[str], settings: dict[str, Any], rank: int = 0):
        self.prefix = f"{os.fspath(output_file)}.partial-"
        self.path = f"{self.prefix}{rank}.jsonl"
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rank = rank
        self._found: dict[str, dict[str, Any]] = {}  # settings by file
        self._file: BinaryIO | None = None

    def files(self) -> list[str]:
        """The files of all ranks that are there."""
        return sorted(glob.glob(glob.escape(self.prefix) + "[0-9]*.jsonl"))

    def read(self) -> dict[str, Transcript]:
        """The results so far, by their request's `request_key`; their `index` is not set.

        Damaged lines are named in a warning of rank 0; the results of a file without settings are not used.

        Raises:
            ValueError: if they were made with other settings.
            OSError: if a file can't be read.
        """
        results = {}
        self._found = {}
        damaged = []
        for path in self.files():
            lines = Path(path).read_bytes().split(b"\n")[:-1]  # a last line without its end is what a kill cut off
            for number, line in enumerate(lines, start=1):
                row = _parse(line)
                if row is None or (number == 1) != ("settings" in row):
                    lost = "its result is" if number > 1 else f"without settings, {len(lines) - 1} results are"
                    damaged.append(f"{path}:{number}: damaged: {lost} not used, but decoded again")
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
        """Adds settings, which were not known when the journal was made, and compares all of them with what was read.

        Raises:
            ValueError: if results were made with others; the message names them.
        """
        self.settings |= json.loads(json.dumps(settings))
        for path, found in self._found.items():
            differing = [name for name, value in self.settings.items() if found.get(name) != value]
            if differing:
                changes = ", ".join(f"{name} ({found.get(name)!r}, now {self.settings[name]!r})" for name in differing)
                raise ValueError(
                    f"{path}: an unfinished run with other settings: {changes}. Give the same to resume it, or "
                    "--overwrite to start again"
                )

    def add(self, key: str, transcript: Transcript) -> None:
        """Keeps a result, so that it outlives this process.

        Raises:
            OSError: if the file can't be written, for example since the disk is full.
        """
        segments = [dataclasses.astuple(segment) for segment in transcript.segments]
        self._write({"key": key, "text": transcript.text, "seconds": transcript.seconds, "segments": segments})

    def open(self) -> None:
        """Begins this process's file, or goes on with it.

        Raises:
            OSError: if the file can't be written.
        """
        content = Path(self.path).read_bytes() if os.path.exists(self.path) else b""
        complete, end, _ = content.rpartition(b"\n")
        usable = "settings" in (_parse(complete.partition(b"\n")[0]) or ())
        if usable:
            os.truncate(self.path, len(complete) + len(end))
        # Without a buffer: what is written outlives the process, though not the machine.
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
            while content:  # a disk that is nearly full takes a part
                content = content[self._file.write(content) :]
        except OSError as error:
            raise OSError(f"{self.path} can't be written: {error.strerror}") from error


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, ensure_ascii=False).encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row of a line; `None` if it is damaged."""
    try:
        row = json.loads(line)
        checksum = row.pop("checksum")
        return row if checksum == _checksum(row) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _transcript(row: dict[str, Any]) -> Transcript:
    segments = tuple(Segment(*values) for values in row["segments"])
    return Transcript(-1, row["text"], row["seconds"], segments=segments)


def request_key(request: Request) -> str:
    """A hash of a request: ID, prompt, and the path, size and time of each local recording."""
    try:
        recordings = request.dialogue.recordings
    except ChatError:  # it fails when it is measured, and is not kept
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
