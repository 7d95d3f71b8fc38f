"""Quantization with bitsandbytes: excludes unsupported layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

BLOCK_4BIT = 64  # weights of a row with a common scale


def only_whole_blocks(quantization: Any, shapes: Mapping[str, Sequence[int]]) -> Any:
    """Excludes layers from 4-bit quantization if their width is not a multiple of the block size of bitsandbytes.

    The first layer of the encoder has such a width (560). bitsandbytes 0.49 to 0.50 fails for such layers on CPUs with
    AVX512-BF16.

    Args:
        quantization: `BitsAndBytesConfig`, or a config of another method, which is returned unchanged.
        shapes: shapes of the tensors of the model, by name.
    """
    odd = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2 and shape[1] % BLOCK_4BIT]
    if not getattr(quantization, "load_in_4bit", False) or not odd:
        return quantization
    quantization = copy.copy(quantization)
    quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or ["lm_head"]), *odd]
    return quantization
