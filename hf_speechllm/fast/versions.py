"""Checks that each fast path is tested with the installed libraries; otherwise the plain path runs."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

# Libraries whose private parts each fast path uses.
FAST_PATHS = {
    "padding-free attention": ("torch", "transformers"),
    "FSMN kernel": ("transformers",),
    "layer compilation": ("torch", "transformers"),
    "FSDP2 on shards": ("torch",),
}


@functools.cache
def tested_ranges() -> dict[str, SpecifierSet]:
    """Returns the declared version range of each dependency; empty if this package is not installed."""
    try:
        declared = requires("hf_speechllm") or ()
    except PackageNotFoundError:
        return {}
    return {item.name: item.specifier for item in map(Requirement, declared)}


@functools.cache
def is_tested(path: str) -> bool:
    """Whether a fast path is tested with the installed releases; logs one warning otherwise.

    Args:
        path: a key of `FAST_PATHS`.
    """
    for library in FAST_PATHS[path]:
        allowed, installed = tested_ranges().get(library, SpecifierSet()), version(library)
        if not allowed.contains(installed, prereleases=True):
            logger.warning(
                "%s is off: tested with %s%s, but %s is installed; the plain path computes the same results",
                path, library, allowed, installed,
            )  # fmt: skip
            return False
    return True
