"""The model card of a run: its data, settings and scores as plain values for `hub.card`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerState

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
) -> None:
    """Writes the model card of a run into its output folder; if that is not possible, there is a warning.

    Args:
        args: of the run.
        model: as it was trained.
        train_rows: rows of `data.dataset`, or a stream.
        eval_rows: the same, or a dict of them by name, or `None`.
        state: of the run.
        name: Hub id; default that of the arguments, or the name of the output folder.
        scores: metrics of the final weights; `None` if they were not evaluated.
        selection: which weights these are, as text; `None` if they are simply the last.
        language, licence: ISO codes and SPDX id, where known.
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
    )
    path = Path(args.output_dir) / CARD_FILE
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        logger.warning("%s can't be written: %s", path, error)


def summarize_data(train_dataset, eval_dataset) -> list[DataSummary]:
    """Counts rows and seconds of the training files and the validation sets.

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


def run_settings(
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    epochs: float | None,
    steps: int | None,
    selection: str | None,
) -> list[tuple[str, object]]:
    """Lists the settings of a run, names and values, for its card.

    Args:
        args: of the run.
        parameters: of each part, trained and in all.
        epochs, steps: that were trained.
        selection: which weights remained, as text.
    """
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
        ("SpecAugment", "yes" if args.run_options.get("spec_augment") else "no"),
        ("tempo perturbation", args.run_options.get("tempo_perturb", "")),
        ("seed", args.seed),
        ("versions", ", ".join([f"hf_speechllm {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])),
    ]
    return [row for row in rows if row[1] != ""]
