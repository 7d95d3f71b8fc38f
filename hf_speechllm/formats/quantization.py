"""Quantization by bitsandbytes: which layers are left out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

BLOCK_4BIT = 64  # weights of a row that share a scale


def only_whole_blocks(quantization: Any, shapes: Mapping[str, Sequence[int]]) -> Any:
    """Leaves out of 4-bit quantization the layers whose width is not a multiple of a block of bitsandbytes.

    The encoder's first layer is one (560). On CPUs with AVX512-BF16, bitsandbytes 0.49 to 0.50 fails at such layers.

    Args:
        quantization: `BitsAndBytesConfig`, or a config of another method, which is returned unchanged.
        shapes: of the model's tensors.
    """
    odd = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2 and shape[1] % BLOCK_4BIT]
    if not getattr(quantization, "load_in_4bit", False) or not odd:
        return quantization
    quantization = copy.copy(quantization)
    quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or ["lm_head"]), *odd]
    return quantization
