"""Readers of recordings that belong to texts by their names: a text or subtitles beside each, or a list of names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from ...audio.waveform import AUDIO_SUFFIXES
from ..kaldi import read_list
from ..utterance import Utterance
from .reading import HEAD_BYTES, NO_ROWS, Reading, choose_lists, split_of_path

TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab", ".srt", ".vtt")  # the most specific first; compared in lower case
LOOKED_AT = 20  # folders with recordings that the detector examines
_TIMIT = re.compile(r"0 \d{4,} (?=\D)")  # first and last sample before the text
_TIME = r"(?:(\d+):)?(\d+):(\d+)[.,](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_TAGS = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def _folders(source: str) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """Yields the folders with recordings: path, names of recordings by stem, and all names, also in lower case."""
    for folder, below, names in os.walk(source):
        below.sort()
        stems = {os.path.splitext(name)[0]: name for name in sorted(names) if name.lower().endswith(AUDIO_SUFFIXES)}
        if stems:
            yield folder, stems, {name.lower(): name for name in names} | {name: name for name in names}


def _text_of(stem: str, names: Mapping[str, str]) -> str | None:
    wanted = (name for suffix in TEXT_SUFFIXES for name in (stem + suffix, stem.lower() + suffix))
    return next((names[name] for name in wanted if name in names), None)


def is_sidecar(source: str) -> bool:
    """Returns whether a source is a folder in which texts or subtitles are beside recordings of the same name."""
    first = itertools.islice(_folders(source), LOOKED_AT)
    return any(_text_of(stem, names) for _, stems, names in first for stem in stems)


def read_sidecar(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `NAME.wav` with `NAME.txt`, `.lab`, `.normalized.txt` (LibriTTS), or the subtitles `NAME.srt` or `.vtt`.

    Each cue of subtitles is an utterance.
    """
    root = os.path.abspath(source)
    for folder, stems, names in _folders(root):
        for stem, name in stems.items():
            beside = _text_of(stem, names)
            if beside is None:
                reading.left_out["recordings without a transcript"] += 1
                continue
            path = os.path.join(folder, beside)
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                content = file.read()
            cues = _cues(content) if path.lower().endswith((".srt", ".vtt")) else [_whole(content)]
            for line, text, start, end in cues:
                item = reading.utterance(
                    path, line, name, text, folder=folder, start=start, end=end, split=split_of_path(folder, root)
                )
                if item is not None:
                    yield item


def _whole(content: str) -> tuple[int, str, None, None]:
    return 1, _TIMIT.sub("", " ".join(content.split()), count=1), None, None


def _cues(content: str) -> Iterator[tuple[int, str, float, float]]:
    """Yields line, text, start and end of the cues of subtitles."""
    lines = content.splitlines()
    for number, line in enumerate(lines):
        if match := _CUE.match(line):
            text = itertools.takewhile(str.strip, lines[number + 1 :])
            start, end = (_seconds(*match.groups()[index : index + 4]) for index in (0, 4))
            yield number + 1, " ".join(_TAGS.sub("", " ".join(text)).split()), start, end


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(f"{seconds}.{fraction}")


def _name_lists(source: str) -> dict[str, dict[str, str]]:
    """Returns the files of a source that may be lists `NAME TEXT`, by folder, each with the first name."""
    below = ("*.txt", "text", "*/*.txt", "*/text")
    paths = [source] if os.path.isfile(source) else [p for b in below for p in glob.glob(f"{glob.escape(source)}/{b}")]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(os.path.abspath(path) for path in paths if os.path.basename(path) not in NO_ROWS):
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
        words = [] if b"\0" in head else head.partition(b"\n")[0].split(maxsplit=1)  # zeros are in binary files
        if words:
            found[os.path.dirname(path)][path] = _stem(words[0].decode("utf-8", "replace"))
    return found


def _recordings(folder: str) -> dict[str, list[str]]:
    """Returns the recordings below a folder by stem."""
    found = defaultdict(list)
    for place, stems, _ in _folders(folder):
        for stem, name in stems.items():
            found[stem].append(os.path.join(place, name))
    return found


def _stem(name: str) -> str:
    base = os.path.basename(name)
    return os.path.splitext(base)[0] if base.lower().endswith(AUDIO_SUFFIXES) else base


def is_name_list(source: str) -> bool:
    """Returns whether a source is a list of names of recordings below its folder, with texts, or has such lists."""
    return any(
        not {*lists.values()}.isdisjoint(stems)  # the first common name ends the search
        for folder, lists in _name_lists(source).items()
        for _, stems, _ in _folders(folder)
    )


def read_name_list(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `transcripts.txt` and similar lists: the name of a recording, with or without folder and suffix, and text.

    Recordings may be in any folder below the list, as in MLS.
    """
    recordings: dict[str, dict[str, list[str]]] = {}  # by list
    for folder, lists in _name_lists(source).items():
        below = _recordings(folder)
        recordings |= {path: below for path, name in lists.items() if name in below}
    root = os.path.abspath(source)
    for path, split in choose_lists(source, [(path, split_of_path(path, root)) for path in recordings]):
        for entry in read_list(path, reading.bad_rows, "transcript").entries:
            found = recordings[path].get(_stem(entry.id), [])
            if len(found) != 1:
                reading.bad_rows.add(
                    path, entry.line, f'no recording: {len(found) or "no"} files are named after "{entry.id}"'
                )
                continue
            item = reading.utterance(path, entry.line, found[0], entry.value, id=_stem(entry.id), split=split)
            if item is not None:
                yield item
