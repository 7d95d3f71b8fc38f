"""Floating-point operations of training steps, for MFU (model FLOP utilization)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..model.ctc import CTC_HEAD, is_trained_alone
from ..model.modeling import ALL_PARTS, PARTS
from .freezing import part_of, size_of, trained_parts

# Peak speed of dense bf16 matrix products in TFLOP/s, by a word of the device name; from NVIDIA's data sheets.
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
    """Returns the peak bf16 speed of a device in FLOP/s; `None` if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for word, tflops in PEAK_TFLOPS.items() if word in name), None)


class FlopCounter:
    """Counts the operations of training steps: matrix products only, without padding.

    A weight matrix and n tokens need 2 n operations per weight in the forward pass, 2 n for the gradient of the input
    and 2 n for the gradient of the weight. Attention counts fully, even if causal (Chowdhery et al. 2022, "PaLM",
    appendix B). The gradient of the input counts if this part or an earlier part is trained. Recomputation of gradient
    checkpointing does not count.

    Args:
        model: as trained: with frozen parts and adapters.
        cached: parts that do not run, because `data.encoder_cache` contains the output.
    """

    def __init__(self, model: Any, cached: Collection[str] = ()):
        weights = dict.fromkeys(ALL_PARTS, 0)  # weights of matrix products
        trained = dict.fromkeys(ALL_PARTS, 0)
        self.head = 0
        for name, module in model.named_modules():
            if ".original_module." in f"{name}.":  # peft's copy of a fully trained part
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
        # Forward pass, per pair of tokens: scores and weighted sum.
        self._attention = {
            "audio_encoder": 4 * encoder.hidden_size * _layers(encoder),
            "audio_adaptor": 4 * config.audio_adaptor_config.hidden_size * _layers(config.audio_adaptor_config),
            "llm": 4 * llm.num_attention_heads * _head_dim(llm) * llm.num_hidden_layers,
            CTC_HEAD: 0,  # few layers
        }
        self._weights, self._trained = weights, trained
        learning = trained_parts(model)
        # Gradients flow through a part if this part or an earlier part is trained.
        self._has_gradient = {part: not learning.isdisjoint(PARTS[: index + 1]) for index, part in enumerate(PARTS)}
        self._has_gradient[CTC_HEAD] = CTC_HEAD in learning
        alone = is_trained_alone(model)
        run = ("audio_encoder",) if alone else PARTS
        self._parts = [part for part in (*run, *({CTC_HEAD} & learning)) if part not in cached]
        self._head_trained = model.get_output_embeddings().weight.requires_grad
        if alone:
            self.head = 0

    def count(self, frames: torch.Tensor, tokens: torch.Tensor, num_labels: int) -> float:
        """Counts the operations of one batch.

        Args:
            frames: number of encoder frames of each recording, shape = (recordings,).
            tokens: number of tokens of each row, shape = (rows,).
            num_labels: number of supervised tokens, for which logits are computed.
        """
        lengths = {"audio_encoder": frames.double(), "audio_adaptor": frames.double(), "llm": tokens.double()}
        lengths[CTC_HEAD] = lengths["audio_encoder"]
        total = 0.0
        for part in self._parts:
            number, squares = float(lengths[part].sum()), float(lengths[part].square().sum())
            passes = 2 if self._has_gradient[part] else 1
            total += 2 * number * (self._weights[part] * passes + self._trained[part])
            total += self._attention[part] * squares * (3 if self._has_gradient[part] else 1)
        return total + 2 * num_labels * self.head * (3 if self._head_trained else 2)


def _layers(config) -> int:
    return config.num_hidden_layers + getattr(config, "num_timestamp_prediction_layers", 0)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
