"""Examination of data: measures all recordings in parallel and collects the findings of all checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..data.kaldi import speech_length
from ..data.processes import read_ahead
from .corpus_checks import Corpus, check_corpus
from .kinds import KINDS, SEVERITIES, limit
from .measurement import Measurement, measure_recording
from .near_duplicates import near_duplicates
from .recording_checks import check_recording
from .rows import DataRow, Problem
from .scripts import syllables
from .shifted_transcripts import shifted_transcripts
from .text_checks import check_text, show

ROWS_PER_CHUNK = 16  # some recordings are hours long
MIN_ROWS_PER_WORKER = 8  # fewer rows are examined in this process, before others would start
PACE_SLACK = 2.0  # syllables that a recording may lack: single words are cut close
SAME_LENGTH = 0.05  # seconds between a number in the text and the length of the recording
MIN_SLOW_SECONDS = 3.0  # of speech; a shorter word may be drawn out


class Finding(NamedTuple):
    """A fault.

    Args:
        kind: one of `KINDS`.
        row: number of the row in `Diagnosis.rows`; `None` for a row that cannot be read.
        file, line, id, split: place of the row; the ID is empty for a row that cannot be read.
        detail: what was found, with numbers.
    """

    kind: str
    row: int | None
    file: str
    line: int | str
    id: str
    split: str
    detail: str

    @property
    def severity(self) -> str:
        """`error`, `warning` or `note`."""
        return KINDS[self.kind].severity


@dataclass
class Diagnosis:
    """Result of an examination.

    Args:
        rows: readable rows.
        measured: measurements of the recordings of each row.
        findings: in the order of the rows; rows that cannot be read first.
        num_unreadable: number of rows that cannot be read.
        has_vad: whether speech was detected.
    """

    rows: Sequence[DataRow]
    measured: Sequence[Sequence[Measurement]]
    findings: list[Finding] = field(default_factory=list)
    num_unreadable: int = 0
    has_vad: bool = False

    @property
    def seconds(self) -> float:
        """Total length of the recordings."""
        return sum(item.seconds for found in self.measured for item in found)

    def kinds(self) -> list[tuple[str, list[Finding]]]:
        """Returns the findings by kind: errors first, then the most frequent."""
        counts = Counter(finding.kind for finding in self.findings)
        kinds = sorted(counts, key=lambda kind: (SEVERITIES.index(KINDS[kind].severity), -counts[kind], kind))
        return [(kind, [finding for finding in self.findings if finding.kind == kind]) for kind in kinds]

    def count(self, severity: str) -> int:
        """Returns the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


@dataclass
class Examiner:
    """Measures the recordings of rows and checks each row alone; runs in worker processes.

    Args:
        vad: whether to detect speech.
        max_seconds: longest recording that the model accepts; `None` without a model.
    """

    vad: bool
    max_seconds: float | None = None
    detector: Any = None

    def __call__(self, rows: Sequence[DataRow]) -> list[tuple[list[Measurement], list[tuple[str, str]]]]:
        """Returns measurements and findings (kind and detail) of each row."""
        if self.vad and self.detector is None:
            import torch

            from ..audio.vad import VoiceDetector

            torch.set_num_threads(1)  # the processes use all cores; and a forked process must not start others
            self.detector = VoiceDetector()
        read_ahead([source for row in rows for source in row.recordings])
        return [self._examine(row) for row in rows]

    def _examine(self, row: DataRow) -> tuple[list[Measurement], list[tuple[str, str]]]:
        measured = [measure_recording(source, self.detector) for source in row.recordings]
        found = [item for one in measured for item in check_recording(one, self.max_seconds)]
        found += check_text(row)
        if all(one.error is None for one in measured):
            found += _check_lengths(row, measured)
        return measured, found


