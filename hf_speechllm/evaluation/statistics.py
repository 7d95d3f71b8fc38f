"""How sure an error rate, or a difference of two, is: bootstrap intervals and a paired test, over utterances.

Utterances are drawn as if they were independent. Those of one speaker or dialogue are not quite: where there are few
speakers, the true intervals are wider.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CHUNK = 2_000_000  # numbers drawn at once, 16 MB
CONFIDENCE = (2.5, 97.5)  # percentiles


class Comparison(NamedTuple):
    """Two systems on the same utterances; a negative difference says that the first is better.

    Args:
        difference: rate of the first system less that of the second, a fraction.
        low, high: ends of its 95 % interval.
        p_value: of the paired test, two-sided.
        better, worse: utterances in which the first system has fewer, more errors than the second.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int

    @property
    def significant(self) -> bool:
        """Whether both the interval and the test say, at 5 %, that there is a difference."""
        return self.p_value < 0.05 and not self.low <= 0 <= self.high


def resampled_sums(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Column sums of bootstrap samples: as many rows as there are, drawn with replacement.

    How often each row is drawn is multinomial, and equal rows are one: many times quicker than drawing indices.

    Args:
        values: shape = (rows, columns).
        num_resamples: samples.
        seed: of the generator.

    Returns:
        Sums, float64, shape = (num_resamples, columns).
    """
    rows, counts = np.unique(values, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(rows))
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    shares = counts / counts.sum()
    rows = rows.astype(np.float64)
    return np.concatenate([generator.multinomial(counts.sum(), shares, size=size) @ rows for size in sizes])


def rate_interval(
    errors: Sequence[int], tokens: Sequence[int], num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of an error rate: percentiles of the rates of bootstrap samples of the utterances.

    Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP.

    Args:
        errors: of each utterance, at least one.
        tokens: of each reference.
        num_resamples: bootstrap samples.
        seed: the same one gives the same interval.
    """
    sums = resampled_sums(np.column_stack([errors, tokens]), num_resamples, seed)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), CONFIDENCE)
    return float(low), float(high)


def compare_systems(
    errors: Sequence[int],
    other_errors: Sequence[int],
    tokens: Sequence[int],
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares two systems on the same utterances.

    The interval is the paired bootstrap's: both rates on the same samples (Bisani and Ney 2004). The test is the
    matched-pairs test of Gillick and Cox 1989 ("Some statistical issues in the comparison of speech recognition
    algorithms", ICASSP) with utterances as the segments. Its null distribution is not taken as normal, which small
    sets are too small for, but made by random signs of the differences (Noreen 1989, "Computer-intensive methods for
    testing hypotheses").

    Args:
        errors: of the first system, for each utterance.
        other_errors: of the second system.
        tokens: of each reference.
        num_resamples: bootstrap samples, and random choices of signs; the smallest p-value is 1 / (this + 1).
        seed: the same one gives the same result.
    """
    differences = np.subtract(errors, other_errors)
    total = max(int(np.sum(tokens)), 1)
    sums = resampled_sums(np.column_stack([differences, tokens]), num_resamples, seed)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), CONFIDENCE)

    # Of n differences of one size, those that keep their sign under a random choice are binomial.
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    generator = np.random.default_rng(seed)
    kept = generator.binomial(counts, 0.5, size=(num_resamples, len(counts)))
    by_chance = np.abs((2 * kept - counts) @ sizes)
    as_large = np.count_nonzero(by_chance >= abs(differences.sum()))
    return Comparison(
        difference=float(differences.sum() / total),
        low=float(low),
        high=float(high),
        p_value=float((as_large + 1) / (num_resamples + 1)),
        better=int(np.count_nonzero(differences < 0)),
        worse=int(np.count_nonzero(differences > 0)),
    )
