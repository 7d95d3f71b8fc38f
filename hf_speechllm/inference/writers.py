"""Writes results: texts, and segments with times as JSON lines, SRT and WebVTT."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.bad_rows import NUM_NAMED, path_hint
from ..files import atomic_write, file_digest, record_path
from .pieces import Transcript
from .segments import Segment
from .word_files import ctm, cues, textgrid, word_rows

LONGEST_NAME = 250  # bytes of a file name without the suffix; file systems allow 255


def srt(segments: Sequence[Segment], keep_lines: bool = False) -> str:
    """Formats segments with text as SubRip subtitles; `keep_lines` keeps the lines of cues."""
    spoken = [segment for segment in segments if segment.text]
    return "\n".join(
        f"{number}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{_text(segment, keep_lines)}\n"
        for number, segment in enumerate(spoken, start=1)
    )


def vtt(segments: Sequence[Segment], keep_lines: bool = False) -> str:
    """Formats segments with text as WebVTT subtitles (W3C); `keep_lines` keeps the lines of cues."""
    cues = [
        f"\n{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{_escaped(_text(segment, keep_lines))}\n"
        for segment in segments
        if segment.text
    ]
    return "".join(["WEBVTT\n", *cues])


def write_results(
    output_file: str | os.PathLike[str],
    results: Sequence[tuple[str, Transcript]],
    segments: bool = False,
    subtitles: bool = False,
    words: bool = False,
    checked: bool = False,
) -> list[str]:
    """Writes lines `ID<tab>text`, and optional segments and subtitles.

    Args:
        output_file: for example `DIR/hyp.txt`.
        results: ID and transcript of each recording.
        segments: whether to write `DIR/hyp.segments.jsonl`, one line per segment:
            `{"id", "start", "end", "text", "looped"}`, times in seconds; with `checked` also `confidence`,
            `contradicted`.
        subtitles: whether to write `DIR/hyp.subtitles/ID.srt` and `.vtt`. In file names, `/`, `\\` and `%` of an ID
            become `%2F` and so on, and the end of a name that is too long is replaced by a hash.
        words: whether to write the times of words, see `write_words`; subtitles then have short cues.
        checked: whether the CTC head has checked the texts.

    Returns:
        The files and folders.
    """
    output = Path(output_file)
    # Other suffixes stay, so that the files of hyp.v1 and hyp.v2 differ.
    stem = os.fspath(output.with_suffix("") if output.suffix == ".txt" else output)
    if segments:
        with atomic_write(f"{stem}.segments.jsonl") as file:
            for id_, transcript in results:
                for segment in transcript.segments:
                    row = {"id": id_, "start": round(segment.start, 3), "end": round(segment.end, 3)}
                    row |= {"text": segment.text, "looped": segment.looped}
                    if checked:
                        confidence = None if segment.confidence is None else round(segment.confidence, 4)
                        row |= {"confidence": confidence, "contradicted": segment.contradicted}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if subtitles:
        for id_, transcript in results:
            shown = cues(transcript.words) if words else transcript.segments
            for ending, content in (("srt", srt(shown, words)), ("vtt", vtt(shown, words))):
                _write_named(f"{stem}.subtitles", f"{_file_name(id_)}.{ending}", content)
    if words:
        write_words(stem, results)
    # Written last: if this file exists, all files are complete.
    with atomic_write(output) as file:
        file.writelines(f"{id_}\t{_line(transcript.text)}\n" for id_, transcript in results)
    endings = [
        *(segments * ["segments.jsonl"]),
        *(words * ["words.jsonl", "ctm", "textgrids"]),
        *(subtitles * ["subtitles"]),
    ]
    return [str(output), *(f"{stem}.{ending}" for ending in endings)]


def write_record(output_file: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Writes beside an output file how it was made (`files.record_path`), with the digest of the output file.

    Args:
        output_file: complete file of texts.
        record: JSON values: model, settings and fingerprint of the model, device, amounts.
    """
    with atomic_write(record_path(output_file)) as file:
        json.dump({**record, "sha256": file_digest(output_file)}, file, ensure_ascii=False, indent=1)


def write_words(stem: str, results: Sequence[tuple[str, Transcript]]) -> None:
    """Writes word times: `STEM.words.jsonl`, `STEM.ctm` and `STEM.textgrids/ID.TextGrid`.

    A JSON line is `{"id", "words": [{"word", "start", "end", "confidence", "ctc", "llm"}, ...]}`, times in seconds.

    Args:
        stem: path without suffix.
        results: ID and transcript of each recording.
    """
    with atomic_write(f"{stem}.words.jsonl") as file:
        for id_, transcript in results:
            file.write(json.dumps({"id": id_, "words": word_rows(transcript.words)}, ensure_ascii=False) + "\n")
    with atomic_write(f"{stem}.ctm") as file:
        for id_, transcript in results:
            file.writelines(ctm(id_, transcript.words))
    for id_, transcript in results:
        content = textgrid(transcript.words, transcript.seconds)
        _write_named(f"{stem}.textgrids", f"{_file_name(id_)}.TextGrid", content)


def _write_named(folder: str, name: str, content: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    with atomic_write(Path(folder) / name) as file:
        file.write(content)


def write_failures(output_file: str | os.PathLike[str], failures: Sequence[str]) -> str:
    """Returns a message with the first failures; writes all failures to `OUTPUT.failures` if there are more.

    Args:
        output_file: of the run; an older `OUTPUT.failures` is removed.
        failures: `ID: REASON` of each failure.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(f"{os.fspath(output_file)}.failures")
    path.unlink(missing_ok=True)
    named = list(failures[:NUM_NAMED])
    if len(failures) > NUM_NAMED:
        with atomic_write(path) as file:
            file.writelines(f"{_line(failure)}\n" for failure in failures)
        named.append(f"and {len(failures) - NUM_NAMED} more; {path} lists all")
    named += path_hint(failures)
    return "\n".join(named)


def _file_name(id_: str) -> str:
    """Returns a file name for an ID, without suffix; different IDs have different names."""
    name = re.sub(r"[/\\\0%]", lambda match: f"%{ord(match[0]):02X}", id_)
    content = name.encode()
    if len(content) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(content).hexdigest()[:16]
    return f"{content[: LONGEST_NAME - len(digest) - 1].decode(errors='ignore')}-{digest}"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


def _line(text: str) -> str:
    """Joins a text to one line, because an empty line would end the subtitle."""
    return " ".join(text.split())


def _text(segment: Segment, keep_lines: bool) -> str:
    return "\n".join(map(_line, segment.text.split("\n"))) if keep_lines else _line(segment.text)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
