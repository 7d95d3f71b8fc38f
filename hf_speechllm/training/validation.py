"""Validation: loss, token accuracy and, by decoding, the error rates of validation sets."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.bad_rows import BadRow
from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..data.prompt_collator import PromptCollator
from ..evaluation.scoring import ErrorCounts, count_errors
from ..evaluation.validation_metrics import COUNTS, metric_prefix
from ..model import chat
from ..model.processing import SpeechLLMProcessor
from .arguments import SpeechLLMTrainingArguments
from .dataloaders import BudgetDataLoader, eval_loader
from .device import to_device
from .option_checks import MEASURES
from .options import RETENTION_SET
from .unreadable_rows import UNREADABLE_ROWS, SkipUnreadableCollator
from .validation_files import SAMPLES_FOLDER, SAMPLES_SHOWN, Sample, write_samples

logger = logging.getLogger(__name__)


@dataclass
class Validator:
    """Scores validation sets, each rank its share.

    Args:
        args: of the run.
        accelerator: sums over the ranks.
        processor: decodes tokens.
        collator: builds batches, without augmentation.
        input_dtype: of floating-point inputs, where DeepSpeed computes in its own; default as they are.

    Attributes:
        unreadable: file, line and reason of the rows of the current set that this rank could not read.
    """

    args: SpeechLLMTrainingArguments
    accelerator: Accelerator
    processor: SpeechLLMProcessor
    collator: SpeechLLMCollator
    input_dtype: torch.dtype | None = None
    unreadable: dict[tuple[str, int], str] = field(default_factory=dict, init=False)

    def score(self, engine: Any, sets: Mapping[str, Any], prefix: str, step: int) -> dict[str, float]:
        """Scores several sets, adds their means, and writes some transcripts into `validation_samples`.

        The random numbers of training are left as they were.

        Args:
            engine: the model as it is trained, wrapped by Accelerate or not.
            sets: rows of `data.dataset` by name; a single set may be called `""`.
            prefix: of the metric names.
            step: of training, for the file of transcripts.

        Returns:
            Metrics (`PREFIX_loss`, ...; rates as fractions).
        """
        metrics: dict[str, float] = {}
        samples = {}
        device = self.args.device
        # Each loader draws a seed for its workers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for name, rows in sets.items():
                scores, samples[name] = self._score_set(engine, rows, metric_prefix(prefix, name))
                metrics.update(scores)
        add_means(metrics, list(sets), prefix)
        if self.args.eval_cer and self.accelerator.is_main_process:
            file = f"step-{step}.txt" if prefix == "eval" else f"{prefix}.txt"
            write_samples(samples, Path(self.args.output_dir) / SAMPLES_FOLDER / file)
        return metrics

    def _score_set(self, engine: Any, rows: Any, prefix: str) -> tuple[dict[str, float], list[Sample]]:
        began = time.perf_counter()
        self.unreadable.clear()
        metrics = self.losses(engine, self.loader(rows), prefix)
        samples: list[Sample] = []
        if self.args.eval_cer:
            chosen = spread_rows(len(rows), self.args.eval_cer_samples)
            counts, samples = self.decode(engine, rows if len(chosen) == len(rows) else rows.select(chosen))
            metrics[f"{prefix}_cer"] = counts.rate
            metrics.update({f"{prefix}_{name}": getattr(counts, name) for name in COUNTS})
        metrics.update(self._left_out(rows, prefix))
        runtime = time.perf_counter() - began
        metrics[f"{prefix}_runtime"] = round(runtime, 4)
        metrics[f"{prefix}_samples_per_second"] = round(len(rows) / runtime, 3)
        return metrics, samples

    def _left_out(self, rows: Any, prefix: str) -> dict[str, int]:
        """Names and counts the rows of a set whose recordings can no longer be read, if there are any."""
        if not {"features", *ENCODED_COLUMNS}.isdisjoint(rows.column_names):
            return {}
        for (file, line), reason in self.unreadable.items():
            logger.warning("left out of %s: %s", prefix, BadRow(file, line, reason))
        count = int(self.accelerator.reduce(torch.tensor(len(self.unreadable), device=self.args.device), "sum"))
        return {f"{prefix}_bad_rows": count} if count else {}

    def _readable(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self.unreadable.update(batch.pop(UNREADABLE_ROWS, ()))
            yield batch

    def loader(self, rows: Any) -> BudgetDataLoader:
        """Builds the batches of this rank, sorted by length, without rows that can no longer be read."""
        return eval_loader(self.args, rows, SkipUnreadableCollator(self.collator))

    def losses(self, engine: Any, batches: BudgetDataLoader, prefix: str) -> dict[str, float]:
        """Computes mean loss and accuracy over the supervised tokens (not over batches, which differ in size) of all
        ranks.

        Args:
            engine: the model as it is trained.
            batches: of this rank.
            prefix: of the metric names.
        """
        engine.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in self._readable(batches):
            with torch.no_grad():
                outputs = engine(**to_device(batch, self.args.device, self.input_dtype))
            count = outputs.num_label_tokens
            sums += torch.stack([outputs.loss * count, outputs.token_accuracy * count, count]).double()
        loss, correct, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return {f"{prefix}_loss": loss / max(tokens, 1), f"{prefix}_token_accuracy": correct / max(tokens, 1)}

    def decode(self, engine: Any, rows: Any) -> tuple[ErrorCounts, list[Sample]]:
        """Decodes a set greedily, in the precision of training.

        Args:
            engine: the model as it is trained.
            rows: of `data.dataset`.

        Returns:
            The errors of all ranks, and some transcripts, the same rows every time.
        """
        shown = set(spread_rows(len(rows), SAMPLES_SHOWN).tolist())
        # Not the wrapper of several processes: generation exchanges nothing between them.
        model = self.accelerator.unwrap_model(engine, keep_torch_compile=False)
        model.eval()  # no dropout, no gradient checkpointing, which would forbid the key-value cache
        limit = self.args.eval_max_new_tokens
        tokenizer = self.processor.tokenizer
        counts = ErrorCounts()
        samples: list[Sample] = []
        collator = SkipUnreadableCollator(self.collator, PromptCollator(self.collator))
        for batch in self._readable(eval_loader(self.args, rows, collator)):
            inputs = to_device(batch["inputs"], self.args.device, self.input_dtype)
            # Not compiled: training may leave padding out, and its graphs are then of no use here.
            with torch.no_grad(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                output = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1, use_cache=True)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            columns = (batch[name] for name in ("positions", "names", "references", "counted"))
            for position, name, reference, counted, answer in zip(*columns, answers, strict=True):
                if not counted:
                    continue
                hypothesis = chat.clean_answer(answer)
                counts += count_errors(reference, hypothesis)
                if position in shown:
                    samples.append(Sample(position, name, reference, hypothesis))
        sums = torch.tensor([getattr(counts, name) for name in COUNTS], dtype=torch.float64, device=self.args.device)
        totals = self.accelerator.reduce(sums, "sum").long().tolist()
        return ErrorCounts(*totals), sorted(gather_object(samples), key=lambda sample: sample.position)


def add_means(metrics: dict[str, float], names: Sequence[str], prefix: str) -> None:
    """Adds `PREFIX_loss`, `PREFIX_token_accuracy` and `PREFIX_cer`: means over the sets, each with the same weight.

    The set of `--retention_file` is left out: it is there to be kept, not to be improved.

    Args:
        metrics: of all sets.
        names: of the sets.
        prefix: of the metric names.
    """
    wanted = [name for name in names if name != RETENTION_SET]
    for measure in MEASURES:
        values = [metrics[key] for name in wanted if (key := f"{prefix}_{name}_{measure}") in metrics]
        if values:
            metrics[f"{prefix}_{measure}"] = sum(values) / len(values)


def spread_rows(rows: int, number: int | None) -> np.ndarray:
    """Chooses a fixed sample of row indices, one from each of `number` equal ranges; all if there are no more.

    The index inside a range is drawn (with a fixed seed), so that a regular order of the rows does no harm.
    """
    if number is None or number >= rows:
        return np.arange(rows)
    edges = np.arange(number + 1) * rows / number
    places = np.random.default_rng(0).uniform(edges[:-1], edges[1:])
    return np.minimum(np.floor(places), rows - 1).astype(np.int64)
