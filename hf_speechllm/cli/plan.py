"""Plan a run before GPU time is spent: time and memory of each configuration, measured on this machine.

hf-speechllm plan --model_name_or_path MODEL --train_file data/train.jsonl --validation_file data/dev.jsonl
hf-speechllm plan lora ... --num_processes 8         (only this configuration, for a run on eight GPUs)
hf-speechllm plan ... --curve                        (also: what would more hours of data give?)
hf-speechllm finetune --auto ... --output_dir exp/a  (takes the plan)

Accepts the options of `finetune`, which override those of the configurations. A few training steps run with the real
model, rows and batches; then validation, checkpoints and features are timed. The model is not changed.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import command, print_summary, quiet_transformers, show_log
from .arguments import check_command_line, parse_arguments, read_configuration
from .configurations import TRAINING, find_configuration
from .parser import Parser, command_line, prog

if TYPE_CHECKING:
    from ..diagnosis.plan import Plan
    from ..training.options import FinetuningOptions

SHARDED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")  # set by accelerate

logger = logging.getLogger(__name__)


def positive(text: str) -> float:
    """Parses a number above 0."""
    if (value := float(text)) <= 0:
        raise argparse.ArgumentTypeError("it must be above 0")
    return value


def split_own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits a command line into options of `plan` and of `finetune`."""
    parser = Parser(__doc__, usage="%(prog)s [CONFIG] [--OPTION VALUE ...]", allow_abbrev=False)
    parser.add_argument("--json", help="file for the plan, as JSON")
    parser.add_argument("--num_processes", type=int, default=1, help="processes (GPUs) of the planned run")
    parser.add_argument(
        "--probe_seconds", type=positive, help="time for training steps of all probes (default: 120 on a GPU, else 60)"
    )
    parser.add_argument(
        "--curve", action="store_true", help="also train on 1/8, 1/4 and 1/2 of the data, and extrapolate the error"
    )
    parser.add_argument("--curve_minutes", type=positive, default=5.0, help="training time of each part of --curve")
    own, rest = parser.parse_known_args(argv)
    if own.num_processes < 1:
        parser.error("--num_processes must be at least 1")
    return own, rest


