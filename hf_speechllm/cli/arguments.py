"""Command line of `finetune`: options of all packages, values from a YAML file, help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.augmentation_options import WAVEFORM_NAMES, AugmentationOptions
from ..data.options import DataOptions
from ..hub.options import PublishingOptions
from ..model.options import ModelOptions
from ..options import usable_cores
from ..training.inherited_options import WITHOUT_EFFECT, check_inherited_options
from ..training.options import (
    BatchOptions,
    FaultOptions,
    FinetuningOptions,
    OptimizationOptions,
    TrainedPartsOptions,
    ValidationOptions,
)
from .configurations import TRAINING, find_configuration, is_of_package
from .launch import add_launch_options
from .parser import OneLineErrors, Parser, command_line, did_you_mean, prog

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from ..training.arguments import SpeechLLMTrainingArguments

OF_TRAINER = (OptimizationOptions, BatchOptions, ValidationOptions, FaultOptions, PublishingOptions)
GROUPS = (ModelOptions, DataOptions, AugmentationOptions, TrainedPartsOptions, *OF_TRAINER)
OWN = frozenset(item.name for kind in GROUPS for item in dataclasses.fields(kind))
USAGE = "%(prog)s [CONFIG] [--OPTION VALUE ...]"
AUTO = "--auto"
LOADERS = "dataloader_num_workers"
# Options of other trainers.
SYNONYMS = {
    "--batch_size": "--per_device_train_batch_seconds", "--lr": "--learning_rate", "--model": "--model_name_or_path",
    "--train_data": "--train_file", "--valid_file": "--validation_file",
}  # fmt: skip
KINDS = {"bool": "BOOL", "int": "N", "float": "X", "str": "TEXT"}
TYPES = {"N": int, "X": float}  # of the values of other metavars: str


def parse_arguments(
    argv: Sequence[str] | None = None, description: str | None = None, planned: Mapping[str, Any] | None = None,
    required: Sequence[str] = (),
) -> FinetuningOptions:  # fmt: skip
    """Parses `[CONFIG] [--key value ...]`; options of the command line override values of the file.

    Args:
        argv: default the command line.
        description: text for `--help`.
        planned: values of a plan, which the command line overrides; with a plan, the file is ignored.
        required: options that must be set.

    Raises:
        SystemExit: for an unknown key, a wrong type or a contradiction; one line names file and key.
    """
    argv = list(command_line()[1] if argv is None else argv)
    if {"-h", "--help", "--help_all"} & {*argv}:
        print_help(description, with_inherited="--help_all" in argv)
        sys.exit()
    from ..training.arguments import SpeechLLMTrainingArguments

    return _parse(argv, lambda values: SpeechLLMTrainingArguments(**values), planned, required)


def check_command_line(argv: Sequence[str], where: str = "", required: Sequence[str] = ()) -> FinetuningOptions:
    """Checks a command line in the same way as `parse_arguments`, before processes start, without using a device.

    Args:
        argv: the command line.
        where: name of the stage, for errors.
        required: options that must be set.

    Raises:
        SystemExit: see `parse_arguments`.
    """
    from ..training.arguments import SpeechLLMTrainingArguments

    def unstarted(values: dict[str, Any]) -> SpeechLLMTrainingArguments:
        training = SpeechLLMTrainingArguments.__new__(SpeechLLMTrainingArguments)
        for name, value in values.items():
            setattr(training, name, value)
        training.check()
        return training

    return _parse(argv, unstarted, required=required, where=where)


def _parse(
    argv: Sequence[str],
    make_training: Callable[[dict], SpeechLLMTrainingArguments],
    planned: Mapping[str, Any] | None = None,
    required: Sequence[str] = (),
    where: str = "",
) -> FinetuningOptions:
    from ..training.arguments import SpeechLLMTrainingArguments

    parser = _parser(SpeechLLMTrainingArguments)
    if where:
        parser.prog += f": {where}"
    values = _read(parser, argv, planned)
    if missing := next((name for name in required if values[name] is None), None):
        parser.error(f"--{missing} is missing; --help_all lists all options")

    def chosen(kind: type) -> dict[str, Any]:
        return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.init}

    try:
        model, data = ModelOptions(**chosen(ModelOptions)), DataOptions(**chosen(DataOptions))
        parts = TrainedPartsOptions(**chosen(TrainedPartsOptions))
        return FinetuningOptions(model, data, parts, make_training(chosen(SpeechLLMTrainingArguments)))
    except ValueError as error:
        return parser.error(" ".join(str(error).split()))


def _parser(trainer_options: type) -> HfArgumentParser:
    from transformers import HfArgumentParser

    from ..training.arguments import batch_seconds

    class FinetuneParser(OneLineErrors, HfArgumentParser):
        synonyms = SYNONYMS
        not_suggested = frozenset(f"--{name}" for name in WITHOUT_EFFECT)

        def add_argument(self, *names, **options):
            if "--per_device_train_batch_seconds" in names:
                options["type"] = batch_seconds
            if "--report_to" in names:  # HfArgumentParser takes one value of options of type `str | list[str]`
                options["nargs"] = "+"
            return super().add_argument(*names, **options)

    kinds = [ModelOptions, DataOptions, TrainedPartsOptions, trainer_options]
    parser = FinetuneParser(kinds, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
    parser.prog = prog()
    return parser


def _read(parser: HfArgumentParser, argv: Sequence[str], planned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values of all options, including defaults."""
    argv, from_file = list(argv), []
    known = {item.name for kind in parser.dataclass_types for item in dataclasses.fields(kind) if item.init}
    try:
        if argv and not argv[0].startswith("-"):
            path = find_configuration(argv.pop(0), TRAINING)
            config = read_configuration(path)
            if LOADERS in config and is_of_package(path):  # a user's number, here or in a file, is not changed
                ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
                config[LOADERS] = min(config[LOADERS], max(1, usable_cores() // ranks))
            from_file = [] if planned else _to_argv(parser, config, str(path), known)
        if planned:
            from_file = _to_argv(parser, planned, "plan", known)
        given = [item.partition("=")[0][2:].replace("-", "_") for item in argv if item.startswith("--")]
        given = [name if name in known else name.removeprefix("no_") for name in given]
        check_inherited_options(
            (name for name in given if name in known), OWN
        )  # before parsing, because an error for the type of a value would be misleading
        return vars(parser.parse_args([*from_file, *argv]))
    except ValueError as error:
        return parser.error(str(error))


def read_configuration(path: Path) -> dict[str, Any]:
    """Reads a YAML file of options.

    Raises:
        ValueError: if the file is not readable or has no options.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no `key: value` lines; write options as `key: value`")
    return config


def _to_argv(parser: HfArgumentParser, config: Mapping[str, Any], path: str, known: Collection[str]) -> list[str]:
    argv = []
    for key, value in config.items():
        if key not in known:
            parser.error(f"{path}: unknown key {key}{did_you_mean(str(key), known)}")
        try:
            check_inherited_options([key], OWN)
        except ValueError as error:
            parser.error(f"{path}: {error}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        option = [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
        # Parsed separately first, so that the error for a wrong type names the file.
        prog, parser.prog = parser.prog, f"{parser.prog}: {path}"
        _, rest = parser.parse_known_args(option)
        if rest:
            parser.error(f"argument --{key}: one value expected, not {value!r}")
        parser.prog = prog
        argv += option
    return argv


def print_help(description: str | None, with_inherited: bool = False) -> None:
    """Prints the options of this project in groups, without importing torch and transformers, which takes seconds.

    Args:
        description: text before the options.
        with_inherited: whether to add the options of transformers' `TrainingArguments`.
    """
    parser = Parser(description, usage=USAGE, add_help=False, conflict_handler="resolve")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or name of a file of the package")
    for kind in GROUPS:
        own = [item for item in dataclasses.fields(kind) if item.name in kind.__annotations__]  # not of a parent class
        add_group(parser, str(kind.__doc__).partition("\n")[0], own)
    add_launch_options(parser)
    parser.add_argument_group("Plan").add_argument(
        AUTO, action="store_true", help="measure this machine, and take the options of the plan; see hf-speechllm plan"
    )
    if with_inherited:
        from transformers import TrainingArguments

        inherited = [item for item in dataclasses.fields(TrainingArguments) if item.init and item.name not in OWN]
        add_group(parser, "Options of transformers' TrainingArguments", inherited)
    else:
        parser.epilog = (
            "--help_all also lists the options of transformers' TrainingArguments (--output_dir, --learning_rate, "
            "--num_train_epochs,\n--max_steps, --eval_strategy, --save_steps, --seed, --report_to, ...)"
        )
    parser.print_help()


class Values(list):
    """A list that is formatted as on the command line."""

    def __str__(self) -> str:
        return " ".join(map(str, self))


def add_group(parser: argparse.ArgumentParser, title: str, fields: Sequence[dataclasses.Field]) -> None:
    """Adds fields of an options dataclass to a parser, as a group with a title."""
    group = parser.add_argument_group(title)
    for item in fields:
        if item.name in WITHOUT_EFFECT:
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else Values(item.default_factory())
        kind = item.type.__name__ if isinstance(item.type, type) else str(item.type).replace(" | None", "")
        many = kind.startswith("list[")
        metavar = KINDS.get(kind.removeprefix("list[").removesuffix("]"), "VALUE")
        group.add_argument(
            f"--{item.name}",
            metavar=metavar,
            nargs="+" if many else None,
            type=TYPES.get(metavar, str),
            default=getattr(default, "value", default),
            help=item.metadata.get("help", "").replace("%", "%%"),
        )


def add_waveform_augmentation(parser: argparse.ArgumentParser, title: str) -> None:
    """Adds the options of waveform augmentation to a parser, as a group with a title."""
    add_group(parser, title, [item for item in dataclasses.fields(AugmentationOptions) if item.name in WAVEFORM_NAMES])


def waveform_augmentation_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> AugmentationOptions:
    """Returns the options that `add_waveform_augmentation` has added; reports invalid values as wrong usage."""
    try:
        return AugmentationOptions(**{name: vars(args)[name] for name in WAVEFORM_NAMES})
    except ValueError as error:
        parser.error(str(error))
