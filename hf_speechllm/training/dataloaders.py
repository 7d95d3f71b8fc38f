"""Data loaders of a run. The sampler or the stream assigns batches to the ranks, not accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data.augmentation_options import AugmentationOptions
from ..data.collator import SpeechLLMCollator
from ..data.dataset import row_seconds
from ..data.sampler import BudgetBatchSampler, KeyedRows, budget_before_augmentation
from ..data.stream_loader import StreamLoader
from ..data.streaming import RowStream
from ..model.native_families import fixed_seconds, max_feature_frames
from ..model.processing import SpeechLLMProcessor
from .arguments import SpeechLLMTrainingArguments
from .checkpointing.position import Position
from .loader_workers import ignore_signals, kill_workers_at_exit, worker_context
from .unreadable_rows import SkipUnreadableCollator


class BudgetDataLoader(DataLoader):
    """A loader that passes the epoch to the batch sampler: the `Trainer` calls `set_epoch` on loaders only."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of batches."""
        self.batch_sampler.set_epoch(epoch)


def training_collator(
    args: SpeechLLMTrainingArguments,
    augmentation: AugmentationOptions | None,
    processing_class: SpeechLLMProcessor,
    data_collator: SpeechLLMCollator | None = None,
    model: Any = None,
    **kwargs: Any,
) -> SpeechLLMCollator:
    """Returns the collator of a trainer for training; adds the options of augmentation to the options of the run.

    Args:
        args: of the run.
        augmentation: options; default: no augmentation, or that of `data_collator`.
        processing_class, data_collator, model: arguments of the trainer.
        **kwargs: other arguments of the trainer, ignored.

    Raises:
        ValueError: if both `augmentation` and `data_collator` are given, or a source of augmentation is missing.
    """
    if data_collator is not None:
        if augmentation is not None:
            raise ValueError("augmentation and data_collator are both given; use SpeechLLMCollator.augmenting")
        return data_collator
    if augmentation is not None:
        args.run_options = {**args.run_options, **vars(augmentation)}  # compared when a run resumes
    limits = (math.inf, 0.0) if model is None else (max_feature_frames(model.config), fixed_seconds(model.config))
    return SpeechLLMCollator.augmenting(processing_class, augmentation or AugmentationOptions(), *limits)


def train_loader(
    args: SpeechLLMTrainingArguments, rows, collator: SpeechLLMCollator, weights=None, skip_unreadable: bool = False
) -> BudgetDataLoader:
    """Builds the loader of this rank for training.

    Args:
        args: of the run.
        rows: a `datasets.Dataset`, see `data.dataset`.
        collator: builds a batch from rows.
        weights: how often an epoch uses each row, shape = (rows,); default 1.
        skip_unreadable: whether to skip rows with unreadable recordings.
    """
    sampler = train_sampler(args, rows, collator, weights, args.world_size)
    return batch_loader(args, rows, sampler, SkipUnreadableCollator(collator) if skip_unreadable else collator)


def train_sampler(
    args: SpeechLLMTrainingArguments, rows, collator: SpeechLLMCollator, weights=None, num_replicas: int = 1
) -> BudgetBatchSampler:
    """Builds the sampler of this rank for training; arguments as for `train_loader` and `BudgetBatchSampler`."""
    seconds = row_seconds(rows)
    return BudgetBatchSampler(
        seconds,
        budget_before_augmentation(seconds, args.per_device_train_batch_seconds, collator.largest_stretch),
        num_replicas=num_replicas,
        rank=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        weights=weights,
        row_cost=collator.row_cost_of(rows),
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


def step_rows(loader: BudgetDataLoader | None, position: Position | None, number: int) -> Callable[[], Iterable[Any]]:
    """Returns a function that returns the rows of the last batches of a rank; for a stream, empty lists.

    Args:
        loader: training loader; `None` for a stream.
        position: position in its rows.
        number: number of batches.
    """
    if position is None or loader is None:
        return lambda: [[]] * number
    rows, keys = loader.dataset, position.last_batches(number)
    return lambda: (rows.__getitems__(batch) for batch in keys())
