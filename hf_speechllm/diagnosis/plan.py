"""The plan of a run: size, time and memory of each recommended configuration, and the one to take."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import progress_bar
from ..data.dataset import row_seconds
from ..files import atomic_write
from ..model.native_processing import NativeProcessor
from ..options import usable_cores
from ..training.arguments import batch_seconds
from ..training.assembly import load_data
from ..training.options import BatchOptions
from .isolation import ProbeError, run_isolated
from .probe import Measurement, Parse, measure
from .recommendations import RECOMMENDATIONS, recommend

PLAN_FILE = "plan.json"  # in the output folder
VERSION = 1
SMALLEST_BATCH = 15.0  # seconds of audio
# What a plan adds to a configuration if there is a validation set: the best checkpoint becomes the model.
VALIDATION: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_cer": True,
    "eval_cer_samples": 500,
    "load_best_model_at_end": True,
}
VALIDATION_OPTIONS = {*VALIDATION, "eval_steps", "early_stopping_patience"}
SCHEDULES = {"eval_strategy", "save_strategy"}  # a schedule of the configuration stays, and one of the user
AUGMENTATION = ("spec_augment", "tempo_perturb")  # of features, which a native model's own processor computes
CER = ("eval_cer", "eval_cer_samples")  # of the LLM's texts, which a CTC head trained alone does not change
STAGES = {
    "start": "start",
    "features": "features, first run only",
    "training": "training",
    "validation": "validation",
    "checkpoints": "checkpoints",
    "end": "final model",
}

logger = logging.getLogger(__name__)


@dataclass
class Candidate:
    """A configuration in a plan.

    Args:
        name: of the configuration.
        options: options that `finetune` would take; the command line overrides these.
        measurement: `None` if the configuration was not or could not be measured.
        problem: why the configuration cannot be used.
    """

    name: str
    options: dict[str, Any]
    measurement: Measurement | None = None
    problem: str | None = None


@dataclass
class Plan:
    """A plan.

    Args:
        data: `rows`, `hours`, `longest_seconds`, `validation_rows`, `validation_hours`.
        processes: of the run.
        candidates: measured configurations.
        configuration: name of the configuration to take; `None` if none is usable.
        reason: why.
    """

    data: dict[str, float]
    processes: int
    candidates: list[Candidate] = field(default_factory=list)
    configuration: str | None = None
    reason: str = ""

    @property
    def chosen(self) -> Candidate:
        """The configuration to take.

        Raises:
            ValueError: if no configuration is usable.
        """
        for candidate in self.candidates:
            if candidate.name == self.configuration:
                return candidate
        problems = "; ".join(f"{item.name}: {item.problem}" for item in self.candidates)
        raise ValueError(f"no configuration is usable on this machine: {problems}")

    def save(self, path: Path, **further: Any) -> None:
        """Writes the plan as JSON; `options` are those of the configuration to take.

        Args:
            path: of the file.
            **further: other values of the file.
        """
        content = {"version": VERSION, **dataclasses.asdict(self), **further}
        if self.configuration is not None:
            content["options"] = self.chosen.options
        with atomic_write(path) as file:
            json.dump(content, file, indent=1, ensure_ascii=False)


def make_plan(
    parse: Parse,
    argv: Sequence[str],
    configurations: Mapping[str, Mapping[str, Any]],
    given: Collection[str],
    *,
    processes: int = 1,
    seconds: float = 120.0,
    folder: str | None = None,
    only_recommended: bool = False,
    check_data: Callable[[Mapping[str, float]], None] = lambda data: None,
) -> Plan:
    """Measures configurations, and chooses one.

    Args:
        parse: returns the options of a command line, given options that it overrides.
        argv: command line, without a configuration.
        configurations: options by name.
        given: names of the options in the command line.
        processes: of the run.
        seconds: time for training steps of all probes.
        folder: place for temporary checkpoints.
        only_recommended: whether to measure no other configuration than the one to take.
        check_data: refuses the data of the plan before the first measurement.

    Raises:
        ProbeError: if the data are not usable.
    """
    shared = _shared_options(configurations, given)
    if len(configurations) == 1:  # it may name the model and the data
        (config,) = configurations.values()
        later = {*VALIDATION_OPTIONS, *AUGMENTATION}  # need a validation set, or another model
        shared = {**{name: value for name, value in config.items() if name not in later}, **shared}
    data, _ = run_isolated(describe_data, parse, argv, shared)
    workers, unsupported = data.pop("cores") // processes, data.pop("unsupported")
    check_data(data)
    plan = Plan(data, processes)
    names = _by_preference(configurations, data["hours"]) if only_recommended else [*configurations]
    bar = progress_bar(names, desc="measuring", unit=" configurations", leave=False)
    for number, name in enumerate(bar):
        logger.info("measuring %s (%d of %d)", name, number + 1, len(names))
        left_out = {*given, *unsupported}
        options = planned_options(configurations[name], left_out, data["validation_rows"] > 0, workers)
        share = seconds if only_recommended else seconds / len(names)
        candidate = Candidate(name, options)
        _measure(candidate, parse, argv, given, data["longest_seconds"], processes, share, folder)
        plan.candidates.append(candidate)
        if only_recommended and candidate.problem is None:
            break
    fitting = [candidate.name for candidate in plan.candidates if candidate.problem is None]
    _choose(plan, fitting, named=len(configurations) == 1)
    return plan


def _shared_options(configurations: Mapping[str, Mapping[str, Any]], given: Collection[str]) -> dict[str, Any]:
    """Returns options with which all rows are read: the largest budget of the configurations."""
    if "per_device_train_batch_seconds" in given:
        return {}
    budgets = [_budget(config) for config in configurations.values()]
    return {"per_device_train_batch_seconds": max(budgets) if all(budgets) else 0.0}


def _budget(options: Mapping[str, Any]) -> float:
    """Returns the seconds of a batch; 0 for `auto`."""
    return batch_seconds(options.get("per_device_train_batch_seconds", BatchOptions.per_device_train_batch_seconds))


def describe_data(parse: Parse, argv: Sequence[str], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the amount of data of a run; call this function by `run_isolated`.

    Also returns the number of free cores (`cores`; training on a CPU uses all) and the names of options that the model
    or the run does not support (`unsupported`).

    Args:
        parse, argv, planned: as for `measure`.
    """
    options = parse(argv, planned)
    if options.data.streaming:
        raise ValueError("--streaming: a plan needs the number of rows; leave it out")
    loaded = load_data(options, feature_cache="off")
    audio = row_seconds(loaded.train_rows)
    if loaded.weights is not None:
        audio = audio * loaded.weights
    validation = [row_seconds(rows) for rows in loaded.validation_rows.values()]
    return {
        "rows": len(audio),
        "hours": float(audio.sum()) / 3600,
        "longest_seconds": float(row_seconds(loaded.train_rows).max()),
        "validation_rows": sum(map(len, validation)),
        "validation_hours": float(sum(part.sum() for part in validation)) / 3600,
        "unsupported": (
            *(AUGMENTATION if isinstance(loaded.processor, NativeProcessor) else ()),
            *(CER if options.parts.only_ctc_head else ()),
        ),
        "cores": 0 if options.training.device.type == "cpu" else usable_cores(),
    }