def diagnose(
    rows: Iterable[DataRow | Problem],
    vad: bool = True,
    max_seconds: float | None = None,
    num_workers: int = 1,
    ignore: Collection[str] = (),
    more_checks: Sequence[Callable[[Corpus], Iterator[tuple[int, str, str]]]] = (),
    report: Callable[[int], Any] = lambda count: None,
) -> Diagnosis:
    """Examines rows.

    Args:
        rows: result of `read_rows`.
        vad: whether to detect speech (needs silero-vad).
        max_seconds: longest recording that the model accepts; `None` without a model.
        num_workers: number of processes.
        ignore: kinds to leave out.
        more_checks: checks of the whole corpus, for example with a model.
        report: called with the number of examined rows.

    Raises:
        ChildProcessError: if a process was killed.
    """
    problems: list[Problem] = []
    good: list[DataRow] = []
    for row in rows:
        (problems if isinstance(row, Problem) else good).append(row)  # type: ignore[arg-type]
    report(len(problems))
    measured: list[Sequence[Measurement]] = []
    found: list[list[tuple[str, str]]] = []
    with closing(_examine(good, Examiner(vad, max_seconds), num_workers)) as chunks:
        for chunk in chunks:
            for measurements, details in chunk:
                measured.append(measurements)
                found.append(details)
            report(len(chunk))
    corpus = Corpus(good, measured)
    for check in (check_corpus, near_duplicates, shifted_transcripts, *more_checks):
        for index, kind, detail in check(corpus):
            found[index].append((kind, detail))
    findings = [
        Finding(item.kind, None, item.file, item.line, "", item.split, item.detail)
        for item in problems
        if item.kind not in ignore
    ]
    for index, (row, details) in enumerate(zip(good, found, strict=True)):
        for kind, detail in dict.fromkeys(details):
            if kind not in ignore:
                findings.append(Finding(kind, index, row.file, row.line, row.id, row.split, detail))
    return Diagnosis(good, measured, findings, len(problems), vad)


def _examine(rows: Sequence[DataRow], examiner: Examiner, num_workers: int):
    chunks = [rows[start : start + ROWS_PER_CHUNK] for start in range(0, len(rows), ROWS_PER_CHUNK)]
    if num_workers < 2 or len(rows) < MIN_ROWS_PER_WORKER * num_workers:
        yield from map(examiner, chunks)
    else:
        from ..data.processes import map_in_processes

        yield from map_in_processes(examiner, chunks, num_workers)


def _check_lengths(row: DataRow, measured: Sequence[Measurement]) -> Iterator[tuple[str, str]]:
    """Compares the lengths of text and recordings with each other and with the row."""
    seconds = sum(one.seconds for one in measured)
    spoken = syllables(row.text)
    characters = sum(not character.isspace() for character in row.text)
    fastest = limit("too-much-text")
    if spoken > fastest * seconds + PACE_SLACK:
        pace = f"{characters} characters on {seconds:.1f} s, {characters / seconds:.0f} per second"
        yield "too-much-text", f"{pace}; at most {fastest * characters / spoken:.0f} are said: {show(row.text, 30)}"
    if re.fullmatch(r"\d+\.\d+", row.text.strip()) and abs(float(row.text) - seconds) < SAME_LENGTH:
        yield "wrong-column", f"the text is the length of the recording: {show(row.text)}"
    sounding = sum(one.sounding_seconds for one in measured)
    if sounding > MIN_SLOW_SECONDS and spoken < limit("too-little-text") * sounding:
        yield "too-little-text", f"{characters} characters on {sounding:.1f} s of speech: {show(row.text, 30)}"
    if row.speech_length is not None:
        frames = sum(speech_length(round(one.seconds * one.rate), one.rate) for one in measured)
        if abs(frames - row.speech_length) > limit("wrong-speech-length") * len(measured):
            yield "wrong-speech-length", f"speech_length is {row.speech_length}; the recording has {frames} frames"
    if row.text_length is not None:
        size = sum(len(answer.encode()) for answer in row.answers)
        if not 0 < row.text_length <= size:
            yield "wrong-text-length", f"text_length is {row.text_length}; the transcript has {size} bytes"
