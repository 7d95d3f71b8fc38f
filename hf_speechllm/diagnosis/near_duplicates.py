"""Search for copies of a recording with another gain, codec, rate or padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..audio.waveform import AudioError, load_audio
from .corpus_checks import Corpus, Found, same_recording
from .kinds import limit

RATE = 8000  # Hz at which waveforms are compared: telephone copies have the same band
SIMILAR = 0.88  # cosine of fingerprints from which waveforms are compared
LONGER = 0.04  # share, and 60 ms, by which the sounding parts of copies may differ
MAX_SECONDS = 30.0  # compared at most
MAX_SAMPLES = 64 * 2**20  # kept at a time: 256 MB
MAX_COMPARED = 20  # waveforms compared with one recording, at most
PAIRS_PER_ROW, MIN_PAIRS, MAX_PAIRS = 3, 2_000, 40_000  # compared, the most similar first; 40,000 take two minutes
ROWS_AT_ONCE = 1024
WINDOW = 1600  # samples (0.2 s) in which correlations are compared
LOUD = 0.5  # smallest energy of such a window, as a share of the mean
IDENTICAL, OTHER = 0.97, 0.65  # median and lowest correlation of windows if only a part is the same


def near_duplicates(corpus: Corpus) -> Iterator[Found]:
    """Yields rows whose recordings are copies; exact copies are found by their hash."""
    rows = [index for index in corpus.usable if len(corpus.measured[index][0].fingerprint)]
    known: dict[str, int] = {}
    rows = [index for index in rows if known.setdefault(corpus.measured[index][0].digest, index) == index]
    parents = {index: index for index in rows}
    waves: dict[int, np.ndarray | None] = {}
    similarity: dict[int, float] = {}
    for first, second in _candidates(corpus, rows):
        for index in (first, second):
            if index not in waves:
                waves[index] = _load(corpus.rows[index].recordings[0])
        value = _correlation(waves[first], waves[second])
        if value >= limit("near-duplicate"):
            similarity[max(first, second)] = value
            roots = _root(parents, first), _root(parents, second)
            parents[max(roots)] = min(roots)
        if sum(len(wave) for wave in waves.values() if wave is not None) > MAX_SAMPLES:
            waves.clear()
    groups: dict[int, list[int]] = {}
    for index in rows:
        groups.setdefault(_root(parents, index), []).append(index)
    for group in groups.values():
        if len(group) > 1:
            value = max(similarity.get(index, 0.0) for index in group)
            yield from same_recording(corpus, group, "near-duplicate", f" (correlation of the waveforms {value:.2f})")


def _root(parents: dict[int, int], index: int) -> int:
    """Returns the first row of a group of copies, and shortens the path to it."""
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _candidates(corpus: Corpus, rows: list[int]) -> Iterator[tuple[int, int]]:
    """Yields pairs of rows with similar fingerprints and lengths, the most similar first."""
    lengths = np.array([corpus.measured[index][0].active_seconds for index in rows])
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    prints = np.array([corpus.measured[rows[place]][0].fingerprint for place in order])
    most = max(1, min(MAX_COMPARED, MAX_PAIRS // max(1, len(rows))))
    total = min(MAX_PAIRS, max(MIN_PAIRS, PAIRS_PER_ROW * len(rows)))
    pairs: list[tuple[float, int, int]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(rows))
        last = int(np.searchsorted(lengths, lengths[stop - 1] * (1 + LONGER) + 0.06, side="right"))
        similar = prints[start:stop] @ prints[start:last].T
        for place, line in enumerate(similar):
            longest = lengths[start + place] * (1 + LONGER) + 0.06
            found = np.flatnonzero(line[place + 1 :] > SIMILAR) + place + 1
            found = found[lengths[start + found] <= longest]
            for other in found[np.argsort(-line[found], kind="stable")][:most].tolist():
                pairs.append((-float(line[other]), rows[order[start + place]], rows[order[start + other]]))
    yield from ((first, second) for _, first, second in sorted(pairs)[:total])


def _load(source: str) -> np.ndarray | None:
    try:
        # Second differences: vowels of two takes are similar sines at low frequencies, but differ at high ones.
        return np.diff(load_audio(source, RATE)[: int(MAX_SECONDS * RATE)], 2)
    except AudioError:  # it was readable before
        return None


def _correlation(first: np.ndarray | None, second: np.ndarray | None) -> float:
    """Returns the largest correlation of two waveforms over all shifts; 0 if only a part of them is the same."""
    if first is None or second is None:
        return 0.0
    size = 1 << (len(first) + len(second) - 1).bit_length()
    spectra = np.fft.rfft(first, size) * np.conj(np.fft.rfft(second, size))
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    correlations = np.abs(np.fft.irfft(spectra, size))
    shift = int(correlations.argmax())
    shift -= size if shift >= len(first) else 0
    return float(correlations[shift]) / norm if norm and _same_throughout(first, second, shift) else 0.0


def _same_throughout(first: np.ndarray, second: np.ndarray, shift: int) -> bool:
    """Returns whether aligned waveforms are not identical except for some words, as synthetic ones may be."""
    first, second = first[max(0, shift) :], second[max(0, -shift) :]
    count = min(len(first), len(second)) // WINDOW
    first, second = (wave[: count * WINDOW].reshape(count, WINDOW) for wave in (first, second))
    norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    energy = np.maximum(*norms) ** 2
    loud = (energy > LOUD * energy.mean()) if count else np.zeros(0, bool)
    if not loud.any():
        return True
    values = np.abs((first * second).sum(1))[loud] / np.maximum((norms[0] * norms[1])[loud], 1e-12)
    return bool(np.median(values) < IDENTICAL or values.min() >= OTHER)
