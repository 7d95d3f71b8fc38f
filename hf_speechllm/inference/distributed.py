"""The processes of a launch that share one list."""

from __future__ import annotations

import datetime
import heapq
import os
from collections.abc import Sequence
from typing import Any

import torch.distributed

TIMEOUT = datetime.timedelta(
    days=30
)  # the first to finish waits for the last; the launcher ends the others of a dead one


class Processes:
    """The processes that `accelerate launch` or `torchrun` started; or this one alone.

    They exchange small objects only, through gloo, on GPUs, too. Use it as a context, which ends the group.

    Args:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process among those of its machine.
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
        # A group that is left to the interpreter's end can crash there.
        if self.world_size > 1:
            torch.distributed.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; waits for all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values


def shares(seconds: Sequence[float], number: int) -> list[list[int]]:
    """Deals rows out so that the sums of their seconds are alike: the longest row first, always to the poorest.

    Returns:
        The indices of each share, ascending.
    """
    poorest = [(0.0, share) for share in range(number)]
    result: list[list[int]] = [[] for _ in range(number)]
    for index in sorted(range(len(seconds)), key=lambda index: -seconds[index]):
        total, share = poorest[0]
        result[share].append(index)
        heapq.heapreplace(poorest, (total + seconds[index], share))
    return [sorted(share) for share in result]
