"""Splits training batches that do not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..model.ctc import CTC_INPUTS
from ..model.processing import SpeechLLMProcessor

logger = logging.getLogger(__name__)


def run_in_halves(
    step: Callable[[dict], torch.Tensor],
    batch: dict,
    processor: SpeechLLMProcessor,
    clear_gradients: Callable[[], None],
    may_split: bool,
) -> torch.Tensor:
    """Runs a training step; splits the batch in halves, if necessary down to single rows, if memory is insufficient.

    Args:
        step: accumulates the gradients of a batch and returns the share of the loss.
        batch: of `SpeechLLMCollator`.
        processor: computes the number of audio tokens of a recording.
        clear_gradients: clears the gradients before another attempt.
        may_split: must be false with several processes, which would do different numbers of steps, and with gradient
            accumulation, because the gradients of earlier batches would be lost.

    Returns:
        The loss, a scalar.

    Raises:
        torch.OutOfMemoryError: with advice, if a single row does not fit or the batch must not be split.
    """
    parts = [batch]
    while True:
        losses: list[torch.Tensor] = []
        for part in parts:
            rows = len(part["input_ids"])
            try:
                losses.append(step(part))
            except torch.OutOfMemoryError as error:
                if rows == 1 or not may_split:
                    tokens = part["input_ids"].shape[1]
                    raise torch.OutOfMemoryError(
                        f"a batch of {rows} rows of up to {tokens} tokens does not fit into memory: lower "
                        "--per_device_train_batch_seconds (or set auto), or set --gradient_checkpointing true"
                    ) from error
                break  # leaves the handler: the error keeps the tensors of the failed step in memory
        else:
            return torch.stack(losses).sum()
        logger.warning("%d rows do not fit into memory and are split; lower --per_device_train_batch_seconds", rows)
        clear_gradients()  # the failed step may have added some gradients
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        at = len(losses)
        parts[at : at + 1] = split_batch(parts[at], processor)


def split_batch(batch: dict[str, Any], processor: SpeechLLMProcessor) -> list[dict]:
    """Splits a batch of `SpeechLLMCollator` in halves; losses and gradients of the halves sum to those of the batch.

    Args:
        batch: at least two rows.
        processor: computes the number of audio tokens of a recording.
    """
    half, width = len(batch["input_ids"]) // 2, batch["input_ids"].shape[1]
    placeholders = int((batch["input_ids"][:half] == processor.audio_token_id).sum())
    encoded = "encoder_states" in batch
    counts = [processor.num_audio_tokens(int(frames), encoded) for frames in batch["input_features_mask"].sum(-1)]
    recordings = int(np.searchsorted(np.cumsum([0, *counts]), placeholders))
    cuts = dict.fromkeys(("input_features", "input_features_mask", "encoder_states", *CTC_INPUTS), recordings)
    cuts["audio_tokens"] = placeholders
    tensors = {key: value for key, value in batch.items() if key != "positions"}
    first = {key: value[: cuts.get(key, half)] for key, value in tensors.items()}
    second = {key: value[cuts.get(key, half) :] for key, value in tensors.items()}
    first["positions"], second["positions"] = {}, {}
    for key, value in batch.get("positions", {}).items():
        end = recordings * batch["input_features_mask"].shape[1] if key == "frames" else half * width
        before = value < end
        first["positions"][key], second["positions"][key] = value[before], value[~before] - end
    return [first, second]
