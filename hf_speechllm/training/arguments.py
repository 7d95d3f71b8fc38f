"""Arguments of fine-tuning: all of `TrainingArguments` and what a speech LLM needs besides; YAML first, command line
over it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from .option_checks import check_arguments

RETENTION_SET = "retention"  # the name under which --retention_file is evaluated


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class SpeechLLMTrainingArguments(TrainingArguments):
    """`TrainingArguments`, with the model, the data, what is trained, and batches by audio seconds.

    Raises:
        ValueError: where options contradict each other; the message names them.
    """

    # Model
    model_name_or_path: str | None = _option(
        None, "Model folder or Hub id: own, native (fun_asr_nano) or FunASR layout."
    )
    attn_implementation: str = _option("sdpa", "Attention: sdpa, flash_attention_2 or eager.")
    # Data
    train_file: list[str] = _option(
        [], "Training data: JSONL, .tar (WebDataset) or .parquet files, or globs of them ('data/*.tar')."
    )
    train_weight: list[float] = _option(
        [], "How often the rows of each --train_file are seen in an epoch (default 1)."
    )
    validation_file: list[str] = _option([], "Validation data, one or several, each FILE or NAME=FILE.")
    streaming: bool = _option(
        False, "Read training data on the way, without a cache and a list of all rows; needs --max_steps."
    )
    shuffle_buffer: int = _option(
        2000, "Rows that each worker holds, sorts into batches and shuffles at a time, with --streaming."
    )
    audio_root: str | None = _option(None, "Folder that recordings of a JSONL must lie in (default: anywhere).")
    url_max_megabytes: float | None = _option(None, "The largest recording to download (default 1000).")
    url_timeout_seconds: float | None = _option(None, "The longest download of a recording (default 600).")
    allow_private_redirects: bool | None = _option(
        None, "Whether URLs may redirect to private, loopback and link-local addresses (default: no)."
    )
    max_bad_fraction: float = _option(0.0, "Share of unusable rows at which the run stops.")
    feature_cache: str = _option("float16", "Cached fbank: float16, float32, or off (computed in every epoch).")
    cache_level: str = _option(
        "auto",
        "What is cached: fbank, or what frozen parts make of it: encoder or adaptor; auto: the deepest, for more than "
        "one epoch.",
    )
    cache_dir: str | None = _option(None, "Where datasets keeps its caches (default: that of datasets).")
    preprocessing_num_workers: int | None = _option(None, "Processes that compute features (default: all cores).")
    spec_augment: bool = _option(False, "Mask stripes of the training spectrograms.")
    tempo_perturb: float = _option(
        0.0, "Stretch training recordings by up to this share, e.g. 0.1: 90 to 110 percent."
    )
    dither: float = _option(
        0.0, "Noise added to training recordings, in 16-bit steps (the original's: 1.0); needs --feature_cache off."
    )
    # Hotwords; without these options, rows have those that they carry
    hotword_file: str | None = _option(
        None,
        "Words, one in each line: hotwords of the rows that say them and carry none, distractors elsewhere (default: "
        "distractors are the hotwords of other rows and, with --hotwords_from_text, phrases of their transcripts).",
    )
    hotword_distractors: int = _option(0, "The most hotwords that a training row gets besides its own; 0 to this.")
    hotword_dropout: float = _option(0.0, "Share of training rows that get no hotwords at all.")
    hotwords_from_text: float = _option(
        0.0, "Share of training rows without hotwords that get one: a phrase of their own transcript."
    )
    # What is trained
    freeze_audio_encoder: bool = _option(False, "Leave the audio encoder as it is.")
    freeze_audio_adaptor: bool = _option(False, "Leave the audio adaptor as it is.")
    freeze_llm: bool = _option(False, "Leave the LLM as it is.")
    use_lora: bool = _option(False, "Train low-rank adapters (peft) of the LLM instead of its weights.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters; they count lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] = _option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Linear layers of the LLM that get adapters.",
    )
    audio_encoder_learning_rate: float | None = _option(
        None, "Learning rate of the encoder (default --learning_rate)."
    )
    audio_adaptor_learning_rate: float | None = _option(
        None, "Learning rate of the adaptor (default --learning_rate)."
    )
    llm_learning_rate: float | None = _option(
        None, "Learning rate of the LLM and its adapters (default --learning_rate)."
    )
    # Batches
    per_device_train_batch_seconds: float = _option(
        60.0, "Padded audio seconds in a batch on one device; auto (or 0): as many as the GPU's memory takes."
    )
    per_device_eval_batch_seconds: float | None = _option(None, "The same for validation (default: as for training).")
    padding_free: bool | None = _option(
        None,
        "Compute without padding, the rows of a batch one after the other (default: on a GPU with --bf16 or --fp16 if "
        "the LLM allows it).",
    )
    compile_layers: bool = _option(
        False,
        "Compile the layers of encoder, adaptor and LLM (torch.compile): faster steps after some minutes of warm-up.",
    )
    plain_attention: bool = _option(
        False, "Attention as torch and transformers choose it, cuDNN's among it, which plans anew for every shape."
    )
    # Validation by decoding
    eval_cer: bool = _option(
        False,
        "Decode the validation sets at every evaluation and before the first step, and choose checkpoints by CER.",
    )
    eval_cer_samples: int | None = _option(
        None, "Decode only so many rows of each set, the same ones every time, spread over it (default: all)."
    )
    eval_max_new_tokens: int = _option(200, "The longest transcript in validation, in tokens.")
    early_stopping_patience: int | None = _option(
        None, "End training after so many evaluations in a row without a better --metric_for_best_model."
    )
    retention_file: str | None = _option(
        None, "JSONL of general speech, whose CER must not rise over the base model's; needs --eval_cer."
    )
    max_retention_loss: float = _option(1.0, "How far it may rise, in percentage points.")
    retention_action: str = _option(
        "warn", "What happens if it rises further: warn, or stop and go back to the last good checkpoint."
    )
    keep_best_checkpoints: int | None = _option(
        None,
        "Keep so many checkpoints, the best by --metric_for_best_model, and the latest. Takes the place of "
        "--save_total_limit and brings --load_best_model_at_end.",
    )
    average_best: bool = _option(
        False, "At the end, average the weights of the kept best checkpoints, and save the mean if it scores better."
    )
    # Checkpoints and faults
    resume_from_checkpoint: str | None = _option(
        None,
        "Go on from the last complete checkpoint in --output_dir (last, or true), from that or else from the start "
        "(auto), or from a checkpoint folder.",
    )
    async_save: bool = _option(
        False, "Write checkpoints from a copy in the CPU's memory, while training goes on; not with DeepSpeed or FSDP."
    )
    save_only_trained: bool = _option(
        False,
        "Leave frozen parts out of checkpoints (the finished model has them); a checkpoint then names the base model "
        "that it needs. Not with DeepSpeed or FSDP.",
    )
    check_first_checkpoint: bool = _option(
        True, "Load the first checkpoint of a run and see that it gives the same logits as the model in memory."
    )
    max_bad_steps: int = _option(
        10, "How many steps in a row may have a loss or gradient that is not finite; they are left out and counted."
    )
    dataloader_timeout_seconds: float = _option(
        1800, "How long to wait for a batch from a --dataloader_num_workers process; 0: for ever."
    )
    # Other defaults than transformers has
    metric_for_best_model: str | None = _option(
        None,
        "What checkpoints are chosen by: cer (default with --eval_cer), loss or token_accuracy, the mean over the "
        "validation sets; of one set alone NAME_cer, ...",
    )
    greater_is_better: bool | None = _option(None, "Whether more of it is better (default: not of loss and cer).")
    bf16: bool | None = _option(None, "Compute in bfloat16 (default: on a GPU that can); weights stay float32.")
    logging_steps: float = _option(10, "Steps between two log lines; below 1: share of the run.")
    lr_scheduler_type: str = _option("cosine", "Schedule of the learning rates.")
    warmup_steps: float = _option(0.05, "Steps of warm-up; below 1: share of the run.")
    logging_nan_inf_filter: bool = _option(
        False, "Without use: steps that are not finite are left out; see --max_bad_steps."
    )
    remove_unused_columns: bool = _option(
        False, "Must stay false: the collator reads columns that the model does not."
    )
    ddp_find_unused_parameters: bool | None = _option(False, "All that is trained is used in every step.")
    ddp_bucket_cap_mb: int | None = _option(100, "Gradients sent at once; parameters are many, and most are small.")
    ddp_broadcast_buffers: bool | None = _option(False, "Buffers are constants: no rank has to wait for them.")
    hub_private_repo: bool | None = _option(True, "Whether a repository that --push_to_hub creates is private.")
    hub_strategy: str = _option("end", "Must stay `end`: the finished model is pushed, checkpoints are not.")

    def __post_init__(self):
        self.per_device_train_batch_seconds = batch_seconds(self.per_device_train_batch_seconds)
        check_arguments(self)
        if self.bf16 is None:
            import torch

            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._settle_validation()
        super().__post_init__()

    def _settle_validation(self) -> None:
        """What the options on validation mean for those of transformers."""
        if self.eval_cer:
            self.eval_on_start = True  # the base model is what training has to beat
        if self.metric_for_best_model is None and (self.eval_cer or self.chooses_checkpoints):
            self.metric_for_best_model = "cer" if self.eval_cer else "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "cer"))
        if self.keep_best_checkpoints is not None:
            self.load_best_model_at_end = True
            self.save_total_limit = None
        if self.early_stopping_patience is not None:
            self.restore_callback_states_from_checkpoint = True  # patience goes on counting after an interruption

    @property
    def chooses_checkpoints(self) -> bool:
        """Whether anything depends on which evaluation was the best."""
        return self.early_stopping_patience is not None or self.keep_best_checkpoints is not None

    @property
    def stops_at_retention_loss(self) -> bool:
        """Whether training ends where the CER of --retention_file has risen too far."""
        return self.retention_file is not None and self.retention_action == "stop"

    @property
    def validation_files(self) -> dict[str, str]:
        """Validation files by name, with --retention_file as `retention`; one without a name is called after the
        file.

        Raises:
            ValueError: if two have the same name.
        """
        named = {}
        for item in self.validation_file:
            name, found, path = item.partition("=")
            if not found:
                name, path = Path(item).stem, item
            if name in named:
                raise ValueError(f"two files of --validation_file are called {name!r}; name them: NAME=FILE")
            named[name] = path
        if self.retention_file is not None:
            if RETENTION_SET in named:
                raise ValueError(f"a file of --validation_file is called {RETENTION_SET!r}; name it: NAME=FILE")
            named[RETENTION_SET] = self.retention_file
        return named


class _Parser(HfArgumentParser):
    """Errors in one line: the usage of 150 options would bury them."""

    def add_argument(self, *names, **options):
        """As the parent's; `auto` stands for 0 seconds."""
        if "--per_device_train_batch_seconds" in names:
            options["type"] = batch_seconds
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and status 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