def planned_options(
    config: Mapping[str, Any], given: Collection[str], has_validation: bool, workers: int
) -> dict[str, Any]:
    """Returns the options of a configuration in a plan.

    Args:
        config: options of the YAML file.
        given: options of the command line; these replace those of the plan.
        has_validation: whether there is a validation set, with which the plan selects the best checkpoint.
        workers: most processes that load data.
    """
    options = dict(config)
    if "dataloader_num_workers" in options:
        options["dataloader_num_workers"] = min(options["dataloader_num_workers"], workers)
    if not has_validation:
        options = {name: value for name, value in options.items() if name not in VALIDATION_OPTIONS}
    elif not SCHEDULES & {*config} and not {*SCHEDULES, "eval_steps", "save_steps"} & {*given}:
        options = {**VALIDATION, "save_steps": 0.1, **options}
        options["eval_steps"] = options["save_steps"]  # the best checkpoint needs an evaluation
    return {name: value for name, value in options.items() if name not in given}


def _by_preference(configurations: Mapping[str, Any], hours: float) -> list[str]:
    """Returns the configuration for an amount of data, and those that replace it."""
    left, names = {*configurations}, []
    while (item := recommend(hours, left)) is not None:
        names.append(item.name)
        left.remove(item.name)
    return names or [*configurations]


