"""Loaders of a trainer's batches: dealt out among the ranks by `BudgetBatchSampler` or a stream, not by accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from ..data.dataset import row_seconds
from ..data.sampler import ROW_COST, BudgetBatchSampler, Rows
from ..data.stream_loader import StreamLoader
from .faults import SparingCollator
from .preemption import end_workers_at_exit, ignore_in_worker

if TYPE_CHECKING:
    from .trainer import SpeechLLMTrainer


class BudgetDataLoader(DataLoader):
    """A loader that hands the epoch on to its batch sampler: the Trainer calls `set_epoch` on loaders alone."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is dealt next."""
        self.batch_sampler.set_epoch(epoch)


def train_loader(trainer: SpeechLLMTrainer) -> BudgetDataLoader:
    """Batches of this rank for training on a dataset."""
    args, collator = trainer.args, trainer.data_collator
    sampler = BudgetBatchSampler(
        row_seconds(trainer.train_dataset),
        args.per_device_train_batch_seconds,
        num_replicas=args.world_size,
        rank=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        weights=trainer.train_weights,
        row_cost=ROW_COST,
    )
    if trainer.reads_recordings:
        collator = SparingCollator(collator)
    return _loader(trainer, trainer.train_dataset, sampler, collator)


def eval_loader(trainer: SpeechLLMTrainer, dataset, collator: Callable) -> BudgetDataLoader:
    """Batches of this rank for validation, sorted by length."""
    args, seconds = trainer.args, row_seconds(dataset)
    budget = args.per_device_eval_batch_seconds or args.per_device_train_batch_seconds
    sampler = BudgetBatchSampler(
        seconds,
        max(budget, float(seconds.max())),
        num_replicas=args.world_size,
        rank=args.process_index,
        shuffle=False,
    )
    return _loader(trainer, dataset, sampler, collator)


def stream_loader(trainer: SpeechLLMTrainer) -> StreamLoader:
    """Batches of this rank for training on a stream."""
    return StreamLoader(trainer.train_dataset, **_options(trainer))


def _loader(trainer: SpeechLLMTrainer, dataset, sampler: BudgetBatchSampler, collator: Callable) -> BudgetDataLoader:
    args = trainer.args
    return BudgetDataLoader(
        Rows(dataset, seed=sampler.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        # Of its own: the default one is the model's, and must be left as a checkpoint has it.
        generator=torch.Generator(),
        **_options(trainer),
    )


def _options(trainer: SpeechLLMTrainer) -> dict:
    args = trainer.args
    end_workers_at_exit()
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "prefetch_factor": args.dataloader_prefetch_factor,
        "timeout": args.dataloader_timeout_seconds if args.dataloader_num_workers else 0,
        "worker_init_fn": ignore_in_worker,
    }
