"""The model card: description, training data, settings, scores and usage of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from ..evaluation.validation_metrics import metric_prefix, set_names
from ..model.configuration import SpeechLLMConfig
from .markdown import code, escape, table
from .upload import TAGS, hub_id, usage


@dataclass
class DataSummary:
    """A data set in the model card.

    Args:
        name: name of the set, or name (not path) of the file.
        use: `training` or `validation`.
        rows: number of dialogues; `None` if they were streamed and not counted.
        seconds: seconds of audio, or `None`.
    """

    name: str
    use: str
    rows: int | None
    seconds: float | None


def model_card(
    name: str,
    source: str,
    parameters: Mapping[str, tuple[int, int]],
    data: Sequence[DataSummary],
    settings: Sequence[tuple[str, object]],
    lora: str | None = None,
    log_history: Sequence[Mapping[str, float]] = (),
    scores: Mapping[str, float] | None = None,
    language: list[str] | None = None,
    licence: str | None = None,
    model_type: str = SpeechLLMConfig.model_type,
    rate_names: Mapping[str, str] | None = None,
) -> str:
    """Builds the card of a trained model. The card contains file names, but no local folders and no secrets.

    Args:
        name: Hub id or folder name of the model; a folder name may contain any character.
        source: Hub id or folder of the base model.
        parameters: trained and total parameters of each part; see `freezing.count_parameters`.
        data: training and validation sets.
        settings: names and values of training options.
        lora: settings of the adapters, as text; `None` without LoRA.
        log_history: see `TrainerState.log_history`; a validation at step 0 provides the scores before training.
        scores: metrics of the final weights; default: metrics of the last validation in the log.
        language, licence: ISO codes and SPDX id, if known.
        model_type: of the model's config.
        rate_names: CER, WER or MER, by name of the validation set, if known.

    Returns:
        Markdown with a YAML front matter.
    """
    base = hub_id(source)
    front_matter = ModelCardData(
        language=language,
        license=licence,
        library_name="transformers",
        base_model=base,
        tags=[*TAGS, *(["lora"] if lora else [])],
        pipeline_tag=TAGS[0],
    )
    local = code(Path(source).resolve().name)
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"the local model {local}"
    sections = [
        f"---\n{front_matter.to_yaml()}\n---\n\n# {escape(name.split('/')[-1])}",
        f"A speech LLM (audio encoder, adaptor, causal LLM) that transcribes speech, fine-tuned from {origin} with "
        "`hf_speechllm`.",
        _trained(parameters, lora, base),
        _data(data),
        "## Settings\n" + table(("setting", "value"), [(name, escape(value)) for name, value in settings]),
        _scores(log_history, scores, rate_names or {}),
        usage(name, model_type),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _trained(parameters: Mapping[str, tuple[int, int]], lora: str | None, base: str | None) -> str:
    rows = [(part, f"{trained / 1e6:,.2f}", f"{total / 1e6:,.2f}") for part, (trained, total) in parameters.items()]
    text = "## What was trained\n" + table(("part", "trained (million parameters)", "of"), rows)
    if lora:
        text += f"\n\nThe LLM was trained with low-rank adapters (LoRA, {lora}). "
        text += (
            "The repository contains the adapters; loading merges them into the base model."
            if base
            else "The base model is not on the Hub, so the published model contains the merged adapters."
        )
    return text


def _data(data: Sequence[DataSummary]) -> str:
    rows = [
        (
            item.use,
            code(item.name),
            "streamed" if item.rows is None else f"{item.rows:,}",
            "not counted" if item.seconds is None else f"{item.seconds / 3600:.2f}",
        )
        for item in data
    ]
    return "## Data\n" + table(("use", "set", "rows", "hours"), rows) if rows else ""


def _scores(
    log_history: Sequence[Mapping[str, float]], scores: Mapping[str, float] | None, rate_names: Mapping[str, str]
) -> str:
    evaluations = [entry for entry in log_history if set_names(entry)]
    last = {key: value for entry in evaluations for key, value in entry.items()}
    before = {key: value for entry in evaluations if entry["step"] == 0 for key, value in entry.items()}
    scores = last if scores is None else scores
    header = ["validation set", "loss per token", "token accuracy (teacher forcing)"]
    decoded = any(key.endswith("_cer") for key in scores)
    if decoded:
        header += ["error rate before training", "error rate after training"]
    rows = []
    for name in set_names(scores):
        prefix = metric_prefix("eval", name)
        row = [code(name or "validation"), f"{scores[f'{prefix}_loss']:.4f}"]
        accuracy = scores.get(f"{prefix}_token_accuracy")  # absent if only a CTC head is trained
        row.append("" if accuracy is None else f"{accuracy:.2%}")
        if decoded:
            key = f"{prefix}_cer"
            kind = f"{rate_names[name]} " if name in rate_names else ""
            row += [f"{kind}{100 * rates[key]:.2f} %" if key in rates else "" for rates in (before, scores)]
        rows.append(row)
    return "## Scores\n" + table(header, rows) if rows else ""