def _measure(
    candidate: Candidate,
    parse: Parse,
    argv: Sequence[str],
    given: Collection[str],
    longest: float,
    processes: int,
    seconds: float,
    folder: str | None,
) -> None:
    """Measures a configuration; if it does not fit into memory, with half the batch and twice the accumulation."""
    options = candidate.options
    while True:
        try:
            measured, ending = run_isolated(measure, parse, argv, options, processes, seconds, folder)
            if measured.fits:
                measured.seconds["end"] += ending
                candidate.measurement = measured
                return
            shown = f"{measured.memory_bytes / 1e9:.1f} of {measured.available_memory_bytes / 1e9:.1f} GB"
        except ProbeError as error:
            candidate.problem = str(error)
            return
        except MemoryError as error:
            shown = str(error)
        budget = _budget(options)
        smaller = max(budget / 2, longest)
        fixed = {"per_device_train_batch_seconds", "gradient_accumulation_steps"} & {*given}
        if fixed or not budget or smaller < SMALLEST_BATCH or smaller > 0.8 * budget:
            candidate.problem = f"does not fit into memory ({shown})"
            return
        logger.info("%s: batches of %g s do not fit into memory", candidate.name, budget)
        options["per_device_train_batch_seconds"] = smaller
        options["gradient_accumulation_steps"] = 2 * options.get("gradient_accumulation_steps", 1)


def _choose(plan: Plan, fitting: Collection[str], named: bool) -> None:
    if named:
        plan.configuration = next(iter(fitting), None)
        plan.reason = "named on the command line"
        return
    hours = plan.data["hours"]
    wanted = recommend(hours, [item.name for item in RECOMMENDATIONS])
    item = recommend(hours, fitting)
    if item is None or wanted is None:
        return
    plan.configuration = item.name
    plan.reason = f"{hours:.3g} h of audio: {wanted.reason}"
    if item is not wanted:
        plan.reason += f"; but {wanted.name} is not usable on this machine, and {item.name} is the next smaller one"


def format_plan(plan: Plan) -> str:
    """Returns a plan as text for the console."""
    data = plan.data
    lines = [f"data: {data['rows']:,.0f} rows, {data['hours']:.2f} h of audio"]
    if data["validation_rows"]:
        lines[0] += f"; validation: {data['validation_rows']:,.0f} rows, {data['validation_hours']:.2f} h"
    else:
        lines[0] += "; no validation set: the plan has no early stopping, and the last weights become the model"
    if measured := next((item.measurement for item in plan.candidates if item.measurement), None):
        memory = f"{measured.available_memory_bytes / 1e9:.0f} GB of memory available"
        lines.append(f"machine: {measured.device}, {memory}; processes: {plan.processes}")
    header = ("configuration", "batch", "epochs", "steps", "time", "memory", "")
    table = [header, *(_cells(candidate, plan) for candidate in plan.candidates)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines.append("")
    for row in table:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)),
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    lines.append("")
    if plan.configuration is None:
        return "\n".join([*lines, "no configuration is usable on this machine"])
    lines.append(f"recommended: {plan.configuration}. {plan.reason[:1].upper()}{plan.reason[1:]}.")
    measurement = plan.chosen.measurement
    if measurement is not None:
        stages = [
            f"{STAGES[stage]} {format_time(value)}" for stage, value in measurement.seconds.items() if value >= 0.5
        ]
        lines.append(f"time: {format_time(measurement.total_seconds)} = {' + '.join(stages)}")
        lines.append(
            f"schedule: {measurement.steps_per_epoch:,} steps per epoch, {measurement.checkpoints} checkpoints, "
            f"{measurement.evaluations} evaluations"
        )
        if plan.chosen.options.get("early_stopping_patience"):
            lines.append("early stopping may end the run sooner")
    return "\n".join(lines)


def _cells(candidate: Candidate, plan: Plan) -> tuple[str, ...]:
    measured = candidate.measurement
    if measured is None:
        return (candidate.name, "", "", "", "", "", f"not usable: {candidate.problem}")
    batch = f"{measured.batch_seconds:g} s"
    if measured.gradient_accumulation_steps > 1:
        batch += f" x {measured.gradient_accumulation_steps}"
    return (
        candidate.name, batch, f"{measured.epochs:g}", f"{measured.steps:,}", format_time(measured.total_seconds),
        f"{measured.memory_bytes / 1e9:.1f} GB", "<- recommended" if candidate.name == plan.configuration else "",
    )  # fmt: skip


def format_time(seconds: float) -> str:
    """Returns a time as text with two units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:.1f} days"
