"""Batches: within the budget, similar lengths, every row once per epoch, the same number per rank, reproducible."""

import time
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from hf_speechllm.data.sampler import ROW_COST, BudgetBatchSampler, KeyedRows


def log_normal(rows, seed=0, longest=30.0):
    """Typical lengths in speech corpora, in seconds."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(5), 0.7, rows), 0.3, longest)


def ranks_of(seconds, budget, num_replicas, epoch=0, **options):
    """Returns the batches (lists of keys) of each rank."""
    assigned = []
    for rank in range(num_replicas):
        sampler = BudgetBatchSampler(seconds, budget, num_replicas, rank, **options)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assigned.append(batches)
    return assigned


def padded_seconds(seconds, batch):
    return len(batch) * max(seconds[index] for index in batch)


@pytest.mark.parametrize("row_cost", [0.0, ROW_COST])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("budget", [30.0, 60.0, 240.0])
def test_no_batch_exceeds_the_budget(budget, shuffle, row_cost):
    seconds = log_normal(2000)
    sampler = BudgetBatchSampler(seconds, budget, shuffle=shuffle, row_cost=row_cost)
    for epoch in range(3):
        assert max(padded_seconds(seconds, batch) for batch in sampler.batches(epoch)) <= budget + 1e-9


def test_row_cost_makes_the_cost_of_batches_similar():
    seconds = log_normal(20000)

    def spread(row_cost):
        batches = BudgetBatchSampler(seconds, 240.0, row_cost=row_cost).batches(0)
        costs = [len(batch) * (max(seconds[batch]) + ROW_COST) for batch in batches]
        return np.std(costs) / np.mean(costs)

    assert spread(ROW_COST) < 0.05 < 0.1 < spread(0.0)


def test_batches_of_the_longest_rows_fill_the_budget_with_any_row_cost():
    batches = BudgetBatchSampler(np.full(40, 30.0), 240.0, row_cost=ROW_COST).batches(0)
    assert [len(batch) for batch in batches] == [8] * 5


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 257, 1000])
def test_every_row_is_used_once_per_epoch_and_all_ranks_do_the_same_number_of_steps(rows, num_replicas):
    seconds = log_normal(rows, seed=rows)
    for epoch, row_cost in ((0, 0.0), (1, ROW_COST), (5, ROW_COST)):
        assigned = ranks_of(seconds, 40.0, num_replicas, epoch, row_cost=row_cost)
        assert len({len(batches) for batches in assigned}) == 1
        keys = [key for batches in assigned for batch in batches for key in batch]
        seen = [key - epoch * rows for key in keys if key >= 0]
        assert sorted(seen) == list(range(rows))
        fillers = [key for key in keys if key < 0]
        # A filler is a row of the same epoch, and exists only if there are fewer rows than ranks.
        assert all(0 <= -1 - key - epoch * rows < rows for key in fillers)
        assert len(fillers) == max(0, num_replicas - rows)
        for batch in (batch for batches in assigned for batch in batches):
            indices = [(key if key >= 0 else -1 - key) - epoch * rows for key in batch]
            assert padded_seconds(seconds, indices) <= 40.0


def test_filler_rows_are_not_supervised():
    """With fewer rows than ranks, some ranks do a step without labels."""
    dataset = Dataset.from_dict({"text": ["a", "b"]})
    rows = KeyedRows(dataset)
    for epoch in (0, 3):
        assigned = ranks_of([1.0, 2.0], 10.0, 5, epoch)
        served = [row for batches in assigned for batch in batches for row in rows.__getitems__(batch)]
        assert len(served) == 5
        assert sorted(row["text"] for row in served if row["supervised"]) == ["a", "b"]
        assert sum(not row["supervised"] for row in served) == 3


def test_seed_of_a_row_depends_on_epoch_and_index():
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    rows = KeyedRows(dataset, seed=7)
    assert len(rows) == 3
    assert rows[4] == {"text": "b", "seed": (7, 4), "supervised": True}
    assert [row["text"] for row in rows.__getitems__([2, 0, 5, -1 - 1])] == ["c", "a", "c", "b"]
    seeds = [row["seed"] for row in rows.__getitems__(list(range(9)))]
    assert len(set(seeds)) == 9  # a different seed in every epoch


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_order_of_batches_does_not_depend_on_the_number_of_ranks(num_replicas):
    seconds = log_normal(1000)
    (alone,) = ranks_of(seconds, 60.0, 1, epoch=2)
    assigned = ranks_of(seconds, 60.0, num_replicas, epoch=2)
    merged = [batch for step in zip(*assigned, strict=True) for batch in step]
    # If the number of batches is not a multiple of the number of ranks, some batches are split in place.
    assert [key for batch in merged for key in batch] == [key for batch in alone for key in batch]
    assert sum(batch in alone for batch in merged) >= len(alone) - (num_replicas - 1)


def test_batches_depend_on_seed_and_epoch():
    seconds = log_normal(500)
    batches = [[list(batch) for batch in BudgetBatchSampler(seconds, 60.0, seed=3).batches(0)] for _ in range(2)]
    assert batches[0] == batches[1]
    composition = {frozenset(batch) for batch in batches[0]}
    for seed, epoch in ((3, 1), (4, 0)):
        other = [list(batch) for batch in BudgetBatchSampler(seconds, 60.0, seed=seed).batches(epoch)]
        assert other != batches[0]
        assert len(composition & {frozenset(batch) for batch in other}) < len(composition) / 2


def test_order_of_batches_is_independent_of_lengths():
    """An order from short to long would make a run forget short rows while it learns long rows."""
    seconds = log_normal(5000)
    batches = BudgetBatchSampler(seconds, 60.0).batches(0)
    means = np.array([seconds[batch].mean() for batch in batches])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1


def test_without_shuffling_rows_are_sorted_by_length():
    seconds = log_normal(300)
    batches = BudgetBatchSampler(seconds, 60.0, shuffle=False).batches(0)
    order = np.concatenate(batches)
    assert (np.diff(seconds[order]) >= 0).all()
    assert sorted(order.tolist()) == list(range(300))


@pytest.mark.parametrize("budget", [60.0, 240.0])
def test_padding_is_under_six_percent_on_speech_like_lengths(budget):
    seconds = log_normal(20_000)
    for epoch in (0, 1):
        batches = BudgetBatchSampler(seconds, budget).batches(epoch)
        padded = sum(padded_seconds(seconds, batch) for batch in batches)
        assert 1 - seconds.sum() / padded < 0.06


def test_batches_are_nearly_full():
    seconds = log_normal(20_000)
    batches = BudgetBatchSampler(seconds, 240.0).batches(0)
    assert sum(padded_seconds(seconds, batch) for batch in batches) / (240.0 * len(batches)) > 0.9


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_weights_set_how_often_a_row_is_used(num_replicas):
    seconds = log_normal(900)
    weights = np.repeat([2.0, 0.5, 1.0], 300)
    counts = Counter()
    halves = []
    for epoch in range(4):
        assigned = ranks_of(seconds, 60.0, num_replicas, epoch, weights=weights)
        keys = [key - epoch * 900 for batches in assigned for batch in batches for key in batch if key >= 0]
        seen = Counter(keys)
        assert all(seen[index] == 2 for index in range(300))
        assert all(seen[index] == 1 for index in range(600, 900))
        half = {index for index in range(300, 600) if seen[index]}
        assert all(seen[index] == 1 for index in half)
        # A few rows may be dropped, so all epochs have the same length.
        assert 140 <= len(half) <= 150
        halves.append(half)
        counts.update(keys)
    assert len({frozenset(half) for half in halves}) == 4  # different rows in each epoch
    assert sum(counts[index] for index in range(300, 600)) == pytest.approx(600, rel=0.05)


def test_fractional_weight_above_one():
    seconds = log_normal(200)
    sampler = BudgetBatchSampler(seconds, 60.0, weights=np.full(200, 1.25))
    seen = Counter(np.concatenate(sampler.batches(0)).tolist())
    assert set(seen.values()) == {1, 2}
    assert 245 <= sum(seen.values()) <= 250


@pytest.mark.parametrize("weights", [None, (2.0, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_all_epochs_have_the_same_length(weights, num_replicas):
    seconds = log_normal(777)
    if weights is not None:
        weights = np.resize(weights, 777)
    lengths = set()
    for epoch in range(12):
        assigned = ranks_of(seconds, 35.0, num_replicas, epoch, weights=weights)
        lengths |= {len(batches) for batches in assigned}
    assert len(lengths) == 1


@pytest.mark.parametrize("weight", [0.5, 0.99, 1.5])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_batches_of_one_row_are_assigned_evenly_with_any_weights(weight, num_replicas):
    seconds, weights = np.full(200, 30.0), np.full(200, weight)
    weights[:10] = 1.0
    for epoch in range(3):
        assigned = ranks_of(seconds, 30.0, num_replicas, epoch, weights=weights)
        assert len({len(batches) for batches in assigned}) == 1
        keys = [key - epoch * 200 for batches in assigned for batch in batches for key in batch]
        assert min(keys) >= 0  # no fillers
        seen = Counter(keys)
        assert all(seen[index] == 1 for index in range(10))
        assert sum(seen[index] for index in range(10, 200)) == pytest.approx(190 * weight, rel=0.1)


def test_rows_that_are_drawn_besides_are_different_while_there_are_enough():
    sampler = BudgetBatchSampler(np.ones(10), 1, weights=[1.5] * 4 + [1.0] * 6)
    drawn = np.array([0, 1, 2, 3, 0, 1])  # 2 and 3 are left out of the sample
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert sorted(sampler._fractional(drawn, 2, rng)) == [2, 3]
        assert sorted(sampler._fractional(drawn, 4, rng)) == [0, 1, 2, 3]
        assert set(sampler._fractional(drawn, 9, rng)) <= {0, 1, 2, 3}


def test_weights_that_leave_no_rows_are_an_error():
    with pytest.raises(ValueError, match="weights are so small"):
        BudgetBatchSampler([1.0, 2.0], 30.0, weights=[0.1, 0.1])


def test_row_longer_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"31\.0 s of audio, the batch budget is 30 s"):
        BudgetBatchSampler([1.0, 31.0], 30.0)


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows"):
        BudgetBatchSampler([], 30.0)


@pytest.mark.parametrize(
    ("rows", "limit"), [pytest.param(500_000, 2.0), pytest.param(5_000_000, 10.0, marks=pytest.mark.slow)]
)
def test_batches_of_many_rows_are_built_quickly(rows, limit):
    seconds = log_normal(rows)
    start = time.process_time()
    sampler = BudgetBatchSampler(seconds, 240.0, num_replicas=7, rank=3)
    sampler.set_epoch(1)
    batches = list(sampler)
    assert time.process_time() - start < limit
    assert len(batches) == len(sampler)


def test_a_few_rows_over_many_ranks_are_split_quickly():
    seconds = np.full(100_000, 1.0)
    start = time.process_time()
    assigned = ranks_of(seconds, 100.0, 64)[0]
    assert time.process_time() - start < 20
    assert len(assigned) == -(-1000 // 64)
