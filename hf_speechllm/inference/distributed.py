"""Processes of a launch that share one list of requests."""

from __future__ import annotations

import datetime
import heapq
import os
from collections.abc import Sequence
from typing import Any

import torch.distributed

TIMEOUT = datetime.timedelta(
    days=30
)  # the first process may wait long for the last; after a crash, the launcher ends all processes


class Processes:
    """Processes that `accelerate launch` or `torchrun` has started, or a single process.

    The processes exchange small objects through gloo, on GPUs too. Use this class as a context manager, which creates
    and destroys the process group.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process, on this machine.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def __enter__(self) -> Processes:
        if self.world_size > 1:
            torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
        return self

    def __exit__(self, *exception) -> None:
        # A process group that still exists at the end of the interpreter can crash the process.
        if self.world_size > 1:
            torch.distributed.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes in order of ranks; waits for all processes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values


def assign_shares(seconds: Sequence[float], number: int) -> list[list[int]]:
    """Assigns requests to shares of similar duration: longest first, each to the share with the smallest total.

    Args:
        seconds: duration of each request.
        number: number of shares.

    Returns:
        Sorted indices of each share.
    """
    totals = [(0.0, share) for share in range(number)]
    result: list[list[int]] = [[] for _ in range(number)]
    for index in sorted(range(len(seconds)), key=lambda index: -seconds[index]):
        total, share = totals[0]
        result[share].append(index)
        heapq.heapreplace(totals, (total + seconds[index], share))
    return [sorted(share) for share in result]
