"""Conversion of utterances to lines of a JSONL: measures recordings and builds rows in parallel."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

from ..audio.waveform import AudioError, is_url
from ..model.chat import ChatError, parse_messages, transcription_messages
from .bad_rows import BadDataError
from .jsonl import json_line, map_recordings
from .kaldi import TEXTS_AT_ONCE, add_text_lengths, measure_recording
from .processes import map_in_processes, read_ahead
from .utterance import Utterance

NUM_PER_PROCESS = 128  # utterances per worker above which processes are faster than threads


class Prepared(NamedTuple):
    """Result of the conversion of some utterances.

    Args:
        lines: lines of the JSONL with line ends, one per good utterance.
        seconds: durations of the recordings of good utterances.
        num_tokens: tokens of the transcripts of good utterances; 0 without a tokenizer.
        bad: file, line and reason of bad utterances, for `BadRows.add`.
        good: whether each utterance is good.
    """

    lines: list[str]
    seconds: list[float]
    num_tokens: int
    bad: list[tuple[str, int | str, str]]
    good: list[bool]


@dataclass(frozen=True)
class RowMaker:
    """Converts utterances to rows.

    Args:
        prompt: result of `chat.transcription_prompt`.
        tokenizer: tokenizer of the model, to count `text_length`; with `None`, rows have no `text_length`.
        folder: absolute path of the folder to which written paths are relative; `None` for absolute paths.
        prompts: prompt by language of an utterance, instead of `prompt`.
        origin: whether rows have `key` (ID), `speaker` and `language`, where the source has them, for `doctor`.
    """

    prompt: str
    tokenizer: Any = None
    folder: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    origin: bool = False

    def messages(self, utterance: Utterance) -> list[dict]:
        """Builds and checks the dialogue of an utterance, with paths as they are written.

        Raises:
            ChatError: if the dialogue is not usable, or lacks its answer or recording.
        """
        if utterance.messages is None:
            prompt = self.prompts.get(utterance.language or "", self.prompt)
            messages = transcription_messages(self._relative(utterance.recording), prompt, utterance.transcript)
        else:
            messages = map_recordings(utterance.messages, self._relative)
        dialogue = parse_messages(messages, utterance.hotwords or ())
        if not dialogue.recordings:
            raise ChatError("no recording in the dialogue")
        if dialogue.turns[-1].answer is None:
            raise ChatError("no answer: the last message must be the assistant's, with the transcript")
        return messages

    def _relative(self, source: str) -> str:
        return source if self.folder is None or is_url(source) else os.path.relpath(source, self.folder)

    def make(self, utterances: Sequence[Utterance], measured: Iterable[tuple[float, int] | AudioError]) -> Prepared:
        """Converts utterances to rows.

        Args:
            utterances: the utterances.
            measured: result of `measure` for each utterance.
        """
        rows: list[dict[str, Any]] = []
        result = Prepared([], [], 0, [], [])
        for utterance, length in zip(utterances, measured, strict=True):
            result.good.append(False)
            try:
                messages = self.messages(utterance)
            except (BadDataError, ChatError) as error:
                place = utterance.transcript_file, utterance.transcript_line
                result.bad.append((*place, f"unusable transcript: {error}"))
                continue
            if isinstance(length, AudioError):
                place = utterance.recording_file, utterance.recording_line
                result.bad.append((*place, f"unusable recording: {length}"))
                continue
            rows.append({"messages": messages, "speech_length": length[1]})
            if utterance.hotwords:
                rows[-1]["hotwords"] = utterance.hotwords
            if self.origin:
                names = {"key": utterance.id, "speaker": utterance.speaker, "language": utterance.language}
                rows[-1] |= {name: value for name, value in names.items() if value}
            result.seconds.append(length[0])
            result.good[-1] = True
        if self.tokenizer is not None:
            add_text_lengths(rows, self.tokenizer)
        result.lines.extend(map(json_line, rows))
        return result._replace(num_tokens=sum(row.get("text_length", 0) for row in rows))


def prepare(utterances: Sequence[Utterance], maker: RowMaker, num_workers: int) -> Generator[Prepared, None, None]:
    """Measures recordings completely and builds rows, in the order of the utterances.

    Short lists use threads, which finish before processes would start. Long lists use processes, because threads block
    each other at Python's global lock. If the generator may not be exhausted, close it (`contextlib.closing`) to end
    the processes.

    Args:
        utterances: the utterances.
        maker: converts utterances to rows.
        num_workers: number of threads or processes.

    Yields:
        Results of the next utterances.

    Raises:
        ChildProcessError: if a process was killed.
    """
    if len(utterances) < NUM_PER_PROCESS * num_workers:
        with ThreadPool(num_workers) as threads:  # libsndfile and FFmpeg release Python's global lock
            for utterance, result in zip(utterances, threads.imap(measure, utterances), strict=True):
                yield maker.make([utterance], [result])
        return
    # Chunks, because the transfer of one recording to a process takes longer than reading a header. The size is
    # limited because some recordings are hours long.
    size = max(1, min(TEXTS_AT_ONCE, len(utterances) // (16 * num_workers)))
    chunks = (utterances[start : start + size] for start in range(0, len(utterances), size))
    yield from map_in_processes(partial(_prepare_chunk, maker), chunks, num_workers)


def measure(utterance: Utterance) -> tuple[float, int] | AudioError:
    """Returns the result of `measure_recording`, summed over the recordings of a dialogue, or its error."""
    try:
        lengths = [measure_recording(source) for source in utterance.recordings]
    except AudioError as error:
        return error
    except BadDataError:  # a dialogue that is not usable; making its row reports the reason
        return 0.0, 0
    return sum(seconds for seconds, _ in lengths), sum(frames for _, frames in lengths)


def _prepare_chunk(maker: RowMaker, utterances: Sequence[Utterance]) -> Prepared:
    read_ahead([utterance.recording for utterance in utterances])
    return maker.make(utterances, map(measure, utterances))
