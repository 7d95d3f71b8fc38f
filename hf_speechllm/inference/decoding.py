"""Decodes a list of requests with all processes of a launch, and resumes an interrupted run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..audio.downloads import printable
from ..console import progress_bar
from ..locks import output_file_lock
from .distributed import Processes, assign_shares
from .journal import Journal, request_key
from .pieces import Transcript
from .requests import Request
from .transcriber import Transcriber

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Work of a run; the same in every process.

    Args:
        requests: all requests.
        keys: `journal.request_key` of each request.
        done: results of the interrupted run, by key.
        seconds: audio seconds of the requests to decode, by index.
        failures: error messages of unusable requests, by index.
    """

    requests: Sequence[Request]
    keys: list[str]
    done: dict[str, Transcript]
    seconds: dict[int, float]
    failures: dict[int, str]

    @property
    def needs_model(self) -> bool:
        """Whether the model is needed: to decode, or for comparison with the model of earlier results."""
        return bool(self.seconds or self.done)


@dataclass(frozen=True)
class Outcome:
    """Result of a run: a text or a failure for every request.

    Args:
        results: IDs and transcripts of decoded requests, in order; empty except in the main process.
        failures: `ID: REASON` of failed requests, in order; empty except in the main process.
        seconds: audio seconds that all processes have decoded in this run.
        elapsed: duration of the run, in seconds.
    """

    results: list[tuple[str, Transcript]]
    failures: list[str]
    seconds: float
    elapsed: float


@contextlib.contextmanager
def lock_output(
    output_file: str | os.PathLike[str], journal: Journal, processes: Processes, overwrite: bool
) -> Iterator[None]:
    """Locks an output file, its journals and other output files against other runs while the block runs.

    Every process locks its own journal. A process of an earlier launch that still runs is waited for or reported.

    Args:
        output_file: file to lock.
        journal: of this process.
        processes: of the launch.
        overwrite: whether to replace an output file and to remove results of an unfinished run.

    Raises:
        ValueError: in all processes, if another run writes the file, or the file exists without `overwrite`.
    """
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(output_file_lock(journal.path, os.fspath(output_file), "--output_file"))
        except (OSError, ValueError) as error:
            problem = str(error)
        # A run that has ended since the command line was checked has left a complete output file.
        if problem is None and not overwrite and os.path.exists(output_file) and not journal.files():
            problem = f"{os.fspath(output_file)} exists; remove the file, or replace it with --overwrite"
        problems = [other for other in processes.gather(problem) if other is not None]
        if problems:
            raise ValueError(problems[0])
        if overwrite and processes.rank == 0:
            journal.remove()
        processes.gather(None)  # all processes wait for the removal
        yield


def plan_requests(
    requests: Sequence[Request],
    measure: Callable[[Sequence[Request]], list[float | str]],
    journal: Journal,
    processes: Processes,
) -> Plan:
    """Finds completed requests, and measures the others; each process measures a share.

    Args:
        requests: all requests, in every process.
        measure: a `measuring.RequestMeter`.
        journal: results that are not decoded again.
        processes: of the launch.

    Raises:
        ValueError: if the journal has other settings.
        OSError: if the journal cannot be read.
    """
    # The main process decides, because other processes may see an older state of the folder or of a recording.
    done, keys = processes.gather((journal.read(), [request_key(request) for request in requests]))[0]
    todo = [index for index, key in enumerate(keys) if key not in done]
    if len(todo) < len(requests) and processes.rank == 0:
        logger.info("%d of %d requests are already decoded", len(requests) - len(todo), len(requests))
    lengths: list[float | str] = [0.0] * len(todo)
    measured = measure([requests[index] for index in todo[processes.rank :: processes.world_size]])
    for rank, part in enumerate(processes.gather(measured)):
        lengths[rank :: processes.world_size] = part
    seconds = {index: length for index, length in zip(todo, lengths, strict=True) if not isinstance(length, str)}
    failures = {index: length for index, length in zip(todo, lengths, strict=True) if isinstance(length, str)}
    if failures and processes.rank == 0:
        index, reason = next(iter(failures.items()))
        logger.warning(
            "%d of %d requests are unusable; the others are decoded, these are listed at the end; the first: %s: %s",
            len(failures),
            len(requests),
            requests[index].id,
            printable(reason),
        )
    return Plan(requests, keys, done, seconds, failures)


def decode_requests(transcriber: Transcriber | None, plan: Plan, journal: Journal, processes: Processes) -> Outcome:
    """Decodes requests; each process decodes a share of similar duration, and the main process merges the results.

    Args:
        transcriber: of this process; `None` if nothing must be decoded.
        plan: see `plan_requests`.
        journal: stores every result immediately.
        processes: of the launch.

    Raises:
        OSError: if the journal cannot be written.
    """
    started = time.perf_counter()
    todo = list(plan.seconds)
    share = [todo[i] for i in assign_shares(list(plan.seconds.values()), processes.world_size)[processes.rank]]
    results: dict[int, Transcript] = {}
    failures: dict[int, str] = {}
    if transcriber is not None:
        journal.open()
        for index, transcript in _decode_share(transcriber, plan, share, processes, started):
            if transcript.error is None:
                journal.add(plan.keys[index], transcript)
                results[index] = transcript
            else:
                failures[index] = transcript.error
    parts = processes.gather((results, failures))
    elapsed = time.perf_counter() - started
    seconds = sum(transcript.seconds for part, _ in parts for transcript in part.values())
    if processes.rank > 0:
        return Outcome([], [], seconds, elapsed)
    results = {index: plan.done[key] for index, key in enumerate(plan.keys) if key in plan.done}
    failures = dict(plan.failures)
    for part, failed in parts:
        results |= part
        failures |= failed
    # No request may be missing without an error, even after a bug.
    for index in range(len(plan.requests)):
        if index not in results:
            failures.setdefault(index, "no result and no error; start again")
    return Outcome(
        [(plan.requests[index].id, results[index]) for index in sorted(results)],
        [printable(f"{plan.requests[index].id}: {failures[index]}") for index in sorted(failures)],
        seconds,
        elapsed,
    )


def _decode_share(transcriber: Transcriber, plan: Plan, share: list[int], processes: Processes, started: float):
    """Decodes the share of this process; yields indices and transcripts."""
    title = "decoding" if processes.world_size == 1 else f"decoding (process 1 of {processes.world_size})"
    seconds = 0.0
    hidden = processes.rank > 0
    with progress_bar(total=len(share), desc=title, unit="recording", disable=hidden) as progress:
        requests = [plan.requests[index] for index in share]
        for transcript in transcriber(requests, [plan.seconds[index] for index in share]):
            if transcript.looped:
                logger.warning("%s: a loop at the end of the text is cut", requests[transcript.index].id)
            yield share[transcript.index], transcript
            seconds += transcript.seconds
            progress.set_postfix(RTFx=f"{seconds / (time.perf_counter() - started):.0f}", refresh=False)
            progress.update()
