"""Checks with a model: tokens and lengths of transcripts, and rows whose loss is unusually high."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional

from ..console import progress_bar
from ..data.collator import SpeechLLMCollator
from ..formats.loading import load_config
from ..model.chat import IGNORE_INDEX
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import max_feature_frames
from ..model.processing import SpeechLLMProcessor
from .corpus_checks import Corpus, Found
from .kinds import limit
from .text_checks import show

MIN_CHARACTERS = 8  # of a transcript whose tokens per character are judged
MIN_LOSS_ROWS = 10  # rows from which a median is one
LOSS_FACTOR, MIN_LOSS = 1.5, 1.0  # by which a loss must exceed the median, and nats per token, besides the threshold


class ModelChecks:
    """Checks that need a model. Loads the tokenizer at once, and the model when it is needed.

    Args:
        name: folder or Hub id of the model.
        loss: whether to compute losses.
        batch_seconds: seconds of audio per batch.

    Raises:
        OSError, ValueError: if the model cannot be loaded.
    """

    def __init__(self, name: str, loss: bool = True, batch_seconds: float = 60.0):
        self.name, self.loss, self.batch_seconds = name, loss, batch_seconds
        self.processor = SpeechLLMProcessor.from_pretrained(name)
        self.max_seconds = max_feature_frames(load_config(name)) * self.processor.frame_seconds

    def __call__(self, corpus: Corpus) -> Iterator[Found]:
        """Yields the findings of all rows."""
        counts = yield from self._check_tokens(corpus)
        if self.loss:
            losses = self._losses(corpus)
            yield from high_losses(corpus, losses, counts)

    def _check_tokens(self, corpus: Corpus):
        tokenizer = self.processor.tokenizer
        unknown = tokenizer.unk_token_id
        unknown = None if unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown
        counts = []
        for index, row in enumerate(corpus.rows):
            ids = tokenizer(row.answers, add_special_tokens=False)["input_ids"]
            counts.append(sum(map(len, ids)))
            if unknown is not None and any(unknown in answer for answer in ids):
                yield index, "unknown-token", f"a character is {tokenizer.unk_token}: {show(row.text, 40)}"
            if row.text_length is not None and abs(row.text_length - counts[-1]) > limit("wrong-text-length"):
                yield index, "wrong-text-length", f"text_length is {row.text_length}; there are {counts[-1]} tokens"
        rates = np.array([count / max(1, len(row.text)) for count, row in zip(counts, corpus.rows, strict=True)])
        most = max(limit("many-tokens"), 2 * float(np.median(rates))) if len(rates) else 0.0
        for number in np.flatnonzero(rates > most).tolist():
            text = corpus.rows[number].text
            if len(text) >= MIN_CHARACTERS:
                yield number, "many-tokens", f"{rates[number]:.1f} tokens per character: {show(text, 40)}"
        return counts

    def _losses(self, corpus: Corpus) -> dict[int, float]:
        """Returns the mean loss per token of each usable row, by its number."""
        rows = [index for index in corpus.usable if corpus.measured[index][0].seconds <= self.max_seconds]
        rows.sort(key=lambda index: corpus.measured[index][0].seconds)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = SpeechLLMForConditionalGeneration.from_pretrained(self.name, dtype=dtype).eval().to(device)
        collator = SpeechLLMCollator(self.processor)
        losses: dict[int, float] = {}
        with progress_bar(desc="computing losses", total=len(rows), unit=" rows") as progress, torch.no_grad():
            for batch in _batches(rows, corpus, self.batch_seconds):
                inputs = collator(
                    [
                        {
                            "messages": json.dumps(corpus.rows[index].record["messages"], ensure_ascii=False),
                            "recordings": corpus.rows[index].recordings,
                            "hotwords": corpus.rows[index].hotwords,
                        }
                        for index in batch
                    ]
                )
                inputs.pop("positions")
                labels = inputs.pop("labels")
                inputs = {name: value.to(device) for name, value in inputs.items()}
                losses |= zip(batch, _row_losses(model, inputs, labels.to(device)), strict=True)
                progress.update(len(batch))
        return losses


def high_losses(corpus: Corpus, losses: dict[int, float], counts: Sequence[int]) -> Iterator[Found]:
    """Yields rows whose loss per token is far above the median.

    Args:
        corpus: all rows.
        losses: mean loss per token by number of the row.
        counts: tokens of each row.
    """
    if len(losses) < MIN_LOSS_ROWS:
        return
    values = np.array(list(losses.values()))
    median = float(np.median(values))
    scale = max(1.4826 * float(np.median(np.abs(values - median))), 1e-3)
    typical = float(np.median([counts[index] for index in losses]))
    for index, loss in losses.items():
        # The mean of few tokens varies more.
        deviation = (loss - median) / (scale * max(1.0, (typical / max(1, counts[index])) ** 0.5))
        if deviation > limit("high-loss") and loss > max(LOSS_FACTOR * median, MIN_LOSS):
            text = show(corpus.rows[index].text, 40)
            yield index, "high-loss", f"loss {loss:.2f} per token, median {median:.2f}: {text}"


def _batches(rows: Sequence[int], corpus: Corpus, batch_seconds: float) -> Iterator[list[int]]:
    """Yields rows, sorted by length, whose padded recordings have at most `batch_seconds`."""
    batch: list[int] = []
    for index in rows:
        if batch and (len(batch) + 1) * corpus.measured[index][0].seconds > batch_seconds:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _row_losses(model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[float]:
    """Returns the mean loss per supervised token of each row."""
    kept = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
    logits = model(**inputs, logits_to_keep=kept).logits
    targets = labels[:, kept + 1]
    return [
        functional.cross_entropy(row.float(), target, ignore_index=IGNORE_INDEX).item()
        for row, target in zip(logits, targets, strict=True)
    ]
