"""Batches by a budget of padded audio seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BUCKET_RATIO = 1.06  # lengths that differ by less than 6 % share a bucket and are shuffled together
MIN_BUCKET_SECONDS = 0.1  # shorter rows share one bucket
# Constant cost of a row in training (the 20 tokens of its prompt), in seconds of audio. With this cost, batches of
# short and long rows take about the same time, so ranks do not wait for each other.
ROW_COST = 1.5


def budget_before_augmentation(
    seconds: Sequence[float] | np.ndarray, batch_seconds: float, largest_stretch: float
) -> float:
    """Returns the budget for unchanged recordings, so that batches fit the budget after augmentation.

    The lengths after augmentation differ between epochs, and are not known before. So each recording counts as if it
    were lengthened as much as possible. Only a single recording that nearly fills the budget can exceed it.

    Args:
        seconds: seconds of audio of each row, shape = (rows,).
        batch_seconds: budget after augmentation.
        largest_stretch: factor by which augmentation lengthens a recording at most.
    """
    return min(batch_seconds, max(batch_seconds / largest_stretch, float(np.max(seconds, initial=0.0))))


@dataclass(frozen=True)
class CompletedRun:
    """The batches of an epoch that an interrupted run has completed with one setting.

    Args:
        batch_seconds, num_replicas: settings of the sampler in this run.
        batches: number of completed batches per rank.
    """

    batch_seconds: float
    num_replicas: int
    batches: int


class BudgetBatchSampler:
    """Assigns batches of rows with similar lengths, whose padded audio fits a budget, to ranks.

    The global order of batches depends only on the seed and the epoch, not on the number of ranks. Rank `r` of `R`
    gets the batches `r, r + R, ...`. The fullest batches are split until their number is a multiple of `R`, so every
    row is used once per epoch and all ranks do the same number of steps. If no batch can be split, a rank gets a
    filler: a row that another rank also gets, marked so that the collator masks its labels.

    The sampler yields keys instead of indices: `epoch * number of rows + index`, or `-1 - key` for a filler; see
    `KeyedRows`. The keys seed augmentation by row and epoch, so a resumed run uses the same random numbers.

    Args:
        seconds: seconds of audio of each row, shape = (rows,).
        batch_seconds: maximum of padded seconds (longest row times number of rows) per batch and device; if `row_cost`
            is not 0, only batches of the longest rows reach this maximum.
        num_replicas: number of ranks.
        rank: rank of this process.
        seed: seed of the order.
        shuffle: whether to draw a new order every epoch; otherwise rows are sorted by length.
        weights: times per epoch that each row is used, shape = (rows,); 0.5: a random half of these rows in each
            epoch. Default: 1.
        row_cost: constant cost of a row, in seconds of audio; see `ROW_COST`.

    Raises:
        ValueError: if a row is longer than the budget, there are no rows, or the weights are too small.
    """

    def __init__(
        self,
        seconds: Sequence[float] | np.ndarray,
        batch_seconds: float,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | np.ndarray | None = None,
        row_cost: float = 0.0,
    ):
        self.seconds = np.asarray(seconds, dtype=np.float64)
        if len(self.seconds) == 0:
            raise ValueError("there are no rows")
        if self.seconds.max() > batch_seconds:
            raise ValueError(
                f"the longest row has {self.seconds.max():.1f} s of audio, the batch budget is {batch_seconds:g} s; "
                "raise the budget, or shorten or remove the row"
            )
        self.batch_seconds = batch_seconds
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.row_cost = row_cost
        # Batches of the longest rows fill the budget as without `row_cost`.
        self._limit = batch_seconds * (1 + row_cost / float(self.seconds.max()))
        if weights is None:
            self.weights = np.broadcast_to(1.0, len(self.seconds))  # takes no memory
        else:
            self.weights = np.asarray(weights, dtype=np.float64)
        self.epoch = 0
        self._resumed_epoch = -1
        self._earlier_runs: list[CompletedRun] = []
        self._skipped = 0
        buckets = np.floor(np.log(np.maximum(self.seconds, MIN_BUCKET_SECONDS)) / np.log(BUCKET_RATIO))
        self._buckets = (buckets - buckets.min()).astype(np.int16)  # numpy sorts these in linear time
        # The longest row of each bucket determines batch sizes, so the number of batches does not depend on the order.
        self._longest = np.zeros(int(self._buckets.max()) + 1)
        np.maximum.at(self._longest, self._buckets, self.seconds)
        self._num_batches = len(self._cut(self._draw(np.random.default_rng((seed, 0)))))
        if self._num_batches == 0:
            raise ValueError("the weights are so small that no row is left; raise --train_weight")
        if self._has_fractions:
            self._num_batches += 2 + self._num_batches // 50  # reserve for epochs whose sample needs more batches

    @property
    def _has_fractions(self) -> bool:
        return bool((self.weights % 1).any())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def resume(self, epoch: int, completed: Sequence[CompletedRun]) -> None:
        """Skips the completed part of an interrupted epoch.

        With the same number of ranks and the same budget, the remaining batches equal those of an uninterrupted epoch.
        Otherwise the remaining rows form new batches. In both cases, every row is used once.

        Args:
            epoch: the interrupted epoch.
            completed: completed parts of the epoch, in order; consecutive items have different settings.
        """
        earlier, last = list(completed[:-1]), completed[-1]
        same = (last.batch_seconds, last.num_replicas) == (self.batch_seconds, self.num_replicas)
        self._resumed_epoch = epoch
        self._earlier_runs, self._skipped = (earlier, last.batches) if same else ([*earlier, last], 0)

    def num_left(self, epoch: int) -> int:
        """Returns the remaining batches per rank of an epoch; equal to `len`, except for the resumed epoch."""
        if epoch != self._resumed_epoch:
            return len(self)
        return -(-len(self.batches(epoch)) // self.num_replicas) - self._skipped

    def __len__(self) -> int:
        """Returns the batches per rank and epoch; the same for all ranks and epochs, except for a resumed epoch."""
        return -(-self._num_batches // self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        offset = self.epoch * len(self.seconds)
        batches, fillers = self._assign(self.epoch)
        skipped = self._skipped if self.epoch == self._resumed_epoch else 0
        for batch in batches[self.rank :: self.num_replicas][skipped:]:
            yield [int(index) + offset for index in batch]
        if self.rank >= self.num_replicas - fillers:
            yield [-1 - (int(batches[0][0]) + offset)]

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Returns the row indices of all batches of an epoch, in the global order."""
        return self._assign(epoch)[0]

    def _assign(self, epoch: int) -> tuple[list[np.ndarray], int]:
        if epoch == self._resumed_epoch and self._earlier_runs:
            return self._assign_remaining(epoch, self._earlier_runs)
        rng = np.random.default_rng((self.seed, epoch))
        rows = self._draw(rng)
        batches = self._cut(rows)
        while len(batches) > self._num_batches:  # only with fractional weights, whose rows are a random sample
            fractional = np.flatnonzero(self.weights[rows] % 1)
            rows = np.delete(rows, rng.choice(fractional, size=-(-len(fractional) // 100), replace=False))
            batches = self._cut(rows)
        if self.shuffle:
            batches = [batches[index] for index in rng.permutation(len(batches))]
        batches, missing = self._split(batches, len(self) * self.num_replicas - len(batches))
        if missing and self._has_fractions:  # batches of one row cannot be split: adds rows to the sample
            extra = self._fractional(rows, missing, rng)
            batches, missing = [*batches, *extra[:, None]], missing - len(extra)
        return batches, missing

    def _assign_remaining(self, epoch: int, earlier: list[CompletedRun]) -> tuple[list[np.ndarray], int]:
        """Builds batches of the rows that remain after runs with other settings."""
        last = earlier[-1]
        previous = BudgetBatchSampler(
            self.seconds, last.batch_seconds, last.num_replicas,
            seed=self.seed, shuffle=self.shuffle, weights=self.weights, row_cost=self.row_cost,
        )  # fmt: skip
        previous.resume(epoch, earlier)
        rows = np.concatenate(previous.batches(epoch)[last.batches * last.num_replicas :])
        batches = self._cut(rows[np.argsort(self._buckets[rows], kind="stable")])
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch, len(earlier))).permutation(len(batches))
            batches = [batches[index] for index in order]
        return self._split(batches, -len(batches) % self.num_replicas)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Samples the rows of an epoch, sorted by bucket."""
        copies = np.floor(self.weights).astype(np.int64)
        for weight in np.unique(self.weights[self.weights % 1 > 0]):
            candidates = np.flatnonzero(self.weights == weight)
            copies[rng.choice(candidates, size=round(float(weight % 1) * len(candidates)), replace=False)] += 1
        rows = np.repeat(np.arange(len(self.seconds), dtype=np.int32), copies)
        if self.shuffle:
            rows = rng.permutation(rows)
            return rows[np.argsort(self._buckets[rows], kind="stable")]
        return rows[np.argsort(self.seconds[rows], kind="stable")]

    def _fractional(self, drawn: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """Samples additional rows with fractional weights, preferably rows that are not in `drawn`."""
        fractional = self.weights % 1 > 0
        left_out = fractional & (np.bincount(drawn, minlength=len(self.weights)) <= np.floor(self.weights))
        candidates = np.flatnonzero(left_out if left_out.sum() >= number else fractional)
        return rng.choice(candidates, size=number, replace=len(candidates) < number)

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        buckets = self._buckets[rows]
        ends = [*(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(rows)]  # ends of runs of rows in one bucket
        cost = (self._longest[buckets[[end - 1 for end in ends]]] + self.row_cost).tolist() if len(rows) else []
        batches = []
        start = run = 0
        while start < len(rows):
            size = int(self._limit / cost[run])
            while size > 1 and cost[run] * size > self._limit:  # the quotient may be rounded up
                size -= 1
            stop, last = min(start + max(1, size), ends[run]), run
            # A batch may include longer rows of the next buckets if all rows, padded to that length, fit the budget.
            while stop == ends[last] and last + 1 < len(ends):
                fitting = start + int(self._limit / cost[last + 1])
                while fitting > stop and cost[last + 1] * (fitting - start) > self._limit:
                    fitting -= 1
                if fitting <= stop:
                    break
                last += 1
                stop = min(fitting, ends[last])
            batches.append(rows[start:stop])
            while run < len(ends) and ends[run] <= stop:
                run += 1
            start = stop
        return batches

    @staticmethod
    def _split(batches: list[np.ndarray], missing: int) -> tuple[list[np.ndarray], int]:
        while missing > 0 and max(map(len, batches)) > 1:
            fullest = sorted(range(len(batches)), key=lambda index: -len(batches[index]))[:missing]
            halved = {index for index in fullest if len(batches[index]) > 1}
            missing -= len(halved)
            batches = [
                part
                for index, batch in enumerate(batches)
                for part in (np.array_split(batch, 2) if index in halved else [batch])
            ]
        return batches, missing


class KeyedRows:
    """A dataset indexed by keys of `BudgetBatchSampler`.

    Adds `seed`, unique for each row and epoch, and `supervised`, false for a filler, to each row.

    Args:
        dataset: a `datasets.Dataset`.
        seed: first part of the rows' seeds.
    """

    def __init__(self, dataset, seed: int = 0):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict]:
        """Returns the rows of a batch, read with one call."""
        supervised = [key >= 0 for key in keys]
        keys = [key if key >= 0 else -1 - key for key in keys]
        rows = self.dataset.__getitems__([key % len(self.dataset) for key in keys])
        return [
            {**row, "seed": (self.seed, key), "supervised": is_supervised}
            for row, key, is_supervised in zip(rows, keys, supervised, strict=True)
        ]
