"""Extrapolation of learning curves with known answers."""

import numpy as np
import pytest

from hf_speechllm.diagnosis.curve import Curve, Point, format_curve
from hf_speechllm.diagnosis.power_law import TRAINING_NOISE, bootstrap_rates, fit_power_law

AMOUNTS = (1.0, 2.0, 4.0)


def curve(amount, asymptote, gain, exponent):
    return asymptote + gain * np.asarray(amount) ** -exponent


@pytest.mark.parametrize(("asymptote", "gain", "exponent"), [(0.0, 0.3, 0.5), (0.05, 0.2, 0.3), (0.1, 0.4, 1.0)])
def test_interval_of_exact_points_contains_the_true_curve_and_widens_with_the_amount(asymptote, gain, exponent):
    law = fit_power_law(AMOUNTS, curve(AMOUNTS, asymptote, gain, exponent).tolist(), np.zeros((3, 3)))
    widths = []
    for amount in (8.0, 16.0, 32.0):
        low, median, high = law.predict(amount)
        true = float(curve(amount, asymptote, gain, exponent))
        assert low <= true <= high
        assert amount > 8 or abs(median - true) < 0.25 * true
        widths.append(high - low)
    assert widths == sorted(widths) and widths[0] > 0.01


def test_90_percent_intervals_contain_90_percent_of_true_values():
    rng = np.random.default_rng(0)
    hits, number = 0, 200
    for _ in range(number):
        last, exponent = rng.uniform(0.05, 0.4), np.exp(rng.uniform(np.log(0.05), np.log(2.0)))
        asymptote = last * rng.uniform(0, 1)
        gain = (last - asymptote) * 4.0**exponent
        true = curve(AMOUNTS, asymptote, gain, exponent)
        sampling = 0.02 * true  # of the validation set
        noisy = true + rng.normal(scale=np.hypot(sampling, TRAINING_NOISE * true))
        low, _, high = fit_power_law(AMOUNTS, noisy.tolist(), np.diag(sampling**2)).predict(8.0)
        hits += low <= curve(8.0, asymptote, gain, exponent) <= high
    assert 0.84 < hits / number < 0.96


def test_errors_that_do_not_fall_predict_no_gain():
    low, median, high = fit_power_law(AMOUNTS, [0.2, 0.21, 0.2], np.diag([1e-5] * 3)).predict(8.0)
    assert 0.19 < median < 0.21
    assert low > 0.15 and high < 0.22


def test_more_noise_widens_the_interval():
    def width(variance):
        low, _, high = fit_power_law(AMOUNTS, [0.3, 0.25, 0.2], np.eye(3) * variance).predict(16.0)
        return high - low

    assert width(1e-3) > 1.5 * width(1e-6)


def test_bootstrap_uses_the_same_utterances_for_all_systems():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 20, size=200)
    errors = rng.binomial(tokens, 0.1)
    rates, covariance = bootstrap_rates(np.stack([errors, errors]), tokens)
    assert np.array_equal(rates[:, 0], rates[:, 1])
    assert covariance[0, 1] == pytest.approx(covariance[0, 0])
    assert np.sqrt(covariance[0, 0]) == pytest.approx(np.sqrt(0.1 * 0.9 / tokens.sum()), rel=0.3)


def test_table_shows_measured_and_expected_points_and_incomplete_parts():
    measured = [Point(1.0, 0.3, 0.28, 0.32, 4.0), Point(2.0, 0.25, 0.23, 0.27, 0.5)]
    lines = format_curve(Curve(0.9, 100, 900, measured, [Point(8.0, 0.15, 0.1, 0.2)])).splitlines()
    assert lines[0].endswith("before training 90.00 %")
    assert "1.00 h  measured   30.00 %  (28.00 to 32.00)" in lines[1]
    assert "8.00 h  expected   15.00 %  (10.00 to 20.00)" in lines[3]
    bars = [line.split("  ")[-1] for line in lines[1:4]]
    assert [len(bar) for bar in bars] == [40, 34, 25]
    assert "raise --curve_minutes" in lines[-2]
    assert "0.50 epochs" in lines[-1]
