"""Progress of a run on the console: a bar, a line per log entry, and a line per validation set."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..console import format_seconds
from ..evaluation.validation_metrics import metric_prefix, set_names
from .checkpointing.selection import AVERAGED

LOADING_SHARE = 0.2  # share of the time waiting for data above which the line reports it
RECENT_LINES = 10  # whose speed decides the remaining time: the first steps of a run are slower


class TrainingLines(TrainerCallback):
    """Shows the progress of training; replaces transformers' callbacks, which print dicts.

    Args:
        rate_names: name of the error rate of each validation set, see `Validator.rate_names`.
    """

    def __init__(self, rate_names: Mapping[str, str]):
        self.rate_names = rate_names
        self.bar: tqdm | None = None
        self._lines_at: deque[tuple[float, int]] = deque(maxlen=RECENT_LINES)  # training seconds, step
        self._first_step = 0
        self._interrupted_seconds = 0.0  # by validation and saving
        self._last_end = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar; without a terminal, the lines of the log suffice."""
        if state.is_world_process_zero:
            options = {"desc": "training", "total": state.max_steps, "initial": state.global_step, "unit": "step"}
            self.bar = tqdm(**options, dynamic_ncols=True, disable=True if args.disable_tqdm else None)
        self._lines_at.clear()
        self._interrupted_seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock after the validation that precedes the first step."""
        if not self._lines_at:
            self._lines_at.append((time.perf_counter(), state.global_step))
            self._first_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar."""
        self._last_end = time.perf_counter()
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args, state, control, **kwargs):
        """Measures the time since the end of the step, in which no step is trained."""
        if self._lines_at:
            now = time.perf_counter()
            self._interrupted_seconds += now - self._last_end
            self._last_end = now

    on_save = on_evaluate

    def on_log(self, args, state, control, **kwargs):
        """Prints the last entry of the log."""
        if not state.is_world_process_zero or not state.log_history:
            return
        entry = state.log_history[-1]  # the values for callbacks have the names of trackers
        for line in self._lines(entry, state):
            tqdm.write(line if sys.stdout.isatty() else f"{time.strftime('%H:%M:%S')} {line}")

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _lines(self, entry: Mapping[str, Any], state) -> Sequence[str]:
        where = f"step {entry['step']}/{state.max_steps}"
        if "loss" in entry and "learning_rate" in entry:
            return [f"{where}  {training_line(entry)}{self._eta(state)}"]
        if "train_runtime" in entry:
            return []
        prefix = next((name.removesuffix("_loss") for name in entry if name.endswith("_loss")), "")
        kind = prefix.partition("_")[0]
        if kind not in ("eval", AVERAGED):
            values = (f"{name} {value}" for name, value in entry.items() if name not in ("step", "epoch"))
            return [f"{where}  {'  '.join(values)}"]
        history = [item for item in state.log_history if item["step"] == 0]
        return [f"{where}  {line}" for line in validation_lines(entry, self.rate_names, history, kind)]

    def _eta(self, state) -> str:
        if not self._lines_at:
            return ""
        now = time.perf_counter() - self._interrupted_seconds
        before, step = self._lines_at[0]
        self._lines_at.append((now, state.global_step))
        if state.global_step == step:
            return ""
        per_step = (now - before) / (state.global_step - step)
        per_step += self._interrupted_seconds / (state.global_step - self._first_step)
        return f"  ETA {format_seconds(per_step * (state.max_steps - state.global_step))}"


def training_line(entry: Mapping[str, Any]) -> str:
    """Returns loss, accuracy, learning rates and throughput of a log entry as text."""
    parts = [f"loss {entry['loss']:.3f}"]
    if "ctc_loss" in entry:
        parts.append(f"CTC loss {entry['ctc_loss']:.3f}")
    if "token_accuracy" in entry:
        parts.append(f"acc {100 * entry['token_accuracy']:.1f} %")
    parts.append(f"lr {learning_rates(entry)}")
    if "audio_seconds_per_second" in entry:
        parts.append(f"{entry['audio_seconds_per_second']:.0f} audio s/s")
    if entry.get("data_wait_share", 0.0) > LOADING_SHARE:
        parts.append(f"{100 * entry['data_wait_share']:.0f} % waiting for data")
    parts += [f"{entry[name]} {name.replace('_', ' ')}" for name in ("bad_rows", "bad_steps") if name in entry]
    return "  ".join(parts)


def learning_rates(entry: Mapping[str, Any]) -> str:
    """Returns the learning rates of the trained parts as text; one number if all are equal."""
    end = "_learning_rate"
    rates: dict[str, list[str]] = {}
    for name, value in entry.items():
        if name.endswith(end):
            part = name.removesuffix(end).removeprefix("audio_")
            rates.setdefault(f"{value:.1e}", []).append(part)
    if len(rates) > 1:
        return ", ".join(f"{'+'.join(parts)} {rate}" for rate, parts in rates.items())
    return f"{entry['learning_rate']:.1e}"


def validation_lines(
    entry: Mapping[str, Any], rate_names: Mapping[str, str], before: Sequence[Mapping[str, Any]] = (), prefix="eval"
) -> list[str]:
    """Returns a line per validation set.

    Args:
        entry: metrics of an evaluation.
        rate_names: name of the error rate of each set.
        before: log entries of the base model, for comparison.
        prefix: of the metric names.
    """
    lines = []
    for name in set_names(entry, prefix):
        key = metric_prefix(prefix, name)
        parts = [name or "validation", f"loss {entry[f'{key}_loss']:.3f}"]
        if f"{key}_token_accuracy" in entry:
            parts.append(f"acc {100 * entry[f'{key}_token_accuracy']:.1f} %")
        if (rate := entry.get(f"{key}_cer")) is not None:
            base_key = f"{metric_prefix('eval', name)}_cer"
            base = next((item[base_key] for item in before if base_key in item and item is not entry), None)
            parts.append(format_rate(rate, rate_names.get(name, "CER"), base if entry.get("step") else None))
        lines.append("  ".join(parts))
    return lines


def format_rate(rate: float, name: str, before: float | None = None) -> str:
    """Returns an error rate in percent, with its name and the rate of the base model.

    Args:
        rate: a fraction.
        name: CER, WER or MER.
        before: rate before training, a fraction.
    """
    text = f"{name} {100 * rate:.2f} %"
    return text if before is None else f"{text} (before: {100 * before:.2f} %)"


def replace_progress(callbacks: list[TrainerCallback], lines: TrainingLines) -> None:
    """Replaces transformers' callback for terminals in a list of callbacks; one for notebooks stays.

    Args:
        callbacks: of the trainer, changed in place.
        lines: replaces the callback.
    """
    for index, callback in enumerate(callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            callbacks[index] = lines
