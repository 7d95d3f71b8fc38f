"""A list of requests decoded by all processes of a launch, from where the run before was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .distributed import Processes, shares
from .journal import Journal, request_key
from .pieces import Transcript
from .requests import Request
from .transcriber import Transcriber

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        results: ID and transcript of what was decoded, in the order of the list, in the main process; else empty.
        failures: `ID: REASON` of the others, in the same order; in every process.
        seconds: of audio decoded now, by all processes.
        elapsed: seconds that it took.
    """

    results: list[tuple[str, Transcript]]
    failures: list[str]
    seconds: float
    elapsed: float


def decode_requests(
    transcriber: Transcriber, requests: Sequence[Request], journal: Journal, processes: Processes
) -> Outcome:
    """Decodes requests; each process takes a share of alike length, and the main one (rank 0) puts them together.

    Args:
        transcriber: of this process.
        requests: all of them, in every process.
        journal: what it has is not decoded again; it gets every result at once. With several machines, its folder must
            be one that all of them see.

    Raises:
        ValueError: if the journal is of other settings.
    """
    done, keys = journal.read(), [request_key(request) for request in requests]
    todo = [index for index, key in enumerate(keys) if key not in done]
    if len(todo) < len(requests) and processes.rank == 0:
        logger.info("%d of %d are decoded already", len(requests) - len(todo), len(requests))

    started = time.perf_counter()
    lengths: list[float | str] = [0.0] * len(todo)
    measured = transcriber.measure([requests[index] for index in todo[processes.rank :: processes.world_size]])
    for rank, part in enumerate(processes.gather(measured)):
        lengths[rank :: processes.world_size] = part
    weights = [0.0 if isinstance(length, str) else length for length in lengths]
    share = shares(weights, processes.world_size)[processes.rank]

    seconds, failures = 0.0, []
    journal.open()
    whose = "decoding" if processes.world_size == 1 else f"decoding (process 1 of {processes.world_size})"
    progress = tqdm(total=len(share), desc=whose, unit="recording", disable=processes.rank > 0)
    with progress, logging_redirect_tqdm():
        for transcript in transcriber([requests[todo[i]] for i in share], [lengths[i] for i in share]):
            index = todo[share[transcript.index]]
            if transcript.error is None:
                journal.add(keys[index], transcript)
            else:
                failures.append((index, f"{requests[index].id}: {transcript.error}"))
            if transcript.looped:
                logger.warning("%s: the text ended in a loop, which is cut", requests[index].id)
            seconds += transcript.seconds
            progress.set_postfix(RTFx=f"{seconds / (time.perf_counter() - started):.0f}", refresh=False)
            progress.update()

    parts = processes.gather((seconds, failures))
    done = journal.read() if processes.rank == 0 else {}
    return Outcome(
        [(request.id, done[key]) for request, key in zip(requests, keys, strict=True) if key in done],
        [failure for _, failure in sorted(item for _, part in parts for item in part)],
        sum(part for part, _ in parts),
        time.perf_counter() - started,
    )
