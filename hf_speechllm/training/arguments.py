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
    train_file: list[str] = _option([], "Training JSONL, one or several.")
    train_weight: list[float] = _option(
        [], "How often the rows of each --train_file are seen in an epoch (default 1)."
    )
    validation_file: list[str] = _option([], "Validation JSONL, one or several, each FILE or NAME=FILE.")
    max_bad_fraction: float = _option(0.0, "Share of unusable rows at which the run stops.")
    feature_cache: str = _option("float16", "Cached fbank: float16, float32, or off (computed in every epoch).")
    cache_dir: str | None = _option(None, "Where datasets keeps its caches (default: that of datasets).")
    preprocessing_num_workers: int | None = _option(None, "Processes that compute features (default: all cores).")
    spec_augment: bool = _option(False, "Mask stripes of the training spectrograms.")
    tempo_perturb: float = _option(
        0.0, "Stretch training recordings by up to this share, e.g. 0.1: 90 to 110 percent."
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
    per_device_train_batch_seconds: float = _option(60.0, "Padded audio seconds in a batch on one device.")
    per_device_eval_batch_seconds: float | None = _option(None, "The same for validation (default: as for training).")
    # Other defaults than transformers has
    bf16: bool | None = _option(None, "Compute in bfloat16 (default: on a GPU that can); weights stay float32.")
    logging_steps: float = _option(10, "Steps between two log lines; below 1: share of the run.")
    lr_scheduler_type: str = _option("cosine", "Schedule of the learning rates.")
    warmup_steps: float = _option(0.05, "Steps of warm-up; below 1: share of the run.")
    remove_unused_columns: bool = _option(
        False, "Must stay false: the collator reads columns that the model does not."
    )
    ddp_find_unused_parameters: bool | None = _option(False, "All that is trained is used in every step.")
    hub_private_repo: bool | None = _option(True, "Whether a repository that --push_to_hub creates is private.")
    hub_strategy: str = _option("end", "Must stay `end`: the finished model is pushed, checkpoints are not.")

    def __post_init__(self):
        self.check()
        if self.bf16 is None:
            import torch

            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__post_init__()

    def check(self) -> None:
        """Finds contradictions; runs before anything is loaded."""
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is missing")
        if not self.train_file:
            raise ValueError("--train_file is missing")
        if self.train_weight and len(self.train_weight) != len(self.train_file):
            raise ValueError(
                f"--train_weight has {len(self.train_weight)} numbers for {len(self.train_file)} files of --train_file"
            )
        if len(set(self.train_file)) < len(self.train_file):
            raise ValueError("--train_file names a file twice; give it once, with a higher --train_weight")
        if any(weight <= 0 for weight in self.train_weight):
            raise ValueError("--train_weight must be above 0; leave the file out instead")
        if self.freeze_audio_encoder and self.freeze_audio_adaptor and self.freeze_llm and not self.use_lora:
            raise ValueError(
                "nothing is left to train: --freeze_audio_encoder, --freeze_audio_adaptor and --freeze_llm are all "
                "set without --use_lora"
            )
        if self.feature_cache not in ("float16", "float32", "off"):
            raise ValueError(f"--feature_cache is {self.feature_cache!r}; choose float16, float32 or off")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction is {self.max_bad_fraction}; it must be between 0 and 1")
        if not 0 <= self.tempo_perturb < 1:
            raise ValueError(f"--tempo_perturb is {self.tempo_perturb}; it must be at least 0 and below 1")
        if self.fp16:
            raise ValueError(
                "--fp16: the adaptor's outputs overflow float16 (over 1,000 in the released model); use --bf16"
            )
        if self.hub_strategy != "end":
            raise ValueError(
                f"--hub_strategy {self.hub_strategy} would publish optimizer states and pickled options with the "
                "token and paths of this machine; only `end` is offered"
            )
        if self.per_device_train_batch_seconds <= 0:
            raise ValueError("--per_device_train_batch_seconds must be above 0")

    @property
    def validation_files(self) -> dict[str, str]:
        """Validation files by name; one without a name is called after the file, or `eval` if it is the only one.

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
        return named


class _Parser(HfArgumentParser):
    """Errors in one line: the usage of 150 options would bury them."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and status 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


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
