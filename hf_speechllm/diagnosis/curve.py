"""The learning curve of a run: short trainings on parts of the data, and what more data would give."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..data.dataset import row_seconds
from ..evaluation.scoring import count_errors
from ..training.assembly import encode_rows, load_data, load_model
from ..training.speed import attention_context
from ..training.trainer import SpeechLLMTrainer
from ..training.validation import spread_rows
from .isolation import run_isolated
from .plan import Plan
from .power_law import bootstrap_rates, fit_power_law
from .probe import Parse, quieten, silence
from .sampling import with_features

SHARES = (1 / 8, 1 / 4, 1 / 2)
MIN_ROWS = 80  # ten in the smallest part
FACTORS = (1, 2, 4)
EVALUATIONS = 4  # per part; the best one counts, because a small part overfits in as many steps
ROWS = 500  # decoded rows of each validation set
PROBABILITY = 0.9
BAR = 40  # characters


@dataclass
class Point:
    """An error rate of the validation sets.

    Args:
        hours: of training audio.
        rate: as a fraction.
        low, high: interval.
        epochs: of the training; 0 for an extrapolated point.
    """

    hours: float
    rate: float
    low: float
    high: float
    epochs: float = 0.0


@dataclass
class Curve:
    """A learning curve.

    Args:
        base_rate: error rate of the model before training, as a fraction.
        steps: of each training.
        planned_steps: of the run.
        measured, expected: points.
    """

    base_rate: float
    steps: int
    planned_steps: int
    measured: list[Point]
    expected: list[Point]


def learning_curve(parse: Parse, argv: Sequence[str], plan: Plan, minutes: float, folder: str | None = None) -> Curve:
    """Trains on parts of the data, and extrapolates the error rate of the validation sets.

    All trainings have as many steps, at most those of the plan.

    Args:
        parse, argv: as for `make_plan`.
        plan: of the run.
        minutes: training time of each part.
        folder: place for temporary files.

    Raises:
        ProbeError: if a training fails.
        ValueError: if there is no validation set, or too little data.
    """
    chosen = plan.chosen
    measurement = chosen.measurement
    require_enough_data(plan.data)
    assert measurement is not None  # of the configuration to take
    steps = max(EVALUATIONS, min(measurement.steps, int(60 * minutes / measurement.step_seconds)))
    parts = [run_isolated(train_part, parse, argv, chosen.options, share, steps, folder)[0] for share in SHARES]
    hours = [part.hours for part in parts]
    errors, tokens = np.array([part.errors for part in parts]), parts[0].tokens
    rates, covariance = bootstrap_rates(errors, tokens)
    tail = 50 * (1 - PROBABILITY)
    low, high = np.percentile(rates, [tail, 100 - tail], axis=0)
    mean = errors.sum(1) / tokens.sum()
    law = fit_power_law(hours, mean.tolist(), covariance)
    measured = [Point(*values) for values in zip(hours, mean, low, high, [part.epochs for part in parts], strict=True)]
    expected = []
    for factor in FACTORS:
        below, median, above = law.predict(factor * plan.data["hours"], PROBABILITY)
        expected.append(Point(factor * plan.data["hours"], median, below, above))
    return Curve(parts[0].base_errors / float(tokens.sum()), steps, measurement.steps, measured, expected)


def require_enough_data(data: Mapping[str, float]) -> None:
    """Checks that a learning curve can be measured.

    Args:
        data: of a plan.

    Raises:
        ValueError: if there is no validation set, or too little data.
    """
    if not data["validation_rows"]:
        raise ValueError("--curve requires a validation set; add --validation_file")
    if data["rows"] < MIN_ROWS:
        raise ValueError(f"--curve requires at least {MIN_ROWS} training rows; the data have {data['rows']:.0f}")


@dataclass
class Part:
    """The result of a training on a part of the data.

    Args:
        hours: of training audio.
        epochs: of the part.
        errors: of each validation utterance, at the best evaluation; shape = (utterances,).
        tokens: of each reference, shape = (utterances,).
        base_errors: of the model before training.
    """

    hours: float
    epochs: float
    errors: np.ndarray
    tokens: np.ndarray
    base_errors: int


def train_part(
    parse: Parse, argv: Sequence[str], planned: Mapping[str, Any], share: float, steps: int, folder: str | None
) -> Part:
    """Trains on a part of the data; call this function by `run_isolated`.

    Args:
        parse, argv, planned, folder: as for `measure`.
        share: of the audio; smaller parts are contained in larger ones.
        steps: number of optimizer steps.
    """
    options = parse(argv, planned)
    args = options.training
    set_seed(args.seed)
    silence()
    data = load_data(options, feature_cache="off")
    model = load_model(options, data)
    order = np.random.default_rng(args.seed).permutation(len(data.train_rows))
    audio = np.cumsum(row_seconds(data.train_rows)[order])
    largest, number = (int(np.searchsorted(audio, part * audio[-1])) + 1 for part in (max(SHARES), share))
    # Features of the largest part, so that the other parts find them in the cache.
    rows = with_features(data.train_rows.select(order[:largest].tolist()), data, options)
    if options.data.feature_cache != "off":
        rows = encode_rows(rows, model, data.processor, options)
    rows = rows.select(range(min(number, len(rows))))
    weights = None if data.weights is None else data.weights[order[: len(rows)]]
    samples = {
        name: with_features(part.select(spread_rows(len(part), args.eval_cer_samples or ROWS).tolist()), data, options)
        for name, part in data.validation_rows.items()
    }
    warm_up = args.warmup_steps if args.warmup_steps < 1 else 0.1
    with tempfile.TemporaryDirectory(prefix="curve-", dir=folder, ignore_cleanup_errors=True) as temporary:
        quieten(args, temporary, steps)
        args.warmup_steps = warm_up
        scores = _Scores(samples, steps)
        given = {**data.for_trainer(), "train_dataset": rows, "train_weights": weights, "eval_dataset": None}
        trainer = SpeechLLMTrainer(model=model, args=args, callbacks=[scores], **given)
        trainer.remove_callback(PrinterCallback)
        scores.trainer = trainer
        trainer.train()
        epochs = float(trainer.state.epoch or 0)
    errors, tokens = min(scores.results[1:], key=lambda result: result[0].sum())
    base = int(scores.results[0][0].sum())
    return Part(float(row_seconds(rows).sum()) / 3600, epochs, errors, tokens, base)


class _Scores(TrainerCallback):
    """Decodes the validation sets before training and at equal distances.

    Args:
        sets: rows by name.
        steps: of the run.

    Attributes:
        trainer: must be set before training.
        results: errors and reference tokens of each utterance, for each evaluation.
    """

    def __init__(self, sets: Mapping[str, Any], steps: int):
        self.sets = sets
        self.steps = {math.ceil(steps * number / EVALUATIONS) for number in range(1, EVALUATIONS + 1)}
        self.trainer: SpeechLLMTrainer | None = None
        self.results: list[tuple[np.ndarray, np.ndarray]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Decodes with the model before training."""
        self._decode()

    def on_step_end(self, args, state, control, **kwargs):
        """Decodes at some steps."""
        if state.global_step in self.steps:
            self._decode()

    def _decode(self) -> None:
        assert self.trainer is not None
        errors, tokens = [], []
        for rows in self.sets.values():
            with attention_context(self.trainer.args):
                _, samples = self.trainer.validator.decode(self.trainer.model_wrapped, rows, len(rows))
            counts = {item.position: count_errors(item.reference, item.hypothesis) for item in samples}
            for place in range(len(rows)):  # a row that cannot be read has no tokens
                errors.append(counts[place].errors if place in counts else 0)
                tokens.append(counts[place].reference_tokens if place in counts else 0)
        self.results.append((np.array(errors), np.array(tokens)))


