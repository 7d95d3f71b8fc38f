"""Hotwords from the command line."""

from __future__ import annotations

import os

from ..data.hotword_lists import parse_word_list

MAX_HOTWORDS = 1000  # the original is trained with lists of up to 900 words


def read_hotwords(hotwords: str | None) -> list[str]:
    """Words of a list: either a file with one in each line, or the words themselves with commas between them.

    Raises:
        ValueError: if there are more than `MAX_HOTWORDS`, or the file is missing or not UTF-8.
        OSError: if the file can't be read.
    """
    words = parse_word_list(hotwords)
    source = hotwords if hotwords and os.path.isfile(hotwords) else "--hotwords"
    if len(words) > MAX_HOTWORDS:
        raise ValueError(
            f"{source}: {len(words)} hotwords; decoding takes {MAX_HOTWORDS} at most, since each becomes part of "
            "every prompt, and the original is trained with no more than 900. Give those that are likely in these "
            'recordings, or give each recording its own ("hotwords" in the rows of a JSONL)'
        )
    return words
