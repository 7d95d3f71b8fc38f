"""Markdown of model cards: names that may contain any character, and tables."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def _one_line(text: object) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def escape(text: object) -> str:
    """Escapes a text for Markdown, including table cells."""
    line = html.escape(_one_line(text), quote=False)
    return "".join(f"\\{char}" if char in "\\`*[]|~" else char for char in line)


def code(name: object) -> str:
    """Formats a name, which may contain any character, as Markdown code."""
    line = _one_line(name).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats a table; cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
