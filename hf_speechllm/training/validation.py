"""Validation by decoding: what the model writes when nobody holds its hand, and how many errors that has."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..data.collator import SpeechLLMCollator
from ..evaluation.scoring import ErrorCounts, count_errors
from ..files import atomic_write
from ..model import chat
from ..model.processing import pad_features
from .arguments import RETENTION_SET
from .option_checks import MEASURES

if TYPE_CHECKING:
    from .trainer import SpeechLLMTrainer

TABLE_FILE, SAMPLES_FOLDER = "validation.tsv", "validation_samples"
COUNTS = ("substitutions", "deletions", "insertions", "reference_tokens")
SAMPLES_SHOWN = 10  # transcripts of each set that are written out


@dataclass(frozen=True)
class Sample:
    """A decoded row.

    Args:
        position: in its set.
        name: where the row stands: `FILE:LINE`.
        reference, hypothesis: what was said, and what the model wrote.
    """

    position: int
    name: str
    reference: str
    hypothesis: str


@dataclass
class PromptCollator:
    """Builds the inputs of `generate` from rows of `data.dataset`: their dialogues up to the last answer.

    In a dialogue of several turns, the last answer is decoded, given the true answers before it.

    Args:
        collator: of validation; its features are used.
    """

    collator: SpeechLLMCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads a batch.

        Returns:
            `inputs`: `input_ids`, `attention_mask`, shape = (rows, tokens), padded on the left, `input_features`,
            shape = (recordings, frames, feature size), `input_features_mask`; `references`: the last answers;
            `names`, `positions`; and `counted`, false for rows that only keep the ranks in step.
        """
        processor = self.collator.processor
        prompts: list[list[int]] = []
        features: list[torch.Tensor] = []
        references: list[str | None] = []
        for row in rows:
            inputs = self.collator.row_inputs(row)
            dialogue = chat.parse_messages(json.loads(row["messages"]), row["hotwords"] or ())
            *before, last = dialogue.turns
            question = chat.Dialogue(dialogue.system, (*before, chat.Turn(last.pieces, None)))
            prompts.append(processor.tokenize(question, [len(item) for item in inputs]).input_ids)
            references.append(last.answer)
            features.extend(inputs)
        return {
            "inputs": {**processor.pad_tokens({"input_ids": prompts}, "left"), **pad_features(features)},
            "references": references,
            "names": [f"{Path(row['file']).name}:{row['line']}" for row in rows],
            "positions": [row["seed"][1] for row in rows],  # keys of `BudgetBatchSampler`; indices in epoch 0
            "counted": [row["supervised"] for row in rows],
        }


def spread_rows(rows: int, number: int | None) -> np.ndarray:
    """Indices of a fixed sample, one from each of `number` equal stretches; all if there are no more.

    The place inside a stretch is drawn (with a seed of its own), so that a regular order of the rows does no harm.
    """
    if number is None or number >= rows:
        return np.arange(rows)
    edges = np.arange(number + 1) * rows / number
    places = np.random.default_rng(0).uniform(edges[:-1], edges[1:])
    return np.minimum(np.floor(places), rows - 1).astype(np.int64)


def decode_set(trainer: SpeechLLMTrainer, dataset) -> tuple[ErrorCounts, list[Sample]]:
    """Decodes a set greedily, each rank its share, in the precision of training.

    Args:
        trainer: gives model, batches and options.
        dataset: rows of `data.dataset`.

    Returns:
        The errors of all ranks, and some transcripts, the same rows every time.
    """
    args = trainer.args
    shown = set(spread_rows(len(dataset), SAMPLES_SHOWN).tolist())
    # Not the wrapper of several processes: nothing is exchanged between them in generation.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.eval()  # no dropout, no gradient checkpointing, which would forbid the key-value cache
    tokenizer = trainer.processing_class.tokenizer
    counts = ErrorCounts()
    samples: list[Sample] = []
    for batch in trainer.get_decoding_dataloader(dataset):
        inputs = trainer._prepare_inputs(batch["inputs"])
        # Not compiled: training may leave padding out, and its graphs are then of no use here.
        with torch.no_grad(), trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            output = model.generate(
                **inputs, max_new_tokens=args.eval_max_new_tokens, do_sample=False, num_beams=1, use_cache=True
            )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows = zip(batch["positions"], batch["names"], batch["references"], answers, batch["counted"], strict=True)
        for position, name, reference, answer, counted in rows:
            if not counted:
                continue
            hypothesis = chat.clean_answer(answer)
            counts += count_errors(reference, hypothesis)
            if position in shown:
                samples.append(Sample(position, name, reference, hypothesis))
    sums = torch.tensor([getattr(counts, name) for name in COUNTS], dtype=torch.float64, device=args.device)
    totals = trainer.accelerator.reduce(sums, "sum").long().tolist()
    return ErrorCounts(*totals), sorted(gather_object(samples), key=lambda sample: sample.position)


