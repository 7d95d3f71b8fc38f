"""The two names of the key-value cache in releases of transformers."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
# Name in the installed release: an argument of models and of `generate`, and a field of outputs.
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def find_cache(arguments: dict[str, Any]) -> Any:
    """Returns the key-value cache from keyword arguments of a forward pass, under either name; `None` if absent.

    Raises:
        ValueError: if both names are given.
    """
    found = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    if len(found) > 1:
        raise ValueError(f"both {' and '.join(CACHE_NAMES)} are given, two names of one argument; give only {CACHE}")
    if "past_key_values" in found and CACHE == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated, as in transformers; use `cache`", FutureWarning, stacklevel=3)
    return next(iter(found.values()), None)
