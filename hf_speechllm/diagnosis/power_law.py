"""Extrapolation of a learning curve: error = a + b * n^-c of the amount of data n, with uncertainty.

Three points do not determine three parameters, and the points are noisy. So all curves of a grid are weighted by their
likelihood, and the prediction is the weighted distribution of these curves. Learning curves of this form:
Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically", arXiv 1712.00409.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = (0.05, 2.0)  # range of c; every ratio of exponents has the same prior probability
GRID = 32  # values of each parameter
SIGMAS = 4.0  # range of the error at the largest amount
TRAINING_NOISE = 0.03  # assumed standard deviation between runs with other seeds, as share of the error


@dataclass(frozen=True)
class PowerLaw:
    """A weighted set of curves.

    Args:
        asymptotes: errors with unlimited data, a; shape = (curves,).
        gains: errors at the largest amount, minus a; shape = (curves,).
        exponents: c; shape = (curves,).
        weights: shape = (curves,); the sum is 1.
        largest: largest measured amount of data.
    """

    asymptotes: np.ndarray
    gains: np.ndarray
    exponents: np.ndarray
    weights: np.ndarray
    largest: float

    def predict(self, amount: float, probability: float = 0.9) -> tuple[float, float, float]:
        """Returns lower bound, median and upper bound of the error at an amount of data.

        Args:
            amount: in the unit of the fit.
            probability: of the interval.
        """
        errors = self.asymptotes + self.gains * (amount / self.largest) ** -self.exponents
        order = np.argsort(errors)
        cumulative = np.cumsum(self.weights[order])
        places = np.searchsorted(cumulative, [(1 - probability) / 2, 0.5, (1 + probability) / 2])
        low, median, high = errors[order][np.minimum(places, len(errors) - 1)]
        return float(low), float(median), float(high)


def fit_power_law(amounts: Sequence[float], errors: Sequence[float], covariance: np.ndarray) -> PowerLaw:
    """Weights the curves of a grid by measured errors.

    The prior is uniform in the error at the largest amount, in the share of the asymptote in this error, and in the
    logarithm of the exponent. `TRAINING_NOISE` is added to the covariance.

    Args:
        amounts: of data, ascending; shape = (points,).
        errors: shape = (points,).
        covariance: of the errors, from the choice of validation utterances; shape = (points, points).
    """
    x, y = np.asarray(amounts, dtype=float), np.asarray(errors, dtype=float)
    noise = np.asarray(covariance, dtype=float) + np.diag((TRAINING_NOISE * y) ** 2 + 1e-10)
    width = SIGMAS * float(np.sqrt(noise[-1, -1]))
    at_largest, shares, logarithms = np.meshgrid(
        np.linspace(max(y[-1] - width, 0.0), y[-1] + width, GRID),
        (np.arange(GRID) + 0.5) / GRID,
        np.linspace(np.log(EXPONENTS[0]), np.log(EXPONENTS[1]), GRID),
        indexing="ij",
    )
    last, exponents = at_largest.ravel(), np.exp(logarithms).ravel()
    asymptotes = last * shares.ravel()
    gains = last - asymptotes
    residuals = asymptotes + gains * (x[:, None] / x[-1]) ** -exponents - y[:, None]
    distances = np.einsum("pc,pc->c", residuals, np.linalg.solve(noise, residuals))
    weights = np.exp(-0.5 * (distances - distances.min()))
    return PowerLaw(asymptotes, gains, exponents, weights / weights.sum(), float(x[-1]))


def bootstrap_rates(
    errors: np.ndarray, tokens: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns error rates of resampled validation utterances; all systems have the same utterances.

    Args:
        errors: shape = (systems, utterances).
        tokens: of the references, shape = (utterances,).
        resamples: number of resamples.
        seed: of the resamples.

    Returns:
        Rates, shape = (resamples, systems), and their covariance, shape = (systems, systems).
    """
    counts = np.random.default_rng(seed).multinomial(
        len(tokens), np.full(len(tokens), 1 / len(tokens)), size=resamples
    )
    rates = (counts @ errors.T) / np.maximum(counts @ tokens, 1)[:, None]
    return rates, np.atleast_2d(np.cov(rates, rowvar=False))
