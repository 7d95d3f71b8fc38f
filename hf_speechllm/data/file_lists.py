"""Expansion of file names, globs and lists of files to files of rows."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence

from ..audio.waveform import AUDIO_SUFFIXES
from .shards import is_archive

SMALL_FILE = 1 << 20  # bytes
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


def expand_paths(patterns: Sequence[str]) -> list[list[str]]:
    """Returns the files of each pattern, as absolute paths.

    Args:
        patterns: files of rows, globs (expanded in alphabetical order), or lists with one file or glob per line, as
            FunASR's `data.list`. Paths in a list are relative to the folder of the list.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if a file is given twice.
    """
    found = [_expand(pattern, pattern) for pattern in patterns]
    found = [[path for file in files for path in (_read_list(file) if _is_list(file) else [file])] for files in found]
    counts = Counter(file for files in found for file in files)
    if twice := [file for file, count in counts.items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice; give it once, with a higher weight")
    return found


def fingerprint(patterns: Sequence[str]) -> str:
    """Returns a SHA-256 of sources.

    Includes the contents of lists and files of rows, and size and time of archives. In folders: names and contents of
    all files except recordings; of files above `SMALL_FILE`, size and time instead of contents.

    Args:
        patterns: see `expand_paths`; files may repeat.

    Raises:
        OSError, ValueError: see `expand_paths`.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        digest.update(b"pattern")
        for file in expand_paths([pattern])[0]:
            if os.path.isdir(file):
                for name in _names_in(file):
                    path = os.path.join(file, name)
                    digest.update(os.fsencode(name) + _state(path, os.path.getsize(path) <= SMALL_FILE))
            else:
                digest.update(_state(file, not is_archive(file)))
    return digest.hexdigest()


def _names_in(folder: str) -> list[str]:
    """Returns the files in a folder and its subfolders without recordings, relative to the folder."""
    paths = (os.path.join(below, name) for below, _, names in os.walk(folder) for name in names)
    return sorted(
        os.path.relpath(path, folder)
        for path in paths
        if not path.lower().endswith(AUDIO_SUFFIXES) and os.path.isfile(path)
    )


def _state(file: str, by_content: bool) -> bytes:
    """Returns the digest of a file's contents, or of size and time of its last change."""
    if by_content:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    status = os.stat(file)
    return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).digest()


def _expand(pattern: str, name: str) -> list[str]:
    files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"{name}: no such file")
    return [os.path.abspath(file) for file in files]


def _is_list(file: str) -> bool:
    """Returns whether a file is a list of files: a text file whose first line is not a JSON object."""
    if file.endswith(ROW_SUFFIXES) or is_archive(file) or not os.path.isfile(file):
        return False
    with open(file, "rb") as opened:
        first = next((line for line in opened if line.strip()), b"{")
    try:
        return not first.decode("utf-8-sig").lstrip().startswith("{")
    except UnicodeDecodeError:
        return False


def _read_list(file: str) -> list[str]:
    folder, found = os.path.dirname(file), []
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        for number, line in enumerate(opened, start=1):
            if name := line.strip():
                hint = "relative paths start at the folder of the list; instead of Kaldi lists, pass their folder"
                source = f"{file}:{number}: {name} ({hint})"
                found += _expand(os.path.join(folder, name), source)
    return found
