"""Whether the installed libraries are those that a fast path is tested with; if not, the plain path runs instead."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

# What each fast path reaches into, beyond public interfaces.
PATHS = {
    "padding-free attention": ("torch", "transformers"),
    "FSMN kernel": ("transformers",),
    "layer compilation": ("torch", "transformers"),
    "CUDA-graph decoding": ("torch", "transformers"),
    "FSDP2 on shards": ("torch",),
}


@functools.cache
def tested_ranges() -> dict[str, SpecifierSet]:
    """Returns the range of each dependency that this package declares; empty where it is used without installation."""
    try:
        declared = requires("hf_speechllm") or ()
    except PackageNotFoundError:
        return {}
    return {item.name: item.specifier for item in map(Requirement, declared)}


@functools.cache
def is_tested(path: str) -> bool:
    """Whether a fast path is tested with the installed releases; if not, a log line says so once.

    Args:
        path: a key of `PATHS`.
    """
    for library in PATHS[path]:
        allowed, installed = tested_ranges().get(library, SpecifierSet()), version(library)
        if not allowed.contains(installed, prereleases=True):
            logger.warning(
                "%s is off: it is tested with %s%s, and %s is installed; the plain path gives the same numbers",
                path, library, allowed, installed,
            )  # fmt: skip
            return False
    return True
