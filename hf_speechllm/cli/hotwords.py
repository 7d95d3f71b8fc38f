"""The option `--hotwords` of decoding."""

from __future__ import annotations

import os

from ..data.hotword_lists import parse_word_list

MAX_HOTWORDS = 1000  # the original model was trained with lists of up to 900 words


def read_hotwords(hotwords: str | None) -> list[str]:
    """Reads hotwords from a file with one hotword per line, or from a comma-separated list.

    Raises:
        ValueError: if there are more than `MAX_HOTWORDS`, or the file is missing or not UTF-8.
        OSError: if the file cannot be read.
    """
    words = parse_word_list(hotwords)
    source = hotwords if hotwords and os.path.isfile(hotwords) else "--hotwords"
    if len(words) > MAX_HOTWORDS:
        raise ValueError(
            f"{source}: {len(words)} hotwords; the maximum is {MAX_HOTWORDS}, because every prompt contains all "
            "hotwords and the original model was trained with up to 900. List only hotwords that are likely in these "
            'recordings, or set hotwords for each recording ("hotwords" in the rows of a JSONL)'
        )
    return words
