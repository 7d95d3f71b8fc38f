"""Files of rows: as they are named, by globs, or in a list of files."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence

from .shards import is_archive

ROW_SUFFIXES = (".jsonl", ".json")


def expand(patterns: Sequence[str]) -> list[list[str]]:
    """The files that each pattern of a list stands for, as absolute paths.

    Args:
        patterns: files of rows; globs, which stand for what they match in alphabetical order; and lists of such, a
            line each, as FunASR's `data.list`. Paths in a list are relative to the folder of the list.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
        ValueError: if a file is named twice.
    """
    found = [_expand(pattern, pattern) for pattern in patterns]
    found = [[path for file in files for path in (_read_list(file) if _is_list(file) else [file])] for files in found]
    counts = Counter(file for files in found for file in files)
    if twice := [file for file, count in counts.items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice; name it once, with a higher weight")
    return found


def _expand(pattern: str, place: str) -> list[str]:
    files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"{place}: no such file")
    return [os.path.abspath(file) for file in files]


def _is_list(file: str) -> bool:
    """Whether a file is a list of files: text of another kind than rows, whose first line is no JSON object."""
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
                place = f"{file}:{number}: {name} (relative paths start at the folder of the list)"
                found += _expand(os.path.join(folder, name), place)
    return found
