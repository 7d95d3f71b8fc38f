"""The model card: what a model is, what it was trained on and how, what it scored, and how to use it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from .. import __version__

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments

CARD_FILE = "README.md"
LIBRARIES = ("transformers", "torch", "accelerate", "peft", "datasets")


@dataclass
class DataSummary:
    """A set of recordings.

    Args:
        name: of the set, or the name (not the path) of its file.
        use: `training` or `validation`.
        rows: dialogues.
        seconds: of audio.
    """

    name: str
    use: str
    rows: int
    seconds: float


def hub_id(name: str) -> str | None:
    """The Hub id that a model was loaded by; `None` for a folder of this machine."""
    return None if os.path.exists(name) or os.path.isabs(name) or name.count("/") > 1 else name


def model_card(
    name: str,
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    data: Sequence[DataSummary],
    log_history: Sequence[Mapping[str, float]] = (),
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
        log_history: of `TrainerState`; the last validation gives the scores.
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
        tags=["automatic-speech-recognition", "speech_llm", *(["lora"] if args.use_lora else [])],
        pipeline_tag="automatic-speech-recognition",
    )
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"the local model `{Path(source).resolve().name}`"
    sections = [
        f"---\n{front_matter.to_yaml()}\n---\n\n# {name.split('/')[-1]}",
        f"A speech LLM (audio encoder, adaptor, causal LLM) that transcribes speech, fine-tuned from {origin} with "
        "`hf_speechllm`.",
        _trained(args, parameters, base),
        _data(data),
        _settings(args, parameters, epochs, steps),
        _scores(log_history),
        _use(name),
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
    rows = [(item.use, f"`{item.name}`", f"{item.rows:,}", f"{item.seconds / 3600:.2f}") for item in data]
    return "## Data\n" + _table(("use", "set", "rows", "hours"), rows) if rows else ""


def _settings(
    args: SpeechLLMTrainingArguments,
    parameters: Mapping[str, tuple[int, int]],
    epochs: float | None,
    steps: int | None,
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
        ("weight decay", f"{args.weight_decay:g}"),
        ("precision", "float32 weights" + (", bfloat16 compute" if args.bf16 else "")),
        ("SpecAugment", "yes" if args.spec_augment else "no"),
        ("tempo perturbation", f"{args.tempo_perturb:g}"),
        ("seed", args.seed),
        ("versions", ", ".join([f"hf_speechllm {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])),
    ]
    return "## Settings\n" + _table(("setting", "value"), [row for row in rows if row[1] != ""])


def _scores(log_history: Sequence[Mapping[str, float]]) -> str:
    last: dict[str, tuple[int, float, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            name = key.removesuffix("_loss").removeprefix("eval").removeprefix("_") or "validation"
            accuracy = entry.get(f"{key.removesuffix('_loss')}_token_accuracy")
            if key.startswith("eval") and key.endswith("_loss") and accuracy is not None:
                last[name] = (int(entry["step"]), value, accuracy)
    if not last:
        return ""
    rows = [(f"`{name}`", step, f"{loss:.4f}", f"{accuracy:.2%}") for name, (step, loss, accuracy) in last.items()]
    header = ("validation set", "step", "loss per token", "token accuracy (teacher forcing)")
    return "## Scores\n" + _table(header, rows)


def _use(name: str) -> str:
    return f"""## Use
```python
from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.inference.transcriber import Transcriber

model = SpeechLLMForConditionalGeneration.from_pretrained("{name}")
processor = SpeechLLMProcessor.from_pretrained("{name}")
Transcriber(model, processor).transcribe(["recording.wav"])
```

With lists, from a checkout of the project:

```bash
python recipes/decode.py --model_name_or_path {name} --scp_file wav.scp --output_file hyp.txt
```

For stock transformers (`fun_asr_nano`) or FunASR, convert it: `python recipes/convert_checkpoint.py --input {name}
--output converted --format native` (or `funasr`). Where the model would behave differently there, this is refused, and
the reason given."""
