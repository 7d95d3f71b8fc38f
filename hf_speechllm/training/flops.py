"""Floating-point operations of training and decoding, for the share of the hardware's speed that a run reaches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..model.modeling import PARTS
from .freezing import part_of, size_of, trained_parts

# Dense bf16 matrix products, TFLOP/s, by a word of the device's name; NVIDIA's data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device can do in bf16; `None` if it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for word, tflops in PEAK_TFLOPS.items() if word in name), None)


class FlopCounter:
    """Counts the operations that training steps need: matrix products alone, padding left out.

    A product of a weight matrix with n tokens takes 2 n operations a weight forward, as many for the gradient of its
    input, and as many for that of the weight; attention is counted whole, causal or not (Chowdhery et al. 2022,
    "PaLM", appendix B). The gradient of an input is counted where it, or something before it, is trained.
    Recomputation (gradient checkpointing) is not counted: it is not needed work.

    Args:
        model: as it is trained: frozen, with or without adapters.
        cached: parts whose output comes from `data.encoder_cache`, so that they don't run.
    """

    def __init__(self, model: Any, cached: Collection[str] = ()):
        weights = dict.fromkeys(PARTS, 0)  # those that multiply
        trained = dict.fromkeys(PARTS, 0)
        self.head = 0
        for name, module in model.named_modules():
            if ".original_module." in f"{name}.":  # what peft keeps of a part that is trained whole
                continue
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                part, count = part_of(name), size_of(module.weight)
                if name.endswith("lm_head"):
                    self.head = count
                    continue
                weights[part] += count
                trained[part] += count if module.weight.requires_grad else 0
        config = model.config
        encoder, llm = config.audio_encoder_config, config.llm_config
        # Forward, per token and token attended to: scores and weighted sum.
        self._attention = {
            "audio_encoder": 4 * encoder.hidden_size * _layers(encoder),
            "audio_adaptor": 4 * config.audio_adaptor_config.hidden_size * _layers(config.audio_adaptor_config),
            "llm": 4 * llm.num_attention_heads * _head_dim(llm) * llm.num_hidden_layers,
        }
        self._weights, self._trained = weights, trained
        learning = trained_parts(model)
        # Whether gradients flow through a part: where it, or one before it, is trained.
        self._flows = {part: not learning.isdisjoint(PARTS[: index + 1]) for index, part in enumerate(PARTS)}
        self._parts = [part for part in PARTS if part not in cached]
        self._head_trained = model.get_output_embeddings().weight.requires_grad

    def step(self, frames: torch.Tensor, tokens: torch.Tensor, num_labels: int) -> float:
        """Operations of one batch.

        Args:
            frames: encoder frames of each recording, shape = (recordings,).
            tokens: tokens of each row, shape = (rows,).
            num_labels: supervised tokens, where logits are computed.
        """
        lengths = {"audio_encoder": frames.double(), "audio_adaptor": frames.double(), "llm": tokens.double()}
        total = 0.0
        for part in self._parts:
            number, squares = float(lengths[part].sum()), float(lengths[part].square().sum())
            passes = 2 if self._flows[part] else 1
            total += 2 * number * (self._weights[part] * passes + self._trained[part])
            total += self._attention[part] * squares * (3 if self._flows[part] else 1)
        return total + 2 * num_labels * self.head * (3 if self._head_trained else 2)


def _layers(config) -> int:
    return config.num_hidden_layers + getattr(config, "num_timestamp_prediction_layers", 0)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
