"""Collator for validation with `generate`: builds prompts from dialogues without the last answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..audio.front_ends import pad_features
from ..model import chat
from ..model.native_processing import NativeProcessor
from .collator import SpeechLLMCollator
from .native_collator import prompt_batch


@dataclass
class PromptCollator:
    """Builds the inputs of `generate` from rows (see `data.dataset`): dialogues without the last answer.

    In a dialogue of several turns, the prompt contains the reference answers of the earlier turns.

    Args:
        collator: collator of validation, which computes the features.
    """

    collator: SpeechLLMCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads a batch.

        Returns:
            `inputs`: `input_ids`, `attention_mask`, shape = (rows, tokens), padded on the left, `input_features`,
            shape = (recordings, frames, feature size), `input_features_mask`; `references`: the last answers; `names`:
            FILE:LINE; `positions`: see below; `counted`: false for filler rows, see `BudgetBatchSampler`.
        """
        processor = self.collator.processor
        prompts: list[list[int]] = []
        features: list[torch.Tensor] = []
        references: list[str | None] = []
        for row in rows:
            dialogue = chat.parse_messages(json.loads(row["messages"]), row["hotwords"] or ())
            *before, last = dialogue.turns
            references.append(last.answer)
            if isinstance(processor, NativeProcessor):
                continue
            recordings = self.collator.row_inputs(row)
            question = chat.Dialogue(dialogue.system, (*before, chat.Turn(last.pieces, None, last.prefix)))
            prompts.append(processor.tokenize(question, [len(item) for item in recordings]).input_ids)
            features.extend(recordings)
        inputs: dict[str, torch.Tensor]
        if isinstance(processor, NativeProcessor):
            inputs = prompt_batch(processor, rows, self.collator.row_waveforms)
        else:
            inputs = {**processor.pad_tokens({"input_ids": prompts}, "left"), **pad_features(features)}
        return {
            "inputs": inputs,
            "references": references,
            "names": [f"{Path(row['file']).name}:{row['line']}" for row in rows],
            "positions": [row["seed"][1] for row in rows],  # keys of `BudgetBatchSampler`; indices in epoch 0
            "counted": [row["supervised"] for row in rows],
        }
