"""Signals that ask a run to make room: it saves, and ends so that it can be resumed."""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows has one
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: to be tried again


class Preempted(RuntimeError):
    """The run was asked to end, and has saved a checkpoint."""


class Preemption(TrainerCallback):
    """Saves and ends training after a step once any rank has got a signal.

    The ranks agree by a sum that each step starts and the next one reads, so that no step waits for it: they all end
    after the same step, at the latest the second one after the signal.

    Attributes:
        stopped: whether training was ended.
    """

    def __init__(self):
        self.received: int | None = None
        self.stopped = False
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals for as long as the block runs; in the main thread, as others can't."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        """Ends training, unless this is its last step anyway. An evaluation that is due is left out."""
        if not self._agreed(args) or state.global_step >= state.max_steps:
            return
        logger.warning("asked to end by a signal: saving checkpoint %d", state.global_step)
        self.stopped = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _agreed(self, args) -> bool:
        if args.world_size == 1:
            return self.received is not None
        agreed = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor(int(self.received is not None), device=args.device)
        self._pending = (flag, torch.distributed.all_reduce(flag, async_op=True))
        return agreed


def ignore_in_worker(worker: int) -> None:
    """Leaves signals to the main process, which still needs its loader processes; for `worker_init_fn`.

    `end_workers_at_exit` has to be called in the main process.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def end_workers_at_exit() -> None:
    """Has the loader processes that are left killed when this one ends.

    Else multiprocessing would ask them to end by SIGTERM, which they ignore, and wait for them without end. Some are
    left where something still holds the iterator of a loader: an exception's frames, or a loader with persistent
    processes.
    """
    atexit.register(kill_workers)  # runs before what multiprocessing has registered, which was earlier


def kill_workers() -> None:
    """Kills the loader processes that are left, and waits for their end."""
    # torch's handler would raise an error for a killed worker that is not waited for yet; other threads can't set it.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
            process.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
