"""Validation: loss, token accuracy and, with decoding, error rates of validation sets."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..console import progress_bar
from ..data.bad_rows import BadRow
from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..data.prompt_collator import PromptCollator
from ..evaluation.scoring import ErrorCounts, common_metric, count_errors, describe_line
from ..evaluation.validation_metrics import COUNTS, metric_prefix
from ..model import chat
from ..model.ctc import is_trained_alone
from ..model.generation import transcribing
from ..model.processing import SpeechLLMProcessor
from .arguments import SpeechLLMTrainingArguments
from .dataloaders import BudgetDataLoader, eval_loader
from .device import to_device
from .option_checks import MEASURES
from .options import RETENTION_SET
from .unreadable_rows import UNREADABLE_ROWS, SkipUnreadableCollator
from .validation_files import SAMPLES_FOLDER, SAMPLES_SHOWN, Sample, write_samples

logger = logging.getLogger(__name__)

NAMED_ROWS = 1000  # transcripts that decide between CER, WER and MER


@dataclass
class Validator:
    """Scores validation sets; each rank scores a share.

    Args:
        args: of the run.
        accelerator: sums over the ranks.
        processor: decodes tokens.
        collator: builds batches, without augmentation.

    Attributes:
        unreadable: file, line and error of the unreadable rows in the current set, on this rank.
        rate_names: CER, WER or MER, by name of the set; filled by `score` with `--eval_cer`.
        samples: some transcripts of the last `score`, by name of the set; empty except in the first process.
    """

    args: SpeechLLMTrainingArguments
    accelerator: Accelerator
    processor: SpeechLLMProcessor
    collator: SpeechLLMCollator
    unreadable: dict[tuple[str, int], str] = field(default_factory=dict, init=False)
    rate_names: dict[str, str] = field(default_factory=dict, init=False)
    samples: dict[str, list[Sample]] = field(default_factory=dict, init=False)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Dtype of floating-point inputs with DeepSpeed, which does not convert inputs; otherwise `None`."""
        plugin = self.accelerator.state.deepspeed_plugin
        return None if plugin is None else plugin.hf_ds_config.dtype()

    def score(self, engine: Any, sets: Mapping[str, Any], prefix: str, step: int) -> dict[str, float]:
        """Scores several sets, adds the means, and writes some transcripts into `validation_samples`.

        Restores the random state of training.

        Args:
            engine: the trained model, wrapped by Accelerate or not.
            sets: rows by name, see `data.dataset`; the name of a single set may be `""`.
            prefix: of the metric names.
            step: training step, for the file name of transcripts.

        Returns:
            Metrics (`PREFIX_loss`, ...; rates as fractions).
        """
        metrics: dict[str, float] = {}
        samples = {}
        device = self.args.device
        # Each loader draws a random seed for the workers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for name, rows in sets.items():
                if self.args.eval_cer and name not in self.rate_names:
                    self.rate_names[name] = rate_name(rows)
                scores, samples[name] = self._score_set(engine, rows, metric_prefix(prefix, name), name)
                metrics.update(scores)
        add_means(metrics, list(sets), prefix)
        if self.args.eval_cer and self.accelerator.is_main_process:
            self.samples = samples
            file = f"step-{step}.txt" if prefix == "eval" else f"{prefix}.txt"
            write_samples(samples, Path(self.args.output_dir) / SAMPLES_FOLDER / file)
        return metrics

    def _score_set(self, engine: Any, rows: Any, prefix: str, name: str) -> tuple[dict[str, float], list[Sample]]:
        started = time.perf_counter()
        self.unreadable.clear()
        metrics = self.losses(engine, self.loader(rows), prefix, f"validation {name}".strip())
        samples: list[Sample] = []
        if self.args.eval_cer:
            chosen = spread_rows(len(rows), self.args.eval_cer_samples)
            counts, samples = self.decode(
                engine, rows if len(chosen) == len(rows) else rows.select(chosen), title=f"decoding {name}".strip()
            )
            metrics[f"{prefix}_cer"] = counts.rate
            metrics.update({f"{prefix}_{name}": getattr(counts, name) for name in COUNTS})
        metrics.update(self._report_unreadable(rows, prefix))
        runtime = time.perf_counter() - started
        metrics[f"{prefix}_runtime"] = round(runtime, 4)
        metrics[f"{prefix}_samples_per_second"] = round(len(rows) / runtime, 3)
        return metrics, samples

    def _report_unreadable(self, rows: Any, prefix: str) -> dict[str, int]:
        """Logs and counts the unreadable rows of a set; returns an empty dict without unreadable rows."""
        if not {"features", *ENCODED_COLUMNS}.isdisjoint(rows.column_names):
            return {}
        for (file, line), reason in self.unreadable.items():
            logger.warning("skipped an unreadable row of %s: %s", prefix, BadRow(file, line, reason))
        count = int(self.accelerator.reduce(torch.tensor(len(self.unreadable), device=self.args.device), "sum"))
        return {f"{prefix}_bad_rows": count} if count else {}

    def _readable(self, batches: BudgetDataLoader, title: str) -> Iterator[dict[str, Any]]:
        """Yields the batches of this rank without unreadable rows; the first process shows its progress."""
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        for batch in progress_bar(batches, desc=title, unit=" batches", leave=False, disable=hidden):
            self.unreadable.update(batch.pop(UNREADABLE_ROWS, ()))
            yield batch

    def loader(self, rows: Any) -> BudgetDataLoader:
        """Builds the batches of this rank, sorted by length, without unreadable rows."""
        return eval_loader(self.args, rows, SkipUnreadableCollator(self.collator))

    def losses(
        self, engine: Any, batches: BudgetDataLoader, prefix: str, title: str = "validation"
    ) -> dict[str, float]:
        """Computes mean loss and accuracy over the supervised tokens of all ranks (not over batches, which differ in
        size).

        Args:
            engine: the trained model.
            batches: of this rank.
            prefix: of the metric names.
            title: of the progress bar.
        """
        engine.eval()
        alone = is_trained_alone(self.accelerator.unwrap_model(engine, keep_torch_compile=False))
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for batch in self._readable(batches, title):
            with torch.no_grad():
                outputs = engine(**to_device(batch, self.args.device, self.input_dtype))
            count = outputs.num_label_tokens
            numbers = (outputs.loss, outputs.token_accuracy, getattr(outputs, "ctc_loss", None))
            means = [torch.zeros_like(outputs.loss) if number is None else number for number in numbers]
            sums += torch.stack([*(mean * count for mean in means), count]).double()
        loss, correct, ctc_loss, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{prefix}_loss": loss / max(tokens, 1)}
        if not alone:
            metrics[f"{prefix}_token_accuracy"] = correct / max(tokens, 1)
        if self.collator.ctc_vocabulary is not None and not alone:
            # Not `_ctc_loss`, which would be the loss of a validation set with this name.
            metrics[f"{prefix}_loss_ctc"] = ctc_loss / max(tokens, 1)
        return metrics

    def decode(
        self, engine: Any, rows: Any, shown_rows: int = SAMPLES_SHOWN, title: str = "decoding"
    ) -> tuple[ErrorCounts, list[Sample]]:
        """Decodes a set greedily, in the precision of training.

        Args:
            engine: the trained model.
            rows: see `data.dataset`.
            shown_rows: number of rows whose transcripts are returned.
            title: of the progress bar.

        Returns:
            Error counts of all ranks, and some transcripts, always of the same rows.
        """
        shown = set(spread_rows(len(rows), shown_rows).tolist())
        # Without the wrapper of several processes: generation needs no communication.
        model = self.accelerator.unwrap_model(engine, keep_torch_compile=False)
        model.eval()  # disables dropout and gradient checkpointing, which does not support the key-value cache
        limit = self.args.eval_max_new_tokens
        counts = ErrorCounts()
        samples: list[Sample] = []
        collator = SkipUnreadableCollator(self.collator, PromptCollator(self.collator))
        for batch in self._readable(eval_loader(self.args, rows, collator), title):
            inputs = to_device(batch["inputs"], self.args.device, self.input_dtype)
            # Not compiled: graphs of padding-free training do not fit padded batches.
            eager = torch.compiler.set_stance("force_eager")
            search = transcribing(model, max_new_tokens=limit)
            with torch.no_grad(), self.accelerator.autocast(), eager, search as generation_config:
                output = model.generate(**inputs, generation_config=generation_config)
            hypotheses = self.processor.transcripts(output[:, inputs["input_ids"].shape[1] :])
            columns = (batch[name] for name in ("positions", "names", "references", "counted"))
            for position, name, reference, counted, hypothesis in zip(*columns, hypotheses, strict=True):
                if not counted:
                    continue
                counts += count_errors(reference, hypothesis)
                if position in shown:
                    samples.append(Sample(position, name, reference, hypothesis))
        sums = torch.tensor([getattr(counts, name) for name in COUNTS], dtype=torch.float64, device=self.args.device)
        totals = self.accelerator.reduce(sums, "sum").long().tolist()
        return ErrorCounts(*totals), sorted(gather_object(samples), key=lambda sample: sample.position)


