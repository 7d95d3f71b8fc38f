"""The common type of all readers of training data: a recording with its transcript."""

from __future__ import annotations

from typing import NamedTuple

from .jsonl import map_recordings

SPLITS = ("train", "dev", "test")


class Utterance(NamedTuple):
    """A recording with its transcript, or a dialogue about recordings.

    Args:
        id: of the source; may be empty.
        recording: absolute path or URL, a part of one (see `audio.time_range`), or a member of an archive.
        transcript: the text; empty for a dialogue.
        recording_line, transcript_line: lines in both lists, counted from 1, or other places as text.
        recording_file, transcript_file: the lists that contain recording and transcript.
        speaker: `None` if unknown.
        language: code or name as in the source; `None` if unknown.
        split: one of `SPLITS`; `None` if the source has none.
        messages: a dialogue with its recordings; `None` for a transcript.
        hotwords: hotwords of this utterance.
        origin: ID of the original, if the recording is a copy of a part; `None` if unknown.
    """

    id: str
    recording: str
    transcript: str
    recording_line: int | str
    transcript_line: int | str
    recording_file: str
    transcript_file: str
    speaker: str | None = None
    language: str | None = None
    split: str | None = None
    messages: list[dict] | None = None
    hotwords: list[str] | None = None
    origin: str | None = None

    @property
    def recordings(self) -> list[str]:
        """All recordings, in the order of their places."""
        if self.messages is None:
            return [self.recording]
        found: list[str] = []
        map_recordings(self.messages, lambda source: found.append(source) or source)  # type: ignore[func-returns-value]
        return found
