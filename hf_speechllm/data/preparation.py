"""Conversion of utterances to lines of a JSONL: measures recordings and builds rows in parallel."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

from ..audio.waveform import AudioError, is_url, local_path
from ..model.chat import ChatError, parse_messages, transcription_messages
from .bad_rows import BadDataError
from .jsonl import json_line, map_recordings
from .kaldi import TEXTS_AT_ONCE, add_text_lengths, measure_recording
from .utterance import Utterance

NUM_PER_PROCESS = 128  # utterances per worker above which processes are faster than threads
HEADER_SIZE = 4096  # bytes (one page); contains the header of nearly every recording
_maker: RowMaker  # set in each worker process


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
    """

    prompt: str
    tokenizer: Any = None
    folder: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)

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
    # A fork takes milliseconds, and processes need no imports. A fork is safe only on Linux.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    gc.freeze()  # garbage collection would write to, and thereby copy, shared memory
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (maker,)) as pool:
        try:
            # `pool.map` cancels waiting tasks, which makes the pool fail when its processes end (Python 3.11).
            futures = deque(pool.submit(_prepare_chunk, chunk) for chunk in chunks)
            while futures:
                yield futures.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that checks recordings was killed; if memory ran out, reduce --num_workers"
            ) from error
        except BaseException:  # including interruptions: otherwise the pool waits for recordings, possibly for minutes
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def measure(utterance: Utterance) -> tuple[float, int] | AudioError:
    """Returns the result of `measure_recording`, summed over the recordings of a dialogue, or its error."""
    try:
        lengths = [measure_recording(source) for source in utterance.recordings]
    except AudioError as error:
        return error
    except BadDataError:  # a dialogue that is not usable; making its row reports the reason
        return 0.0, 0
    return sum(seconds for seconds, _ in lengths), sum(frames for _, frames in lengths)


def _start_worker(maker: RowMaker) -> None:
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process immediately when its parent process ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read_ahead(source: str) -> None:
    """Makes the system read the start of a file in the background; ignores errors, which `measure` reports."""
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return
    with contextlib.suppress(OSError, ValueError):
        file = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # does not block on a FIFO
        try:
            os.posix_fadvise(file, 0, HEADER_SIZE, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _prepare_chunk(utterances: Sequence[Utterance]) -> Prepared:
    # A disk reads many files in parallel nearly as fast as a few; read-ahead is cheaper than waiting threads.
    for utterance in utterances:
        _read_ahead(local_path(utterance.recording))
    return _maker.make(utterances, map(measure, utterances))
