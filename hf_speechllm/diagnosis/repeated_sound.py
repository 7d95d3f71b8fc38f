"""Search for sound that is repeated at once, sample by sample: a buffer that was written again."""

from __future__ import annotations

import numpy as np

LENGTH = 8  # samples of a key
SHARE = 16  # one of so many keys is compared
LAGS = (0.01, 1.0)  # seconds between a sound and its repetition; shorter periods are tones
LONG = 0.2  # of the longest repetition: a repetition that long may be chosen
MIN_KEYS = 4  # equal keys with one lag, fewest
_CHOICE = np.array([0x9E3779B1, 0x85EBCA77], np.uint32)  # odd factors of hashes
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
    values = samples.astype(np.uint32)
    # Two samples choose the places of keys, so equal sound has keys at equal places.
    chosen = values[1 : 2 - LENGTH] * _CHOICE[0] + values[: 1 - LENGTH] * _CHOICE[1]
    places = np.flatnonzero((chosen >> np.uint32(16)) % np.uint32(SHARE) == 0)
    keys = sum(values[places + place] * factor for place, factor in enumerate(_FACTORS))
    order = np.argsort(keys, kind="stable")
    lags = np.diff(places[order])[np.diff(keys[order]) == 0]
    lags = lags[(lags >= LAGS[0] * rate) & (lags <= LAGS[1] * rate)]
    if len(lags) < MIN_KEYS or (counts := np.bincount(lags)).max() < MIN_KEYS:
        return None
    lag = int(counts.argmax())
    ends = np.flatnonzero(np.concatenate([[True], samples[lag:] != samples[:-lag], [True]]))
    lengths = np.diff(ends)
    # The loudest of the long repetitions: in a pause, equal samples are no fault.
    energies = np.add.reduceat(np.append(np.square(samples[: len(samples) - lag] / 32768.0), 0.0), ends[:-1])
    best = int(np.argmax(np.where(lengths >= LONG * lengths.max(), energies, -1.0)))
    part = samples[ends[best] : ends[best + 1] - 1] / 32768.0
    return len(part) / rate, float(np.mean(part * part)) if len(part) else 0.0
