"""Measures a configuration with the real trainer: a few training steps, validation, a checkpoint, features, memory."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..audio.downloads import UrlPolicy
from ..console import show_log
from ..data.collator import SpeechLLMCollator
from ..data.dataset import row_seconds
from ..data.sampler import ROW_COST
from ..hub.publishing import CURVE_FILE
from ..training.arguments import SpeechLLMTrainingArguments
from ..training.assembly import RunData, load_data, load_model
from ..training.batch_budget import USED_SHARE
from ..training.cache_stage import choose_cache_level
from ..training.callbacks import draw_curve
from ..training.checkpointing.position import Position
from ..training.dataloaders import batch_loader, train_sampler
from ..training.options import FinetuningOptions
from ..training.run import save_final
from ..training.speed import attention_context
from ..training.trainer import SpeechLLMTrainer
from ..training.unreadable_rows import SkipUnreadableCollator
from ..training.validation import spread_rows
from .isolation import Clock, PeakMemory, available_memory, describe_device
from .sampling import (
    FIRST_BATCHES,
    ChosenBatches,
    Sample,
    batch_cost,
    prepare_sample,
    representative_batches,
    with_features,
)
from .schedule import Schedule
from .validation_time import BatchSample

MEASURED_STEPS = 16  # at most
SAVES = 2  # the first checkpoint is also verified
BYTES_PER_PARAMETER = 4  # float32 master weights
Parse = Callable[[Sequence[str], Mapping[str, Any]], FinetuningOptions]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Size, time and memory of a run with one configuration on this machine.

    Args:
        batch_seconds: padded audio seconds per batch and device.
        gradient_accumulation_steps: batches per optimizer step.
        steps_per_epoch, steps: optimizer steps.
        epochs: of the run.
        evaluations, checkpoints: number of evaluations (with the one before the first step) and checkpoints.
        seconds: expected time of each stage of the run, in seconds: `start`, `features`, `training`, `validation`,
            `checkpoints`, `end`.
        step_seconds: of an optimizer step, in seconds.
        validation_seconds: of an evaluation after the first one, in seconds.
        memory_bytes: peak memory of the GPU, otherwise resident memory of the process.
        available_memory_bytes: of the GPU, otherwise of the machine.
        cpu_seconds: expected CPU time of the run; other work on the machine changes its time, but not this.
        fits: whether the peak memory leaves a reserve.
        device: name.
        measured_steps: number of steps that were timed.
    """

    batch_seconds: float
    gradient_accumulation_steps: int
    steps_per_epoch: int
    steps: int
    epochs: float
    evaluations: int
    checkpoints: int
    seconds: dict[str, float]
    step_seconds: float
    validation_seconds: float
    memory_bytes: int
    available_memory_bytes: int
    cpu_seconds: float
    fits: bool
    device: str
    measured_steps: int

    @property
    def total_seconds(self) -> float:
        """Expected time of the run, in seconds."""
        return sum(self.seconds.values())


def measure(
    parse: Parse, argv: Sequence[str], planned: Mapping[str, Any], processes: int, seconds: float, folder: str | None
) -> Measurement:
    """Measures a configuration; call this function by `run_isolated`.

    Args:
        parse: returns the options of a command line, given options that it overrides.
        argv: command line.
        planned: options that the command line overrides.
        processes: number of processes of the run; this process measures one.
        seconds: time for training steps.
        folder: place for the temporary checkpoints; default: of the system.

    Raises:
        torch.OutOfMemoryError: if the smallest batch does not fit into memory.
        BadDataError, ImportError, OSError, ValueError: if data or options are not usable.
    """
    options = parse(argv, planned)
    set_seed(options.training.seed)
    silence()
    with tempfile.TemporaryDirectory(prefix="plan-", dir=folder, ignore_cleanup_errors=True) as temporary:
        return _Probe(options, processes, temporary).run(seconds)


