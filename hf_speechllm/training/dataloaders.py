"""Data loaders of a run. The sampler or the stream assigns batches to the ranks, not accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data.dataset import row_seconds
from ..data.sampler import ROW_COST, BudgetBatchSampler, KeyedRows
from ..data.stream_loader import StreamLoader
from ..data.streaming import RowStream
from .arguments import SpeechLLMTrainingArguments
from .loader_workers import ignore_signals, kill_workers_at_exit, worker_context


class BudgetDataLoader(DataLoader):
    """A loader that passes the epoch to the batch sampler: the `Trainer` calls `set_epoch` on loaders only."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of batches."""
        self.batch_sampler.set_epoch(epoch)


def train_loader(args: SpeechLLMTrainingArguments, rows, collator: Callable, weights=None) -> BudgetDataLoader:
    """Builds the loader of this rank for training.

    Args:
        args: of the run.
        rows: a `datasets.Dataset`, see `data.dataset`.
        collator: builds a batch from rows.
        weights: how often an epoch uses each row, shape = (rows,); default 1.
    """
    return batch_loader(args, rows, train_sampler(args, rows, weights, args.world_size), collator)


def train_sampler(args: SpeechLLMTrainingArguments, rows, weights=None, num_replicas: int = 1) -> BudgetBatchSampler:
    """Builds the sampler of this rank for training; arguments as for `train_loader`."""
    return BudgetBatchSampler(
        row_seconds(rows),
        args.per_device_train_batch_seconds,
        num_replicas=num_replicas,
        rank=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        weights=weights,
        row_cost=ROW_COST,
    )


def eval_loader(args: SpeechLLMTrainingArguments, rows, collator: Callable) -> BudgetDataLoader:
    """Builds the loader of this rank for validation, sorted by length; arguments as for `train_loader`."""
    seconds = row_seconds(rows)
    budget = args.per_device_eval_batch_seconds or args.per_device_train_batch_seconds
    sampler = BudgetBatchSampler(
        seconds,
        max(budget, float(seconds.max())),
        num_replicas=args.world_size,
        rank=args.process_index,
        shuffle=False,
    )
    return batch_loader(args, rows, sampler, collator)


def stream_loader(args: SpeechLLMTrainingArguments, stream: RowStream) -> StreamLoader:
    """Builds the loader of this rank for training on a stream."""
    return StreamLoader(stream, **_options(args))


def batch_loader(
    args: SpeechLLMTrainingArguments, rows, sampler: BudgetBatchSampler, collator: Callable
) -> BudgetDataLoader:
    """Builds a loader of the sampler's batches."""
    return BudgetDataLoader(
        KeyedRows(rows, seed=sampler.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        # A loader must not use the default generator, whose state a checkpoint restores.
        generator=torch.Generator(),
        **_options(args),
    )


def _options(args: SpeechLLMTrainingArguments) -> dict[str, Any]:
    options = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
    }
    if args.dataloader_num_workers == 0:
        return options
    kill_workers_at_exit()
    return {
        **options,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "timeout": args.dataloader_timeout_seconds,
        "worker_init_fn": ignore_signals,
        "multiprocessing_context": worker_context(),
    }
