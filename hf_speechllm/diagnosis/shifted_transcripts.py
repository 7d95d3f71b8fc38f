"""Search for blocks of rows whose transcripts are those of rows nearby: lists that are out of step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np

from .corpus_checks import MIN_PACE_SCALE, Corpus, Found
from .kinds import limit
from .text_checks import show

SHIFT_ROWS = 12  # rows of a file, fewest
SHIFTS = (1, -1, 2, -2, 3, -3)  # rows by which transcripts may be shifted
MIN_SPREAD = 0.3  # of log syllables between the 10th and 90th percentile: texts of one length fit every duration
SHIFT_PENALTY = 0.5  # nats per row: rows that fit as well without the shift do not belong to the block
SHIFT_EDGE = 3.0  # nats from the edge of a block to the first reported row: rows beside the block fit by chance
WRONG_SHARE, WRONG_RANGE = 0.05, 4.0  # rows with wrong texts, and range of their log durations (1/7 to 7 times)


def shifted_transcripts(corpus: Corpus) -> Iterator[Found]:
    """Finds blocks of a file in which the transcripts some rows away fit the durations better.

    Sums the logarithms of likelihood ratios over the rows of a block. Without a shift, a sum above x has at most the
    probability exp(-x) for each row at which a block may start (Wald 1945).
    """
    files: dict[str, list[int]] = defaultdict(list)
    for index in sorted(corpus.expected):
        files[corpus.rows[index].file].append(index)
    for rows in files.values():
        if len(rows) < SHIFT_ROWS:
            continue
        time = np.log([corpus.measured[index][0].sounding_seconds for index in rows])
        errors = min(map(partial(_shift_errors, time), _log_durations(corpus, rows, time)), key=_smallest_scale)
        scale = max(_smallest_scale(errors), MIN_PACE_SCALE)
        least = limit("shifted-transcripts") + np.log(len(rows) * len(SHIFTS))
        blocks: list[tuple[float, int, range]] = []
        for move, moved in zip(SHIFTS, errors[1:], strict=True):
            gains = _log_likelihoods(moved, scale) - _log_likelihoods(errors[0], scale)
            while (total := gains[(part := slice(*_best_run(gains - SHIFT_PENALTY)))].sum()) > least:
                first, last = (
                    int(np.argmax(np.cumsum(sums) > SHIFT_EDGE)) for sums in (gains[part], gains[part][::-1])
                )
                if np.median(np.abs(moved[part])) < scale:  # otherwise wrong texts, which another fits less badly
                    blocks.append((float(total), move, range(len(rows))[part][first : part.stop - part.start - last]))
                gains[part] = -least
        reported: set[int] = set()
        for total, move, block in sorted(blocks, reverse=True):
            whose = f"{abs(move)} row{'s'[: abs(move) - 1]} {'below' if move > 0 else 'above'}"
            for place in sorted({*block} - reported):
                detail = f"in {len(block)} neighbouring rows, the transcript {whose} fits"
                text = show(corpus.rows[rows[place]].text, 30)
                yield rows[place], "shifted-transcripts", f"{detail} (exp({total:.0f}) times likelier): {text}"
            reported.update(block)


def _log_durations(corpus: Corpus, rows: list[int], time: np.ndarray) -> Iterator[np.ndarray]:
    """Yields expected log durations of texts: from the lines of the corpus, which a shift of all rows makes useless,
    and from the percentiles of durations and lengths of texts, which do not depend on the order."""
    yield np.log([corpus.expected[index] for index in rows])
    text = np.log([corpus.syllables[index] for index in rows])
    (low, high), (least, most) = np.percentile(text, (10, 90)), np.percentile(time, (10, 90))
    if high - low > MIN_SPREAD:
        yield np.median(time) + (text - np.median(text)) * (most - least) / (high - low)


def _shift_errors(time: np.ndarray, expected: np.ndarray) -> list[np.ndarray]:
    """Returns the errors of log durations without a shift, and with each of `SHIFTS`."""
    return [time - np.roll(expected, -move) for move in (0, *SHIFTS)]


def _smallest_scale(errors: list[np.ndarray]) -> float:
    return min(1.4826 * float(np.median(np.abs(error))) for error in errors)


def _log_likelihoods(errors: np.ndarray, scale: float) -> np.ndarray:
    """Returns log densities: a normal distribution, and a share of rows whose text is wrong anyway."""
    normal = np.exp(-0.5 * (errors / scale) ** 2) / (scale * np.sqrt(2 * np.pi))
    return np.log((1 - WRONG_SHARE) * normal + WRONG_SHARE / WRONG_RANGE)


def _best_run(gains: np.ndarray) -> tuple[int, int]:
    """Returns start and end of the run with the largest sum."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    ends = int(np.argmax(sums - np.minimum.accumulate(sums)))
    return int(np.argmin(sums[: ends + 1])), ends