class _Probe:
    def __init__(self, options: FinetuningOptions, processes: int, folder: str):
        self.options, self.args, self.processes, self.folder = options, options.training, processes, folder
        url = options.data
        UrlPolicy.change(url.url_max_megabytes, url.url_timeout_seconds, url.allow_private_redirects)
        self.data: RunData = load_data(options, feature_cache="off")
        self.audio = row_seconds(self.data.train_rows)
        self.model = load_model(options, self.data)
        self.longest_answer = self.args.eval_max_new_tokens
        self.not_of_the_run = 0.0  # seconds that only the probe needs

    def run(self, seconds: float) -> Measurement:
        """Measures steps, caches, validation and checkpoints of the run.

        Args:
            seconds: limit of the measured steps; other measurements take additional time.
        """
        args, data = self.args, self.data
        schedule = Schedule.of(args, bool(data.validation_rows))  # before options change
        if not args.per_device_train_batch_seconds:
            compiled, args.compile_layers, args.output_dir = args.compile_layers, False, self.folder
            self._trainer(data.for_trainer()).get_train_dataloader()  # measures the budget, see `find_batch_seconds`
            args.compile_layers = compiled
        if choose_cache_level(self.options.data, self.options.parts, args) != "fbank":
            data.collator.row_cost = ROW_COST  # the encoder does not compute in training
        sampler = train_sampler(args, data.train_rows, data.collator, data.weights, self.processes)
        steps_per_epoch, steps = schedule.steps(len(sampler))
        batches = sampler.batches(0)

        with _Timer() as preparing:
            number = (FIRST_BATCHES + MEASURED_STEPS + SAVES) * args.gradient_accumulation_steps
            chosen = representative_batches(self.audio, batches, number)
            sample = prepare_sample(data.train_rows, chosen, data, self.options, self.model, self.folder)
            sets = [self._validation_samples(rows) for rows in data.validation_rows.values()]
        self.not_of_the_run = preparing.seconds

        saves = schedule.checkpoints(steps)
        quieten(args, self.folder, len(sample.batches) // args.gradient_accumulation_steps)
        clock = _StepClock(self, seconds, sample, min(saves, SAVES))
        given = {**data.for_trainer(), "train_dataset": sample.rows, "train_weights": None, "eval_dataset": None}
        with PeakMemory(args.device) as memory:
            trainer = self._trainer(given, batches=sample.batches)
            trainer.add_callback(clock)  # the last one: the times include the other callbacks
            result = trainer.train()
            scoring = [self._time_scoring(trainer, samples) for samples in sets]
        with _Timer() as drawing:
            draw_curve(trainer.state.log_history, Path(self.folder) / CURVE_FILE)
        args.eval_cer = False  # no scores to log
        with _Timer() as end, contextlib.redirect_stdout(io.StringIO()):  # metrics
            save_final(trainer, result)

        mean_cost = float(np.mean([batch_cost(self.audio, batch, data.collator.row_cost) for batch in batches]))
        per_batch = max(clock.rate * mean_cost, self._time_loading(trainer))
        step_seconds = per_batch * args.gradient_accumulation_steps
        audio = [float(row_seconds(rows).sum()) for rows in (data.train_rows, *data.validation_rows.values())]
        features = sample.features.total(*audio) if sample.features else 0.0
        if sample.encoding:
            features += sample.encoding.total(audio[0]) / self.processes
        evaluations = schedule.evaluations(steps)
        first = sum(extra for extra, _ in scoring)
        validation_seconds = sum(later for _, later in scoring) / self.processes + drawing.seconds
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        peak = memory.peak + (BYTES_PER_PARAMETER * trained if self.processes > 1 else 0)  # buckets of DDP
        available = available_memory(args.device)
        stages = {
            "start": clock.start,
            "features": features,
            "training": steps * step_seconds,
            "validation": first + evaluations * validation_seconds,
            "checkpoints": clock.saves[0] + (saves - 1) * clock.saves[-1] if saves else 0.0,
            "end": drawing.seconds + end.seconds,
        }
        in_steps = stages["training"] + stages["validation"] + stages["checkpoints"]
        overall = sum(os.times()[:4]) / Clock.seconds()  # CPU time of this process and of its children
        return Measurement(
            batch_seconds=args.per_device_train_batch_seconds,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            steps_per_epoch=steps_per_epoch,
            steps=steps,
            epochs=round(steps / steps_per_epoch, 2),
            evaluations=evaluations,
            checkpoints=saves,
            seconds=stages,
            step_seconds=step_seconds,
            validation_seconds=validation_seconds,
            memory_bytes=peak,
            available_memory_bytes=available,
            cpu_seconds=clock.cpu_share * in_steps + overall * (sum(stages.values()) - in_steps),
            fits=not memory.failures and peak <= USED_SHARE * available,
            device=describe_device(args.device),
            measured_steps=clock.measured,
        )

    def _trainer(self, given: dict[str, Any], **probe: Any) -> SpeechLLMTrainer:
        kind: Any = ProbeTrainer if probe else SpeechLLMTrainer
        trainer = kind(model=self.model, args=self.args, **given, **probe)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _validation_samples(self, rows: Any) -> list[BatchSample]:
        """Returns batches of a set for its loss and, with `--eval_cer`, of the rows that are decoded."""
        parts = [rows]
        if self.args.eval_cer:
            parts.append(rows.select(spread_rows(len(rows), self.args.eval_cer_samples)))
        add = functools.partial(with_features, data=self.data, options=self.options)
        return [BatchSample.of(part, self.args, self.data.collator, add) for part in parts]

    def _time_loading(self, trainer: SpeechLLMTrainer) -> float:
        """Returns the seconds in which loader processes build a batch: during the timed steps, they are ahead."""
        workers = self.args.dataloader_num_workers
        if workers == 0:
            return 0.0  # the steps contain this time
        batches = iter(trainer.get_train_dataloader())
        next(batches)  # the processes have started, and each has built about one batch
        with _Timer() as loading:
            number = 1 + sum(1 for _ in batches)
        return loading.seconds / max(number - workers, 1)

    def _time_scoring(self, trainer: SpeechLLMTrainer, samples: Sequence[BatchSample]) -> tuple[float, float]:
        """Returns what the first evaluation of a set takes longer, and the time of a later one, in seconds."""
        validator = trainer.validator
        with attention_context(self.args):
            times = [
                samples[0].measure(
                    lambda rows: validator.losses(trainer.model_wrapped, validator.loader(rows), "eval")
                )
            ]
            for sample in samples[1:]:
                # A batch ends with its longest answer. A trained model's answers are as long as the transcripts; those
                # of an untrained one may have no end.
                longest = [min(self.longest_answer, longest_answer(rows, validator.collator)) for rows in sample.parts]
                self.args.eval_max_new_tokens = round(float(np.mean(longest)))
                times.append(sample.measure(lambda rows: validator.decode(trainer.model_wrapped, rows)))
        first, later = (sum(column) for column in zip(*times, strict=True))
        return first, later


def longest_answer(rows: Any, collator: SpeechLLMCollator) -> int:
    """Returns the number of tokens of the longest answer in the rows."""
    return int((collator([rows[index] for index in range(len(rows))])["labels"] >= 0).sum(-1).max())


class _Timer:
    """Measures the seconds of a block."""

    def __enter__(self) -> _Timer:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._started


class ProbeTrainer(SpeechLLMTrainer):
    """A trainer of given batches.

    Args:
        batches: row indices of each batch, in order.
        **kwargs: of the parent class.
    """

    def __init__(self, *, batches: Sequence[np.ndarray], **kwargs: Any):
        super().__init__(**kwargs)
        self.batches = batches

    def get_train_dataloader(self) -> DataLoader:
        """Returns the given batches."""
        rows, collator = self.train_dataset, self.data_collator
        sampler = ChosenBatches(row_seconds(rows), self.batches, self.args.seed)
        if self.reads_recordings:
            collator = SkipUnreadableCollator(collator)
        self.train_loader = batch_loader(self.args, rows, sampler, collator)
        self.position = Position(sampler, self.args)
        return self.train_loader


class _StepClock(TrainerCallback):
    """Times the steps after the first ones, and the checkpoints after these steps; ends training.

    Args:
        probe: receives the times.
        limit: seconds for steps.
        sample: of training rows.
        saves: number of checkpoints to time.

    Attributes:
        start: seconds from the start of the process to the first step, and what the first steps took longer.
        rate: seconds per cost, see `batch_cost`.
        cpu_share: CPU seconds of this process per second of the timed steps.
        saves: seconds of each checkpoint.
        measured: number of timed steps.
    """

    def __init__(self, probe: _Probe, limit: float, sample: Sample, saves: int):
        self.probe, self.limit, self.wanted = probe, limit, saves
        accumulation, audio = probe.args.gradient_accumulation_steps, row_seconds(sample.rows)
        row_cost = probe.data.collator.row_cost
        costs = np.array([batch_cost(audio, batch, row_cost) for batch in sample.batches])
        self.costs = costs[: len(costs) // accumulation * accumulation].reshape(-1, accumulation).sum(1)
        self.start = self.rate = self.cpu_share = 0.0
        self.saves: list[float] = []
        self.measured = 0
        self._first = self._mark = 0.0  # start of the first step; end of the first steps
        self._cpu = self._save_started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Notes the start of the first step."""
        if state.global_step == 0:
            self._first = time.perf_counter()
            self.start = Clock.seconds() - self.probe.not_of_the_run

    def on_step_end(self, args, state, control, **kwargs):
        """Measures, then saves checkpoints, then ends training."""
        step = state.global_step
        if step == FIRST_BATCHES:
            self._mark, self._cpu = self._now(), time.process_time()
        last = len(self.costs) - self.wanted
        if not self.measured and step > FIRST_BATCHES:
            if time.perf_counter() - self._mark < self.limit and step < last:
                return
            self.measured = step - FIRST_BATCHES
            elapsed = self._now() - self._mark
            self.cpu_share = (time.process_time() - self._cpu) / elapsed
            self.rate = elapsed / float(self.costs[FIRST_BATCHES:step].sum())
            usual = self.rate * float(self.costs[:FIRST_BATCHES].sum())
            self.start += max(0.0, self._mark - self._first - usual)
        if self.measured:
            control.should_save = len(self.saves) < self.wanted
            control.should_training_stop = len(self.saves) + control.should_save == self.wanted
            self._save_started = self._now()

    def on_save(self, args, state, control, **kwargs):
        """Notes the time of a checkpoint."""
        self.saves.append(time.perf_counter() - self._save_started)

    def _now(self) -> float:
        if self.probe.args.device.type == "cuda":
            torch.cuda.synchronize(self.probe.args.device)
        return time.perf_counter()


def silence() -> None:
    """Hides log lines and progress bars of a run."""
    show_log(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def quieten(args: SpeechLLMTrainingArguments, folder: str, steps: int) -> None:
    """Changes the options of a run for some steps without validation, checkpoints and logs.

    Args:
        args: of the run, changed in place.
        folder: output folder.
        steps: number of optimizer steps.
    """
    changes = {
        "output_dir": os.path.join(folder, "run"), "max_steps": steps, "num_train_epochs": 1.0,
        "eval_strategy": IntervalStrategy.NO, "save_strategy": SaveStrategy.NO,
        "logging_strategy": IntervalStrategy.NO, "eval_on_start": False, "load_best_model_at_end": False,
        "early_stopping_patience": None, "retention_file": None, "keep_best_checkpoints": None, "average_best": False,
        "save_total_limit": None, "push_to_hub": False, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    for name, value in changes.items():
        setattr(args, name, value)
