"""Argument parsers whose errors are one line, with the option that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of the description as they are, and adds defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        help = action.help
        shown = action.nargs != 0 and action.default not in (None, False, argparse.SUPPRESS, [])  # 0: a switch
        if help and shown and "default" not in help:
            return f"{help.rstrip('.')} (default: %(default)s)"
        return help


class OneLineErrors(argparse.ArgumentParser):
    """Ends with one line and status 2 where the command line is wrong."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        report(f"{self.prog}: error: {message}")
        sys.exit(2)

    def parse_args(self, args=None, namespace=None) -> Any:
        """As the parent's; names the option that an unknown one is closest to."""
        parsed, rest = self.parse_known_args(command_line()[1] if args is None else args, namespace)
        if rest:
            unknown = next((item for item in rest if item.startswith("-")), None)
            if unknown is None:
                self.error(f"unexpected: {' '.join(rest)}")
            self.refuse(unknown)
        return parsed

    def refuse(self, word: str) -> NoReturn:
        """Ends the program because of an unknown option."""
        name = word.partition("=")[0]
        self.error(f"unknown option {name}{did_you_mean(name, options_of(self))}; all options: --help")


class Parser(OneLineErrors):
    """The parser of a verb; the description is the docstring of its module."""

    def __init__(self, description: str | None, **options: Any):
        super().__init__(prog(), description=description, formatter_class=HelpFormatter, **options)

    def parse_args(self, args=None, namespace=None) -> Any:
        """As the parent's; a typing error is reported before the options that are missing because of it."""
        args = list(command_line()[1] if args is None else args)
        for word in itertools.takewhile("--".__ne__, args):
            name = word.partition("=")[0]
            abbreviated = any(option.startswith(name) for option in {"--help", *options_of(self)})
            if re.fullmatch(r"--\w+", name) and not abbreviated:
                self.refuse(word)
        return super().parse_args(args, namespace)


def report(message: str) -> None:
    """Prints a message that all processes of a launch have in common; the first of this machine prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the closest of the known names; empty if none is close."""
    names = {word: word for word in known}
    beginnings = {word[: len(name)]: word for word in sorted(names, key=len, reverse=True)}
    for candidates in (names, beginnings):
        if close := difflib.get_close_matches(name, candidates, n=1):
            return f"; did you mean {candidates[close[0]]}?"
    return ""


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
