"""Division of a corpus into splits: by speaker if known, and never with one recording in two splits."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Hashable, Sequence

from ..audio.archives import find_archive
from ..audio.time_range import split_time_range
from .utterance import SPLITS, Utterance

ROUNDING = 1e-6  # utterances; tolerance for rounding errors of shares


def split_utterances(utterances: Sequence[Utterance], shares: Sequence[float], seed: int = 0) -> list[str]:
    """Draws a split for each utterance.

    Utterances of one speaker, or of one recording (also under two names, through links), are in one split. The splits
    depend only on utterances, shares and seed.

    Args:
        utterances: the utterances.
        shares: shares of `SPLITS`, in any unit.
        seed: seed of the random order.

    Returns:
        The split of each utterance. If there are enough speakers or recordings, no split with a share is empty.

    Raises:
        ValueError: if a share is negative, or all are 0.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or not sum(shares):
        raise ValueError(f"the shares of {', '.join(SPLITS)} must be three numbers from 0, not {list(shares)}")
    groups = _groups(utterances)
    sizes = Counter(groups)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    targets = [share / sum(shares) * len(utterances) for share in shares]
    missing = list(targets)
    chosen: dict[int, int] = {}
    for group in order:
        fitting = [index for index in range(len(SPLITS)) if sizes[group] <= missing[index] + ROUNDING]
        if fitting:
            split = max(fitting, key=lambda index: missing[index] / targets[index])
        else:
            split = max(range(len(SPLITS)), key=lambda index: missing[index])
        chosen[group] = split
        missing[split] -= sizes[group]
    for split, share in enumerate(shares):
        counts = Counter(chosen.values())
        largest = max(counts, key=lambda index: counts[index], default=split)
        if share and not counts[split] and counts[largest] > 1:
            chosen[min((group for group in order if chosen[group] == largest), key=lambda group: sizes[group])] = split
    return [SPLITS[chosen[group]] for group in groups]


def own_splits(utterances: Sequence[Utterance]) -> list[str] | None:
    """Returns the splits of the source; `None` if it has no splits or only training data."""
    found = {utterance.split for utterance in utterances}
    if None in found or found == {"train"} or not found:
        return None
    return [str(utterance.split) for utterance in utterances]


def _groups(utterances: Sequence[Utterance]) -> list[int]:
    """Returns a number per utterance, equal for utterances that share a speaker or recording, directly or not."""
    parents = list(range(len(utterances)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    first: dict[Hashable, int] = {}
    files: dict[str, Hashable] = {}
    for index, utterance in enumerate(utterances):
        keys: list[Hashable] = [] if utterance.speaker is None else [("speaker", utterance.speaker)]
        for source in utterance.recordings:
            whole = split_time_range(source)[0]
            if whole not in files:
                files[whole] = _identity(whole)
            keys.append(files[whole])
        if utterance.origin is not None:
            keys.append(("origin", utterance.origin))
        for key in keys:
            parents[root(index)] = root(first.setdefault(key, index))
    return [root(index) for index in range(len(utterances))]


def _identity(source: str) -> Hashable:
    """Returns a value that is equal for all names of one file."""
    if not find_archive(source):
        try:
            status = os.stat(source)
            return status.st_dev, status.st_ino
        except (OSError, ValueError):  # a URL, or a missing file, which measuring reports
            pass
    return source
