"""Writes the pages of docs/reference that are made from the code: commands with their options, and configurations.

python tools/reference.py

A test compares the pages with the code. Defaults that depend on the number of CPU cores are those of a machine with
eight cores.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hf_speechllm.cli.main import VERBS, main
from hf_speechllm.cli.parser import help_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/reference"
NOTE = "<!-- Written by tools/reference.py; change the code instead. -->\n"
TITLES = {"positional arguments": "Arguments", "options": "Options", "optional arguments": "Options"}
CONFIGURATIONS = {
    "recipes/configs": "Training: `hf-speechllm finetune NAME`",
    "recipes/configs/models": "New models: `hf-speechllm compose models/NAME`",
    "accelerate_configs": "Processes: `--config_file NAME`",
}


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Returns the parser that a verb builds for `--help`."""
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)

    with (
        mock.patch.object(sys, "argv", ["hf-speechllm", verb, "--help"]),
        mock.patch.object(os, "cpu_count", lambda: 8),
        mock.patch.object(os, "sched_getaffinity", lambda process: range(8), create=True),
        mock.patch.object(argparse.ArgumentParser, "print_help", keep),
        contextlib.suppress(SystemExit),
    ):
        main()
    return found[-1]


def description(text: str) -> Iterator[str]:
    """Yields a docstring as Markdown: paragraphs of commands become code blocks."""
    for paragraph in text.strip().split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if any(line.lstrip().startswith(("hf-speechllm ", "accelerate launch ")) for line in lines):
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            yield "\n".join(["```text", *(line[indent:] for line in lines), "```"])
        else:
            yield "\n".join(lines).replace("<", "&lt;") if "`" not in paragraph else "\n".join(lines)


def sections_of(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """Returns the groups of options as `--help` shows them: title and options."""
    sections: list[tuple[str, list[argparse.Action]]] = []

    class Recorder(argparse.HelpFormatter):
        def start_section(self, heading):
            sections.append((heading, []))

        def add_arguments(self, actions):
            sections[-1][1].extend(item for item in actions if item.dest != "help")

        def end_section(self):
            pass

        def add_usage(self, *_):
            pass

    parser.formatter_class = Recorder
    parser.format_help()
    return [(title, actions) for title, actions in sections if actions]


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Returns the row of an option: name with value, effect, default."""
    name = next((item for item in action.option_strings if item.startswith("--")), "")
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else None
    value = str(action.metavar or choices or {int: "N", float: "X"}.get(action.type, "TEXT"))
    value = "" if action.nargs == 0 else f"{value} ..." if action.nargs in ("+", "*") else value
    effect = (help_of(action) or "") % {**vars(action), "prog": parser.prog}
    if action.required and action.option_strings:
        effect = f"{effect} (required)"
    effect = effect.replace("|", "\\|").replace("<", "&lt;")
    return f"| `{' '.join(filter(None, (name, value)))}` | {effect} |"


def command_page(verb: str) -> str:
    """Returns the page of a verb."""
    parser = parser_of(verb)
    blocks = [f"# {verb}", *description(parser.description or "")]
    for title, actions in sections_of(parser):
        table = ["| option | effect |", "|---|---|", *(row(parser, item) for item in actions)]
        blocks += [f"## {TITLES.get(title, title)}", "\n".join(table)]
    if parser.epilog:
        blocks.append(" ".join(parser.epilog.split()))
    return NOTE + "\n\n".join(blocks) + "\n"


def configuration_page() -> str:
    """Returns the page with all YAML files of the package."""
    blocks = [
        "# Configurations",
        "YAML files of the package. The command line overrides a file. Names and paths of files are accepted.",
    ]
    for folder, title in CONFIGURATIONS.items():
        blocks.append(f"## {title}")
        for file in sorted((ROOT / folder).glob("*.yaml")):
            content = file.read_text(encoding="utf-8").strip()
            blocks.append(f"### {file.stem}\n```yaml\n{content}\n```")
    return NOTE + "\n\n".join(blocks) + "\n"


def pages() -> dict[Path, str]:
    """Returns all pages: text by path."""
    rows = [f"| [{verb}]({verb}.md) | {text} |" for verb, text in VERBS.items()]
    index = [
        "# Commands",
        "`hf-speechllm VERB --help` prints the options of a verb. The scripts in `recipes/` accept the\n"
        "same options. Defaults that depend on the number of CPU cores are those of a machine with eight cores.",
        "\n".join(["| verb | task |", "|---|---|", *rows]),
    ]
    commands = {FOLDER / f"commands/{verb}.md": command_page(verb) for verb in VERBS}
    return {
        FOLDER / "commands/index.md": NOTE + "\n\n".join(index) + "\n",
        **commands,
        FOLDER / "configurations.md": configuration_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
