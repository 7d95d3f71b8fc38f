"""Preemption by a signal (Ctrl-C, SIGTERM, SIGUSR1): the run saves a checkpoint, ends, and reports how to resume."""

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
EXIT_STATUS = 75  # EX_TEMPFAIL in sysexits.h: temporary failure


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `KeyboardInterrupt` at the end of the block if a library has caught a Ctrl-C within the block.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
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
    """Saves a checkpoint and ends training after a rank has received a signal.

    Each step starts an all-reduce and the next step reads the result, so that no step waits. All ranks end after the
    same step, at most two steps after the signal.

    Attributes:
        stopped: whether a signal has ended training.
    """

    def __init__(self):
        self.received: int | None = None
        self.stopped = False
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._previous: dict[int, Any] = {}

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handles the signals while the block runs, and restores the previous handlers afterwards.

        Only the main thread can set handlers. SIGINT stays ignored if the parent process ignores SIGINT, as a shell
        does for background jobs.
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
            logger.warning("interrupted: saving a checkpoint after this step; press Ctrl-C again to end immediately")
            signal.signal(number, self._previous[number])

    def on_step_end(self, args, state, control, **kwargs):
        """Ends training after a signal, unless this is the last step; skips the evaluation of this step."""
        if not self._received_by_any_rank(args) or state.global_step >= state.max_steps:
            return
        logger.warning("ending the run after a signal: saving checkpoint %d", state.global_step)
        self.stopped = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _received_by_any_rank(self, args) -> bool:
        if args.world_size == 1:
            return self.received is not None
        received = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            received = bool(flag.item())
        flag = torch.tensor(int(self.received is not None), device=args.device)
        self._pending = (flag, torch.distributed.all_reduce(flag, async_op=True))
        return received
