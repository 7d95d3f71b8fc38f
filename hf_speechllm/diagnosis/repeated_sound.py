"""Search for sound that is repeated at once, sample by sample: a buffer that was written again."""

from __future__ import annotations

import numpy as np

LENGTH = 8  # samples of a key
SHARE = 16  # one of so many keys is compared
LAGS = (0.01, 1.0)  # seconds between a sound and its repetition; shorter periods are tones
MIN_KEYS = 4  # equal keys with one lag, fewest
_FACTORS = np.random.default_rng(0).integers(1, 1 << 63, LENGTH, dtype=np.uint64) | np.uint64(1)


def find_repetition(samples: np.ndarray, rate: int) -> tuple[float, float] | None:
    """Finds the longest exact repetition of sound; recorded sound never repeats exactly.

    Args:
        samples: 16 bits, shape = (samples,).
        rate: in Hz.

    Returns:
        Length in seconds and mean square (full scale is 1) of the repeated samples; `None` without a repetition.
    """
    if len(samples) < 2 * LENGTH:
        return None
    values = samples.astype(np.int64).view(np.uint64)
    count = len(values) - LENGTH + 1
    keys = np.zeros(count, np.uint64)
    for place, factor in enumerate(_FACTORS):
        keys += values[place : place + count] * factor
    places = np.flatnonzero((keys >> np.uint64(40)) % np.uint64(SHARE) == 0)
    order = places[np.argsort(keys[places], kind="stable")]
    lags = np.diff(order)[np.diff(keys[order]) == 0]
    lags = lags[(lags >= LAGS[0] * rate) & (lags <= LAGS[1] * rate)]
    if len(lags) < MIN_KEYS or (counts := np.bincount(lags)).max() < MIN_KEYS:
        return None
    lag = int(counts.argmax())
    ends = np.flatnonzero(np.concatenate([[True], samples[lag:] != samples[:-lag], [True]]))
    longest = int(np.diff(ends).argmax())
    part = samples[ends[longest] : ends[longest + 1] - 1] / 32768.0
    return len(part) / rate, float(np.mean(part * part)) if len(part) else 0.0
