"""Results in files: texts, and segment times as JSON lines, SRT and WebVTT."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_write
from .pieces import Transcript
from .segments import Segment


def srt(segments: Sequence[Segment]) -> str:
    """Segments as SubRip subtitles; those without text are left out."""
    spoken = [segment for segment in segments if segment.text]
    return "\n".join(
        f"{number}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{_line(segment.text)}\n"
        for number, segment in enumerate(spoken, start=1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """Segments as WebVTT subtitles (W3C); those without text are left out."""
    cues = [
        f"\n{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{_escaped(_line(segment.text))}\n"
        for segment in segments
        if segment.text
    ]
    return "".join(["WEBVTT\n", *cues])


def write_results(
    output_file: str | os.PathLike[str],
    results: Sequence[tuple[str, Transcript]],
    segments: bool = False,
    subtitles: bool = False,
) -> None:
    """Writes `ID<tab>text` lines, and if asked for what goes beside them.

    Args:
        output_file: say `DIR/hyp.txt`.
        results: ID and transcript of each recording.
        segments: whether to write `DIR/hyp.segments.jsonl`, a line for each segment:
            `{"id", "start", "end", "text", "looped"}`, times in seconds.
        subtitles: whether to write `DIR/hyp.subtitles/ID.srt` and `.vtt`; a slash in an ID becomes `%2F`.
    """
    output = Path(output_file)
    if segments:
        with atomic_write(output.with_suffix(".segments.jsonl")) as file:
            for id_, transcript in results:
                for segment in transcript.segments:
                    row = {"id": id_, "start": round(segment.start, 3), "end": round(segment.end, 3)}
                    row |= {"text": segment.text, "looped": segment.looped}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if subtitles:
        folder = output.with_suffix(".subtitles")
        folder.mkdir(exist_ok=True)
        for id_, transcript in results:
            name = re.sub(r"[/\\\0]", lambda match: f"%{ord(match[0]):02X}", id_)
            for ending, content in (("srt", srt(transcript.segments)), ("vtt", vtt(transcript.segments))):
                with atomic_write(folder / f"{name}.{ending}") as file:
                    file.write(content)
    # Last, since its being there says that all is.
    with atomic_write(output) as file:
        file.writelines(f"{id_}\t{_line(transcript.text)}\n" for id_, transcript in results)


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


def _line(text: str) -> str:
    """On one line: an empty one would end the subtitle."""
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