def add_means(metrics: dict[str, float], names: Sequence[str], prefix: str) -> None:
    """Adds `PREFIX_loss`, `PREFIX_token_accuracy` and `PREFIX_cer`: means over the sets with equal weights.

    The means leave out the set of `--retention_file`, on which training should not improve.

    Args:
        metrics: of all sets.
        names: of the sets.
        prefix: of the metric names.
    """
    averaged = [name for name in names if name != RETENTION_SET]
    for measure in MEASURES:
        values = [metrics[key] for name in averaged if (key := f"{prefix}_{name}_{measure}") in metrics]
        if values:
            metrics[f"{prefix}_{measure}"] = sum(values) / len(values)


def rate_name(rows: Any) -> str:
    """Returns the name of the error rate of a set, according to its transcripts: CER, WER or MER."""
    chosen = rows.select_columns(["messages"]).select(spread_rows(len(rows), NAMED_ROWS))
    answers = (chat.parse_messages(json.loads(row["messages"])).turns[-1].answer or "" for row in chosen)
    return common_metric(describe_line(text.split(), text)[0] for text in answers)


def spread_rows(rows: int, number: int | None) -> np.ndarray:
    """Chooses a fixed sample of row indices: one from each of `number` equal ranges, or all rows if there are fewer.

    The index within a range is random (with a fixed seed), so that a regular order of the rows does not bias the
    sample.
    """
    if number is None or number >= rows:
        return np.arange(rows)
    edges = np.arange(number + 1) * rows / number
    places = np.random.default_rng(0).uniform(edges[:-1], edges[1:])
    return np.minimum(np.floor(places), rows - 1).astype(np.int64)
