"""Worker processes of the data loaders: their signals, their end, and what to report if one dies or hangs."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

from .errors import FaultError
from .preemption import SIGNALS


class LoaderWorker:
    """Marks a process that a data loader of this run has started."""


def _context(method: str) -> BaseContext:
    base = multiprocessing.get_context(method)
    name = f"{method.capitalize()}LoaderWorker"
    process = type(name, (LoaderWorker, base.Process), {"__module__": __name__})  # type: ignore[attr-defined]
    globals()[name] = process  # a spawned process looks its class up by name
    return type(f"{method.capitalize()}LoaderContext", (type(base),), {"Process": process})()


_CONTEXTS = {method: _context(method) for method in multiprocessing.get_all_start_methods()}


def worker_context() -> BaseContext:
    """Returns the start method for `DataLoader`, whose processes `kill_workers` tells from other child processes."""
    methods = multiprocessing.get_all_start_methods()  # the first is the default
    return _CONTEXTS[multiprocessing.get_start_method(allow_none=True) or methods[0]]


def ignore_signals(worker: int) -> None:
    """Leaves preemption signals to the main process, which still needs its workers; for `worker_init_fn`.

    `kill_workers_at_exit` must be called in the main process.

    Args:
        worker: index of the worker.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def kill_workers_at_exit() -> None:
    """Kills the workers that are left when this process ends.

    Otherwise multiprocessing asks them to end by SIGTERM, which they ignore, and waits for them without end. Workers
    are left where something still holds the iterator of a loader: an exception's frames, or persistent workers.
    """
    atexit.register(kill_workers)  # runs before multiprocessing's own function, which was registered earlier


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """Keeps torch's SIGCHLD handler, which raises an error for a dead worker, from running in the block."""
    # Only the main thread can set handlers; Windows has no such signal.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def kill_workers() -> None:
    """Kills the workers that this run's data loaders have started, and waits for their end."""
    with _without_child_signals():
        for process in multiprocessing.active_children():
            if isinstance(process, LoaderWorker):
                process.kill()
                process.join()


def loader_fault(error: Exception, timeout_seconds: float) -> FaultError | None:
    """Explains an error of a data loader, and kills the workers that are left: one that hangs would block the end.

    Args:
        error: raised anywhere in training; torch reports a dead worker at any place.
        timeout_seconds: how long a batch was waited for.

    Returns:
        The error to raise instead; `None` if no worker died or hung.
    """
    with _without_child_signals():
        text = f"{type(error).__name__}: {error}"
        # A batch may be in transit whose memory the dead process would have handed over.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_transit = any(Path(file).parts[-2:] == ("multiprocessing", "reductions.py") for file in files)
        if "DataLoader worker" not in text and "DataLoader timed out" not in text and not in_transit:
            return None
        kill_workers()
    if "timed out" in text:
        return FaultError(
            f"no batch came from the loader's processes for {timeout_seconds:g} s: a file system or server may hang. "
            "Resume with --resume_from_checkpoint last; --dataloader_timeout_seconds sets how long to wait"
        )
    return FaultError(
        f"a process of the loader died: {text}. If the machine ran out of memory, lower --dataloader_num_workers or "
        "--dataloader_prefetch_factor. Resume with --resume_from_checkpoint last"
    )
