"""Functions and classes shared by the readers of all sources."""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...audio.archives import tar_member
from ...audio.time_range import add_time_range
from ...audio.waveform import AudioError, resolve_source
from ...model.languages import ENGLISH_NAMES
from ..bad_rows import NUM_NAMED, BadDataError, BadRows
from ..jsonl import hotwords_of, parse_object
from ..utterance import SPLITS, Utterance
from .json_arrays import read_array

logger = logging.getLogger(__name__)

HEAD_BYTES = 1 << 16  # read from a JSON file to detect the format
# Files beside lists that have no rows, or rows of other lists: of `prepare`, LLaMA-Factory, Common Voice and MLS.
NO_ROWS = {
    "summary.json", "dataset_info.json", "validated.tsv", "invalidated.tsv", "other.tsv", "reported.tsv",
    "validated_sentences.tsv", "unvalidated_sentences.tsv", "clip_durations.tsv", "times.tsv", "segments.txt",
}  # fmt: skip
LONGEST_LINE = 1 << 24  # bytes; maximum length of the first line of a detected JSONL
_SPLIT_NAMES = {
    "train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev",
    "eval": "dev", "test": "test", "testing": "test",
}  # fmt: skip
_ASR_TEXT = re.compile(r"\s*language (?P<language>[^<]*)<asr_text>(?P<text>.*)", re.DOTALL)


@dataclass
class Reading:
    """Options and reports of a reader.

    Args:
        bad_rows: collects unusable rows.
        columns: names of columns by role (see `tables.ROLES`), for columns with unusual names.
        subset: training subset of WenetSpeech or GigaSpeech, for example `S`; default: all.
        config: configuration of a data set on the Hub.
        hub_split: split of a data set on the Hub; default: all.
        streaming: whether to read a data set of the Hub without a copy in the cache of `datasets`.
        recordings_tar: collects recordings without files (`datasets` with bytes); `None` refuses such recordings.
        left_out: number of items that are not utterances, by reason; these items are not bad rows.
    """

    bad_rows: BadRows
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    config: str | None = None
    hub_split: str | None = None
    streaming: bool = False
    recordings_tar: TarWriter | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    def utterance(
        self,
        file: str,
        line: int | str,
        recording: str,
        text: Any,
        *,
        folder: str = "/",
        start: float | None = None,
        end: float | None = None,
        list_of_recordings: tuple[str, int] | None = None,
        **others: Any,
    ) -> Utterance | None:
        """Builds an utterance; returns `None` for a bad row, which `bad_rows` collects.

        Args:
            file, line: position of the transcript.
            recording: path, relative to `folder`, or URL.
            text: transcript.
            folder: absolute path.
            start, end: times of a part of the recording, in seconds.
            list_of_recordings: file and line that contain the recording; default: `file` and `line`.
            **others: fields of `Utterance`.
        """
        try:
            if text is not None and not isinstance(text, str):
                raise BadDataError(f"a transcript must be text, not {str(text)[:60]}")
            if text is None or not text.strip():
                raise BadDataError(f"empty transcript: {text!r}")
            require_utf8(text + recording)
            text, language = clean_text(text)
            source = resolve_source(recording, folder)
            if start is not None or end is not None:
                source = add_time_range(source, start or 0.0, end)
            recording_file, recording_line = list_of_recordings or (file, line)
            language = language_code(others.pop("language", None)) or language
            hotwords = hotwords_of({"hotwords": others.pop("hotwords", None)})
            return Utterance(
                others.pop("id", ""), source, text, recording_line, line, recording_file, file,
                language=language, hotwords=hotwords, **others,
            )  # fmt: skip
        except (AudioError, BadDataError) as error:
            self.bad_rows.add(file, line, str(error))
            return None


