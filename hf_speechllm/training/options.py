"""Options of fine-tuning: what is trained, what the trainer needs besides `TrainingArguments`, and all combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.options import DataOptions
from ..model.options import ModelOptions
from ..options import option
from .option_checks import check_options

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments

RETENTION_SET = "retention"  # the name under which --retention_file is evaluated


@dataclass
class TrainedPartsOptions:
    """What is trained"""

    freeze_audio_encoder: bool = option(False, "Leave the audio encoder as it is.")
    freeze_audio_adaptor: bool = option(False, "Leave the audio adaptor as it is.")
    freeze_llm: bool = option(False, "Leave the LLM as it is.")
    freeze_param: list[str] = option(
        [], "Leave parameters as they are whose names start so, e.g. audio_encoder.layers.0; FunASR's names work, too."
    )
    use_lora: bool = option(False, "Train low-rank adapters (peft) of the LLM instead of its weights.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Scale of the adapters; they count lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Linear layers of the LLM that get adapters.",
    )


@dataclass
class OptimizationOptions:
    """Optimization, and defaults that differ from transformers"""

    audio_encoder_learning_rate: float | None = option(None, "Learning rate of the encoder (default --learning_rate).")
    audio_adaptor_learning_rate: float | None = option(None, "Learning rate of the adaptor (default --learning_rate).")
    llm_learning_rate: float | None = option(
        None, "Learning rate of the LLM and its adapters (default --learning_rate)."
    )
    bf16: bool | None = option(None, "Compute in bfloat16 (default: on a GPU that can); weights stay float32.")
    logging_steps: float = option(10, "Steps between two log lines; below 1: share of the run.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rates.")
    warmup_steps: float = option(0.05, "Steps of warm-up; below 1: share of the run.")
    logging_nan_inf_filter: bool = option(
        False, "Without use: steps that are not finite are left out; see --max_bad_steps."
    )
    remove_unused_columns: bool = option(False, "Must stay false: the collator reads columns that the model does not.")
    ddp_find_unused_parameters: bool | None = option(False, "All that is trained is used in every step.")
    ddp_bucket_cap_mb: int | None = option(100, "Gradients sent at once; parameters are many, and most are small.")
    ddp_broadcast_buffers: bool | None = option(False, "Buffers are constants: no rank has to wait for them.")


@dataclass
class BatchOptions:
    """Batches and speed"""

    per_device_train_batch_seconds: float = option(
        60.0, "Padded audio seconds in a batch on one device; auto (or 0): as many as the GPU's memory takes."
    )
    per_device_eval_batch_seconds: float | None = option(None, "The same for validation (default: as for training).")
    padding_free: bool | None = option(
        None,
        "Compute without padding, the rows of a batch one after the other (default: on a GPU with --bf16 or --fp16 if "
        "the LLM allows it).",
    )
    compile_layers: bool = option(
        False,
        "Compile the layers of encoder, adaptor and LLM (torch.compile): faster steps after some minutes of warm-up.",
    )
    fast: str = option(
        "auto",
        "auto, or off: only the plain paths of torch, transformers and the engines; the same numbers, slower.",
    )
    plain_attention: bool = option(
        False, "Attention as torch and transformers choose it, cuDNN's among it, which plans anew for every shape."
    )


@dataclass
class ValidationOptions:
    """Validation by decoding, and the choice of checkpoints"""

    eval_cer: bool = option(
        False,
        "Decode the validation sets at every evaluation and before the first step, and choose checkpoints by CER.",
    )
    eval_cer_samples: int | None = option(
        None, "Decode only so many rows of each set, the same ones every time, spread over it (default: all)."
    )
    eval_max_new_tokens: int = option(200, "The longest transcript in validation, in tokens.")
    early_stopping_patience: int | None = option(
        None, "End training after so many evaluations in a row without a better --metric_for_best_model."
    )
    retention_file: str | None = option(
        None, "JSONL of general speech, whose CER must not rise over the base model's; needs --eval_cer."
    )
    max_retention_loss: float = option(1.0, "How far it may rise, in percentage points.")
    retention_action: str = option(
        "warn", "What happens if it rises further: warn, or stop and go back to the last good checkpoint."
    )
    keep_best_checkpoints: int | None = option(
        None,
        "Keep so many checkpoints, the best by --metric_for_best_model, and the latest. Takes the place of "
        "--save_total_limit and brings --load_best_model_at_end.",
    )
    average_best: bool = option(
        False, "At the end, average the weights of the kept best checkpoints, and save the mean if it scores better."
    )
    metric_for_best_model: str | None = option(
        None,
        "What checkpoints are chosen by: cer (default with --eval_cer), loss or token_accuracy, the mean over the "
        "validation sets; of one set alone NAME_cer, ...",
    )
    greater_is_better: bool | None = option(None, "Whether more of it is better (default: not of loss and cer).")


@dataclass
class FaultOptions:
    """Checkpoints and faults"""

    max_bad_fraction: float = option(0.0, "Share of unusable rows at which the run stops.")
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from the last complete checkpoint in --output_dir (last, or true), from that or else from the start "
        "(auto), or from a checkpoint folder.",
    )
    async_save: bool = option(
        False, "Write checkpoints from a copy in the CPU's memory, while training goes on; not with DeepSpeed or FSDP."
    )
    save_only_trained: bool = option(
        False,
        "Leave frozen parts out of checkpoints (the finished model has them); a checkpoint then names the base model "
        "that it needs. Not with DeepSpeed or FSDP.",
    )
    check_first_checkpoint: bool = option(
        True, "Load the first checkpoint of a run and see that it gives the same logits as the model in memory."
    )
    max_bad_steps: int = option(
        10, "How many steps in a row may have a loss or gradient that is not finite; they are left out and counted."
    )
    dataloader_timeout_seconds: float = option(
        1800, "How long to wait for a batch from a --dataloader_num_workers process; 0: for ever."
    )


@dataclass
class FinetuningOptions:
    """All options of a run.

    Raises:
        ValueError: if options contradict each other; the message names them.
    """

    model: ModelOptions
    data: DataOptions
    parts: TrainedPartsOptions
    training: SpeechLLMTrainingArguments

    def __post_init__(self):
        check_options(self)
        self.training.run_options = {**vars(self.model), **vars(self.data), **vars(self.parts)}

    @property
    def validation_files(self) -> dict[str, str]:
        """Validation files by name, with --retention_file as `retention`.

        Raises:
            ValueError: if two have the same name.
        """
        named = self.data.validation_files()
        if self.training.retention_file is not None:
            if RETENTION_SET in named:
                raise ValueError(f"a file of --validation_file is called {RETENTION_SET!r}; name it: NAME=FILE")
            named[RETENTION_SET] = self.training.retention_file
        return named
