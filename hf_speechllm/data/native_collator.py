"""Batches of native speech LLMs of transformers: the family's own processor computes features and pads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..model import chat
from ..model.loss import label_positions
from ..model.native_processing import NativeProcessor
from ..model.packing import Positions, non_padding_positions
from ..model.processing import SpeechLLMProcessor
from .bad_rows import BadRows


def training_batch(
    processor: NativeProcessor, rows: list[dict[str, Any]], load: Callable, padding_free: bool = False
) -> dict[str, Any]:
    """Builds a training batch.

    Args:
        rows: see `data.dataset`.
        load: returns the waveforms of a row, each of shape = (samples,).
        padding_free: whether to add the positions for padding-free computation of the LLM.

    Returns:
        Inputs of the model, `labels`, and `positions` with the seconds of each row.
    """
    dialogues, waveforms = _read(rows, load)
    batch = dict(processor.batch(dialogues, waveforms, return_labels=True))
    for index, row in enumerate(rows):
        if not row.get("supervised", True):
            batch["labels"][index] = chat.IGNORE_INDEX
    seconds = torch.tensor([len(waveform) / processor.sampling_rate for waveform in waveforms])
    positions: Positions = {"labels": label_positions(batch["labels"]), "audio_seconds": seconds}
    if padding_free:
        positions["tokens"] = non_padding_positions(batch["attention_mask"])
    return {**batch, "positions": positions}


def prompt_batch(processor: NativeProcessor, rows: list[dict[str, Any]], load: Callable) -> dict[str, Any]:
    """Builds the inputs of `generate`; arguments as for `training_batch`."""
    return dict(processor.batch(*_read(rows, load), return_labels=False))


def unsupported_reason(processor: SpeechLLMProcessor, row: dict[str, Any]) -> str | None:
    """Returns why the model cannot be trained on a row; `None` if it can, and for models of this package."""
    if not isinstance(processor, NativeProcessor):
        return None
    try:
        processor.request(chat.parse_messages(json.loads(row["messages"]), row["hotwords"] or ()), 0.0)
    except chat.ChatError as error:
        return str(error)
    return None


def drop_unsupported(rows: Dataset, bad_rows: BadRows, processor: SpeechLLMProcessor) -> Dataset:
    """Moves rows on which the model cannot be trained to `bad_rows`; see `unsupported_reason`."""
    if not isinstance(processor, NativeProcessor):
        return rows
    good = []
    for index, row in enumerate(rows.select_columns(["messages", "hotwords", "file", "line"])):
        if (reason := unsupported_reason(processor, row)) is None:
            good.append(index)
        else:
            bad_rows.add(row["file"], row["line"], reason)
    return rows if len(good) == len(rows) else rows.select(good)


def _read(rows: list[dict[str, Any]], load: Callable) -> tuple[list[chat.Dialogue], list[np.ndarray]]:
    dialogues = [chat.parse_messages(json.loads(row["messages"]), row["hotwords"] or ()) for row in rows]
    return dialogues, [waveform for row in rows for waveform in load(row)]
