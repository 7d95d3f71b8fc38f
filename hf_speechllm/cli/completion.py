"""Print the script that lets a shell complete verbs, options, their values, configurations and files.

hf-speechllm completion bash > ~/.local/share/bash-completion/completions/hf-speechllm
hf-speechllm completion zsh > ~/.zfunc/_hf-speechllm        (~/.zfunc must be in fpath, before compinit)
hf-speechllm completion fish > ~/.config/fish/completions/hf-speechllm.fish

The script contains all options: a shell completes without starting Python. Print the script again after an update.
Requires the extra [completion].
"""

import argparse
import contextlib
import io
import sys
import zlib
from importlib import import_module
from typing import Any

from .configurations import LAUNCHING, TRAINING, configuration_names
from .parser import Parser

# Verbs that take the options of `finetune` too, with those of transformers' TrainingArguments.
TRAINS = ("finetune", "plan")
CONFIGURATIONS = {"config": TRAINING, "config_file": LAUNCHING}  # argument -> folder of the names that it takes


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that reads the script")
    shell = parser.parse_args().shell

    import shtab

    from .main import VERBS

    command = argparse.ArgumentParser("hf-speechllm")
    verbs = command.add_subparsers()
    for verb, description in VERBS.items():
        parents = [parser_of(verb), *([parser_of("finetune", "--help_all")] if verb in TRAINS else [])]
        for action in (action for parent in parents for action in actions_of(parent)):
            if action.dest in CONFIGURATIONS:
                action.complete = names_and_files(configuration_names(CONFIGURATIONS[action.dest]))
            elif not action.choices and action.type not in (int, float):
                action.complete = shtab.FILE
        verbs.add_parser(verb, help=description, parents=parents, add_help=False, conflict_handler="resolve")
    print(shtab.complete(command, shell))


def parser_of(verb: str, option: str = "--help") -> argparse.ArgumentParser:
    """Returns the parser of a verb, which the option prints."""
    sys.argv[1:] = [verb, option]  # the verbs read the command line
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        import_module(f".{verb}", __package__).main()
    return Parser.last_printed


def actions_of(parser: argparse.ArgumentParser) -> list[Any]:
    """Returns the arguments of a parser that have a value."""
    found = []

    class Recorder(argparse.HelpFormatter):
        def add_argument(self, action):
            found.append(action)

    parser.formatter_class = Recorder
    parser.format_help()
    return [action for action in found if action.nargs != 0]


def names_and_files(names: list[str]) -> dict[str, Any]:
    """Returns completions for shtab: the names, and files."""
    words = " ".join(names)
    function = f"_hf_speechllm_{zlib.crc32(words.encode()):x}_file"
    return {
        "preamble": {"bash": f'{function}() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}'},
        "bash": function,
        "zsh": f"{{compadd {words}; _files}}",
        "fish": f"({'; '.join(f'echo {name}' for name in names)}; __fish_complete_path)",
    }
