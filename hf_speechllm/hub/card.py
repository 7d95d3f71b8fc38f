"""The model card: what a model is, what it was trained on and how, what it scored, and how to use it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from .. import __version__
from ..data.dataset import row_seconds
from ..data.streaming import RowStream
from ..training.validation import set_names
from .upload import TAGS, hub_id, usage

if TYPE_CHECKING:
    from ..training.arguments import SpeechLLMTrainingArguments

LIBRARIES = ("transformers", "torch", "accelerate", "peft", "datasets")


@dataclass
class DataSummary:
    """A set of recordings.

    Args:
        name: of the set, or the name (not the path) of its file.
        use: `training` or `validation`.
        rows: dialogues; `None` if they were streamed, and nobody has counted them.
        seconds: of audio, or `None`.
    """

    name: str
    use: str
    rows: int | None
    seconds: float | None


def summarize_data(train_dataset, eval_dataset) -> list[DataSummary]:
    """Rows and seconds of the training files and the validation sets.

    Args:
        train_dataset: rows of `data.dataset`, or a stream.
        eval_dataset: the same, or a dict of them by name, or `None`.
    """
    if isinstance(train_dataset, RowStream):
        sets = [DataSummary(Path(file).name, "training", None, None) for file in train_dataset.files]
    else:
        known = "file" in train_dataset.column_names
        files = train_dataset["file"] if known else ["training"] * len(train_dataset)
        seconds = defaultdict(list)
        for file, duration in zip(files, row_seconds(train_dataset), strict=True):
            seconds[file].append(float(duration))
        sets = [DataSummary(Path(file).name, "training", len(rows), sum(rows)) for file, rows in seconds.items()]
    validation = eval_dataset or {}
    for name, dataset in (validation if isinstance(validation, dict) else {"validation": validation}).items():
        sets.append(DataSummary(name, "validation", len(dataset), float(row_seconds(dataset).sum())))
    return sets


def model_card(
    name: str,
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    data: Sequence[DataSummary],
    log_history: Sequence[Mapping[str, float]] = (),
    scores: Mapping[str, float] | None = None,
    selection: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    language: list[str] | None = None,
    licence: str | None = None,
) -> str:
    """Writes the card of a trained model; it names files, but no folder of the machine, and no secret.

    Args:
        name: Hub id of the model, or the name of its folder.
        args: of the training.
        parameters: of each part, trained and in all; see `freezing.count_parameters`.
        data: the sets.
        log_history: of `TrainerState`; the validation at step 0, if there is one, gives the scores before training.
        scores: metrics of the model as it is; default those of the last validation in the log.
        selection: which weights these are, in words; `None` if they are simply the last.
        epochs, steps: that were trained.
        language, licence: ISO codes and SPDX id, where known.

    Returns:
        Markdown with a YAML front matter.
    """
    source = str(args.model_name_or_path)  # never empty: the arguments are checked
    base = hub_id(source)
    front_matter = ModelCardData(
        language=language,
        license=licence,
        library_name="transformers",
        base_model=base,
        tags=[*TAGS, *(["lora"] if args.use_lora else [])],
        pipeline_tag=TAGS[0],
    )
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"the local model `{Path(source).resolve().name}`"
    sections = [
        f"---\n{front_matter.to_yaml()}\n---\n\n# {name.split('/')[-1]}",
        f"A speech LLM (audio encoder, adaptor, causal LLM) that transcribes speech, fine-tuned from {origin} with "
        "`hf_speechllm`.",
        _trained(args, parameters, base),
        _data(data),
        _settings(args, parameters, epochs, steps, selection),
        _scores(log_history, scores),
        usage(name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _trained(args: SpeechLLMTrainingArguments, parameters: Mapping[str, tuple[int, int]], base: str | None) -> str:
    rows = [
        (part, f"{trained / 1e6:,.2f}", f"{total / 1e6:,.2f}")
        for part, (trained, total) in parameters.items()
    ]  # fmt: skip
    text = "## What was trained\n" + _table(("part", "trained (million parameters)", "of"), rows)
    if args.use_lora:
        text += (
            f"\n\nThe LLM was trained with low-rank adapters (LoRA, rank {args.lora_r}, alpha {args.lora_alpha}, "
            f"dropout {args.lora_dropout:g}) on {', '.join(args.lora_target_modules)}. "
        )
        text += (
            "The repository holds the adapters; they are merged into the base model when it is loaded."
            if base
            else "The base model is not on the Hub, so they are merged into the model when it is published."
        )
    return text


def _data(data: Sequence[DataSummary]) -> str:
    rows = [
        (
            item.use,
            f"`{item.name}`",
            "streamed" if item.rows is None else f"{item.rows:,}",
            "not counted" if item.seconds is None else f"{item.seconds / 3600:.2f}",
        )
        for item in data
    ]
    return "## Data\n" + _table(("use", "set", "rows", "hours"), rows) if rows else ""


def _settings(
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    epochs: float | None,
    steps: int | None,
    selection: str | None,
) -> str:
    rows: list[tuple[str, object]] = []
    for part, (trained, _) in parameters.items():
        rate = getattr(args, f"{part}_learning_rate")
        if trained:
            rows.append((f"learning rate, {part}", f"{args.learning_rate if rate is None else rate:g}"))
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    devices, accumulation = args.world_size, args.gradient_accumulation_steps
    rows += [
        (
            "schedule",
            f"{schedule}, warm-up {args.warmup_steps:g}" + (" of the steps" if 0 < args.warmup_steps < 1 else ""),
        ),
        ("batch", f"{args.per_device_train_batch_seconds:g} s x {devices} device(s) x {accumulation} accumulated"),
        ("epochs", "" if epochs is None else f"{epochs:.2f}"),
        ("steps", "" if steps is None else f"{steps:,}"),
        ("weights", selection or ""),
        ("weight decay", f"{args.weight_decay:g}"),
        ("precision", "float32 weights" + (", bfloat16 compute" if args.bf16 else "")),
        ("SpecAugment", "yes" if args.spec_augment else "no"),
        ("tempo perturbation", f"{args.tempo_perturb:g}"),
        ("seed", args.seed),
        ("versions", ", ".join([f"hf_speechllm {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])),
    ]
    return "## Settings\n" + _table(("setting", "value"), [row for row in rows if row[1] != ""])


def _scores(log_history: Sequence[Mapping[str, float]], scores: Mapping[str, float] | None) -> str:
    evaluations = [entry for entry in log_history if set_names(entry)]
    last = {key: value for entry in evaluations for key, value in entry.items()}
    before = {key: value for entry in evaluations if entry["step"] == 0 for key, value in entry.items()}
    scores = last if scores is None else scores
    header = ["validation set", "loss per token", "token accuracy (teacher forcing)"]
    decoded = any(key.endswith("_cer") for key in scores)
    if decoded:
        header += ["CER before training", "CER after training"]
    rows = []
    for name in set_names(scores):
        prefix = f"eval_{name}" if name else "eval"
        row = [f"`{name or 'validation'}`", f"{scores[f'{prefix}_loss']:.4f}"]
        row.append(f"{scores[f'{prefix}_token_accuracy']:.2%}")
        if decoded:
            key = f"{prefix}_cer"
            row += [f"{table[key]:.2%}" if key in table else "" for table in (before, scores)]
        rows.append(row)
    return "## Scores\n" + _table(header, rows) if rows else ""
