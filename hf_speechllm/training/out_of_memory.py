"""A training batch that does not fit into memory is computed in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..model.processing import SpeechLLMProcessor

logger = logging.getLogger(__name__)


def run_in_halves(
    step: Callable[[dict], torch.Tensor],
    batch: dict,
    processor: SpeechLLMProcessor,
    clear_gradients: Callable[[], None],
    may_split: bool,
) -> torch.Tensor:
    """Runs a training step; without enough memory, as the sum of its halves, and so on down to single rows.

    Args:
        step: adds a batch's gradients and returns its share of the loss.
        batch: of `SpeechLLMCollator`.
        processor: knows how many audio tokens a recording has.
        clear_gradients: clears the gradients before another try.
        may_split: false where gradients would be lost or ranks would fall out of step: with several processes, or with
            gradients of earlier batches accumulated.

    Returns:
        The loss, a scalar.

    Raises:
        torch.OutOfMemoryError: with advice, if a single row does not fit or the batch may not be split.
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
                    frames = part["input_features_mask"].shape[1]
                    raise torch.OutOfMemoryError(
                        f"a batch of {rows} rows of up to {frames} frames does not fit into memory: lower "
                        "--per_device_train_batch_seconds (or give auto), or set --gradient_checkpointing true"
                    ) from error
                break  # leaves the handler: the error holds on to the tensors of the failed step
        else:
            return torch.stack(losses).sum()
        logger.warning("%d rows do not fit into memory and are halved; lower --per_device_train_batch_seconds", rows)
        clear_gradients()  # starts again: some of the failed step's gradients may be there
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        at = len(losses)
        parts[at : at + 1] = split_batch(parts[at], processor)


def split_batch(batch: dict[str, Any], processor: SpeechLLMProcessor) -> list[dict]:
    """Halves of a batch of `SpeechLLMCollator`, whose losses and gradients add up to those of the whole.

    Args:
        batch: of at least two rows.
        processor: knows how many audio tokens a recording has.
    """
    half, width = len(batch["input_ids"]) // 2, batch["input_ids"].shape[1]
    placeholders = int((batch["input_ids"][:half] == processor.audio_token_id).sum())
    rate = processor.encoder_downsample_rate if "encoder_states" in batch else 1
    counts = [processor.num_audio_tokens(rate * int(frames)) for frames in batch["input_features_mask"].sum(-1)]
    recordings = int(np.searchsorted(np.cumsum([0, *counts]), placeholders))
    cuts = dict.fromkeys(("input_features", "input_features_mask", "encoder_states"), recordings)
    cuts["audio_tokens"] = placeholders
    tensors = {key: value for key, value in batch.items() if key != "positions"}
    first = {key: value[: cuts.get(key, half)] for key, value in tensors.items()}
    second = {key: value[cuts.get(key, half) :] for key, value in tensors.items()}
    first["positions"], second["positions"] = {}, {}
    for key, value in batch["positions"].items():
        end = recordings * batch["input_features_mask"].shape[1] if key == "frames" else half * width
        before = value < end
        first["positions"][key], second["positions"][key] = value[before], value[~before] - end
    return [first, second]
