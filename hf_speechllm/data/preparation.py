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
    """

    lines: list[str]
    seconds: list[float]
    num_tokens: int
    bad: list[tuple[str, int, str]]


@dataclass(frozen=True)
class RowMaker:
    """Converts utterances to rows.

    Args:
        scp_file, transcript_file: paths of the lists, for bad rows.
        prompt: result of `chat.transcription_prompt`.
        tokenizer: tokenizer of the model, to count `text_length`; with `None`, rows have no `text_length`.
        folder: absolute path of the folder to which written paths are relative; `None` for absolute paths.
    """

    scp_file: str
    transcript_file: str
    prompt: str
    tokenizer: Any = None
    folder: str | None = None

    def make(self, utterances: Sequence[Utterance], measured: Iterable[tuple[float, int] | AudioError]) -> Prepared:
        """Converts utterances to rows.

        Args:
            utterances: the utterances.
            measured: result of `measure` for each utterance.
        """
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
    """Returns the result of `measure_recording`, or its error."""
    try:
        return measure_recording(utterance.recording)
    except AudioError as error:
        return error


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
        _read_ahead(utterance.recording)
    return _maker.make(utterances, map(measure, utterances))
