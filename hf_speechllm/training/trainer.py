"""The Hugging Face `Trainer` with batches by audio seconds, a learning rate for each part, and speech in its log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint

from ..checkpoints.publishing import CARD_FILE
from ..data.collator import SpeechLLMCollator
from ..data.dataset import row_seconds
from ..data.loader import StreamLoader
from ..data.sampler import BudgetBatchSampler, Rows
from ..data.stream import RowStream
from ..modeling import PARTS
from .arguments import SpeechLLMTrainingArguments
from .callbacks import TrainingCurve, ValidationTable
from .card import model_card, summarize_data
from .flops import FlopCounter
from .freezing import count_parameters, part_of
from .progress import Progress
from .publishing import publish
from .selection import checkpoints, delete_checkpoints, scores_at, set_up_selection, settle
from .validation import PromptCollator, score_sets

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

    Attributes:
        current_scores: metrics (`eval_...`) of the weights as they are; `None` if they have not been evaluated.
        selection: which weights remained at the end of training, in words; `None` if they are simply the last.

    Raises:
        ValueError: if `--average_best` is asked for with DeepSpeed or FSDP.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *, args, eval_collator: SpeechLLMCollator | None = None, train_weights=None, **kwargs):
        super().__init__(args=args, **kwargs)
        self.eval_collator: SpeechLLMCollator = eval_collator or self.data_collator
        self.train_weights = train_weights
        self.stream_loader: StreamLoader | None = None
        self._resumed_from: Any = None  # folder of a checkpoint
        self.add_callback(TrainingCurve)
        self.add_callback(ValidationTable)
        self.retention_guard = set_up_selection(self)
        self.current_scores: dict[str, float] | None = None
        self.selection: str | None = None
        frame_seconds = self.processing_class.frame_seconds
        columns = getattr(self.train_dataset, "column_names", None) or ()
        cached = PARTS[:2] if "audio_tokens" in columns else PARTS[:1] if "encoder_states" in columns else ()
        if "encoder_states" in columns:
            frame_seconds *= self.processing_class.encoder_downsample_rate
        self.progress = Progress(self.accelerator, frame_seconds, FlopCounter(self.model, cached))

    # Data. The loaders are not given to `accelerator.prepare`: it would shard batches that are dealt already.

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank for training."""
        if isinstance(self.train_dataset, RowStream):
            self.stream_loader = StreamLoader(self.train_dataset, **self._loader_options())
            if self._resumed_from is not None:
                self.stream_loader.load(self._resumed_from)
            return self.stream_loader
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
        return self._eval_loader(eval_dataset, self.eval_collator)

    def get_decoding_dataloader(self, dataset) -> DataLoader:
        """The same batches, as inputs of `generate`; see `validation.PromptCollator`."""
        return self._eval_loader(dataset, PromptCollator(self.eval_collator))

    def _eval_loader(self, eval_dataset, collator: Callable) -> DataLoader:
        seconds = row_seconds(eval_dataset)
        budget = self.args.per_device_eval_batch_seconds or self.args.per_device_train_batch_seconds
        sampler = BudgetBatchSampler(
            seconds,
            max(budget, float(seconds.max())),
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        return self._loader(eval_dataset, sampler, collator)

    def _loader(self, dataset, sampler: BudgetBatchSampler, collator: Callable) -> DataLoader:
        return BudgetDataLoader(
            Rows(dataset, seed=sampler.seed),
            batch_sampler=sampler,
            collate_fn=collator,
            persistent_workers=self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0,
            **self._loader_options(),
        )

    def _loader_options(self) -> dict:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and torch.cuda.is_available(),
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }

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

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As the parent's; leaves the weights that `selection.settle` chooses.

        Raises:
            RetentionError: if the retention guard has ended training before there was a good checkpoint.
        """
        if isinstance(self.train_dataset, RowStream):  # it goes on by its own state; nothing needs to be skipped
            self.args.ignore_data_skip = True
            last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            self._resumed_from = last or resume_from_checkpoint or None
        on_start = self.args.eval_on_start
        if resume_from_checkpoint and self.args.eval_cer:
            self.args.eval_on_start = False  # the base model was scored when the run began
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.eval_on_start = on_start
        result.metrics.update(settle(self))
        return result

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As the parent's."""
        self.current_scores = None
        return super().training_step(*args, **kwargs)

    # Checkpoints

    def load_checkpoint(self, folder: Path) -> None:
        """Loads the weights of a checkpoint, as transformers loads those of the best one."""
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, str(folder)
        try:
            self._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _load_best_model(self) -> None:
        super()._load_best_model()
        name = Path(str(self.state.best_model_checkpoint)).name
        steps = [step for step, path in checkpoints(self.args.output_dir).items() if path.name == name]
        self.current_scores = scores_at(self.state.log_history, steps[0]) if steps else None
        if steps:
            self.selection = f"{name}, the best by {self.args.metric_for_best_model}"

    def _determine_best_metric(self, metrics, trial) -> bool:
        if self.retention_guard is not None and self.retention_guard.stopped:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        if self.stream_loader is not None:
            self.stream_loader.save(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        if self.retention_guard is not None and self.retention_guard.stopped:
            return  # one can't go on from there
        limit = self.args.save_total_limit
        if self.args.stops_at_retention_loss:
            self.args.save_total_limit = None  # what is deleted is decided below
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and (self.args.stops_at_retention_loss or self.args.keep_best_checkpoints):
            delete_checkpoints(self)

    # Progress

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the parent's; measures the wait for data, the audio and its padding."""
        start = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.progress.add_batches(batches, time.perf_counter() - start)
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the parent's; counts tokens that are predicted right."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.progress.add_tokens(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each line of training: token accuracy, audio seconds per second (all ranks), padding and waiting
        share."""
        if self.stream_loader is not None:  # the parent counts from the last start on
            self.state.epoch = self.state.global_step / self.state.max_steps
        if "loss" in logs:
            logs.update(self.progress.summary())
            if self.stream_loader is not None and self.stream_loader.bad_rows:
                logs["bad_rows"] = self.stream_loader.bad_rows
        elif "train_runtime" in logs and self.args.device.type == "cuda":
            logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        super().log(logs, start_time)

    # Validation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores validation sets and logs the metrics, all sets in one line.

        Args:
            eval_dataset: rows, or a dict of them by name, or such a name; default what the trainer was given.
            ignore_keys: without effect.
            metric_key_prefix: of the metrics' names.

        Returns:
            `eval_loss`, `eval_token_accuracy`, and with `--eval_cer` `eval_cer`, `eval_substitutions`, ...; of several
            sets the same as `eval_NAME_loss`, ..., and the means over the sets, each counting alike, but not of the
            set of `--retention_file`.
        """
        metrics = self.score(eval_dataset, metric_key_prefix)
        self.log(metrics)
        if eval_dataset is None and metric_key_prefix == "eval":
            self.current_scores = dict(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, eval_dataset=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As `evaluate`, without logging."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        sets = self.eval_dataset[sets] if isinstance(sets, str) else sets
        began = time.perf_counter()
        metrics = score_sets(self, sets if isinstance(sets, dict) else {"": sets}, metric_key_prefix)
        self.progress.leave_out(time.perf_counter() - began)
        return metrics

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
            summarize_data(self.train_dataset, self.eval_dataset),
            self.state.log_history,
            scores=self.current_scores,
            selection=self.selection,
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