def split_configuration(argv: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the options of the named configuration, otherwise of all recommended ones, and the other arguments.

    Raises:
        ValueError: if the configuration does not exist.
    """
    from ..diagnosis.recommendations import RECOMMENDATIONS

    argv = list(argv)
    names = [argv.pop(0)] if argv and not argv[0].startswith("-") else [item.name for item in RECOMMENDATIONS]
    return {name: read_configuration(find_configuration(name, TRAINING)) for name in names}, argv


def given_options(argv: Sequence[str]) -> set[str]:
    """Returns the names of the options in a command line."""
    return {word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}


def parse_planned(argv: Sequence[str], planned: Mapping[str, Any]) -> "FinetuningOptions":
    """Returns the options of a command line that overrides a plan."""
    return parse_arguments(argv, planned=planned)


def probe_seconds() -> float:
    """Returns the default time for training steps."""
    import torch

    return 120.0 if torch.cuda.is_available() else 60.0


def plan_run(argv: Sequence[str], output_dir: str, **choices: Any) -> "Plan":
    """Makes the plan of a command line of `finetune`.

    Args:
        argv: command line, with or without a configuration.
        output_dir: temporary checkpoints are written on the same disk.
        **choices: of `make_plan`.

    Raises:
        ValueError: if the configuration does not exist.
        ProbeError: if the data are not usable.
    """
    from ..diagnosis.plan import make_plan

    configurations, argv = split_configuration(argv)
    folder = existing_folder(output_dir)
    return make_plan(parse_planned, argv, configurations, given_options(argv), folder=folder, **choices)


def existing_folder(path: str) -> str:
    """Returns a folder, or the nearest of its parents that exists."""
    return next(str(folder) for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())


def apply_plan(options: "FinetuningOptions", argv: Sequence[str]) -> "FinetuningOptions":
    """Returns the options of a run that takes a plan; must be called by all processes.

    The first process makes the plan and stores it in the output folder. A stored plan is used again, unless the data
    have changed and there are no checkpoints.

    Args:
        options: of the command line without a plan.
        argv: command line.

    Raises:
        ValueError: if no plan can be made, or the stored plan is for another configuration.
    """
    from accelerate.utils import broadcast_object_list

    args = options.training
    found: list[Any] = [None, None]
    if args.process_index == 0:
        from ..diagnosis.isolation import ProbeError

        try:
            found[0] = _stored_or_new_plan(options, argv)
        except (OSError, ValueError, ProbeError) as error:
            found[1] = str(error)
    if args.world_size > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return parse_planned([*argv], found[0])


def _stored_or_new_plan(options: "FinetuningOptions", argv: Sequence[str]) -> dict[str, Any]:
    import json

    from ..data import file_lists
    from ..diagnosis.plan import PLAN_FILE, format_plan
    from ..training.checkpointing.manifest import checkpoint_folders

    args = options.training
    path = Path(args.output_dir) / PLAN_FILE
    name = argv[0] if argv and not argv[0].startswith("-") else None
    fingerprint = file_lists.fingerprint([*options.data.train_file, *options.validation_files.values()])
    has_checkpoints = bool(checkpoint_folders(args.output_dir))
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            configuration, planned = stored["configuration"], stored["options"]
        except (ValueError, KeyError, TypeError) as error:  # damaged, or a plan without a usable configuration
            raise ValueError(f"{path} is not a plan that can be used; delete it to plan again") from error
        if name not in (None, configuration):
            raise ValueError(f"{path} is a plan for {configuration}, not for {name}; delete it to plan again")
        changed = stored.get("fingerprint", fingerprint) != fingerprint
        if not changed or has_checkpoints:
            logger.info("%s: the stored plan is used (%s)", path, configuration)
            if changed:
                logger.warning("the data have changed since this plan; the checkpoints of the run fix the plan")
            return planned
        logger.info("%s: the data have changed since this plan; planning again", path)
    elif has_checkpoints:
        raise ValueError(
            f"--auto: {args.output_dir} contains checkpoints of a run without a plan; leave --auto out, or choose "
            "another --output_dir"
        )
    if args.deepspeed or args.fsdp or any(key in os.environ for key in SHARDED):
        raise ValueError("--auto does not measure models that DeepSpeed or FSDP shard; leave it out, or use DDP")
    plan = plan_run(argv, args.output_dir, processes=args.world_size, seconds=probe_seconds(), only_recommended=True)
    print(format_plan(plan), flush=True)
    options_of_plan = plan.chosen.options  # an error if no configuration is usable
    plan.save(path, fingerprint=fingerprint)
    return options_of_plan


def _training_command(argv: Sequence[str], processes: int) -> str:
    """Returns the command that trains with the plan of a command line."""
    words = [*argv, "--auto"]
    if processes > 1:
        words += ["--num_processes", str(processes)]
    return command("finetune", *words, output_dir=None if "output_dir" in given_options(argv) else "exp/auto")


def main() -> None:
    """Runs the command; see the docstring of the module."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `finetune`
    own, argv = split_own_options(command_line()[1])
    show_log()
    quiet_transformers()
    options = check_command_line(argv)
    output_dir = options.training.output_dir or "."
    from ..diagnosis.curve import format_curve, learning_curve, require_enough_data
    from ..diagnosis.isolation import ProbeError
    from ..diagnosis.plan import format_plan

    try:
        if own.curve and not options.validation_files:
            raise ValueError("--curve requires a validation set; add --validation_file")
        seconds = own.probe_seconds or probe_seconds()
        checks = {"check_data": require_enough_data} if own.curve else {}
        plan = plan_run(argv, output_dir, processes=own.num_processes, seconds=seconds, **checks)
        print(format_plan(plan), flush=True)
        curve = None
        if own.curve and plan.configuration is not None:
            arguments, folder = split_configuration(argv)[1], existing_folder(output_dir)
            found = learning_curve(parse_planned, arguments, plan, own.curve_minutes, folder)
            print(f"\n{format_curve(found)}")
            curve = dataclasses.asdict(found)
        if own.json:
            plan.save(Path(own.json), curve=curve)
        plan.chosen  # noqa: B018 (an error if no configuration is usable)
        print_summary({"plan": own.json}, [_training_command(argv, own.num_processes)])
    except (OSError, ValueError, ProbeError) as error:
        sys.exit(f"{prog()}: error: {error}")
