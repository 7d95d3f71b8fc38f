"""A list of requests decoded by all processes of a launch, from where the run before was interrupted."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..audio.downloads import printable
from ..locks import output_file_lock
from .distributed import Processes, shares
from .journal import Journal, request_key
from .pieces import Transcript
from .requests import Request
from .transcriber import Transcriber

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is left to do of a list; the same in every process.

    Args:
        requests: the list.
        keys: of each request, as of `journal.request_key`.
        done: results of the run before, by key.
        seconds: of audio, by the indices of the requests that are to be decoded.
        failures: why others can't be, by index.
    """

    requests: Sequence[Request]
    keys: list[str]
    done: dict[str, Transcript]
    seconds: dict[int, float]
    failures: dict[int, str]

    @property
    def needs_model(self) -> bool:
        """Whether there is anything to decode, or any earlier text to compare the model with."""
        return bool(self.seconds or self.done)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: of every request a text or a failure.

    Args:
        results: ID and transcript of what was decoded, in the order of the list, in the main process; else empty.
        failures: `ID: REASON` of the others, in the same order, in the main process; else empty.
        seconds: of audio decoded now, by all processes.
        elapsed: seconds that it took.
    """

    results: list[tuple[str, Transcript]]
    failures: list[str]
    seconds: float
    elapsed: float


@contextlib.contextmanager
def claim_output(
    output_file: str | os.PathLike[str], journal: Journal, processes: Processes, overwrite: bool
) -> Iterator[None]:
    """Keeps other runs from an output file, its journals, and what is written beside it, while the block runs.

    Every process locks its own journal: a process of an earlier launch that is still there is waited for or reported.

    Args:
        overwrite: whether an output file may be replaced, and the results of an unfinished run removed.

    Raises:
        ValueError: in all processes, if another run writes the file, or it exists and may not be replaced.
    """
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(output_file_lock(journal.path, os.fspath(output_file), "--output_file"))
        except (OSError, ValueError) as error:
            problem = str(error)
        # A run that has ended in the meantime has left its output, complete.
        if problem is None and not overwrite and os.path.exists(output_file) and not journal.files():
            problem = f"{os.fspath(output_file)} exists; remove it, or replace it with --overwrite"
        problems = [other for other in processes.gather(problem) if other is not None]
        if problems:
            raise ValueError(problems[0])
        if overwrite and processes.rank == 0:
            journal.remove()
        processes.gather(None)  # nobody reads before it is removed
        yield


def plan_requests(
    requests: Sequence[Request],
    measure: Callable[[Sequence[Request]], list[float | str]],
    journal: Journal,
    processes: Processes,
) -> Plan:
    """Finds out what is done already, and measures the other requests, each process a share of them.

    Args:
        requests: all of them, in every process.
        measure: a `measuring.RequestMeter`.
        journal: what it has is not decoded again.

    Raises:
        ValueError: if the journal is of other settings.
        OSError: if the journal can't be read.
    """
    # The main process decides: the others may see the folder, or a recording, in an older state.
    done, keys = processes.gather((journal.read(), [request_key(request) for request in requests]))[0]
    todo = [index for index, key in enumerate(keys) if key not in done]
    if len(todo) < len(requests) and processes.rank == 0:
        logger.info("%d of %d are decoded already", len(requests) - len(todo), len(requests))
    lengths: list[float | str] = [0.0] * len(todo)
    measured = measure([requests[index] for index in todo[processes.rank :: processes.world_size]])
    for rank, part in enumerate(processes.gather(measured)):
        lengths[rank :: processes.world_size] = part
    seconds = {index: length for index, length in zip(todo, lengths, strict=True) if not isinstance(length, str)}
    failures = {index: length for index, length in zip(todo, lengths, strict=True) if isinstance(length, str)}
    if failures and processes.rank == 0:
        logger.warning("%d of %d can't be decoded, and are named at the end", len(failures), len(requests))
    return Plan(requests, keys, done, seconds, failures)


def decode_requests(transcriber: Transcriber | None, plan: Plan, journal: Journal, processes: Processes) -> Outcome:
    """Decodes requests; each process takes a share of alike length, and the main one (rank 0) puts them together.

    Args:
        transcriber: of this process; `None` where nothing is to be decoded.
        plan: of `plan_requests`.
        journal: gets every result at once.

    Raises:
        OSError: if the journal can't be written.
    """
    started = time.perf_counter()
    todo = list(plan.seconds)
    share = [todo[i] for i in shares(list(plan.seconds.values()), processes.world_size)[processes.rank]]
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
    # Whatever goes wrong before: no request may be missing in silence.
    for index in range(len(plan.requests)):
        if index not in results:
            failures.setdefault(index, "neither a text nor a failure came of it; start again")
    return Outcome(
        [(plan.requests[index].id, results[index]) for index in sorted(results)],
        [printable(f"{plan.requests[index].id}: {failures[index]}") for index in sorted(failures)],
        seconds,
        elapsed,
    )


def _decode_share(transcriber: Transcriber, plan: Plan, share: list[int], processes: Processes, started: float):
    """Indices and transcripts of this process's share, as they come."""
    whose = "decoding" if processes.world_size == 1 else f"decoding (process 1 of {processes.world_size})"
    progress = tqdm(total=len(share), desc=whose, unit="recording", disable=processes.rank > 0)
    seconds = 0.0
    with progress, logging_redirect_tqdm():
        requests = [plan.requests[index] for index in share]
        for transcript in transcriber(requests, [plan.seconds[index] for index in share]):
            if transcript.looped:
                logger.warning("%s: the text ended in a loop, which is cut", requests[transcript.index].id)
            yield share[transcript.index], transcript
            seconds += transcript.seconds
            progress.set_postfix(RTFx=f"{seconds / (time.perf_counter() - started):.0f}", refresh=False)
            progress.update()
