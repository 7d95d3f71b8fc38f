"""The Hugging Face `Trainer` with batches by audio seconds, a learning rate for each part, and speech in its log."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..data.stream_loader import StreamLoader
from ..data.streaming import RowStream
from ..fast.attention import allow_packing, spare_the_host
from ..fast.compilation import compile_layers
from ..fast.fsdp import clip_shards, keep_outputs, step_on_shards
from ..hub.publishing import publish, write_card
from ..model.chat import IGNORE_INDEX
from ..model.modeling import PARTS
from .arguments import SpeechLLMTrainingArguments
from .batch_budget import find_batch_seconds, run_in_halves
from .callbacks import TrainingCurve, ValidationTable
from .checkpointing.manifest import last_complete
from .checkpointing.output_lock import hold_output
from .checkpointing.position import Position
from .checkpointing.resume import ResumableTrainer
from .checkpointing.selection import checkpoints, scores_at, set_up_selection, settle
from .checkpointing.writer import CheckpointWriter, clean_up
from .dataloaders import BudgetDataLoader, eval_loader, stream_loader, train_loader
from .faults import BadSteps, LostRows, fault_counts, loader_fault
from .flops import FlopCounter
from .parameter_groups import parameter_groups
from .preemption import Preempted, Preemption
from .progress import Progress
from .validation import PromptCollator, score_batches, score_sets

logger = logging.getLogger(__name__)


class SpeechLLMTrainer(ResumableTrainer):
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
        ValueError: if `--average_best` is asked for with DeepSpeed or FSDP, or `--compile_layers` with ZeRO-3.
    """

    args: SpeechLLMTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *, args, eval_collator: SpeechLLMCollator | None = None, train_weights=None, **kwargs):
        super().__init__(args=args, **kwargs)
        self.eval_collator: SpeechLLMCollator = eval_collator or self.data_collator
        self.train_weights = train_weights
        self.stream_loader: StreamLoader | None = None
        self.train_loader: BudgetDataLoader | None = None
        self.last_inputs: dict[str, torch.Tensor] | None = None  # of the batch that was trained on last
        if self.args.device.type == "cuda" and not self.args.plain_attention:
            spare_the_host(self.model)
        if self._leave_padding_out():
            self.data_collator.padding_free = self.eval_collator.padding_free = True
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # else each gradient is copied there and back
        deepspeed = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if deepspeed is not None:
            from ..fast.deepspeed import prepare  # DeepSpeed need not be installed

            prepare(self.model, deepspeed.deepspeed_config)
        elif self.is_fsdp_enabled:
            keep_outputs(self.accelerator.state.fsdp_plugin)
        if self.args.compile_layers:
            if deepspeed is not None and deepspeed.zero_stage == 3:
                raise ValueError("--compile_layers is not for ZeRO-3: its parameters have no size while they are away")
            alone = self.model._no_split_modules if self.is_fsdp_enabled else ()
            compile_layers(self.model, alone=alone)
        self.add_callback(TrainingCurve)
        self.add_callback(ValidationTable)
        self.retention_guard = set_up_selection(self)
        self.preemption = Preemption()
        self.add_callback(self.preemption)
        self.writer = CheckpointWriter(self)
        self.bad_steps = BadSteps(self)
        self.current_scores: dict[str, float] | None = None
        self.selection: str | None = None
        frame_seconds = self.processing_class.frame_seconds
        train_rows: Any = self.train_dataset
        columns = getattr(train_rows, "column_names", None) or ()
        cached = PARTS[:2] if "audio_tokens" in columns else PARTS[:1] if "encoder_states" in columns else ()
        if "encoder_states" in columns:
            frame_seconds *= self.processing_class.encoder_downsample_rate
        self.reads_recordings = not isinstance(train_rows, RowStream) and not {"features", *ENCODED_COLUMNS} & {
            *columns
        }
        self.lost_rows = LostRows(self.args.max_bad_fraction, len(train_rows) if self.reads_recordings else 0)
        self.progress = Progress(self.accelerator, frame_seconds, FlopCounter(self.model, cached))

    # Data. The loaders are not given to `accelerator.prepare`: it would shard batches that are dealt already.

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank for training."""
        if isinstance(self.train_dataset, RowStream):
            self.stream_loader = stream_loader(self)
            if self._resumed_from is not None:
                self.stream_loader.load(self._resumed_from)
            return self.stream_loader
        if not self.args.per_device_train_batch_seconds:
            self.args.per_device_train_batch_seconds = find_batch_seconds(self)
        self.train_loader = train_loader(self)
        self.position = Position(self.train_loader.batch_sampler, self.args)
        if self._resumed_from is not None:
            self.load_position(self._resumed_from)
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Batches of this rank for validation, sorted by length."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        return eval_loader(self, eval_dataset, self.eval_collator)

    def get_decoding_dataloader(self, dataset) -> DataLoader:
        """The same batches, as inputs of `generate`; see `validation.PromptCollator`."""
        return eval_loader(self, dataset, PromptCollator(self.eval_collator))

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of the dataset, over all ranks."""
        return len(dataloader.dataset)

    # Optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer | None:
        """AdamW (or what `--optim` says) with a group for each part, with and without weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        groups = parameter_groups(model, self.args, self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As the parent's; leaves the weights that `selection.settle` chooses.

        Raises:
            RetentionError: if the retention guard has ended training before there was a good checkpoint.
            Preempted: if a signal has ended it, with a checkpoint to go on from.
            SaveError: if a checkpoint can't be written; `ReadbackError` if the first one can't be used.
            FaultError: if too many steps are not finite, or a process of the loader dies or hangs.
            BadDataError: if too many recordings have vanished.
            ValueError: if another run has the output folder, or the checkpoint does not fit.
        """
        if self.args.should_save:
            hold_output(self.args.output_dir)
            clean_up(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete(self.args.output_dir) or "") or None
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if isinstance(self.train_dataset, RowStream):  # it goes on by its own state; nothing needs to be skipped
            self.args.ignore_data_skip = True
        on_start = self.args.eval_on_start
        if resume_from_checkpoint and self.args.eval_cer:
            self.args.eval_on_start = False  # the base model was scored when the run began
        try:
            with self.preemption.listening():
                result = super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        except (RuntimeError, OSError, EOFError) as error:  # torch tells of a dead process at any place
            if (fault := loader_fault(error, self.args.dataloader_timeout_seconds)) is None:
                raise
            raise fault from error
        finally:
            self.args.eval_on_start = on_start
        result.metrics.update(settle(self))
        return result

    def _finalize_training(self, *args) -> TrainOutput:
        self.bad_steps.settle()
        self.writer.finish()
        if self.preemption.stopped:
            self.is_in_train = False
            raise Preempted(
                f"ended by a signal after step {self.state.global_step}, which is saved in {self.args.output_dir}; go "
                "on with --resume_from_checkpoint last"
            )
        return super()._finalize_training(*args)

    def _leave_padding_out(self) -> bool:
        args = self.args
        suited = args.device.type == "cuda" and (args.bf16 or args.fp16) and not args.plain_attention
        if args.padding_free is False or (args.padding_free is None and not suited):
            return False
        try:
            allow_packing(self.model)
        except ValueError:
            if args.padding_free:
                raise
            return False
        return True

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            from ..fast.deepspeed import prepare_optimizer

            prepare_optimizer(self.deepspeed.optimizer)
        elif self.is_fsdp_enabled:
            step_on_shards(getattr(self.optimizer, "optimizer", self.optimizer))
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As the parent's; a batch that does not fit into memory is run in parts."""
        self.current_scores = None
        parent = super().training_step
        self.last_inputs = inputs = self._prepare_inputs(inputs)
        self.bad_steps.begin(model)
        loss = run_in_halves(self, lambda part: parent(model, part, num_items_in_batch), inputs)
        if self.position is not None:
            self.position.dealt += 1
        self.bad_steps.losses.append(loss)
        return torch.where(torch.isfinite(loss), loss, 0.0)  # one that is not would be all that the log tells

    def _prepare_input(self, data):
        # The parent's copy makes the host wait until the GPU has done all that came before.
        if isinstance(data, torch.Tensor) and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """None: `get_batch_samples` counts them; the parent's guess takes no account of the audio, and goes through
        all parameters in every step."""
        return 0

    def _clip_grad_norm(self, model):
        norm = clip_shards(model.parameters(), self.args.max_grad_norm) if self.is_fsdp_enabled else None
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.bad_steps.check(model, grad_norm)
        return grad_norm

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
        if self.retention_guard is None or not self.retention_guard.stopped:  # else one can't go on from there
            self.store_flos()
            with self.progress.paused():
                self.writer.save()

    # Progress

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the parent's; measures the wait for data, the audio and its padding."""
        start = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.lost_rows.take(batch)
        self.current_flos += self.progress.add_batches(batches, time.perf_counter() - start)
        return batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples, device):
        # As the parent's, which has the host wait for the GPU. Of one process alone the number stays on the host.
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        number = sum((batch["labels"][..., 1:] != IGNORE_INDEX).sum() for batch in batch_samples)
        if self.args.world_size == 1 or not self.args.average_tokens_across_devices:
            return number
        if device.type == "cuda":
            number = number.pin_memory()
        return self.accelerator.gather(number.to(device, non_blocking=True)).sum()

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
        elif self.position is not None and self.is_in_train:
            self.state.epoch = self.position.epochs
        if "loss" in logs:
            logs.update(self.progress.summary())
            logs.update(fault_counts(self))
        elif "train_runtime" in logs:
            rows = self.accelerator.reduce(torch.tensor(self.progress.rows, device=self.args.device), "sum").item()
            logs["train_samples_per_second"] = round(rows / logs["train_runtime"], 3)  # the parent's are of 8 a batch
            if self.args.device.type == "cuda":
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
        with self.progress.paused():
            return score_sets(self, sets if isinstance(sets, dict) else {"": sets}, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss and accuracy over supervised tokens (not over batches, which differ in size), summed over
        ranks."""
        metrics = score_batches(self, dataloader, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    # Publishing

    def create_model_card(self, language=None, license=None, **kwargs) -> None:
        """Writes our model card into the output folder; other options of the parent are without effect.

        A card that can't be written is reported, and doesn't end the run.
        """
        if self.is_world_process_zero():
            write_card(self, [language] if isinstance(language, str) else language, license)

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
