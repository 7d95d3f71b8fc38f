"""The results of an unfinished run, so that they are not computed again."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..audio.waveform import source_stamp
from ..model.chat import ChatError
from .pieces import Transcript
from .requests import Request
from .segments import Segment

WEIGHTS = (".safetensors", ".bin", ".pt")


class Journal:
    """Results of a run beside its output file, `OUTPUT.partial-RANK.jsonl`, a line for each as soon as there is one.

    The first line of each file has the run's settings. A result belongs to a request as a whole: ID, prompt, and the
    path, size and time of the recording. Failures are not kept, so that they are tried again.

    Args:
        output_file: of the run.
        settings: what the results depend on, besides the requests; of JSON's types.
        rank: of this process; each writes a file of its own, and reads those of all.
    """

    def __init__(self, output_file: str | os.PathLike[str], settings: dict[str, Any], rank: int = 0):
        self.prefix = f"{os.fspath(output_file)}.partial-"
        self.path = f"{self.prefix}{rank}.jsonl"
        self.settings = json.loads(json.dumps(settings))
        self._file: IO[str] | None = None

    def files(self) -> list[str]:
        """The files of all ranks that are there."""
        return sorted(glob.glob(glob.escape(self.prefix) + "*.jsonl"))

    def read(self) -> dict[str, Transcript]:
        """The results so far, by their request's `request_key`; their `index` is not set.

        Raises:
            ValueError: if they were made with other settings.
        """
        results = {}
        for path in self.files():
            for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True)):
                if not line.endswith(b"\n"):  # a process was killed while it wrote
                    continue
                row = json.loads(line)
                if number == 0:
                    self._check(path, row["settings"])
                else:
                    row["segments"] = tuple(Segment(*values) for values in row["segments"])
                    key = row.pop("key")
                    results[key] = Transcript(-1, **row)
        return results

    def _check(self, path: str, settings: dict[str, Any]) -> None:
        differing = [name for name in self.settings | settings if settings.get(name) != self.settings.get(name)]
        if differing:
            changes = ", ".join(
                f"{name} ({settings.get(name)!r}, now {self.settings.get(name)!r})" for name in differing
            )
            raise ValueError(
                f"{path}: an unfinished run with other settings: {changes}. Give the same to go on with it, or "
                "--overwrite to start anew"
            )

    def add(self, key: str, transcript: Transcript) -> None:
        """Keeps a result, so that it outlives this process."""
        if self._file is None:
            raise RuntimeError("the journal is not open")
        row = {
            "key": key,
            "text": transcript.text,
            "seconds": transcript.seconds,
            "segments": [dataclasses.astuple(segment) for segment in transcript.segments],
        }
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def open(self) -> None:
        """Begins this process's file, or goes on with it."""
        complete = Path(self.path).read_bytes().rpartition(b"\n")[0] if os.path.exists(self.path) else b""
        if complete:
            os.truncate(self.path, len(complete) + 1)
        # Buffered by line: what is written outlives the process, though not the machine.
        mode = "a" if complete else "w"
        self._file = open(self.path, mode, buffering=1, encoding="utf-8", newline="\n")  # noqa: SIM115
        if not complete:
            self._file.write(json.dumps({"settings": self.settings}, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """Removes the files of all ranks."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in self.files():
            Path(path).unlink(missing_ok=True)


def request_key(request: Request) -> str:
    """A hash of a request: ID, prompt, and the path, size and time of each local recording."""
    try:
        recordings = request.dialogue.recordings
    except ChatError:  # it fails when it is measured, and is not kept
        recordings = []
    stamps = [source_stamp(source) for source in recordings if isinstance(source, str)]
    content = json.dumps([request.id, request.messages, request.hotwords, stamps], default=_json)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def model_stamp(model_name_or_path: str) -> list[Any]:
    """What tells one state of a model from another: its name, and the size and time of local weights."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        return [model_name_or_path]
    weights = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    return [str(folder.resolve()), *([path.name, source_stamp(str(path))] for path in weights)]


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return os.fspath(value)
