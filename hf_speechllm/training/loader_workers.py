"""Worker processes of the data loaders: signals, termination, and errors for dead or hanging workers."""

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
    """Base class of the worker processes that this run's data loaders start."""


def _context(method: str) -> BaseContext:
    base = multiprocessing.get_context(method)
    name = f"{method.capitalize()}LoaderWorker"
    process = type(name, (LoaderWorker, base.Process), {"__module__": __name__})  # type: ignore[attr-defined]
    globals()[name] = process  # a spawned process finds the class by name
    return type(f"{method.capitalize()}LoaderContext", (type(base),), {"Process": process})()


_CONTEXTS = {method: _context(method) for method in multiprocessing.get_all_start_methods()}


def worker_context() -> BaseContext:
    """Returns a start method for `DataLoader`, whose processes `kill_workers` can identify."""
    methods = multiprocessing.get_all_start_methods()  # the first is the default
    return _CONTEXTS[multiprocessing.get_start_method(allow_none=True) or methods[0]]


def ignore_signals(worker: int) -> None:
    """Ignores preemption signals in a worker, as `worker_init_fn`: the main process still needs the workers.

    `kill_workers_at_exit` must be called in the main process.

    Args:
        worker: index of the worker.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def kill_workers_at_exit() -> None:
    """Kills the remaining workers when this process ends.

    Otherwise multiprocessing sends SIGTERM, which workers ignore, and waits forever. Workers remain if an object still
    references the iterator of a loader: frames of an exception, or a loader with persistent workers.
    """
    atexit.register(kill_workers)  # runs before the function of multiprocessing, which was registered earlier


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """Disables torch's SIGCHLD handler, which raises an error for a dead worker, while the block runs."""
    # Only the main thread can set handlers. Windows has no SIGCHLD.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def kill_workers() -> None:
    """Kills the workers of this run's data loaders, and waits until the processes have ended."""
    with _without_child_signals():
        for process in multiprocessing.active_children():
            if isinstance(process, LoaderWorker):
                process.kill()
                process.join()


@contextmanager
def explain_loader_faults(timeout_seconds: float) -> Iterator[None]:
    """Replaces errors that a dead or hanging worker causes in the block by a `FaultError`; other errors pass.

    Args:
        timeout_seconds: timeout of the loader for a batch.

    Raises:
        FaultError: if a worker died or hung.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # torch can report a dead worker anywhere in the block
        if (fault := _loader_fault(error, timeout_seconds)) is None:
            raise
        raise fault from error


def _loader_fault(error: Exception, timeout_seconds: float) -> FaultError | None:
    """Explains an error that a worker caused; kills the other workers, because a hanging worker would block the exit.

    Returns:
        `None` if no worker died or hung.
    """
    with _without_child_signals():
        text = f"{type(error).__name__}: {error}"
        # A dead worker may have shared the memory of a batch that is in transit.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_transit = any(Path(file).parts[-2:] == ("multiprocessing", "reductions.py") for file in files)
        if "DataLoader worker" not in text and "DataLoader timed out" not in text and not in_transit:
            return None
        kill_workers()
    if "timed out" in text:
        return FaultError(
            f"no batch from the loader processes for {timeout_seconds:g} s: a file system or server may hang. Resume "
            "with --resume_from_checkpoint last; --dataloader_timeout_seconds sets the timeout"
        )
    return FaultError(
        f"a loader process died: {text}. If the machine ran out of memory, lower --dataloader_num_workers or "
        "--dataloader_prefetch_factor. Resume with --resume_from_checkpoint last"
    )
