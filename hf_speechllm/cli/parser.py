"""Argument parsers whose errors are one line, with the option that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of the description as they are, and adds defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        help = action.help
        if help and action.default not in (None, False, argparse.SUPPRESS, []) and "default" not in help:
            return f"{help.rstrip('.')} (default: %(default)s)"
        return help


class OneLineErrors(argparse.ArgumentParser):
    """Ends with one line and status 2 where the command line is wrong."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)

    def parse_args(self, args=None, namespace=None) -> Any:
        """As the parent's; names the option that an unknown one is closest to."""
        parsed, rest = self.parse_known_args(command_line()[1] if args is None else args, namespace)
        if rest:
            unknown = next((item for item in rest if item.startswith("-")), None)
            if unknown is None:
                self.error(f"unexpected: {' '.join(rest)}")
            name = unknown.partition("=")[0]
            self.error(f"unknown option {name}{did_you_mean(name, options_of(self))}; all options: --help")
        return parsed


class Parser(OneLineErrors):
    """The parser of a verb; the description is the docstring of its module."""

    def __init__(self, description: str | None, **options: Any):
        super().__init__(prog(), description=description, formatter_class=HelpFormatter, **options)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the closest of the known names; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options that a parser knows."""
    return set(re.findall(r"--\w+", parser.format_usage()))


def command_line() -> tuple[str, list[str]]:
    """The name of the program, with the verb if it was started by `hf-speechllm VERB`, and the arguments behind it."""
    path, *words = sys.argv
    name = Path(path).name
    if name.startswith("hf-speechllm") or Path(path).parts[-2:] == ("hf_speechllm", "__main__.py"):
        return " ".join(["hf-speechllm", *words[:1]]), words[1:]
    return name, words


def prog() -> str:
    """The name of the program, for its messages."""
    return command_line()[0]
