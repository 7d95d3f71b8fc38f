"""Rows in, padded batches out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import chat
from ..audio import load_audio
from ..features import cacheable_features, encoder_input
from ..processing import SpeechLLMProcessor, pad_features

Augmentation = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


@dataclass
class SpeechLLMCollator:
    """Builds the model's training inputs from rows of `data.dataset`.

    Args:
        processor: gives features, ids and labels.
        augmentations: applied to the features in turn; their randomness comes from each row's `seed`.
    """

    processor: SpeechLLMProcessor
    augmentations: Sequence[Augmentation] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pads a batch.

        Returns:
            `input_ids`, `attention_mask`, `labels`, shape = (rows, tokens), padded on the right; `input_features`,
            shape =
            (recordings, frames, feature size), `input_features_mask`.
        """
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        features: list[torch.Tensor] = []
        for row in rows:
            inputs = [encoder_input(self.processor.feature_extractor, item) for item in self.row_features(row)]
            dialogue = chat.parse_messages(json.loads(row["messages"]), row["hotwords"] or ())
            example = self.processor.tokenize(dialogue, [len(item) for item in inputs])
            columns["input_ids"].append(example.input_ids)
            supervised = row.get("supervised", True)
            columns["labels"].append(example.labels if supervised else [chat.IGNORE_INDEX] * len(example.labels))
            features.extend(inputs)
        return {**self.processor.pad_tokens(columns, "right"), **pad_features(features)}

    def row_features(self, row: dict[str, Any]) -> list[torch.Tensor]:
        """Features of a row's recordings, each of shape = (10 ms frames, mel bins): from the cache, or from the
        audio."""
        if row.get("features") is not None:
            features = [
                stored_features(data, frames, self.processor.feature_extractor.feature_size)
                for data, frames in zip(row["features"], row["num_frames"], strict=True)
            ]
        else:
            extractor = self.processor.feature_extractor
            features = [
                torch.from_numpy(cacheable_features(extractor, load_audio(source, self.processor.sampling_rate)))
                for source in row["recordings"]
            ]
        if self.augmentations:
            rng = np.random.default_rng(row["seed"])
            for augmentation in self.augmentations:
                features = [augmentation(item, rng) for item in features]
        return features


def stored_features(data: bytes, frames: int, feature_size: int) -> torch.Tensor:
    """Cached features as a tensor, float32, shape = (frames, feature_size); stored as float16 or float32, told by the
    size."""
    dtype = {2: np.float16, 4: np.float32}[len(data) // (frames * feature_size)]
    return torch.from_numpy(np.frombuffer(data, dtype=dtype).astype(np.float32).reshape(frames, feature_size))
