"""Arguments of the trainer: `TrainingArguments` and the options of speech LLMs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..hub.options import PublishingOptions
from .inherited_options import changed_without_effect, check_inherited_options
from .option_checks import check_training
from .options import BatchOptions, FaultOptions, OptimizationOptions, ValidationOptions

logger = logging.getLogger(__name__)


@dataclass
class SpeechLLMTrainingArguments(
    OptimizationOptions, BatchOptions, ValidationOptions, FaultOptions, PublishingOptions, TrainingArguments
):
    """`TrainingArguments` with batches by audio seconds, validation by decoding, and other options of the trainer.

    Attributes:
        run_options: options about model, data and adapters by name, set by the command line. Checkpoints record these
            options, so that a resumed run reports changes.

    Raises:
        ValueError: if options contradict each other; the message names the options.
    """

    run_options: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.check()
        self._set_device()
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        for suffix in ("", "_kwargs"):  # the new name, where transformers has it: the old name warns
            if getattr(self, f"activation_checkpointing{suffix}", suffix) is None:
                setattr(self, f"activation_checkpointing{suffix}", getattr(self, f"gradient_checkpointing{suffix}"))
        for option in ("gradient_checkpointing", "activation_checkpointing"):  # old and new name of the same option
            if getattr(self, option, None) and getattr(self, f"{option}_kwargs") is None:
                setattr(self, f"{option}_kwargs", {"use_reentrant": False})
        self._set_validation()
        super().__post_init__()

    def check(self) -> None:
        """Checks for options that contradict each other or have no effect, before a device is used.

        Raises:
            ValueError: the message names the options.
        """
        self.per_device_train_batch_seconds = batch_seconds(self.per_device_train_batch_seconds)
        check_inherited_options(changed_without_effect(self))
        self.check_publishing()
        check_training(self)
        self._check_trackers()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the content of `training_args.bin`: all options except the token of the Hub."""
        return {**self.__dict__, "hub_token": None}

    def _check_trackers(self) -> None:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        installed = get_available_reporting_integrations()
        if len(names) > 1 and {"none", "all"} & {*names}:
            raise ValueError(f"--report_to {' '.join(names)}: none and all are not combined with other trackers")
        for name in names:
            if name not in ("none", "all", *installed):
                raise ValueError(
                    f"--report_to {name}: no such package is installed; pip install {name}, or choose one of "
                    f"{', '.join(['none', *installed])}"
                )

    def _set_device(self) -> None:
        """Sets `use_cpu` if accelerate uses the CPU; transformers ignores the setting of accelerate."""
        # The launcher does not pass the setting to several processes.
        single_process = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            self.use_cpu = True
        elif not (single_process or self.use_cpu or torch.accelerator.is_available()):
            if int(os.environ.get("RANK", 0)) == 0:
                logger.warning("no GPU was found: all processes train on the CPU")
            self.use_cpu = True

    def _set_validation(self) -> None:
        """Sets options of transformers that follow from the options of validation."""
        if self.eval_cer:
            self.eval_on_start = True  # the scores of the base model, for comparison
        if self.metric_for_best_model is None and (self.eval_cer or self.chooses_checkpoints):
            self.metric_for_best_model = "cer" if self.eval_cer else "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "cer"))
        if self.keep_best_checkpoints is not None:
            self.load_best_model_at_end = True
            self.save_total_limit = None
        if self.early_stopping_patience is not None:
            self.restore_callback_states_from_checkpoint = True  # a resumed run keeps the count of evaluations

    @property
    def chooses_checkpoints(self) -> bool:
        """Whether an option depends on the best evaluation."""
        return self.early_stopping_patience is not None or self.keep_best_checkpoints is not None

    @property
    def stops_at_retention_loss(self) -> bool:
        """Whether training ends if the CER of --retention_file exceeds the limit."""
        return self.retention_file is not None and self.retention_action == "stop"


def batch_seconds(text: str | float) -> float:
    """Parses a batch budget; returns 0 for `auto`.

    Raises:
        ValueError: if the text is neither a number nor `auto`.
    """
    return 0.0 if text == "auto" else float(text)
