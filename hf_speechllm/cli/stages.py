"""Stages of `finetune`: a YAML file with a list of runs, each of which starts from the model of the previous run.

A stage is a run of `finetune` with its own output folder, options and checkpoints. Options outside of `stages` apply
to all stages; options of the command line override both.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import atomic_write
from .configurations import TRAINING, find_configuration
from .parser import Parser, report

KEY = "stages"
SUMMARY_FILE = "stages.json"  # in the output folder: results of all finished stages
RESULTS_FILE, STATE_FILE = "all_results.json", "trainer_state.json"  # of a stage, written by the trainer
FINISHED_FILE = "finished.json"
RESERVED = ("model_name_or_path", "output_dir", "resume_from_checkpoint")  # the same for all stages, or derived
# A name with a suffix could be that of a file in the output folder.
NAME = re.compile(r"(?!.*\.(json|yaml)$)[\w.-]*\w[\w.-]*")


@dataclass(frozen=True)
class Stage:
    """A run of `finetune`.

    Args:
        name: name of the stage and of its folder.
        output_dir: folder of the stage.
        options: values of the YAML file for this stage, without `stages`.
        argv: options of the command line.
    """

    name: str
    output_dir: Path
    options: dict[str, Any]
    argv: list[str]

    @property
    def config_file(self) -> Path:
        """File with the options of the stage."""
        return self.output_dir.with_name(f"{self.name}.yaml")

    @property
    def command(self) -> list[str]:
        """Command line of `finetune`."""
        return [str(self.config_file), *self.argv]

    def is_finished(self) -> bool:
        """Returns whether the stage is finished with these options."""
        if self.finish is None or not self.config_file.is_file():
            return False
        return self.config_file.read_text(encoding="utf-8") == self.content

    @property
    def finish(self) -> int | None:
        """Time at which the last run of the stage has finished; `None` if the stage is not finished."""
        file = self.output_dir / FINISHED_FILE
        return file.stat().st_mtime_ns if file.is_file() else None

    @property
    def content(self) -> str:
        """Content of `config_file`. The first line changes with the options of the command line."""
        return f"# {json.dumps(self.argv)}\n{yaml.safe_dump(self.options, sort_keys=False, allow_unicode=True)}"


def find_stages(argv: Sequence[str]) -> list[Stage] | None:
    """Returns the stages of a command line of `finetune`; `None` if its configuration has no stages.

    Raises:
        ValueError: if the configuration or its stages are invalid; the message names the file and the stage.
    """
    if not argv or argv[0].startswith("-"):
        return None
    file = find_configuration(argv[0], TRAINING)
    try:
        common = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None  # reported by the parser of the options
    if not isinstance(common, dict) or KEY not in common:
        return None
    listed = common.pop(KEY)
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        raise ValueError(f"{file}: {KEY} must be a list of `key: value` blocks, one per stage")
    parser = Parser(None, add_help=False, allow_abbrev=False)
    for name in RESERVED:
        parser.add_argument(f"--{name}", default=common.pop(name, None))
    reserved, rest = parser.parse_known_args(argv[1:])
    if reserved.resume_from_checkpoint is not None:
        raise ValueError(f"{file}: leave out --resume_from_checkpoint: stages always resume where they ended")
    if not reserved.output_dir:
        raise ValueError(f"{file}: output_dir is missing; name a folder for all stages")
    stages: list[Stage] = []
    model = reserved.model_name_or_path
    for number, own in enumerate(listed, start=1):
        name = str(own.pop("name", f"stage{number}"))
        where = f"{file}: stage {number} ({name})"
        if not NAME.fullmatch(name) or name.lower() in [stage.name.lower() for stage in stages]:
            raise ValueError(
                f"{where}: name must consist of letters, digits, '-', '_' and '.', not end in .json or .yaml, and "
                "differ from the other names"
            )
        if wrong := next((key for key in RESERVED if key in own), None):
            raise ValueError(f"{where}: {wrong} is the same for all stages; write it above {KEY}")
        options = {**common, **own, "model_name_or_path": model, "resume_from_checkpoint": "auto"}
        options["output_dir"] = str(Path(reserved.output_dir) / name)
        _add_replay(options, [stage.options for stage in stages], where)
        if number < len(listed):
            options["push_to_hub"] = False
        stages.append(Stage(name, Path(options["output_dir"]), options, rest))
        model = options["output_dir"]
    return stages


def _add_replay(options: dict[str, Any], earlier: Sequence[dict[str, Any]], where: str) -> None:
    """Adds a share of the training files of earlier stages to the options of a stage.

    Raises:
        ValueError: if the share or a weight is invalid, or there is no earlier stage.
    """
    given = options.pop("replay", None)
    if given is None:
        return
    share = _number(given)
    if not 0 < share <= 1:
        raise ValueError(f"{where}: replay is {given!r}; it must be a share of the earlier rows, above 0, at most 1")
    if not earlier:
        raise ValueError(f"{where}: replay needs an earlier stage; remove it from the first stage")
    weights = _weights_of(options, where)
    for stage in earlier:
        for name, weight in _weights_of(stage, where).items():
            weights.setdefault(name, share if weight >= 1 else share * weight)
    options["train_file"], options["train_weight"] = list(weights), list(weights.values())


def _weights_of(options: dict[str, Any], where: str) -> dict[str, float]:
    """Returns the weight of each training file."""
    files, weights = options.get("train_file", []), options.get("train_weight", [])
    files, weights = (value if isinstance(value, list) else [value] for value in (files, weights))
    if weights and len(weights) != len(files) or any(not 0 < _number(weight) < math.inf for weight in weights):
        raise ValueError(f"{where}: train_weight is {weights}; it must be one number above 0 per file of {files}")
    return dict(zip(files, map(_number, weights or [1.0] * len(files)), strict=True))


def _number(value: Any) -> float:
    """Returns the value of an option; NaN if the value is no number. YAML reads `1e-1` as text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def run_stages(
    stages: Sequence[Stage], check: Callable[[list[str], str], Any], run: Callable[[list[str]], Any]
) -> None:
    """Runs the stages that are not finished, in order, and writes and prints a summary.

    Args:
        stages: result of `find_stages`.
        check: checks the command line of a stage, which its errors name; called for all stages before the first run.
        run: runs `finetune` with a command line; ends the process if the run fails.

    Raises:
        ValueError: if several processes run this function.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{KEY} are not supported under `accelerate launch` with several processes; use `hf-speechllm finetune "
            "CONFIG --num_processes N`"
        )
    folder = stages[0].output_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    finished = [stage.is_finished() for stage in stages]
    begin = finished.index(False) if False in finished else len(stages)
    for stage in stages[begin:]:
        with atomic_write(stage.config_file) as file:
            file.write(stage.content)
    for number, stage in enumerate(stages[begin:], start=begin + 1):
        where = f"stage {number} ({stage.name})"
        try:
            check(stage.command, where)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    for number, stage in enumerate(stages, start=1):
        if number <= begin:
            report(f"stage {number} of {len(stages)} ({stage.name}) is finished")
            continue
        report(f"stage {number} of {len(stages)} ({stage.name}) starts from {stage.options['model_name_or_path']}")
        before = stage.finish
        run(stage.command)
        gc.collect()  # the memory of the stage's model and optimizer
        for later in stages[number:] if stage.finish != before else ():
            if later.output_dir.is_dir():
                raise ValueError(
                    f"{later.output_dir} was trained from an earlier result of stage {stage.name}, which has changed; "
                    "remove this folder and run the command again"
                )
    results = [summary_of(stage) for stage in stages]
    with atomic_write(folder / SUMMARY_FILE) as file:
        json.dump(results, file, indent=1)
    for result in results:
        report("  ".join(_shown(name, value) for name, value in result.items()))


def _shown(name: str, value: Any) -> str:
    """Returns a result as text; error rates and accuracy in percent."""
    if name.endswith(("_cer", "_token_accuracy")):
        return f"{name.replace('_cer', '_error_rate')} {100 * value:.2f} %"
    return f"{name} {value}"


def summary_of(stage: Stage) -> dict[str, Any]:
    """Returns the results of a finished stage: steps, first and last loss, metrics of validation, seconds, folder."""
    state = json.loads((stage.output_dir / STATE_FILE).read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    metrics = json.loads((stage.output_dir / RESULTS_FILE).read_text(encoding="utf-8"))
    scores = {
        name: round(value, 4)
        for name, value in metrics.items()
        if name.startswith("eval_") and name.endswith(("loss", "cer", "token_accuracy"))
    }
    result = {"stage": stage.name, "steps": state["global_step"], "epochs": round(state["epoch"], 2)}
    if losses:
        result |= {"first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}
    if "train_runtime" in metrics:
        result["seconds"] = round(metrics["train_runtime"])
    return {**result, **scores, "model": str(stage.output_dir)}
