"""Releases of other libraries that each fast path is tested with; outside them the plain path runs instead."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

# They cover the ranges of setup.py, and do not come from installed metadata: a source tree has none.
TESTED = {
    "torch": ">=2.11,<2.15",
    "transformers": ">=5.17,<5.25",
    "deepspeed": ">=0.19.8,<0.20",
}
# What each path reaches into.
PATHS = {
    "padding-free attention": ("torch", "transformers"),
    "FSMN kernel": ("transformers",),
    "layer compilation": ("torch", "transformers"),
    "CUDA-graph decoding": ("torch", "transformers"),
    "FSDP2 on shards": ("torch",),
    "ZeRO-3 leaf layers": ("deepspeed",),
}


@functools.cache
def is_tested(path: str) -> bool:
    """Whether the installed releases are those that a fast path is tested with; if not, a log line says so once.

    Args:
        path: a key of `PATHS`.
    """
    for library in PATHS[path]:
        try:
            installed = version(library)
        except PackageNotFoundError:
            return False
        if not SpecifierSet(TESTED[library]).contains(installed, prereleases=True):
            logger.warning(
                "%s is off: it is tested with %s%s, and %s is installed; the plain path gives the same numbers",
                path, library, TESTED[library], installed,
            )  # fmt: skip
            return False
    return True
