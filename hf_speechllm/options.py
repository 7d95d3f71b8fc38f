"""Fields of option dataclasses. Modules with options must not import large libraries, to keep `--help` fast."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field with a help text; a list as default is copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