def batch_seconds(text: str | float) -> float:
    """A batch budget; 0 for `auto`.

    Raises:
        ValueError: if it is neither a number nor `auto`.
    """
    return 0.0 if text == "auto" else float(text)


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> SpeechLLMTrainingArguments:
    """Reads `[CONFIG.yaml] [--key value ...]`; what the command line says goes before what the file says.

    Args:
        argv: default the command line.
        description: shown by `--help`.

    Raises:
        SystemExit: with a line that names the file and key, for an unknown key, a wrong type or a contradiction.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(SpeechLLMTrainingArguments, description=description, allow_abbrev=False)
    parser.usage = "%(prog)s [CONFIG.yaml] [--key value ...]"
    from_file: list[str] = []
    if argv and not argv[0].startswith("-"):
        from_file = _yaml_to_argv(parser, argv.pop(0))
    namespace = parser.parse_args([*from_file, *argv])
    names = [item.name for item in dataclasses.fields(SpeechLLMTrainingArguments) if item.init]
    try:
        return SpeechLLMTrainingArguments(**{name: getattr(namespace, name) for name in names})
    except ValueError as error:
        parser.error(str(error))


def _yaml_to_argv(parser: _Parser, path: str) -> list[str]:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(config, dict):
        parser.error(f"{path}: must hold `key: value` lines")
    known = {item.name for item in dataclasses.fields(SpeechLLMTrainingArguments) if item.init}
    argv = []
    for key, value in config.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            parser.error(f"{path}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        option = [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
        # Parsed alone first, so that a wrong type is reported with the file it stands in.
        prog, parser.prog = parser.prog, f"{parser.prog}: {path}"
        _, rest = parser.parse_known_args(option)
        if rest:
            parser.error(f"argument --{key}: one value expected, not {value!r}")
        parser.prog = prog
        argv += option
    return argv
