"""Model card of a run: passes data, settings and scores as plain values to `hub.card`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from ..data.augmentation_options import WAVEFORM_OPTIONS
from ..data.column_values import read_column
from ..data.dataset import row_seconds
from ..data.streaming import RowStream
from ..hub.card import DataSummary, model_card
from ..hub.upload import CARD_FILE
from ..version import __version__
from .arguments import SpeechLLMTrainingArguments
from .freezing import count_parameters
from .lora import uses_lora

logger = logging.getLogger(__name__)

LIBRARIES = ("transformers", "torch", "accelerate", "peft", "datasets")


def write_card(
    args: SpeechLLMTrainingArguments,
    model: Any,
    train_rows: Any,
    eval_rows: Any,
    state: TrainerState,
    name: str | None = None,
    scores: Mapping[str, float] | None = None,
    selection: str | None = None,
    language: list[str] | None = None,
    licence: str | None = None,
    rate_names: Mapping[str, str] | None = None,
) -> None:
    """Writes the model card of a run into the output folder; logs a warning if the card cannot be written.

    Args:
        args: of the run.
        model: trained model.
        train_rows: training rows, see `data.dataset`, or a stream.
        eval_rows: validation rows, a dict of rows by name, or `None`.
        state: of the run.
        name: Hub id; default `args.hub_model_id`, or the name of the output folder.
        scores: metrics of the final weights; `None` without evaluation.
        selection: text that says which weights are saved; `None` for the last weights.
        language, licence: ISO codes and SPDX id, if known.
        rate_names: CER, WER or MER, by name of the validation set, if known.
    """
    lora = None
    if uses_lora(model):
        config = next(iter(model.peft_config.values()))
        layers = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
        lora = f"rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}, on "
        lora += ", ".join(sorted(layers))
    parameters = count_parameters(model)
    card = model_card(
        name or args.hub_model_id or Path(args.output_dir).resolve().name,
        model.name_or_path,
        parameters,
        summarize_data(train_rows, eval_rows),
        run_settings(args, parameters, state.epoch, state.global_step, selection),
        lora,
        state.log_history,
        scores,
        language,
        licence,
        model.config.model_type,
        rate_names,
    )
    path = Path(args.output_dir) / CARD_FILE
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        logger.warning("%s: the model card cannot be written: %s", path, error)


def summarize_data(train_dataset, eval_dataset) -> list[DataSummary]:
    """Counts rows and seconds of the training files and the validation sets.

    Args:
        train_dataset: training rows, see `data.dataset`, or a stream.
        eval_dataset: validation rows, a dict of rows by name, or `None`.
    """
    if isinstance(train_dataset, RowStream):
        sets = [DataSummary(Path(file).name, "training", None, None) for file in train_dataset.files]
    else:
        has_files = "file" in train_dataset.column_names
        files = read_column(train_dataset, "file") if has_files else ["training"] * len(train_dataset)
        seconds = defaultdict(list)
        for file, duration in zip(files, row_seconds(train_dataset), strict=True):
            seconds[file].append(float(duration))
        sets = [DataSummary(Path(file).name, "training", len(rows), sum(rows)) for file, rows in seconds.items()]
    validation = eval_dataset or {}
    for name, dataset in (validation if isinstance(validation, dict) else {"validation": validation}).items():
        sets.append(DataSummary(name, "validation", len(dataset), float(row_seconds(dataset).sum())))
    return sets


def run_settings(
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    epochs: float | None,
    steps: int | None,
    selection: str | None,
) -> list[tuple[str, object]]:
    """Lists names and values of the settings of a run, for the model card.

    Args:
        args: of the run.
        parameters: numbers of trained and of all parameters, by part.
        epochs, steps: numbers of trained epochs and steps.
        selection: text that says which weights are saved.
    """
    rows: list[tuple[str, object]] = []
    for part, (trained, _) in parameters.items():
        rate = getattr(args, f"{part}_learning_rate")
        if trained:
            rows.append((f"learning rate, {part}", f"{args.learning_rate if rate is None else rate:g}"))
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    devices, accumulation = args.world_size, args.gradient_accumulation_steps
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
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
        ("SpecAugment", "yes" if args.run_options.get("spec_augment") else "no"),
        ("tempo perturbation", args.run_options.get("tempo_perturb", "")),
        *((name, args.run_options[name]) for name in WAVEFORM_OPTIONS if args.run_options.get(name)),
        ("seed", args.seed),
        ("hardware", f"{devices} x {device}"),
        ("versions", ", ".join([f"hf_speechllm {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])),
    ]
    return [row for row in rows if row[1] != ""]
