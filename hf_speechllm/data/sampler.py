"""Batches by a budget of padded audio seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BUCKET_RATIO = 1.06  # lengths within 6 % of each other count as alike and are shuffled together
SHORTEST = 0.1  # seconds; anything shorter shares a bucket
# What a row costs in training besides its audio and text, in seconds of audio: the 20 tokens of its prompt. With it,
# batches of short and of long rows take a GPU about as long, and ranks don't wait for each other.
ROW_COST = 1.5


@dataclass(frozen=True)
class CompletedRun:
    """Batches at the beginning of an epoch, or after such, that were dealt out under one setting.

    Args:
        batch_seconds, num_replicas: of the sampler that dealt them.
        batches: of each rank.
    """

    batch_seconds: float
    num_replicas: int
    batches: int


class BudgetBatchSampler:
    """Deals out batches of similar lengths whose padded audio fits a budget.

    The global order of batches depends on the seed and the epoch alone, not on the number of ranks: rank `r` of `R`
    takes the batches `r, r + R, ...`. Where their number is not a multiple of `R`, the fullest batches are split until
    it is, so every row is seen once an epoch and every rank does as many steps. Only if there is nothing left to
    split, a rank gets a filler: a row that has been dealt already, marked so that the collator takes its labels away.

    It yields keys, not indices: `epoch * number of rows + index`, or `-1 - key` for a filler; see `Rows`. Thus
    augmentation can be seeded by row and epoch, which keeps an interrupted run on the course of an uninterrupted one.

    Args:
        seconds: audio of each row, in seconds, shape = (rows,).
        batch_seconds: the most padded seconds (longest row times rows) in one batch on one device; only batches of
            the longest rows reach it if `row_cost` is not 0.
        num_replicas: number of ranks.
        rank: the rank that this sampler serves.
        seed: of the order.
        shuffle: whether to draw a new order every epoch; without, rows come sorted by length.
        weights: how often each row is seen in an epoch, shape = (rows,); 0.5 means half of such rows, other ones each
            epoch. Default 1.
        row_cost: what a row costs besides its audio, in seconds of audio; see `ROW_COST`.

    Raises:
        ValueError: if a row alone is longer than the budget, or there are no rows, or the weights leave none.
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
            raise ValueError("there are no rows to make batches of")
        if self.seconds.max() > batch_seconds:
            raise ValueError(
                f"the longest row has {self.seconds.max():.1f} s of audio, the batch budget is {batch_seconds:g} s: "
                "raise the budget, or shorten or remove the row"
            )
        self.batch_seconds = batch_seconds
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.row_cost = row_cost
        # Rows of the longest fill the budget as without.
        self._limit = batch_seconds * (1 + row_cost / float(self.seconds.max()))
        if weights is None:
            self.weights = np.broadcast_to(1.0, len(self.seconds))  # takes no memory
        else:
            self.weights = np.asarray(weights, dtype=np.float64)
        self.epoch = 0
        self._resumed_epoch = -1
        self._past: list[CompletedRun] = []
        self._skipped = 0
        buckets = np.floor(np.log(np.maximum(self.seconds, SHORTEST)) / np.log(BUCKET_RATIO))
        self._buckets = (buckets - buckets.min()).astype(np.int16)  # numpy sorts these in linear time
        # Batches are cut by the longest row of each bucket, so the cuts, and the number of batches, don't change with
        # the order.
        self._longest = np.zeros(int(self._buckets.max()) + 1)
        np.maximum.at(self._longest, self._buckets, self.seconds)
        self._num_batches = len(self._cut(self._draw(np.random.default_rng((seed, 0)))))
        if self._num_batches == 0:
            raise ValueError("the weights are so small that no row is left; raise them")
        if self._has_fractions:
            self._num_batches += 2 + self._num_batches // 50  # room for epochs whose draw needs a few more

    @property
    def _has_fractions(self) -> bool:
        return bool((self.weights % 1).any())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is dealt next."""
        self.epoch = epoch

    def resume(self, epoch: int, completed: Sequence[CompletedRun]) -> None:
        """Leaves out what an interrupted epoch has dealt already.

        After the same number of ranks and the same budget, the batches that follow are those of an uninterrupted
        epoch; else the rows that are left are put into new batches, and every row is still seen once.

        Args:
            completed: the completed part of the epoch, in order; each item has other settings than the item before.
        """
        past, last = list(completed[:-1]), completed[-1]
        same = (last.batch_seconds, last.num_replicas) == (self.batch_seconds, self.num_replicas)
        self._resumed_epoch = epoch
        self._past, self._skipped = (past, last.batches) if same else ([*past, last], 0)

    def num_left(self, epoch: int) -> int:
        """Batches of one rank that are left of an epoch; of all but the resumed one, as many as `len`."""
        if epoch != self._resumed_epoch:
            return len(self)
        return -(-len(self.batches(epoch)) // self.num_replicas) - self._skipped

    def __len__(self) -> int:
        """Batches of one rank in one epoch; the same for every epoch and rank, but for a resumed epoch."""
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
        """The row indices of every batch of an epoch, in the global order."""
        return self._assign(epoch)[0]

    def _assign(self, epoch: int) -> tuple[list[np.ndarray], int]:
        if epoch == self._resumed_epoch and self._past:
            return self._assign_remaining(epoch, self._past)
        rng = np.random.default_rng((self.seed, epoch))
        rows = self._draw(rng)
        batches = self._cut(rows)
        while len(batches) > self._num_batches:  # only with fractional weights: these rows are a sample anyway
            fractional = np.flatnonzero(self.weights[rows] % 1)
            rows = np.delete(rows, rng.choice(fractional, size=-(-len(fractional) // 100), replace=False))
            batches = self._cut(rows)
        if self.shuffle:
            batches = [batches[index] for index in rng.permutation(len(batches))]
        batches, missing = self._split(batches, len(self) * self.num_replicas - len(batches))
        if missing and self._has_fractions:  # batches of one row cannot be split: a few more rows of the sample, then
            extra = self._fractional(rows, missing, rng)
            batches, missing = [*batches, *extra[:, None]], missing - len(extra)
        return batches, missing

    def _assign_remaining(self, epoch: int, past: list[CompletedRun]) -> tuple[list[np.ndarray], int]:
        """Batches of the rows that other settings have left."""
        last = past[-1]
        before = BudgetBatchSampler(
            self.seconds, last.batch_seconds, last.num_replicas,
            seed=self.seed, shuffle=self.shuffle, weights=self.weights, row_cost=self.row_cost,
        )  # fmt: skip
        before.resume(epoch, past)
        rows = np.concatenate(before.batches(epoch)[last.batches * last.num_replicas :])
        batches = self._cut(rows[np.argsort(self._buckets[rows], kind="stable")])
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch, len(past))).permutation(len(batches))
            batches = [batches[index] for index in order]
        return self._split(batches, -len(batches) % self.num_replicas)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of an epoch, in buckets of similar length."""
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
        """More rows with fractional weights; those that the epoch has left out, if there are enough."""
        fractional = self.weights % 1 > 0
        left_out = fractional & (np.bincount(drawn, minlength=len(self.weights)) <= np.floor(self.weights))
        candidates = np.flatnonzero(left_out if left_out.sum() >= number else fractional)
        return rng.choice(candidates, size=number, replace=len(candidates) < number)

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        buckets = self._buckets[rows]
        ends = [*(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(rows)]  # of the runs of one bucket
        cost = (self._longest[buckets[[end - 1 for end in ends]]] + self.row_cost).tolist() if len(rows) else []
        batches = []
        start = run = 0
        while start < len(rows):
            size = int(self._limit / cost[run])
            while size > 1 and cost[run] * size > self._limit:  # the quotient may have been rounded up
                size -= 1
            stop, last = min(start + max(1, size), ends[run]), run
            # A batch may go on with longer rows, as long as all of it fits when padded to them.
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


class Rows:
    """A dataset that is addressed by the keys of `BudgetBatchSampler`.

    Each row gets `seed`, unique to the row and epoch, and `supervised`, false for a filler.

    Args:
        dataset: of `datasets`.
        seed: mixed into the rows' seeds.
    """

    def __init__(self, dataset, seed: int = 0):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict]:
        """The rows of a batch, read in one go."""
        supervised = [key >= 0 for key in keys]
        keys = [key if key >= 0 else -1 - key for key in keys]
        rows = self.dataset.__getitems__([key % len(self.dataset) for key in keys])
        return [
            {**row, "seed": (self.seed, key), "supervised": wanted}
            for row, key, wanted in zip(rows, keys, supervised, strict=True)
        ]