class TarWriter:
    """Writes recordings to a new tar file, and returns the addresses of the recordings.

    The first recording creates the file. An exception in the `with` block removes the file.

    Args:
        folder: folder of the file; files of earlier runs are kept.
    """

    def __init__(self, folder: str):
        numbers = (f"recordings-{number}.tar" for number in itertools.count(1))
        self.path = next(
            path for name in numbers if not os.path.exists(path := os.path.join(os.path.abspath(folder), name))
        )
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, content: bytes) -> str:
        """Writes a recording; returns its address (see `audio.archives`)."""
        if self._tar is None:
            self._tar = tarfile.open(self.path, "x", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return tar_member(self.path, name, self._tar.offset - padded, len(content))

    def finish(self) -> None:
        """Completes the file, if any recording was added."""
        if self._tar is not None:
            self._tar.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self.finish()
        if kind is not None and self._tar is not None:
            os.unlink(self.path)


def split_of(name: str) -> str | None:
    """Returns the split in the name of a file, folder or value, such as `train-clean-100` or `validation`."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return None


def split_of_path(path: str, root: str) -> str | None:
    """Returns the split in the name of a file, otherwise in the name of the nearest folder below `root`."""
    names = reversed(os.path.relpath(path, root).split(os.sep))
    return next((split for name in names if (split := split_of(name)) is not None), None)


def language_code(language: Any) -> str | None:
    """Returns the code of a language: `zh` for `zh-CN`, `Chinese` and `<|zh|>`; `None` without a language."""
    if not isinstance(language, str):
        return None
    name = re.split(r"[-_]", language.strip("<|> ").lower())[0]
    return None if name in ("", "none", "auto", "nospeech") else ENGLISH_NAMES.get(name, name)


def clean_text(text: str) -> tuple[str, str | None]:
    """Removes Qwen3-ASR's prefix, such as `language English<asr_text>`; returns text and language."""
    match = _ASR_TEXT.match(text)
    if match is None:
        return text.strip(), None
    if not match["text"].strip():
        raise BadDataError("empty transcript: no text after <asr_text>")
    return match["text"].strip(), language_code(match["language"])


def lists_in(source: str, suffixes: Sequence[str]) -> list[tuple[str, str | None]]:
    """Returns the lists of a source, each with the split in its name.

    Args:
        source: a list, or a folder with one list, or with several lists named after splits.
        suffixes: of lists, in lower case, with the dot.

    Raises:
        BadDataError: if a folder has several lists, and not all of them are named after splits.
    """
    if os.path.isfile(source):  # of any name: `--format` decides
        return [(os.path.abspath(source), None)]
    return choose_lists(source, find_lists(source, suffixes))


def choose_lists(source: str, found: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Returns the lists of a folder that have its rows, each with the split in its name; see `lists_in`."""
    rows = [item for item in found if os.path.basename(item[0]) not in NO_ROWS]
    if any(split is not None for _, split in rows):
        if ignored := [os.path.basename(item[0]) for item in found if item not in rows]:
            logger.info("%s: not read: %s", source, ", ".join(ignored))
        return sort_by_split(source, rows)
    # Common Voice in languages without splits; one list of the same name in each folder, for example of a speaker.
    if not rows and (validated := [item for item in found if os.path.basename(item[0]) == "validated.tsv"]):
        return validated
    if len({os.path.basename(path) for path, _ in found}) > 1:
        names = _some_names(source, [path for path, _ in found])
        raise BadDataError(f"{source}: several lists ({names}); pass one of the lists instead of the folder")
    return found


def _some_names(source: str, paths: Sequence[str]) -> str:
    """Returns the first paths as text, relative to a folder."""
    names = [os.path.relpath(path, source) for path in paths]
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")


def sort_by_split(source: str, lists: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Sorts the lists of a folder by split.

    Raises:
        BadDataError: if some lists are not named after splits: their rows would be lost, or get into a wrong split.
    """
    if without := [path for path, split in lists if split is None]:
        names = _some_names(source, without)
        raise BadDataError(
            f"{source}: lists with and without a split in their names; rename {names} (for example to "
            f"train-{os.path.basename(without[0])}), move them to another folder, or pass one of the lists"
        )
    return sorted(lists, key=lambda item: (SPLITS.index(str(item[1])), item[0]))


def require_utf8(text: str) -> None:
    """Checks that a text can be encoded as UTF-8, without bytes from `surrogateescape` and lone surrogates.

    Raises:
        BadDataError: if the text cannot be encoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDataError("not UTF-8: save the list as UTF-8") from error


def find_lists(source: str, suffixes: Sequence[str]) -> list[tuple[str, str | None]]:
    """Returns all lists in a folder, otherwise in the subfolders or those of `data`, each with the split in the name.

    If the source is a list, returns only this list. JSONL and JSON may have any name, such as `data.list`. Leaves out
    `.list` files without JSON in a folder, which are lists of files.
    """
    root = os.path.abspath(source)
    if os.path.isfile(root):
        fits = root.lower().endswith(tuple(suffixes)) or (".jsonl" in suffixes and first_record(root) is not None)
        return [(root, None)] if fits else []
    for below in ("", "*/", "data/*/"):  # data/train: data sets on the Hub
        names = sorted(glob.glob(f"{glob.escape(root)}/{below}*"))
        files = [path for suffix in suffixes for path in names if path.lower().endswith(suffix)]
        files = [path for path in files if not path.lower().endswith(".list") or first_record(path) is not None]
        if files:
            files.sort(key=lambda path: os.path.basename(path) in NO_ROWS)  # detectors examine the first list
            return [(path, split_of_path(path, root)) for path in files]
    return []


def first_record(path: str) -> dict | None:
    """Returns the first object of a JSONL or JSON list; `None` for other files."""
    try:
        with open(path, "rb") as file:
            if not file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
                return None
            file.seek(0)
            head = file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf").lstrip()
            if head.startswith(b"{"):
                return parse_object(head)
            if head.startswith(b"["):
                head += file.read(HEAD_BYTES)
                record, _ = json.JSONDecoder().raw_decode(head.decode("utf-8", "ignore")[1:].lstrip())
                return record if isinstance(record, dict) else None
    except (OSError, RecursionError, ValueError):
        pass
    return None


def _elements(path: str) -> Iterator[Any]:
    try:
        yield from read_array(path)
    except (RecursionError, ValueError) as error:
        raise BadDataError(f"{path}: not JSON: {error}") from error


def read_records(path: str, bad_rows: BadRows) -> Iterator[tuple[int, dict]]:
    """Yields the objects of a JSONL with their lines, or of a JSON list with their numbers, counted from 1.

    Raises:
        BadDataError: if a JSON list cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            for number, record in enumerate(_elements(path), start=1):
                try:
                    if not isinstance(record, dict):
                        raise BadDataError("not an object")
                    require_utf8(json.dumps(record, ensure_ascii=False))
                    yield number, record
                except BadDataError as error:
                    bad_rows.add(path, f"item {number}", str(error))
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, parse_object(line)
            except BadDataError as error:
                bad_rows.add(path, number, str(error))
