"""Charts of the report: positions of marks and ticks, in percent of the plot. The template draws these as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .confidence import JudgedWord, bins_of, held_out_confidence, raw_confidence
from .scoring import ErrorCounts, ScoredUtterance
from .statistics import rate_interval

NUM_BINS = 8  # bins of the chart of durations, with equal numbers of utterances
NUM_DOTS = 2000  # dots without a link, at most, which limits the size of the page
MAX_TICKS = 7  # of an axis; more labels would touch on a phone
MIN_TOP, MAX_TOP = 10.0, 110.0  # percent; upper end of the axis of error rates
LOG_RATIO = 20  # a larger ratio of the longest to the shortest recording needs a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Args:
        low, high: values at the ends; `low < high`.
        log: whether the axis is logarithmic; both ends are then above 0.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Returns the distance of a value from the low end, in percent of the axis; values outside are at the ends."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(100 * min(max((value - low) / (high - low), 0), 1), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns places and labels of at most `MAX_TICKS` round values."""
        for leading in ((1, 2, 5), (1, 3), (1,)) if self.log else ():
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [digit * 10.0**power for power in decades for digit in leading]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) <= MAX_TICKS:
                break
        else:
            step = _round_up((self.high - self.low) / (MAX_TICKS - 1))
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            values = [step * number for number in range(first, last + 1)]
        return [(self.place(value), f"{value:g}") for value in values]


def _round_up(value: float) -> float:
    """Returns the next larger number with one of the leading digits 1, 2 and 5 and zeros."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value * (1 - 1e-9))


@dataclass(frozen=True)
class DurationChart:
    """Error rates against durations.

    Args:
        x_ticks, y_ticks: places and labels.
        dots: places (x, y) of utterances.
        linked: the same, and ID and link target, of the utterances that the page shows.
        steps: first x, last x, rate, low end and high end of the 95 % interval, of each bin.
        above: number of utterances whose rate is above the axis.
        missing: number of utterances without a hypothesis, which are left out.
        sampled: whether dots are left out.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[tuple[float, float]]
    linked: list[tuple[float, float, str, str]]
    steps: list[tuple[float, float, float, float, float]]
    above: int
    missing: int
    sampled: bool


def duration_chart(
    utterances: Iterable[ScoredUtterance],
    durations: Mapping[str, float],
    links: Mapping[str, str],
    missing: Iterable[str] = (),
) -> DurationChart | None:
    """Places utterances by duration and error rate, and the error rate of each eighth of the utterances.

    The axis ends above the intervals and above 98 % of the rates, so that few very wrong utterances do not flatten the
    others. Utterances without a hypothesis are left out: their rate is 100 % for every duration.

    Args:
        utterances: those without a duration are ignored.
        durations: seconds by ID.
        links: link targets by ID.
        missing: IDs without a hypothesis.

    Returns:
        `None` if no utterance has a duration and a hypothesis.
    """
    absent = set(missing)
    all_timed = [utterance for utterance in utterances if utterance.id in durations]
    timed = sorted((u for u in all_timed if u.id not in absent), key=lambda u: durations[u.id])
    if not timed:
        return None
    seconds = [durations[utterance.id] for utterance in timed]
    rates = np.array([100 * utterance.counts.rate for utterance in timed])
    bins = []
    for group in np.array_split(np.arange(len(timed)), min(NUM_BINS, len(timed))):
        counts = [timed[index].counts for index in group]
        interval = rate_interval([c.errors for c in counts], [c.reference_tokens for c in counts], 1000)
        rate = sum(counts, ErrorCounts()).rate
        bins.append((seconds[group[0]], seconds[group[-1]], 100 * rate, 100 * interval[0], 100 * interval[1]))
    top = max(MIN_TOP, min(1.15 * max(np.percentile(rates, 98), *(high for *_, high in bins)), MAX_TOP))
    margin = 0.02 * (seconds[-1] - seconds[0]) or 0.5 * seconds[0]
    log = seconds[-1] > LOG_RATIO * seconds[0]
    ends = (seconds[0] / 1.05, seconds[-1] * 1.05) if log else (max(0, seconds[0] - margin), seconds[-1] + margin)
    x, y = Axis(*ends, log), Axis(0, top)
    others = [index for index, utterance in enumerate(timed) if utterance.id not in links]
    chosen = sorted(np.random.default_rng(0).permutation(others)[:NUM_DOTS]) if len(others) > NUM_DOTS else others
    places = [(x.place(duration), y.place(rate)) for duration, rate in zip(seconds, rates, strict=True)]
    return DurationChart(
        x.ticks(),
        y.ticks(),
        [places[index] for index in chosen],
        [(*place, u.id, links[u.id]) for place, u in zip(places, timed, strict=True) if u.id in links],
        [
            (x.place(first), x.place(last), y.place(mid), y.place(low), y.place(high))
            for first, last, mid, low, high in bins
        ],
        int((rates > top).sum()),
        len(all_timed) - len(timed),
        len(chosen) < len(others),
    )


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Accuracy against confidence; places (x, y) of the bins by name of the confidence."""

    curves: dict[str, list[tuple[float, float]]]
    ticks: list[tuple[float, str]] = field(default_factory=Axis(0, 100).ticks)


def reliability_diagram(words: Sequence[JudgedWord]) -> ReliabilityDiagram:
    """Places the accuracy of words by confidence: without calibration, and calibrated on the other half."""
    pairs = {"without calibration": raw_confidence(words), "calibrated": held_out_confidence(words)}
    return ReliabilityDiagram(
        {name: [(100 * mean, 100 * rate) for mean, rate, _ in bins_of(found)] for name, found in pairs.items()}
    )
