"""Fields and defaults of options. Modules with options must not import large libraries, to keep `--help` fast."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field with a help text; a list as default is copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use; in a job, often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
