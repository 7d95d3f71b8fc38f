"""Starts training processes with accelerate: `hf-speechllm finetune --num_processes 8 ...`."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .configurations import LAUNCHING, find_configuration
from .parser import Parser, prog

# Options of `accelerate launch` that are accepted together with the options of a run.
OPTIONS = {
    "config_file": "configuration of accelerate: a name (multi_gpu, deepspeed_zero2, fsdp2, ...) or a path",
    "num_processes": "total number of processes; usually one per GPU",
    "num_machines": "number of machines",
    "machine_rank": "rank of this machine, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "port of machine 0",
    "gpu_ids": "comma-separated GPUs of this machine",
    "max_restarts": "number of restarts after a process is lost, at most",
}
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port", "max_restarts")


def split_launch_options(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits a command line into options of the launcher and other arguments; reports wrong usage."""
    parser = Parser(None, add_help=False, allow_abbrev=False)
    add_launch_options(parser)
    found, rest = parser.parse_known_args(argv)
    if found.num_processes is not None and found.num_processes < 1:
        parser.error(f"--num_processes is {found.num_processes}; it must be at least 1")
    if found.config_file is not None:
        try:
            found.config_file = str(find_configuration(found.config_file, LAUNCHING))
        except ValueError as error:
            parser.error(str(error))
    return {name: value for name, value in vars(found).items() if value is not None}, rest


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the launcher as a separate group."""
    group = parser.add_argument_group("Several processes, started by accelerate")
    for name, help in OPTIONS.items():
        kind, metavar = (int, "N") if name in NUMBERS else (str, "TEXT")
        group.add_argument(f"--{name}", help=help, metavar=metavar, type=kind)


def launch(verb: str, options: dict[str, Any], argv: Sequence[str]) -> None:
    """Runs a verb in several processes, and exits with the status of the first failed process.

    Args:
        verb: of `hf-speechllm`.
        options: from `split_launch_options`.
        argv: other arguments of the command line.

    Raises:
        ValueError: if the configuration requires GPUs and none is found.
        SystemExit: if a process failed; the process has printed the error, unless a signal ended the process.
    """
    import yaml
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.accelerator import is_available
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "config_file" not in options and not os.path.isfile(default_config_file):
        several = "multi_node" if options.get("num_machines", 1) > 1 else "multi_gpu"
        options = {**options, "config_file": str(find_configuration(several if is_available() else "cpu", LAUNCHING))}
    file = Path(options.get("config_file", default_config_file))
    config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if config.get("use_cpu"):
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate sets this for a single process only
    elif config.get("distributed_type", "NO") != "NO" and not is_available():
        raise ValueError(f"{file} requires GPUs, and none was found; use --config_file cpu")
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    logging.disable(logging.ERROR)  # messages of the launcher; the processes report their own errors
    try:
        launch_command(launch_command_parser().parse_args([*words, "--module", "hf_speechllm", verb, *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.exit(f"{prog()}: error: signal {-failure.exitcode} ended the process of rank {rank}")
        sys.exit(failure.exitcode)
    except SignalException as error:  # the processes also got the signal, and have reported the result
        sys.exit(128 + error.sigval)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
