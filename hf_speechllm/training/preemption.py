"""Signals that ask a run to end (Ctrl-C, SIGTERM, SIGUSR1): it saves a checkpoint and says how to resume."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `KeyboardInterrupt` at the end of the block if Ctrl-C was pressed in it, but a library has caught it.

    Raises:
        KeyboardInterrupt: if so.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


class Preemption(TrainerCallback):
    """Saves a checkpoint and ends training after a step once any rank has received a signal.

    The ranks agree through a sum that each step starts and the next step reads, so that no step waits for the sum: all
    ranks end after the same step, at the latest the second one after the signal.

    Attributes:
        stopped: whether training was ended.
    """

    def __init__(self):
        self.received: int | None = None
        self.stopped = False
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while the block runs, and restores the previous handlers after it.

        Only the main thread can set handlers. A signal that the parent process ignores, as a shell does with SIGINT
        for a background job, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._previous = {
            number: handler
            for number in SIGNALS
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN or number != signal.SIGINT
        }
        for number in self._previous:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            logger.warning("interrupted: a checkpoint is saved after this step; Ctrl-C again ends the run at once")
            signal.signal(number, self._previous[number])

    def on_step_end(self, args, state, control, **kwargs):
        """Ends training, unless this is its last step anyway. An evaluation that is due is left out."""
        if not self._agreed(args) or state.global_step >= state.max_steps:
            return
        logger.warning("a signal asks this run to end: saving checkpoint %d", state.global_step)
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
