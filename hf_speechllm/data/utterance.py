"""Common result type of the readers of training data: a recording with its transcript."""

from __future__ import annotations

from typing import NamedTuple

from .jsonl import map_recordings

SPLITS = ("train", "dev", "test")


class Utterance(NamedTuple):
    """A recording with its transcript, or a dialogue about recordings.

    Args:
        id: ID in the source; may be empty.
        recording: absolute path, URL, part of a recording (see `audio.time_range`), or member of an archive.
        transcript: text; empty for a dialogue.
        recording_line, transcript_line: lines in both lists, counted from 1, or other positions as text.
        recording_file, transcript_file: lists that contain recording and transcript.
        speaker: `None` if unknown.
        language: code or name as in the source; `None` if unknown.
        split: one of `SPLITS`; `None` if the source has no splits.
        messages: dialogue with its recordings; `None` for a transcript.
        hotwords: hotwords of this utterance.
        origin: ID of the original recording, if the recording is a copied part; `None` if unknown.
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
        """All recordings, in the order of the dialogue."""
        if self.messages is None:
            return [self.recording]
        found: list[str] = []
        map_recordings(self.messages, lambda source: found.append(source) or source)  # type: ignore[func-returns-value]
        return found