def score_set(trainer: SpeechLLMTrainer, dataset, prefix: str) -> tuple[dict[str, float], list[Sample]]:
    """Loss and token accuracy of a set, and with `--eval_cer` its CER and errors.

    Args:
        dataset: rows of `data.dataset`.
        prefix: of the metrics' names.

    Returns:
        Metrics (`PREFIX_loss`, ...; rates as fractions) and transcripts.
    """
    began = time.perf_counter()
    output = trainer.evaluation_loop(
        trainer.get_eval_dataloader(dataset), "Evaluation", prediction_loss_only=True, metric_key_prefix=prefix
    )
    metrics: dict[str, float] = dict(output.metrics or {})
    samples: list[Sample] = []
    if trainer.args.eval_cer:
        chosen = spread_rows(len(dataset), trainer.args.eval_cer_samples)
        counts, samples = decode_set(trainer, dataset if len(chosen) == len(dataset) else dataset.select(chosen))
        metrics[f"{prefix}_cer"] = counts.rate
        metrics.update({f"{prefix}_{name}": getattr(counts, name) for name in COUNTS})
    runtime = time.perf_counter() - began
    metrics[f"{prefix}_runtime"] = round(runtime, 4)
    metrics[f"{prefix}_samples_per_second"] = round(output.num_samples / runtime, 3)
    return metrics, samples


def score_sets(trainer: SpeechLLMTrainer, sets: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Scores several sets, adds their means, and writes some transcripts into `validation_samples`.

    The random numbers of training are left as they were.

    Args:
        sets: rows of `data.dataset` by name; a single set may be called `""`.
        prefix: of the metrics' names.
    """
    metrics: dict[str, float] = {}
    samples = {}
    device = trainer.args.device
    # Each loader draws a seed for its workers.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name, dataset in sets.items():
            scores, samples[name] = score_set(trainer, dataset, f"{prefix}_{name}" if name else prefix)
            metrics.update(scores)
    add_means(metrics, list(sets), prefix)
    if trainer.args.eval_cer and trainer.is_world_process_zero():
        file = f"step-{trainer.state.global_step}.txt" if prefix == "eval" else f"{prefix}.txt"
        write_samples(samples, Path(trainer.args.output_dir) / SAMPLES_FOLDER / file)
    return metrics


def add_means(metrics: dict[str, float], names: Sequence[str], prefix: str) -> None:
    """Adds `PREFIX_loss`, `PREFIX_token_accuracy` and `PREFIX_cer`: means over the sets, each counting alike.

    The set of `--retention_file` is left out: it is there to be kept, not to be improved.
    """
    wanted = [name for name in names if name != RETENTION_SET]
    for measure in MEASURES:
        values = [metrics[key] for name in wanted if (key := f"{prefix}_{name}_{measure}") in metrics]
        if values:
            metrics[f"{prefix}_{measure}"] = sum(values) / len(values)


def set_names(entry: Mapping[str, float], prefix: str = "eval") -> list[str]:
    """The sets that an evaluation's metrics tell of; a single set without a name is called `""`."""
    keys = [key.removeprefix(prefix).removeprefix("_") for key in entry if key.startswith(f"{prefix}_")]
    names = [key.removesuffix("loss").removesuffix("_") for key in keys if key == "loss" or key.endswith("_loss")]
    return [name for name in names if name] or names


def write_table(log_history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes all evaluations of a run as a table, tabs between columns, all or nothing.

    Args:
        log_history: of `TrainerState`.
        path: of the file.
    """
    lines = ["\t".join(("step", "set", "loss", "token_accuracy", "cer_percent", *COUNTS))]
    for entry in log_history:
        for name in set_names(entry):
            prefix = f"eval_{name}" if name else "eval"
            cer = entry.get(f"{prefix}_cer")
            cells = [entry["step"], name or "validation"]
            cells += [f"{entry[f'{prefix}_{measure}']:.5f}" for measure in ("loss", "token_accuracy")]
            cells += [
                "" if cer is None else f"{100 * cer:.3f}",
                *(entry.get(f"{prefix}_{count}", "") for count in COUNTS),
            ]
            lines.append("\t".join(map(str, cells)))
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")


def write_samples(samples: dict[str, list[Sample]], path: Path) -> None:
    """Writes references and hypotheses below each other.

    Args:
        samples: by set.
        path: of the text file.
    """
    blocks = []
    for set_name, rows in samples.items():
        blocks.append(f"# {set_name or 'validation'}")
        for row in rows:
            counts = count_errors(row.reference, row.hypothesis)
            blocks.append(
                f"{row.name}: {counts.errors} errors, {counts.reference_tokens} tokens\n"
                f"ref: {row.reference}\nhyp: {row.hypothesis}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write("\n\n".join(blocks) + "\n")


def score_batches(trainer: SpeechLLMTrainer, dataloader, prefix: str) -> dict[str, float]:
    """Mean loss and accuracy over supervised tokens (not over batches, which differ in size), summed over ranks."""
    model = (
        trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
        if not trainer.is_in_train
        else trainer.model_wrapped
    )
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=trainer.args.device)
    for inputs in dataloader:
        inputs = trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            outputs = model(**inputs)
        count = outputs.num_label_tokens
        sums += torch.stack([outputs.loss * count, outputs.token_accuracy * count, count]).double()
    loss, correct, tokens = trainer.accelerator.reduce(sums, "sum").tolist()
    return {
        f"{prefix}_loss": loss / max(tokens, 1),
        f"{prefix}_token_accuracy": correct / max(tokens, 1),
    }
