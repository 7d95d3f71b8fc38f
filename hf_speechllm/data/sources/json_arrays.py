"""Reading of large JSON files element by element; `json.load` needs several times the size of the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters to read at once
LONGEST_TOKEN = 16  # characters of a JSON token that is not a string or number; an error further from the end is final
_NUMBER_PART = re.compile(r"\.|[eE][+-]?")  # the end of a text after which a number may continue
_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_array(path: str | os.PathLike[str], key: str | None = None) -> Iterator[Any]:
    """Yields the elements of a JSON array.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        key: of the array in the object of the file; `None`: the file is an array.

    Raises:
        ValueError, RecursionError: if the file is not JSON, has more text after the JSON value, or has no such array;
            possibly after some elements.
        OSError: if the file cannot be read.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = _Text(file)
        if key is not None:
            text.take("{")
            while text.value() != key:
                text.take(":")
                text.value()
                if text.take(",}") == "}":
                    raise ValueError(f"no key {key!r}")
            text.take(":")
        text.take("[")
        if text.next() == "]":
            text.take("]")
        else:
            yield text.value()
            while text.take(",]") == ",":
                yield text.value()
        if key is not None:
            while text.take(",}") == ",":
                text.value()
                text.take(":")
                text.value()
        text.end()


class _Text:
    """The unread part of a file."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text, self.at, self.dropped = "", 0, 0

    def next(self) -> str:
        """Returns the next character that is not white space."""
        while (place := _SPACES.match(self.text, self.at).end()) == len(self.text):  # type: ignore[union-attr]
            self._read("the file ends early")
        self.at = place
        return self.text[place]

    def take(self, allowed: str) -> str:
        """Skips the next character, which must be one of `allowed`."""
        if (found := self.next()) not in allowed:
            raise ValueError(f"{found!r} instead of {' or '.join(allowed)} at character {self.dropped + self.at + 1}")
        self.at += 1
        return found

    def end(self) -> None:
        """Requires that nothing but white space follows."""
        while _SPACES.fullmatch(self.text, self.at):
            self.dropped, self.text, self.at = self.dropped + len(self.text), self.file.read(CHUNK), 0
            if not self.text:
                return
        place = self.dropped + _SPACES.match(self.text, self.at).end() + 1  # type: ignore[union-attr]
        raise ValueError(
            f"more text after the end of the JSON at character {place}; remove it, or join lists into one list"
        )

    def value(self) -> Any:
        """Returns the next value."""
        self.next()
        while True:
            reason = "the file ends early"
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) and not _NUMBER_PART.fullmatch(self.text, end):
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at character {self.dropped + error.pos + 1}"
                if error.pos < len(self.text) - LONGEST_TOKEN and not error.msg.startswith("Unterminated string"):
                    raise ValueError(reason) from error
            self._read(reason)

    def _read(self, reason: str) -> None:
        """Reads more of the file; a long value is decoded again only a few times, because the size doubles."""
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not more:
            raise ValueError(reason)
        self.dropped += self.at
        self.text, self.at = self.text[self.at :] + more, 0
