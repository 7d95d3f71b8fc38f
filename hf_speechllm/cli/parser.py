"""Argument parsers with one-line errors and suggestions for unknown options."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

OTHER_RANKS_WAIT = 15.0  # seconds; the launcher needs less to end the ranks


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the formatting of the description, and adds informative defaults to help texts."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return help_of(action)


def help_of(action: argparse.Action) -> str | None:
    """Returns the help text of an option, with its default if that is informative and not named in the text."""
    shown = action.nargs != 0 and action.default not in (None, False, argparse.SUPPRESS, "", (), [])  # 0: a switch
    if action.help and shown and "default" not in action.help:
        return f"{action.help.rstrip('.')} (default: %(default)s)"
    return action.help


class OneLineErrors(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line and exits with status 2.

    Attributes:
        file_status: exit status of an error that depends on files other than configurations.
        synonyms: options of other tools, and the options to suggest instead.
        not_suggested: options that are not suggested for an unknown option.
    """

    file_status = 1
    synonyms: ClassVar[Mapping[str, str]] = {}
    not_suggested: ClassVar[frozenset[str]] = frozenset()

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits."""
        report(f"{self.prog}: error: {message}")
        sys.exit(2)

    def file_error(self, message: str) -> NoReturn:
        """Prints the error for a file that is missing, exists, or cannot be read or written, and exits."""
        report(f"{self.prog}: error: {message}")
        sys.exit(self.file_status)

    def parse_args(self, args=None, namespace=None) -> Any:
        """Parses arguments; the error for an unknown option suggests a similar option."""
        parsed, rest = self.parse_known_args(command_line()[1] if args is None else args, namespace)
        if rest:
            unknown = next((item for item in rest if item.startswith("-")), None)
            if unknown is None:
                self.error(f"unexpected arguments: {' '.join(rest)}; --help lists all options")
            self.refuse(unknown)
        return parsed

    def refuse(self, word: str) -> NoReturn:
        """Prints the error for an unknown option and exits."""
        name = word.partition("=")[0]
        hint = did_you_mean(self.synonyms.get(name, name), options_of(self) - self.not_suggested)
        self.error(f"unknown option {name}{hint}; --help lists all options")


class Parser(OneLineErrors):
    """The parser of a verb; the description is the docstring of the module."""

    last_printed: ClassVar[Parser]  # `completion` reads the options of a verb from the parser that `--help` prints

    def __init__(self, description: str | None, **options: Any):
        super().__init__(prog(), description=description, formatter_class=HelpFormatter, **options)

    def print_help(self, file=None) -> None:
        """Prints the help."""
        Parser.last_printed = self
        super().print_help(file)

    def parse_args(self, args=None, namespace=None) -> Any:
        """Parses arguments; reports a misspelled option before missing options, because one can cause the other."""
        args = self._underscored(command_line()[1] if args is None else args)
        for word in itertools.takewhile("--".__ne__, args):
            name = word.partition("=")[0]
            abbreviated = any(option.startswith(name) for option in {"--help", *options_of(self)})
            if re.fullmatch(r"--\w[\w-]*", name) and not abbreviated:
                self.refuse(word)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None) -> Any:
        """Parses the known arguments."""
        return super().parse_known_args(self._underscored(command_line()[1] if args is None else args), namespace)

    def _underscored(self, args: Sequence[str]) -> list[str]:
        """Accepts `--output-dir` for `--output_dir`, as the parser of transformers does."""
        known = options_of(self)

        def plain(word: str) -> str:
            name, equals, value = word.partition("=")
            own = f"--{name[2:].replace('-', '_')}"
            return own + equals + value if word.startswith("--") and own in known else word

        return list(map(plain, args))


def report(message: str) -> None:
    """Prints a message that is the same in all processes; only the first process of each machine prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Ends a process of a launch with an error, and with status 1.

    An error that all ranks have is printed once: the launcher ends the other ranks after the first. An error that only
    another rank has appears after `OTHER_RANKS_WAIT` seconds.

    Args:
        message: may have several lines.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHER_RANKS_WAIT)
        message = f"rank {rank}: {message}"
    sys.exit(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` with the most similar known name, whose folder may be missing, or an empty text."""
    known = list(known)
    names = {word.rpartition("/")[2]: word for word in known} | {word: word for word in known}
    beginnings = {word[: len(name)]: word for word in sorted(names, key=len, reverse=True)}
    for candidates in (names, beginnings):
        if close := difflib.get_close_matches(name, candidates, n=1):
            return f"; did you mean {candidates[close[0]]}?"
    return ""


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the options of a parser."""
    return set(re.findall(r"--\w+", parser.format_usage()))


def command_line() -> tuple[str, list[str]]:
    """Returns the program name (with the verb, for `hf-speechllm VERB`) and the other arguments."""
    path, *words = sys.argv
    name = Path(path).name
    if name.startswith("hf-speechllm") or Path(path).parts[-2:] == ("hf_speechllm", "__main__.py"):
        return " ".join(["hf-speechllm", *words[:1]]), words[1:]
    return name, words


def prog() -> str:
    """Returns the program name for messages."""
    return command_line()[0]


def require_writable(parser: OneLineErrors, option: str, path: str) -> None:
    """Creates the folder of a file; ends with an error if the file cannot be written, or is a folder."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        parser.file_error(f"{option} {path} is a folder; name a file")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.file_error(
            f"{option} {path}: the folder {folder} is not writable: {error.strerror}; choose another folder"
        )


def refuse_input(parser: argparse.ArgumentParser, option: str, output: str, inputs: Iterable[str | None]) -> None:
    """Ends with an error if an output is an input, also under another name: --overwrite would destroy it."""
    for name in filter(None, inputs):
        if os.path.exists(output) and os.path.exists(name) and os.path.samefile(output, name):
            parser.error(f"{option}: {output} is an input of this command; choose another name")
