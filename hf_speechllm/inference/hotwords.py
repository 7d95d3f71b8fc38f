"""Hotwords from the command line."""

from __future__ import annotations

from pathlib import Path

from .. import chat

MAX_HOTWORDS = 1000  # the original is trained with lists of up to 900 words


def read_hotwords(hotwords: str | None) -> list[str]:
    """Words of a list: either a file with one in each line, or the words themselves with commas between them.

    Raises:
        ValueError: if there are more than `MAX_HOTWORDS`, or the file is not UTF-8.
        OSError: if the file can't be read.
    """
    if hotwords is None:
        return []
    words, source = chat.parse_hotwords(hotwords), "--hotwords"
    if len(words) == 1 and Path(hotwords).is_file():
        source = hotwords
        try:
            words = Path(hotwords).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{hotwords}: not UTF-8: save the list as UTF-8") from error
    words = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if len(words) > MAX_HOTWORDS:
        raise ValueError(
            f"{source}: {len(words)} hotwords; models listen to {MAX_HOTWORDS} at most, since each of them is part of "
            'every prompt. Give those that may occur, or give each recording its own ("hotwords" in the rows of a '
            "JSONL)"
        )
    return words