def format_curve(curve: Curve) -> str:
    """Returns a curve as a table with bars."""
    points = [("measured", point) for point in curve.measured] + [("expected", point) for point in curve.expected]
    highest = max(point.high for _, point in points) or 1.0
    lines = [f"learning curve: CER of the validation sets; before training {100 * curve.base_rate:.2f} %"]
    for kind, point in points:
        low, high = (round(BAR * value / highest) for value in (point.low, point.high))
        bar = "#" * low + "-" * (high - low)
        lines.append(
            f"{point.hours:10.2f} h  {kind}  {100 * point.rate:6.2f} %  "
            f"({100 * point.low:.2f} to {100 * point.high:.2f})  {bar}"
        )
    lines.append(
        f"{100 * PROBABILITY:.0f} % intervals. Measured: other utterances. Expected: also other curves through three "
        "points, and noise of training."
    )
    lines.append(f"each training: {curve.steps:,} steps; the plan has {curve.planned_steps:,}")
    if curve.steps < curve.planned_steps:
        lines.append("longer trainings give lower rates, and show the effect of data better: raise --curve_minutes")
    if (fewest := min(point.epochs for point in curve.measured)) < 1:
        lines.append(f"the largest part was not read completely ({fewest:.2f} epochs): raise --curve_minutes")
    return "\n".join(lines)
