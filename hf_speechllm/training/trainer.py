"""The Hugging Face `Trainer` with batches by audio seconds, a learning rate for each part, and speech in its log."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import row_seconds
from ..data.sampler import BudgetBatchSampler, Rows
from .arguments import SpeechLLMTrainingArguments
from .callbacks import TrainingCurve
from .card import CARD_FILE, DataSummary, model_card
from .freezing import count_parameters, part_of
from .publishing import publish

logger = logging.getLogger(__name__)


class BudgetDataLoader(DataLoader):
    """A loader that hands the epoch on to its batch sampler: the Trainer calls `set_epoch` on loaders alone."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is dealt next."""
        self.batch_sampler.set_epoch(epoch)


class SpeechLLMTrainer(Trainer):
    """Trains a speech LLM on datasets of `data.dataset`.

    Args:
        args: see `SpeechLLMTrainingArguments`.
        eval_collator: builds validation batches; default the training collator. Give one without augmentation.
        train_weights: how often each training row is seen in an epoch, shape = (rows,); default 1.
        **kwargs: as for `Trainer`; `processing_class` must be the processor.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *, args, eval_collator: Callable | None = None, train_weights=None, **kwargs):
        super().__init__(args=args, **kwargs)
        self.eval_collator = eval_collator or self.data_collator
        self.train_weights = train_weights
        self.add_callback(TrainingCurve)
        self._frame_seconds = self.processing_class.frame_seconds
        self._reset_progress()

    # Data. The loaders are not given to `accelerator.prepare`: it would shard batches that are dealt already.

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank for training."""
        sampler = BudgetBatchSampler(
            row_seconds(self.train_dataset),
            self.args.per_device_train_batch_seconds,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            weights=self.train_weights,
        )
        return self._loader(self.train_dataset, sampler, self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Batches of this rank for validation, sorted by length."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        seconds = row_seconds(eval_dataset)
        budget = self.args.per_device_eval_batch_seconds or self.args.per_device_train_batch_seconds
        sampler = BudgetBatchSampler(
            seconds,
            max(budget, float(seconds.max())),
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        return self._loader(eval_dataset, sampler, self.eval_collator)

    def _loader(self, dataset, sampler: BudgetBatchSampler, collator: Callable) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return BudgetDataLoader(
            Rows(dataset, seed=sampler.seed),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of the dataset, over all ranks."""
        return len(dataloader.dataset)

    # Optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer | None:
        """AdamW (or what `--optim` says) with a group for each part, with and without weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], dict] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            part, decay = part_of(name), name in decayed
            rate = getattr(self.args, f"{part}_learning_rate")
            group = groups.setdefault(
                (part, decay),
                {
                    "params": [],
                    "lr": self.args.learning_rate if rate is None else rate,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                },
            )
            group["params"].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer

    # Progress: counted on the device and read only when a line is logged, so that no step waits for the GPU.

    def _reset_progress(self) -> None:
        self._correct = torch.zeros((), device=self.args.device)
        self._tokens = torch.zeros((), device=self.args.device)
        self._audio_seconds = 0.0
        self._padded_seconds = 0.0
        self._waited_seconds = 0.0
        self._started = time.perf_counter()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the parent's; measures the wait for data, the audio and its padding."""
        start = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited_seconds += time.perf_counter() - start
        for batch in batches:
            mask = batch["input_features_mask"]
            self._audio_seconds += int(mask.sum()) * self._frame_seconds
            self._padded_seconds += mask.numel() * self._frame_seconds
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the parent's; counts tokens that are predicted right."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._tokens += outputs.num_label_tokens
            self._correct += outputs.token_accuracy * outputs.num_label_tokens
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each line of training: token accuracy, audio seconds per second (all ranks), padding and waiting
        share."""
        if "loss" in logs:
            elapsed = time.perf_counter() - self._started
            counts = torch.stack(
                [
                    self._correct.double(),
                    self._tokens.double(),
                    *torch.tensor(
                        [self._audio_seconds, self._padded_seconds, self._waited_seconds],
                        dtype=torch.float64,
                        device=self.args.device,
                    ),
                ]
            )
            correct, tokens, audio, padded, waited = self.accelerator.reduce(counts, "sum").tolist()
            logs["token_accuracy"] = round(correct / max(tokens, 1), 4)
            logs["audio_seconds_per_second"] = round(audio / elapsed, 1)
            logs["padding_share"] = round(1 - audio / max(padded, 1e-9), 4)
            logs["data_wait_share"] = round(waited / elapsed / self.args.world_size, 4)
            self._reset_progress()
        elif "train_runtime" in logs and self.args.device.type == "cuda":
            logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        super().log(logs, start_time)

    # Validation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss and accuracy over supervised tokens (not over batches, which differ in size), summed over
        ranks."""
        model = (
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            if not self.is_in_train
            else self.model_wrapped
        )
        model.eval()
        began = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs)
            count = outputs.num_label_tokens
            sums += torch.stack([outputs.loss * count, outputs.token_accuracy * count, count]).double()
        loss, correct, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(tokens, 1),
            f"{metric_key_prefix}_token_accuracy": correct / max(tokens, 1),
        }
        self._started += time.perf_counter() - began  # validation is not training time
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    # Publishing

    def create_model_card(self, language=None, license=None, **kwargs) -> None:
        """Writes our model card into the output folder; other options of the parent are without effect.

        A card that can't be written is reported, and doesn't end the run.
        """
        if not self.is_world_process_zero():
            return
        card = model_card(
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            self.args,
            count_parameters(self.accelerator.unwrap_model(self.model)),
            self._data_summaries(),
            self.state.log_history,
            epochs=self.state.epoch,
            steps=self.state.global_step,
            language=[language] if isinstance(language, str) else language,
            licence=license,
        )
        path = Path(self.args.output_dir) / CARD_FILE
        try:
            path.write_text(card, encoding="utf-8")
        except OSError as error:
            logger.warning("%s can't be written: %s", path, error)

    def _data_summaries(self) -> list[DataSummary]:
        known = "file" in self.train_dataset.column_names
        files = self.train_dataset["file"] if known else ["training"] * len(self.train_dataset)
        seconds = defaultdict(list)
        for file, duration in zip(files, row_seconds(self.train_dataset), strict=True):
            seconds[file].append(float(duration))
        sets = [DataSummary(Path(file).name, "training", len(rows), sum(rows)) for file, rows in seconds.items()]
        validation = self.eval_dataset or {}
        for name, dataset in (validation if isinstance(validation, dict) else {"validation": validation}).items():
            sets.append(DataSummary(name, "validation", len(dataset), float(row_seconds(dataset).sum())))
        return sets

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """Saves and publishes the model; unlike the parent's, without optimizer states and `training_args.bin`.

        Args:
            blocking: must be true.
            private: default `args.hub_private_repo`.
            **kwargs: for `create_model_card`.
        """
        if not blocking:
            raise ValueError("push_to_hub only returns when all is uploaded; leave `blocking` true")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        folder = self.args.output_dir
        logger.info(
            "publishing %s as %s; if this breaks off: python recipes/push_to_hub.py --input %s --hub_model_id %s",
            folder, self.hub_model_id, folder, self.hub_model_id,
        )  # fmt: skip
        revision = revision or self.args.hub_revision
        return publish(folder, self.hub_model_id, private, token, revision, commit_message or "End of training")
