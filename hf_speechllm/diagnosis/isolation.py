"""Functions that run in a process of their own: memory is measured, and a lack of memory ends only that process."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from ..console import bars_as_lines
from ..data.processes import end_with_parent

# Variables of launchers, which would make the process a rank of a training run.
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
SAMPLING_SECONDS = 0.02
PACKAGE = __name__.partition(".")[0]
# A CPU allocator raises a plain RuntimeError.
CPU_ALLOCATOR = "not enough memory"


class ProbeError(Exception):
    """A function in a separate process failed; the message is one line."""


def run_isolated(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Runs a function in a new process, on one device.

    Args:
        function: a function of a module.
        *args: picklable.

    Returns:
        The result, and the seconds that the process took to end.

    Raises:
        MemoryError: if memory is insufficient, also if the system kills the process.
        ProbeError: if the function raises another error.
    """
    context = multiprocessing.get_context("spawn")  # a forked process has neither CUDA nor threads
    receiver, sender = context.Pipe(duplex=False)
    method = multiprocessing.get_start_method()
    process = context.Process(target=_run, args=(sender, time.time(), method, function, args))
    process.start()
    sender.close()
    try:
        found, value = receiver.recv()
    except EOFError:
        found, value = None, None
    answered = time.perf_counter()
    process.join()
    if found == "result":
        return value, time.perf_counter() - answered
    if found == "memory" or (found is None and process.exitcode == -9):
        raise MemoryError(value or "the system ended the process")
    raise ProbeError(value or f"the process ended with status {process.exitcode}")


def _run(sender: Connection, started: float, method: str, function: Callable[..., Any], args: tuple) -> None:
    end_with_parent()
    # Otherwise the loader processes of the function are also spawned, which takes seconds, unlike in a run.
    multiprocessing.set_start_method(method, force=True)
    for name in [*DISTRIBUTED, *(name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_")))]:
        if name != "ACCELERATE_USE_CPU":
            os.environ.pop(name, None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]  # the trainer would use all GPUs
    Clock.started = started
    try:
        with bars_as_lines():
            answer = ("result", function(*args))
    except (torch.OutOfMemoryError, MemoryError) as error:
        answer = ("memory", " ".join(str(error).split()))
    except SystemExit as error:
        answer = ("error", f"the options are refused (status {error.code})")
    except KeyboardInterrupt:
        answer = ("error", "interrupted")
    except Exception as error:  # any error of a configuration must not end the plan of the others
        text = " ".join(str(error).split())
        for_users = isinstance(error, (OSError, ValueError, ImportError)) or type(error).__module__.startswith(PACKAGE)
        answer = (
            "memory" if CPU_ALLOCATOR in text else "error",
            text if for_users else f"{type(error).__name__}: {text}",
        )
    sender.send(answer)
    sender.close()


class Clock:
    """Start of this process.

    Attributes:
        started: seconds since the epoch; the start of the parent's request in a process of `run_isolated`.
    """

    started = psutil.Process().create_time()

    @classmethod
    def seconds(cls) -> float:
        """Returns the seconds since the start of the process."""
        return time.time() - cls.started


class PeakMemory:
    """Measures the peak memory of this process while a block runs: of the GPU, otherwise resident memory.

    Args:
        device: of training.

    Attributes:
        peak: bytes.
        failures: number of failed allocations on the GPU; the trainer splits such batches, see `out_of_memory`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = self.failures = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_stats(self.device).get("num_ooms", 0)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        else:
            self.peak = torch.cuda.max_memory_allocated(self.device)
            self.failures = torch.cuda.memory_stats(self.device).get("num_ooms", 0) - self._before

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._stop.wait(SAMPLING_SECONDS):
                return


def available_memory(device: torch.device) -> int:
    """Returns the memory that this process uses or could use, of the GPU, otherwise of the machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def describe_device(device: torch.device) -> str:
    """Returns the name of the GPU, or the number of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {psutil.cpu_count()} cores"
