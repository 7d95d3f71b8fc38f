"""The Hugging Face `Trainer` with batches by audio seconds, learning rates by part, and audio metrics in the log.

One training step, top to bottom: `get_batch_samples`, `training_step`, `compute_loss`, `_clip_grad_norm`, `log`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.collator import ENCODED_COLUMNS
from ..data.stream_loader import StreamLoader
from ..data.streaming import RowStream
from ..fast.fsdp import clip_shards, sharded_optimizer
from ..files import apply_umask
from ..locks import acquire_output_lock
from ..model.chat import IGNORE_INDEX
from ..model.native_families import is_native
from .arguments import SpeechLLMTrainingArguments
from .batch_budget import find_batch_seconds
from .callbacks import TrainingCurve, ValidationTable
from .checkpointing.comparison import check_dependencies
from .checkpointing.dependencies import describe_engine, describe_run, write_record
from .checkpointing.lineage import CheckpointLineage
from .checkpointing.manifest import last_complete
from .checkpointing.position import Position, ShiftedSchedule
from .checkpointing.retention import RetentionGuard
from .checkpointing.selection import complete_checkpoints, scores_at, select_final_weights
from .checkpointing.verification import CheckpointVerifier
from .checkpointing.weights import load_weights
from .checkpointing.writer import CheckpointWriter, remove_partial_checkpoints, save_callback_states
from .dataloaders import BudgetDataLoader, step_rows, stream_loader, train_loader, training_collator
from .device import to_device
from .errors import Preempted
from .loader_workers import explain_loader_faults
from .lora import uses_lora
from .non_finite import NonFiniteStepGuard
from .out_of_memory import run_in_halves
from .parameter_groups import optimized_parts, parameter_groups
from .preemption import Preemption
from .progress import Progress
from .progress_lines import TrainingLines, replace_progress
from .publishing import PublishingTrainer
from .speed import attention_context, check_encoder_passes, enable_fast_paths
from .trackers import PartValues, connect_trackers
from .unreadable_rows import UnreadableRows
from .validation import Validator

logger = logging.getLogger(__name__)


class SpeechLLMTrainer(PublishingTrainer):
    """Trains a speech LLM on prepared rows, see `data.dataset`.

    Args:
        args: see `SpeechLLMTrainingArguments`.
        augmentation: augmentation of the training rows; not together with `data_collator`.
        eval_collator: builds validation batches; default: the training collator without augmentation.
        train_weights: how often an epoch uses each training row, shape = (rows,); default 1.
        **kwargs: as for `Trainer`; `processing_class` must be the processor. The default `data_collator` is a
            `SpeechLLMCollator` with `augmentation`.

    Attributes:
        position: position in the training rows; `None` for a stream, which has a separate state.
        dependencies: inputs of the run, see `describe_run`.
        lineage: checkpoints from which the run continues.
        initial_step: number of steps before this process started.
        current_scores: metrics (`eval_...`) of the current weights; `None` before an evaluation.
        selection: text that says which weights are final; `None` for the last weights.

    Raises:
        ValueError: if an option is not supported with DeepSpeed or FSDP, or the rows do not support the augmentation.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *, args, augmentation=None, eval_collator=None, train_weights=None, **kwargs):
        if args.max_grad_norm == 0:
            args.max_grad_norm = math.inf  # measures the norm without clipping
        kwargs["data_collator"] = training_collator(args, augmentation, **kwargs)
        super().__init__(args=args, **kwargs)
        self.data_collator.use_training_rows(self.train_dataset)
        eval_collator = eval_collator or self.data_collator.without_augmentation()
        self.train_weights = train_weights
        self.position: Position | None = None
        self.dependencies: dict[str, Any] = {}
        self.lineage = CheckpointLineage()
        self.initial_step = 0
        self.stream_loader: StreamLoader | None = None
        self.train_loader: BudgetDataLoader | None = None
        self.current_scores: dict[str, float] | None = None
        self.selection: str | None = None
        self.last_inputs: dict[str, torch.Tensor] | None = None  # latest training batch
        self._resumed_from: str | None = None  # checkpoint folder
        self.part_values = PartValues(self.args)
        enable_fast_paths(self.args, self.model, self.accelerator, (self.data_collator, eval_collator))

        train_rows: Any = self.train_dataset
        columns = set(getattr(train_rows, "column_names", None) or ())
        if columns.isdisjoint(ENCODED_COLUMNS):
            check_encoder_passes(self.model, self.accelerator)
        self.reads_recordings = not isinstance(train_rows, RowStream) and columns.isdisjoint(
            {"features", *ENCODED_COLUMNS}
        )
        self.unreadable = UnreadableRows(self.args.max_bad_fraction, len(train_rows) if self.reads_recordings else 0)
        self.guard = NonFiniteStepGuard(
            self.args.output_dir, self.args.process_index, self.args.max_bad_steps, self.data_collator
        )
        self.progress = Progress(self.accelerator, self.model, self.processing_class, columns)
        self.validator = Validator(self.args, self.accelerator, self.processing_class, eval_collator)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self.writer = CheckpointWriter(self, sharded)
        self.verifier = CheckpointVerifier(self.accelerator, self.args, sharded)
        self.preemption = Preemption()
        self.retention_guard: RetentionGuard | None = None
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args = self.args
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.retention_file is not None:
            self.retention_guard = RetentionGuard(args.max_retention_loss, args.retention_action == "stop")
            self.add_callback(self.retention_guard)
        schedule = ShiftedSchedule(lambda: self.position)
        curve = TrainingCurve(self.validator.rate_names)
        for callback in (self.lineage, schedule, curve, ValidationTable(), self.preemption):
            self.add_callback(callback)
        replace_progress(self.callback_handler.callbacks, TrainingLines(self.validator.rate_names))
        connect_trackers(self.callback_handler.callbacks, self.validator)

    # Data. Accelerate does not prepare the loaders, because the batches are already assigned to the ranks.

    def get_train_dataloader(self) -> DataLoader:
        """Returns the training batches of this rank."""
        if isinstance(self.train_dataset, RowStream):
            self.stream_loader = stream_loader(self.args, self.train_dataset)
            if self._resumed_from is not None:
                self.stream_loader.load(self._resumed_from)
            return self.stream_loader
        rows, collator = self.train_dataset, self.data_collator
        if not self.args.per_device_train_batch_seconds:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            self.args.per_device_train_batch_seconds = find_batch_seconds(
                self.args, self.model, rows, collator, self._probe, sharded
            )
        self.train_loader = train_loader(self.args, rows, collator, self.train_weights, self.reads_recordings)
        self.position = Position(self.train_loader.batch_sampler, self.args)
        if self._resumed_from is not None:
            self.position.load(Path(self._resumed_from), same_ranks=self.is_deepspeed_enabled)
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Returns the validation batches of this rank, sorted by length."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        return self.validator.loader(eval_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Returns the number of rows over all ranks."""
        return len(dataloader.dataset)

    def _probe(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        with self.accelerator.autocast():
            self.model(**to_device(batch, self.args.device)).loss.backward()

    # Optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer | None:
        """Creates the optimizer of `--optim` with parameter groups by part, with and without weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        groups = parameter_groups(model, self.args, self.get_decay_parameter_names(model))
        self.part_values.use_parts(optimized_parts(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.is_fsdp_enabled and self.args.fast == "auto":
            optimizer_class = sharded_optimizer(optimizer_class)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Creates the learning rate schedule; after a change of the number of ranks, for the corrected total steps."""
        offset = self.position.schedule_offset if self.position is not None else 0
        return super().create_scheduler(num_training_steps + offset, optimizer)

    # A training step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Returns the batches of one optimizer step, and the number of their supervised tokens over all ranks.

        Measures waiting time, audio and padding. Unlike the method of the parent class, the count makes no host-device
        sync: with one process, the count stays on the host.
        """
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        for batch in batches:
            self.unreadable.collect(batch)
        self.current_flos += self.progress.add_batches(batches, time.perf_counter() - started)
        if not batches or "labels" not in batches[0]:
            return batches, None
        tokens = sum((batch["labels"][..., 1:] != IGNORE_INDEX).sum() for batch in batches)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            tokens = tokens.pin_memory() if device.type == "cuda" else tokens
            tokens = self.accelerator.gather(tokens.to(device, non_blocking=True)).sum()
        return batches, tokens

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Runs the forward and backward pass of one batch; splits the batch if memory is insufficient on one GPU."""
        self.current_scores = None
        self.last_inputs = inputs = to_device(inputs, self.args.device)
        self.guard.start_batch(model)
        parent = super().training_step
        loss = run_in_halves(
            lambda part: parent(model, part, num_items_in_batch),
            inputs,
            self.processing_class,
            lambda: self.model.zero_grad(set_to_none=True),
            may_split=self.args.world_size == 1
            and self.args.gradient_accumulation_steps == 1
            and not is_native(self.model),
        )
        if self.position is not None:
            self.position.consumed += 1
        return self.guard.add_loss(loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes the loss and counts correct tokens."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.progress.add_tokens(outputs)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Returns 0: `get_batch_samples` counts the operations. The parent class ignores the audio and is slow."""
        return 0

    def _clip_grad_norm(self, model):
        norm = None
        if self.is_fsdp_enabled and self.args.fast == "auto":
            norm = clip_shards(model.parameters(), self.args.max_grad_norm)
        if norm is None:
            norm = super()._clip_grad_norm(model)
        if not self.is_deepspeed_enabled:  # DeepSpeed has no gradients after its step
            self.part_values.measure(self.state, model, norm)
        rows = step_rows(self.train_loader, self.position, len(self.guard.losses))
        self.guard.check(self.state.global_step + 1, norm, model, self.optimizer, rows)
        return norm

    # Progress

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds throughput, token accuracy, and numbers of skipped rows and steps to training log lines."""
        if self.stream_loader is not None:  # the parent class counts from the last start
            self.state.epoch = self.state.global_step / self.state.max_steps
        elif self.position is not None and self.is_in_train:
            self.state.epoch = self.position.epochs
        if "loss" in logs and "learning_rate" in logs:  # not a line of the user
            logs.update(self.part_values.values(logs["learning_rate"]))
            logs.update(self.progress.summary())
            logs.update(self._skipped())
        elif "train_runtime" in logs:
            rows = self.accelerator.reduce(torch.tensor(self.progress.rows, device=self.args.device), "sum").item()
            # The parent class assumes 8 rows per batch.
            logs["train_samples_per_second"] = round(rows / logs["train_runtime"], 3)
            if self.args.device.type == "cuda":
                logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        super().log(logs, start_time)

    def _skipped(self) -> dict[str, int]:
        """Counts the rows and steps that were skipped so far; must be called by all ranks.

        Raises:
            BadDataError: if too many rows of all ranks are unreadable.
        """
        counts = {}
        self.guard.resolve()
        if self.reads_recordings:
            unreadable = torch.tensor(len(self.unreadable.places), device=self.args.device)
            counts["bad_rows"] = int(self.accelerator.reduce(unreadable, "sum"))
            self.unreadable.check(counts["bad_rows"])
        elif self.stream_loader is not None:
            counts["bad_rows"] = self.stream_loader.bad_rows
        counts["bad_steps"] = self.guard.count
        return {name: count for name, count in counts.items() if count}

    # A run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trains the model; the final weights are those of `select_final_weights`.

        Args:
            resume_from_checkpoint: checkpoint folder; `True` for the last complete checkpoint in the output folder.
            **kwargs: of the parent class.

        Raises:
            RetentionError: if the retention guard has ended training before a good checkpoint was saved.
            Preempted: if a signal has ended training, after saving a checkpoint.
            SaveError: if a checkpoint cannot be written; `VerificationError` if the first checkpoint is unusable.
            FaultError: if too many steps are not finite, or a loader process dies or hangs.
            BadDataError: if too many recordings become unreadable.
            CheckpointError: if the checkpoint does not fit this run, see `check_dependencies`.
            ValueError: if another run uses the output folder.
        """
        if self.args.should_save:
            acquire_output_lock(self.args.output_dir)
            remove_partial_checkpoints(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete(self.args.output_dir) or "") or None
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._check_dependencies()
        if isinstance(self.train_dataset, RowStream):  # the stream restores the position; nothing must be skipped
            self.args.ignore_data_skip = True
        on_start = self.args.eval_on_start
        if resume_from_checkpoint and self.args.eval_cer:
            self.args.eval_on_start = False  # the base model was scored at the start of the run
        faults = explain_loader_faults(self.args.dataloader_timeout_seconds)
        try:
            with faults, self.preemption.handle_signals(), attention_context(self.args):
                result = super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        finally:
            self.args.eval_on_start = on_start
        result.metrics.update(select_final_weights(self))
        return result

    def _check_dependencies(self) -> None:
        self.dependencies = describe_run(
            self.args, self.model, self.processing_class, self.train_dataset, self.train_weights, self.eval_dataset,
            describe_engine(self.accelerator),
        )  # fmt: skip
        self.lineage.checkpoint = Path(self._resumed_from) if self._resumed_from else None
        if self.lineage.checkpoint is not None:
            check_dependencies(self.args, self.dependencies, self.lineage.checkpoint, self.train_dataset)

    def _finalize_training(self, *args) -> TrainOutput:
        self.guard.resolve()
        self.writer.finish()
        if self.preemption.stopped:
            self.is_in_train = False
            raise Preempted(
                f"ended by a signal after step {self.state.global_step}; a checkpoint is saved in "
                f"{self.args.output_dir}; resume with --resume_from_checkpoint last"
            )
        # Hidden from the parent class, which warns about frozen weights that a checkpoint lacks.
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        try:
            output = super()._finalize_training(*args)
        finally:
            self.state.best_model_checkpoint = best
        if best is not None and self.args.load_best_model_at_end:
            self.load_checkpoint(Path(best))
            metric = self.args.metric_for_best_model.replace("cer", "error rate").replace("_", " ")
            self.selection = f"{Path(best).name}, the best by {metric}"
        return output

    # Resuming, with the `Position` of a checkpoint: no row is loaded only to be skipped, repeated, or left out.

    def set_initial_training_values(self, args, dataloader):
        """Returns the values of the parent class; for a resumed run, with the remaining epochs and steps."""
        values = list(super().set_initial_training_values(args, dataloader))
        if self._resumed_from is None:
            return tuple(values)
        step = TrainerState.load_from_json(str(Path(self._resumed_from) / "trainer_state.json")).global_step
        if self.position is not None:
            values[0], values[-1] = self.position.remaining_steps(step)
        elif step >= self.args.max_steps:
            values[0] = 0  # a stream would never end
        return tuple(values)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        epoch, steps = super()._init_training_state(*args, **kwargs)
        self.initial_step = self.state.global_step
        self.state.compute_steps(self.args, self.state.max_steps)  # options such as --save_steps may have changed
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and self.args.early_stopping_patience is not None:
                callback.early_stopping_patience = self.args.early_stopping_patience
        if self.position is None or self._resumed_from is None:
            return epoch, steps
        return self.position.epoch, 0  # the sampler skips consumed batches

    def _run_epoch(self, **kwargs) -> None:
        if self.position is not None:
            self.position.start_epoch(kwargs["epoch"])
            left = self.position.num_left
            kwargs["steps_in_epoch"] = left
            kwargs["num_update_steps_per_epoch"] = -(-left // self.args.gradient_accumulation_steps)
        super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.writer.sharded or uses_lora(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))

    # Checkpoints

    def load_checkpoint(self, folder: Path) -> None:
        """Loads the weights of a checkpoint of this run."""
        if self.writer.sharded or uses_lora(self.model):
            best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, str(folder)
            try:
                self._load_best_model()
            finally:
                self.state.best_model_checkpoint = best
        else:
            load_weights(self.model, folder)
        steps = [step for step, path in complete_checkpoints(self.args.output_dir).items() if path.name == folder.name]
        self.current_scores = scores_at(self.state.log_history, steps[0]) if steps else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; files get default permissions."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            apply_umask(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        if self.retention_guard is None or not self.retention_guard.stopped:  # otherwise no run can resume from there
            self.store_flos()
            with self.progress.paused():
                self.writer.save()

    def write_rank_state(self, folder: Path) -> None:
        """Writes the state of this rank into a checkpoint: random state, position in a stream."""
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.stream_loader is not None:
            self.stream_loader.save(folder)

    def write_run_state(self, folder: Path) -> None:
        """Writes the state of the run into a checkpoint: logs, position in the rows, dependencies, lineage."""
        save_callback_states(self.state, (*self.callback_handler.callbacks, self.control))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.position is not None:
            self.position.save(folder)
        write_record(self.dependencies, self.args, folder)
        self.lineage.save(folder)

    def write_weights(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes weights into a checkpoint."""
        self._save(str(folder), state_dict=weights)

    def write_shards(self, folder: Path) -> None:
        """Writes weights and optimizer of a sharded model into a checkpoint; must be called by all ranks."""
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))

    def verify_checkpoint(self, folder: Path) -> None:
        """Raises a `VerificationError` if a checkpoint differs from the model in memory."""
        if self.last_inputs is not None:
            self.verifier.verify(folder, self.model_wrapped, self.last_inputs)

    # Validation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores validation sets and logs the metrics of all sets in one line.

        Args:
            eval_dataset: rows, a dict of rows by name, or a name; default the `eval_dataset` of the trainer.
            ignore_keys: ignored.
            metric_key_prefix: of the metric names.

        Returns:
            `eval_loss`, `eval_token_accuracy`, and with `--eval_cer` `eval_cer`, `eval_substitutions`, ... For several
            sets `eval_NAME_loss`, ..., and means with equal weights, without the set of `--retention_file`.
        """
        metrics = self.score(eval_dataset, metric_key_prefix)
        self.log(metrics)
        if eval_dataset is None and metric_key_prefix == "eval":
            self.current_scores = dict(metrics)
        with self.progress.paused():  # curve, table, transcripts
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, eval_dataset=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores validation sets without logging; arguments as for `evaluate`."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        sets = self.eval_dataset[sets] if isinstance(sets, str) else sets
        sets = sets if isinstance(sets, dict) else {"": sets}
        with self.progress.paused(), attention_context(self.args):
            return self.validator.score(self._evaluated_model(), sets, metric_key_prefix, self.state.global_step)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Computes mean loss and accuracy over the supervised tokens of all ranks."""
        metrics = self.validator.losses(self._evaluated_model(), dataloader, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def _evaluated_model(self):
        if self.is_in_train:
            return self.model_wrapped
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)
