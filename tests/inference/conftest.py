"""A model that says something, and recordings."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def parts(compose_tiny):
    return compose_tiny(seed=3)


@pytest.fixture(scope="module")
def waveforms():
    """Tones with noise, of many lengths, out of order."""
    rng = np.random.default_rng(0)
    result = []
    for seconds in (0.9, 3.1, 0.2, 1.7, 2.4, 0.5, 1.2):
        time = np.arange(int(seconds * 16000)) / 16000
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
        result.append((0.3 * tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32))
    return result
