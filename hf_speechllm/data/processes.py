"""Parallel work in processes, with results in order."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..audio.waveform import local_path

HEADER_SIZE = 4096  # bytes (one page); contains the header of nearly every recording
_function: Callable[[Any], Any]  # set in each worker process


def map_in_processes(
    function: Callable[[Any], Any], chunks: Iterable[Any], num_workers: int
) -> Generator[Any, None, None]:
    """Yields the results of `function` for each chunk, in order.

    If the generator may not be exhausted, close it (`contextlib.closing`) to end the processes.

    Args:
        function: picklable; sent to each process once.
        chunks: arguments.
        num_workers: number of processes.

    Raises:
        ChildProcessError: if a process was killed.
    """
    # A fork takes milliseconds, and processes need no imports. A fork is safe only on Linux.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    gc.freeze()  # garbage collection would write to, and thereby copy, shared memory
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (function,)) as pool:
        try:
            # `pool.map` cancels waiting tasks, which makes the pool fail when its processes end (Python 3.11).
            futures = deque(pool.submit(_call, chunk) for chunk in chunks)
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


def read_ahead(recordings: Sequence[str]) -> None:
    """Makes the system read the start of each file in the background; ignores errors, which decoding reports.

    A disk reads many files in parallel nearly as fast as a few; read-ahead is cheaper than waiting threads.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return
    for source in recordings:
        with contextlib.suppress(OSError, ValueError):
            file = os.open(local_path(source), os.O_RDONLY | os.O_NONBLOCK)  # does not block on a FIFO
            try:
                os.posix_fadvise(file, 0, HEADER_SIZE, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores
    end_with_parent()


def end_with_parent() -> None:
    """Lets a worker process end when its parent process ends, even if the parent is killed.

    Otherwise workers wait for work forever. Other processes than workers are unchanged.
    """
    _watch_parents(os.getpid())  # a forked process inherits the cache


@functools.cache
def _watch_parents(process_id: int) -> None:
    for module in (multiprocessing, sys.modules.get("multiprocess")):  # `datasets` uses the latter
        if module is not None and (parent := module.parent_process()) is not None:
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    first = os.getppid()
    # A process that was started later, such as a manager of `datasets`, keeps the pipe open that `join` waits for.
    while parent.is_alive() and os.getppid() == first:
        parent.join(1)
    os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
