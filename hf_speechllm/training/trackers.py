"""Names and values for TensorBoard, W&B and trackio: error rates in percent, values of the parts, transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_utils import IntervalStrategy

from ..evaluation.scoring import common_metric
from .arguments import SpeechLLMTrainingArguments
from .checkpointing.selection import AVERAGED
from .freezing import part_of
from .parameter_groups import learning_rate
from .validation_files import Sample

_COLUMNS = ("row", "reference", "hypothesis")
_PERCENT = ("token_accuracy", "padding_share", "data_wait_share", "model_flop_utilization")


class Validation(Protocol):
    """Names of the error rates and samples of the last evaluation, by name of the validation set."""

    rate_names: dict[str, str]
    samples: dict[str, list[Sample]]


class TrackerNames(TrainerCallback):
    """Gives the trackers after it in the list of callbacks error rates with their name, in percent: `eval_test_wer`.

    `PlainNames`, after the trackers, restores the values for other callbacks.

    Args:
        validation: the validator of the trainer.
    """

    def __init__(self, validation: Validation):
        self.validation = validation
        self.plain: dict[str, Any] = {}

    def on_log(self, args, state, control, logs, **kwargs):
        """Renames and converts values in place."""
        self.plain = dict(logs)
        logs.clear()
        logs.update(tracker_values(self.plain, self.validation.rate_names))


class PlainNames(TrainerCallback):
    """Restores the values that `TrackerNames` has renamed."""

    def __init__(self, names: TrackerNames):
        self.names = names

    def on_log(self, args, state, control, logs, **kwargs):
        """Restores the values in place."""
        logs.clear()
        logs.update(self.names.plain)


class SampleTranscripts(TrainerCallback):
    """Sends sample transcripts of every evaluation to TensorBoard, W&B and trackio.

    Args:
        trackers: the callbacks of the trainer.
        validation: the validator of the trainer.
    """

    def __init__(self, trackers: Sequence[TrainerCallback], validation: Validation):
        self.trackers = trackers
        self.validation = validation

    def on_evaluate(self, args, state, control, **kwargs):
        """Sends the samples under `eval/NAME_samples`."""
        if not state.is_world_process_zero:
            return
        for name, samples in self.validation.samples.items():
            if not samples:
                continue
            rows = [(sample.name, sample.reference, sample.hypothesis) for sample in samples]
            key = f"eval/{name}_samples" if name else "eval/samples"
            for tracker in self.trackers:
                send_samples(tracker, key, rows, state.global_step)


def send_samples(tracker: TrainerCallback, key: str, rows: Sequence[tuple[str, str, str]], step: int) -> None:
    """Sends transcripts to a tracker as a table; other trackers than TensorBoard, W&B and trackio get none.

    Args:
        tracker: callback of transformers.
        key: name of the table.
        rows: name of the row, reference, hypothesis.
        step: training step.
    """
    if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
        tracker.tb_writer.add_text(key, markdown_table(rows), step)
    elif isinstance(tracker, WandbCallback):
        import wandb

        table = wandb.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])
        wandb.log({key: table, "train/global_step": step})
    elif isinstance(tracker, TrackioCallback):
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(_COLUMNS)))
        trackio.log({key: table, "train/global_step": step})


def markdown_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Returns transcripts as a Markdown table."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def tracker_values(logs: Mapping[str, Any], rate_names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values of a log entry with the names for trackers; all rates and shares are in percent.

    Args:
        logs: of the trainer, with rates as fractions.
        rate_names: name of the error rate of each validation set.
    """
    values: dict[str, Any] = {}
    for plain, value in logs.items():
        name = f"eval_{plain}" if plain.startswith(AVERAGED) else plain
        if name.startswith("eval") and name.endswith("_cer"):
            prefix = name.removesuffix("_cer")
            rate = rate_names.get(prefix.removeprefix("eval_").removeprefix(f"{AVERAGED}_")) or common_metric(
                rate_names.values()
            )
            values[f"{prefix}_{rate.lower()}"] = round(100 * value, 4)
        elif name.endswith(_PERCENT):
            values[name] = round(100 * value, 4)
        else:
            values[name] = value
    return values


def connect_trackers(callbacks: list[TrainerCallback], validation: Validation) -> None:
    """Gives the trackers in a list of callbacks their names, and the sample transcripts.

    Args:
        callbacks: of the trainer, changed in place.
        validation: the validator of the trainer.
    """
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    trackers = [callback for callback in callbacks if isinstance(callback, kinds)]
    if not trackers:
        return
    others = [callback for callback in callbacks if callback not in trackers]
    names = TrackerNames(validation)
    callbacks[:] = [names, *trackers, PlainNames(names), *others, SampleTranscripts(trackers, validation)]


class PartValues:
    """Learning rates and gradient norms of the trained parts, for the log.

    Args:
        args: with the learning rates, which one schedule multiplies by the same factor.
    """

    def __init__(self, args: SpeechLLMTrainingArguments):
        self.args = args
        self._parts: Sequence[str] = ()
        self._norms: dict[str, torch.Tensor] = {}  # of the latest logged step

    def use_parts(self, parts: Sequence[str]) -> None:
        """Sets the parts that the optimizer trains, in the order of its groups."""
        self._parts = parts

    def measure(self, state: TrainerState, model: torch.nn.Module, norm: Any) -> None:
        """Measures the gradient norms if the step in progress will be logged; all ranks must call this method.

        Args:
            state: of the trainer.
            model: with clipped gradients of the whole step.
            norm: gradient norm of the model before clipping.
        """
        step, args = state.global_step + 1, self.args
        logged = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if args.logging_strategy == IntervalStrategy.STEPS and logged:
            self._norms = part_gradient_norms(model, norm, args.max_grad_norm)

    def values(self, first_rate: float) -> dict[str, float]:
        """Returns `PART_learning_rate`, and `PART_grad_norm` of the last measured step.

        Args:
            first_rate: current learning rate of the first group.
        """
        values = {f"{part}_learning_rate": rate for part, rate in self._rates(first_rate)}
        return values | {f"{part}_grad_norm": round(float(norm), 4) for part, norm in self._norms.items()}

    def _rates(self, first_rate: float) -> Iterator[tuple[str, float]]:
        base = learning_rate(self.args, self._parts[0]) if self._parts else 0.0
        if base:
            for part in self._parts:
                yield part, first_rate / base * learning_rate(self.args, part)


def part_gradient_norms(model: torch.nn.Module, norm: Any, max_norm: float) -> dict[str, torch.Tensor]:
    """Returns the gradient norms of the trained parts before clipping; all ranks must call this function.

    Args:
        model: with clipped gradients of the whole step.
        norm: gradient norm of the model before clipping.
        max_norm: limit of the clipping.
    """
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(part_of(name), []).append(parameter.grad)
    factor = torch.clamp((_whole(torch.as_tensor(norm)) + 1e-6) / max_norm, min=1.0)  # the clipping divided by it
    return {part: _whole(get_total_norm(tensors)) * factor for part, tensors in gradients.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
