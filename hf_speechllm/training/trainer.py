"""The Hugging Face `Trainer` with batches by audio seconds, a learning rate for each part, and speech in its log.

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

from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..data.stream_loader import StreamLoader
from ..data.streaming import RowStream
from ..fast.fsdp import clip_shards, sharded_optimizer
from ..files import apply_umask
from ..formats.checkpoint import CheckpointError
from ..locks import acquire_output_lock
from ..model.chat import IGNORE_INDEX
from ..model.modeling import PARTS
from .arguments import SpeechLLMTrainingArguments
from .batch_budget import find_batch_seconds
from .callbacks import TrainingCurve, ValidationTable
from .checkpointing.comparison import check_dependencies
from .checkpointing.course import Course
from .checkpointing.dependencies import describe_engine, describe_run, write_record
from .checkpointing.manifest import last_complete
from .checkpointing.position import Position, ShiftedSchedule
from .checkpointing.retention import RetentionGuard
from .checkpointing.selection import checkpoints, scores_at, select_final_weights
from .checkpointing.verification import CheckpointVerifier
from .checkpointing.weights import load_weights
from .checkpointing.writer import CheckpointWriter, remove_partial_checkpoints, save_callback_states
from .dataloaders import BudgetDataLoader, stream_loader, train_loader
from .device import to_device
from .errors import Preempted
from .flops import FlopCounter
from .loader_workers import loader_fault
from .lora import uses_lora
from .non_finite import NonFiniteStepGuard
from .out_of_memory import run_in_halves
from .parameter_groups import parameter_groups
from .preemption import Preemption
from .progress import Progress
from .publishing import PublishingTrainer
from .speed import attention_setting, set_up_speed
from .unreadable_rows import SkipUnreadableCollator, UnreadableRows
from .validation import Validator

logger = logging.getLogger(__name__)


class SpeechLLMTrainer(PublishingTrainer):
    """Trains a speech LLM on datasets of `data.dataset`.

    Args:
        args: see `SpeechLLMTrainingArguments`.
        eval_collator: builds validation batches; default the training collator. Give one without augmentation.
        train_weights: how often each training row is seen in an epoch, shape = (rows,); default 1.
        **kwargs: as for `Trainer`; `processing_class` must be the processor, and `data_collator` is by default one
            without augmentation.

    Attributes:
        position: place in the training rows; `None` for a stream, which has a state of its own.
        dependencies: what the run depends on, see `describe_run`.
        course: the checkpoints that the run builds on.
        initial_step: steps that were done before this start.
        current_scores: metrics (`eval_...`) of the current weights; `None` if the weights have not been evaluated.
        selection: which weights remained at the end of training, as text; `None` if they are simply the last.

    Raises:
        ValueError: if `--average_best` is used with DeepSpeed or FSDP, or `--compile_layers` with ZeRO-3.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *, args, eval_collator: SpeechLLMCollator | None = None, train_weights=None, **kwargs):
        if args.max_grad_norm == 0:
            args.max_grad_norm = math.inf  # nothing is clipped, but the norm is still measured
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = SpeechLLMCollator(kwargs["processing_class"])
        super().__init__(args=args, **kwargs)
        eval_collator = eval_collator or self.data_collator
        self.train_weights = train_weights
        self.position: Position | None = None
        self.dependencies: dict[str, Any] = {}
        self.course = Course()
        self.initial_step = 0
        self.stream_loader: StreamLoader | None = None
        self.train_loader: BudgetDataLoader | None = None
        self.current_scores: dict[str, float] | None = None
        self.selection: str | None = None
        self.last_inputs: dict[str, torch.Tensor] | None = None  # the batch that was trained on last
        self._resumed_from: str | None = None  # folder of a checkpoint
        set_up_speed(self.args, self.model, self.accelerator, (self.data_collator, eval_collator))

        train_rows: Any = self.train_dataset
        columns = set(getattr(train_rows, "column_names", None) or ())
        self.reads_recordings = not isinstance(train_rows, RowStream) and columns.isdisjoint(
            {"features", *ENCODED_COLUMNS}
        )
        self.unreadable = UnreadableRows(self.args.max_bad_fraction, len(train_rows) if self.reads_recordings else 0)
        self.guard = NonFiniteStepGuard(
            self.args.output_dir, self.args.process_index, self.args.max_bad_steps, self.data_collator
        )
        self.progress = self._make_progress(columns)
        deepspeed = self.accelerator.state.deepspeed_plugin
        self.validator = Validator(
            self.args,
            self.accelerator,
            self.processing_class,
            eval_collator,
            input_dtype=None if deepspeed is None else deepspeed.hf_ds_config.dtype(),
        )
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self.writer = CheckpointWriter(self, sharded)
        self.verifier = CheckpointVerifier(self.accelerator, self.args, sharded)
        self.preemption = Preemption()
        self.retention_guard: RetentionGuard | None = None
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args = self.args
        if args.average_best and self.writer.sharded:
            raise ValueError(
                "--average_best is not supported with DeepSpeed or FSDP: average the checkpoints afterwards with "
                "`hf-speechllm average`"
            )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.retention_file is not None:
            self.retention_guard = RetentionGuard(args.max_retention_loss, args.retention_action == "stop")
            self.add_callback(self.retention_guard)
        schedule = ShiftedSchedule(lambda: self.position)
        for callback in (self.course, schedule, TrainingCurve(), ValidationTable(), self.preemption):
            self.add_callback(callback)

    def _make_progress(self, columns: set[str]) -> Progress:
        processor = self.processing_class
        cached = PARTS[:2] if "audio_tokens" in columns else PARTS[:1] if "encoder_states" in columns else ()
        rate = processor.encoder_downsample_rate if "encoder_states" in columns else 1
        return Progress(self.accelerator, rate * processor.frame_seconds, FlopCounter(self.model, cached))

    # Data. Accelerate does not prepare the loaders: it would shard batches that are already assigned to the ranks.

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank for training."""
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
        if self.reads_recordings:
            collator = SkipUnreadableCollator(collator)
        self.train_loader = train_loader(self.args, rows, collator, self.train_weights)
        self.position = Position(self.train_loader.batch_sampler, self.args)
        if self._resumed_from is not None:
            self._load_position(self._resumed_from)
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Batches of this rank for validation, sorted by length."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        return self.validator.loader(eval_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of the dataset, over all ranks."""
        return len(dataloader.dataset)

    def _probe(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        with self.accelerator.autocast():
            self.model(**to_device(batch, self.args.device)).loss.backward()

    # Optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer | None:
        """AdamW (or what `--optim` says) with a group for each part, with and without weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        groups = parameter_groups(model, self.args, self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.is_fsdp_enabled and self.args.fast == "auto":
            optimizer_class = sharded_optimizer(optimizer_class)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The learning rate's schedule; after a change of the number of ranks, for all steps that these would do."""
        offset = self.position.schedule_offset if self.position is not None else 0
        return super().create_scheduler(num_training_steps + offset, optimizer)

    # A training step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Batches of one optimizer step, and the supervised tokens of all ranks in them.

        Measures the wait for data, the audio and its padding. Unlike the parent's, the count makes no host-device
        sync: with one process it stays on the host.
        """
        began = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        for batch in batches:
            self.unreadable.take(batch)
        self.current_flos += self.progress.add_batches(batches, time.perf_counter() - began)
        if not batches or "labels" not in batches[0]:
            return batches, None
        tokens = sum((batch["labels"][..., 1:] != IGNORE_INDEX).sum() for batch in batches)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            tokens = tokens.pin_memory() if device.type == "cuda" else tokens
            tokens = self.accelerator.gather(tokens.to(device, non_blocking=True)).sum()
        return batches, tokens

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward pass of one batch; without enough memory on one GPU, in halves."""
        self.current_scores = None
        self.last_inputs = inputs = to_device(inputs, self.args.device)
        self.guard.begin_batch(model)
        parent = super().training_step
        loss = run_in_halves(
            lambda part: parent(model, part, num_items_in_batch),
            inputs,
            self.processing_class,
            lambda: self.model.zero_grad(set_to_none=True),
            may_split=self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1,
        )
        if self.position is not None:
            self.position.consumed += 1
        return self.guard.add_loss(loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss; counts tokens that are predicted right."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.progress.add_tokens(outputs)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """None: `get_batch_samples` counts them. The parent's estimate ignores the audio, and goes through all
        parameters in every step."""
        return 0

    def _clip_grad_norm(self, model):
        norm = None
        if self.is_fsdp_enabled and self.args.fast == "auto":
            norm = clip_shards(model.parameters(), self.args.max_grad_norm)
        if norm is None:
            norm = super()._clip_grad_norm(model)
        self.guard.check(self.state.global_step + 1, norm, model, self.optimizer, self._step_rows())
        return norm

    def _step_rows(self):
        """Returns a function that gives the rows of the current step's batches; a stream does not know its rows."""
        number = len(self.guard.losses)
        if self.position is None or self.train_loader is None:
            return lambda: [[]] * number
        rows, keys = self.train_loader.dataset, self.position.last_batches(number)
        return lambda: (rows.__getitems__(batch) for batch in keys())

    # Progress

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each line of training: token accuracy, audio seconds per second (all ranks), padding and waiting
        share, skipped rows and steps."""
        if self.stream_loader is not None:  # the parent counts from the last start on
            self.state.epoch = self.state.global_step / self.state.max_steps
        elif self.position is not None and self.is_in_train:
            self.state.epoch = self.position.epochs
        if "loss" in logs:
            logs.update(self.progress.summary())
            logs.update(self._skipped())
        elif "train_runtime" in logs:
            rows = self.accelerator.reduce(torch.tensor(self.progress.rows, device=self.args.device), "sum").item()
            logs["train_samples_per_second"] = round(rows / logs["train_runtime"], 3)  # the parent's are of 8 a batch
            if self.args.device.type == "cuda":
                logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        super().log(logs, start_time)

    def _skipped(self) -> dict[str, int]:
        """Rows and steps that were left out so far, if any; called by all ranks.

        Raises:
            BadDataError: if all ranks together could not read too many rows.
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
        """Trains, and leaves the weights that `select_final_weights` chooses.

        Args:
            resume_from_checkpoint: folder of a checkpoint; `True` for the last complete one in the output folder.
            **kwargs: of the parent.

        Raises:
            RetentionError: if the retention guard has ended training before there was a good checkpoint.
            Preempted: if a signal has ended training; a checkpoint is saved.
            SaveError: if a checkpoint can't be written; `VerificationError` if the first one can't be used.
            FaultError: if too many steps are not finite, or a process of the loader dies or hangs.
            BadDataError: if too many recordings can no longer be read.
            CheckpointError: if something has changed that the checkpoint does not fit, see `check_dependencies`.
            ValueError: if another run uses the output folder.
        """
        if self.args.should_save:
            acquire_output_lock(self.args.output_dir)
            remove_partial_checkpoints(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete(self.args.output_dir) or "") or None
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._check_dependencies()
        if isinstance(self.train_dataset, RowStream):  # resumes by its own state; nothing needs to be skipped
            self.args.ignore_data_skip = True
        on_start = self.args.eval_on_start
        if resume_from_checkpoint and self.args.eval_cer:
            self.args.eval_on_start = False  # the base model was scored when the run began
        try:
            with self.preemption.listening(), attention_setting(self.args):
                result = super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        except (RuntimeError, OSError, EOFError) as error:  # torch reports a dead process at any place
            if (fault := loader_fault(error, self.args.dataloader_timeout_seconds)) is None:
                raise
            raise fault from error
        finally:
            self.args.eval_on_start = on_start
        result.metrics.update(select_final_weights(self))
        return result

    def _check_dependencies(self) -> None:
        self.dependencies = describe_run(
            self.args, self.model, self.processing_class, self.train_dataset, self.train_weights, self.eval_dataset,
            describe_engine(self.accelerator),
        )  # fmt: skip
        self.course.checkpoint = Path(self._resumed_from) if self._resumed_from else None
        if self.course.checkpoint is not None:
            check_dependencies(self.args, self.dependencies, self.course.checkpoint, self.train_dataset)

    def _finalize_training(self, *args) -> TrainOutput:
        self.guard.resolve()
        self.writer.finish()
        if self.preemption.stopped:
            self.is_in_train = False
            raise Preempted(
                f"ended by a signal after step {self.state.global_step}, which is saved in {self.args.output_dir}; "
                "resume with --resume_from_checkpoint last"
            )
        # Hidden from the parent, which warns of weights that a checkpoint leaves out on purpose.
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        try:
            output = super()._finalize_training(*args)
        finally:
            self.state.best_model_checkpoint = best
        if best is not None and self.args.load_best_model_at_end:
            self.load_checkpoint(Path(best))
            self.selection = f"{Path(best).name}, the best by {self.args.metric_for_best_model}"
        return output

    # Resuming: by the `Position` of a checkpoint. Nothing is loaded to be skipped, no row is seen twice or left out.

    def _load_position(self, folder: str) -> None:
        assert self.position is not None
        self.position.load(Path(folder))
        if self.is_deepspeed_enabled and self.position.saved_ranks != self.args.world_size:
            raise CheckpointError(
                f"{folder} was written by {self.position.saved_ranks} processes; with DeepSpeed a run resumes only "
                f"with the same number of processes, not with {self.args.world_size}"
            )

    def set_initial_training_values(self, args, dataloader):
        """The parent's values; of a resumed run, what its position leaves to do."""
        values = list(super().set_initial_training_values(args, dataloader))
        if self._resumed_from is None:
            return tuple(values)
        step = TrainerState.load_from_json(str(Path(self._resumed_from) / "trainer_state.json")).global_step
        if self.position is not None:
            values[0], values[-1] = self.position.remaining_steps(step)
        elif step >= self.args.max_steps:
            values[0] = 0  # a stream would continue without end
        return tuple(values)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        epoch, steps = super()._init_training_state(*args, **kwargs)
        self.initial_step = self.state.global_step
        self.state.compute_steps(self.args, self.state.max_steps)  # --save_steps and the like may have changed
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and self.args.early_stopping_patience is not None:
                callback.early_stopping_patience = self.args.early_stopping_patience
        if self.position is None or self._resumed_from is None:
            return epoch, steps
        return self.position.epoch, 0  # the sampler leaves out what was consumed

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
        steps = [step for step, path in checkpoints(self.args.output_dir).items() if path.name == folder.name]
        self.current_scores = scores_at(self.state.log_history, steps[0]) if steps else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model with the permissions that new files have."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            apply_umask(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        if self.retention_guard is None or not self.retention_guard.stopped:  # otherwise nobody can resume from there
            self.store_flos()
            with self.progress.paused():
                self.writer.save()

    def write_rank_state(self, folder: Path) -> None:
        """Writes the state of this rank into a checkpoint: random numbers, the place in a stream."""
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.stream_loader is not None:
            self.stream_loader.save(folder)

    def write_run_state(self, folder: Path) -> None:
        """Writes the state of the run into a checkpoint: logs, the place in the rows, what the run depends on."""
        save_callback_states(self.state, (*self.callback_handler.callbacks, self.control))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.position is not None:
            self.position.save(folder)
        write_record(self.dependencies, self.args, folder)
        self.course.save(folder)

    def write_weights(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes weights into a checkpoint."""
        self._save(str(folder), state_dict=weights)

    def write_shards(self, folder: Path) -> None:
        """Writes weights and optimizer of a sharded model into a checkpoint, all ranks together."""
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))

    def verify_checkpoint(self, folder: Path) -> None:
        """Raises a `VerificationError` if a checkpoint does not hold the model in memory."""
        if self.last_inputs is not None:
            self.verifier.verify(folder, self.model_wrapped, self.last_inputs)

    # Validation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores validation sets and logs the metrics, all sets in one line.

        Args:
            eval_dataset: rows, or a dict of rows by name, or such a name; default what the trainer was given.
            ignore_keys: ignored.
            metric_key_prefix: of the metric names.

        Returns:
            `eval_loss`, `eval_token_accuracy`, and with `--eval_cer` `eval_cer`, `eval_substitutions`, ...; of several
            sets the same as `eval_NAME_loss`, ..., and the means over the sets, each with the same weight, but without
            the set of `--retention_file`.
        """
        metrics = self.score(eval_dataset, metric_key_prefix)
        self.log(metrics)
        if eval_dataset is None and metric_key_prefix == "eval":
            self.current_scores = dict(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, eval_dataset=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores validation sets without logging; the arguments are as for `evaluate`."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        sets = self.eval_dataset[sets] if isinstance(sets, str) else sets
        sets = sets if isinstance(sets, dict) else {"": sets}
        with self.progress.paused(), attention_setting(self.args):
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
