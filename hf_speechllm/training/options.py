"""Options of fine-tuning: trained parts, options of the trainer that `TrainingArguments` lacks, and all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.options import DataOptions
from ..model.options import ModelOptions
from ..options import option
from .option_checks import check_options

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments

RETENTION_SET = "retention"  # name of the validation set of --retention_file


@dataclass
class TrainedPartsOptions:
    """Trained parts"""

    freeze_audio_encoder: bool = option(False, "Do not train the audio encoder.")
    freeze_audio_adaptor: bool = option(False, "Do not train the audio adaptor.")
    freeze_llm: bool = option(False, "Do not train the LLM.")
    ctc_head: str | None = option(
        None,
        "Train a CTC head on the encoder's output, for word times: auto (the model's own, otherwise sanm), sanm or "
        "linear. With all other parts frozen, only the head is computed.",
    )
    ctc_vocabulary: str = option(
        "auto",
        "Vocabulary of a new CTC head: characters of the training transcripts (auto), or llm: the LLM's tokens.",
    )
    ctc_weight: float = option(0.3, "Factor of the CTC loss beside the loss of the LLM.")
    freeze_param: list[str] = option(
        [],
        "Do not train parameters whose names start with one of these, here or in FunASR: audio_encoder.layers.0, ...",
    )
    audio_token_dropout: float = option(
        0.0, "Share of audio tokens that are replaced by zeros in training, at random; not rescaled."
    )
    use_lora: bool = option(False, "Train low-rank adapters (peft) instead of the weights of the LLM.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Scale of the adapters: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Linear layers of the LLM with adapters.",
    )

    @property
    def only_ctc_head(self) -> bool:
        """Whether the CTC head is the only trained part."""
        frozen = self.freeze_audio_encoder and self.freeze_audio_adaptor and self.freeze_llm
        return self.ctc_head is not None and frozen


@dataclass
class OptimizationOptions:
    """Optimization (defaults that differ from transformers)"""

    audio_encoder_learning_rate: float | None = option(None, "Learning rate of the encoder (default --learning_rate).")
    audio_adaptor_learning_rate: float | None = option(None, "Learning rate of the adaptor (default --learning_rate).")
    llm_learning_rate: float | None = option(
        None, "Learning rate of the LLM and the adapters (default --learning_rate)."
    )
    ctc_head_learning_rate: float | None = option(None, "Learning rate of the CTC head (default --learning_rate).")
    bf16: bool | None = option(
        None, "Use bfloat16 compute with float32 master weights (default: true on a GPU that supports bfloat16)."
    )
    logging_steps: float = option(10, "Steps between log lines; below 1: share of the run.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rates.")
    warmup_steps: float = option(0.05, "Warm-up steps; below 1: share of the run.")
    logging_nan_inf_filter: bool = option(False, "No effect: non-finite steps are skipped; see --max_bad_steps.")
    remove_unused_columns: bool = option(False, "Must stay false: the collator reads columns that the model does not.")
    ddp_find_unused_parameters: bool | None = option(False, "Not needed: every step uses all trained parameters.")
    ddp_bucket_cap_mb: int | None = option(100, "Size of DDP's gradient buckets, in MB; large because most are small.")
    ddp_broadcast_buffers: bool | None = option(False, "Not needed: buffers are constant.")


@dataclass
class BatchOptions:
    """Batches and speed"""

    per_device_train_batch_seconds: float = option(
        60.0, "Padded audio seconds per batch and device; auto (or 0): the most that fit into the GPU memory."
    )
    per_device_eval_batch_seconds: float | None = option(
        None, "Padded audio seconds per batch and device in validation (default: as in training)."
    )
    padding_free: bool | None = option(
        None,
        "Compute padding-free: pack the rows of a batch (default: true on a GPU with --bf16 or --fp16, if the LLM "
        "supports packed rows).",
    )
    compile_layers: bool = option(
        False,
        "Compile the layers of encoder, adaptor and LLM (torch.compile): faster steps after minutes of compilation.",
    )
    fast: str = option(
        "auto",
        "auto, or off: plain paths of torch, transformers and the engines, slower and with the same results.",
    )
    plain_attention: bool = option(
        False,
        "Let torch and transformers choose the attention kernel; cuDNN's plans again for every batch shape.",
    )


@dataclass
class ValidationOptions:
    """Validation by decoding, and selection of checkpoints"""

    eval_cer: bool = option(
        False,
        "Decode the validation sets at every evaluation and before the first step, and select checkpoints by CER.",
    )
    eval_cer_samples: int | None = option(
        None, "Number of rows to decode in each set, always the same rows, evenly spread (default: all)."
    )
    eval_max_new_tokens: int = option(200, "Length of the longest transcript in validation, in tokens.")
    early_stopping_patience: int | None = option(
        None, "End training after this number of consecutive evaluations without a better --metric_for_best_model."
    )
    retention_file: str | None = option(
        None, "JSONL of general speech, to check that the CER does not rise above the base model's; needs --eval_cer."
    )
    max_retention_loss: float = option(
        1.0, "Largest rise of the CER of --retention_file over the base model's, in percentage points."
    )
    retention_action: str = option(
        "warn", "Action above --max_retention_loss: warn, or stop and return to the last good checkpoint."
    )
    keep_best_checkpoints: int | None = option(
        None,
        "Number of best checkpoints to keep, by --metric_for_best_model, besides the latest. Replaces "
        "--save_total_limit and implies --load_best_model_at_end.",
    )
    average_best: bool = option(
        False, "At the end, average the weights of the best checkpoints, and save the mean if it scores better."
    )
    metric_for_best_model: str | None = option(
        None,
        "Metric that selects checkpoints: cer (default with --eval_cer), loss or token_accuracy, as a mean over the "
        "validation sets; for a single set NAME_cer, ...",
    )
    greater_is_better: bool | None = option(
        None, "Whether a greater --metric_for_best_model is better (default: false for loss and cer)."
    )


@dataclass
class FaultOptions:
    """Checkpoints and faults"""

    max_bad_fraction: float = option(0.0, "Largest share of unusable rows; the run ends if more rows are unusable.")
    resume_from_checkpoint: str | None = option(
        None,
        "last or true: resume from the last complete checkpoint in --output_dir; auto: resume if a checkpoint exists, "
        "otherwise start fresh; or a checkpoint folder.",
    )
    async_save: bool = option(
        False,
        "Write checkpoints in the background, from a copy in CPU memory; not supported with DeepSpeed or FSDP.",
    )
    save_only_trained: bool = option(
        False,
        "Leave frozen parts out of checkpoints; a checkpoint then names the base model, and the final model is "
        "complete. Not supported with DeepSpeed or FSDP.",
    )
    check_first_checkpoint: bool = option(
        True, "Load the first checkpoint of a run and compare its logits with the logits of the model in memory."
    )
    max_bad_steps: int = option(
        10, "Largest number of consecutive non-finite steps (loss or gradient); these steps are skipped and counted."
    )
    dataloader_timeout_seconds: float = option(
        1800, "Seconds to wait for a batch from a --dataloader_num_workers process; 0: no limit."
    )


@dataclass
class FinetuningOptions:
    """All options of a run.

    Raises:
        ValueError: if options contradict each other; the message names the options.
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
        """Validation files by name; --retention_file is named `retention`.

        Raises:
            ValueError: if two files have the same name.
        """
        named = self.data.validation_files()
        if self.training.retention_file is not None:
            if RETENTION_SET in named:
                raise ValueError(
                    f"--validation_file: the name {RETENTION_SET!r} is reserved for --retention_file; rename the set "
                    "with NAME=FILE"
                )
            named[RETENTION_SET] = self.training.retention_file
        return named
