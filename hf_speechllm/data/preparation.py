"""Utterances become lines of a JSONL: recordings are measured and rows made by several processes at once."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

from ..audio.waveform import AudioError, is_url
from ..model.chat import ChatError, parse_messages, transcription_messages
from .jsonl import json_line
from .kaldi import TEXTS_AT_ONCE, Utterance, add_text_lengths, measure_recording

NUM_PER_PROCESS = 128  # utterances that make it pay to start a process
HEADER_SIZE = 4096  # bytes, a page: it has the header of nearly every recording
_maker: RowMaker  # of a worker process


class Prepared(NamedTuple):
    """What became of some utterances.

    Args:
        lines: of the JSONL, with line ends, a good utterance each.
        seconds: durations of their recordings.
        num_tokens: of their transcripts; 0 without a tokenizer.
        bad: file, line and reason of the others, for `BadRows.add`.
    """

    lines: list[str]
    seconds: list[float]
    num_tokens: int
    bad: list[tuple[str, int, str]]


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of utterances.

    Args:
        scp_file, transcript_file: the lists, for bad rows.
        prompt: what `chat.transcription_prompt` gives.
        tokenizer: of the model, to count `text_length`; `None` leaves that out.
        folder: absolute; paths are written relative to it, or absolute if it is `None`.
    """

    scp_file: str
    transcript_file: str
    prompt: str
    tokenizer: Any = None
    folder: str | None = None

    def make(self, utterances: Sequence[Utterance], measured: Iterable[tuple[float, int] | AudioError]) -> Prepared:
        """Rows of utterances whose recordings have been measured: each as `measure` gives it."""
        rows: list[dict[str, Any]] = []
        seconds, bad = [], []
        for utterance, result in zip(utterances, measured, strict=True):
            source = utterance.recording
            if self.folder is not None and not is_url(source):
                source = os.path.relpath(source, self.folder)
            messages = transcription_messages(source, self.prompt, utterance.transcript)
            try:
                parse_messages(messages)
            except ChatError as error:
                bad.append((self.transcript_file, utterance.transcript_line, f"unusable transcript: {error}"))
                continue
            if isinstance(result, AudioError):
                bad.append((self.scp_file, utterance.recording_line, f"unusable recording: {result}"))
                continue
            rows.append({"messages": messages, "speech_length": result[1]})
            seconds.append(result[0])
        if self.tokenizer is not None:
            add_text_lengths(rows, self.tokenizer)
        return Prepared([json_line(row) for row in rows], seconds, sum(row.get("text_length", 0) for row in rows), bad)


def prepare(utterances: Sequence[Utterance], maker: RowMaker, num_workers: int) -> Generator[Prepared, None, None]:
    """Measures recordings to their end and makes rows, in the order of the utterances.

    Threads measure short lists, which are done before processes have started. They wait for each other at Python's
    lock, so that long ones take processes. Close the generator (`contextlib.closing`) if it may not be read to its
    end: that ends them.

    Args:
        num_workers: recordings measured at once.

    Yields:
        What became of the next utterances.

    Raises:
        ChildProcessError: if a process was killed.
    """
    if len(utterances) < NUM_PER_PROCESS * num_workers:
        with ThreadPool(num_workers) as threads:  # libsndfile and FFmpeg work outside Python's lock
            for utterance, result in zip(utterances, threads.imap(measure, utterances), strict=True):
                yield maker.make([utterance], [result])
        return
    # Not one by one: to hand over a recording takes longer than to read a header. Not too many: some are hours long.
    size = max(1, min(TEXTS_AT_ONCE, len(utterances) // (16 * num_workers)))
    chunks = (utterances[start : start + size] for start in range(0, len(utterances), size))
    # To fork takes milliseconds, and no process has to import anything; other systems than Linux cannot do it safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    gc.freeze()  # a search for garbage would write to, and so copy, the memory that the processes share
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (maker,)) as pool:
        try:
            # No `pool.map`: it cancels what waits, on which the pool stumbles when its processes end (Python 3.11).
            futures = deque(pool.submit(_prepare_chunk, chunk) for chunk in chunks)
            while futures:
                yield futures.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that checks recordings was killed; if memory ran out, give fewer --num_workers"
            ) from error
        except BaseException:  # of an interruption, too: a recording may take minutes, and would be waited for
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def measure(utterance: Utterance) -> tuple[float, int] | AudioError:
    """What `measure_recording` gives or raises."""
    try:
        return measure_recording(utterance.recording)
    except AudioError as error:
        return error


def _start_worker(maker: RowMaker) -> None:
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process, whatever it does, when the one that started it has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read_ahead(source: str) -> None:
    """Has the system read the start of a file in the background; what is wrong with it is told by measuring."""
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return
    with contextlib.suppress(OSError, ValueError):
        file = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for the other end of a FIFO
        try:
            os.posix_fadvise(file, 0, HEADER_SIZE, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _prepare_chunk(utterances: Sequence[Utterance]) -> Prepared:
    # A disk gives many files at once in the time of a few; to ask costs less than threads that wait for a file each.
    for utterance in utterances:
        _read_ahead(utterance.recording)
    return _maker.make(utterances, map(measure, utterances))
