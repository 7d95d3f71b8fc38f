"""Confidence intervals of error rates and a paired test of two systems, over utterances.

Both methods assume independent utterances. Utterances of one speaker or dialogue are correlated: with few speakers,
the true intervals are wider.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CHUNK = 2_000_000  # random numbers per call, 16 MB
CONFIDENCE = (2.5, 97.5)  # percentiles


class Comparison(NamedTuple):
    """Comparison of two systems on the same utterances; a negative difference means that the first is better.

    Args:
        difference: error rate of the first system minus error rate of the second system, a fraction.
        low, high: ends of the 95 % interval of the difference.
        p_value: two-sided p-value of the paired test.
        better, worse: number of utterances in which the first system has fewer or more errors than the second.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0 and the test rejects equality at 5 %."""
        return self.p_value < 0.05 and not self.low <= 0 <= self.high


def resampled_sums(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Returns the column sums of bootstrap samples: each sample draws as many rows as `values` has, with replacement.

    The counts of different rows are multinomial. Drawing counts is much faster than drawing indices.

    Args:
        values: shape = (rows, columns).
        num_resamples: number of samples.
        seed: seed of the random generator.

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
    """Computes the 95 % interval of an error rate: percentiles of the rates of bootstrap samples of the utterances.

    Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP.

    Args:
        errors: number of errors of each utterance, at least one utterance.
        tokens: number of tokens of each reference.
        num_resamples: number of bootstrap samples.
        seed: the same seed returns the same interval.
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

    The interval is a paired bootstrap: both rates use the same samples (Bisani and Ney 2004). The test is the
    matched-pairs test of Gillick and Cox 1989 ("Some statistical issues in the comparison of speech recognition
    algorithms", ICASSP) with utterances as segments. The null distribution comes from random signs of the differences
    (Noreen 1989, "Computer-intensive methods for testing hypotheses"), because small sets are not normal.

    Args:
        errors: number of errors of the first system, for each utterance.
        other_errors: number of errors of the second system, for each utterance.
        tokens: number of tokens of each reference.
        num_resamples: number of bootstrap samples and of random signs; p-values are at least 1 / (num_resamples + 1).
        seed: the same seed returns the same result.
    """
    differences = np.subtract(errors, other_errors)
    total = max(int(np.sum(tokens)), 1)
    sums = resampled_sums(np.column_stack([differences, tokens]), num_resamples, seed)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), CONFIDENCE)

    # The number of differences of one size that keep their sign is binomial.
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
