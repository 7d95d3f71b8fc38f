"""Confidence of words: correct words, calibration by logistic regression, calibration error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.bad_rows import BadDataError
from ..model.calibration import Calibration, log_odds
from .scoring import ScoredUtterance, align, tokenize

SOURCES = ("ctc", "llm")  # probabilities in the output of `hf-speechllm decode --word_times`
NUM_BINS = 10
PENALTY = 1e-3  # of the squared weights, relative to the mean loss of a word: finite weights without errors


def read_words(path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    """Reads the words of `hf-speechllm decode --word_times` (`OUTPUT.words.jsonl`) by ID.

    Raises:
        BadDataError: if a line is invalid.
        OSError: if the file cannot be read.
    """
    words = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                words[str(row["id"])] = [
                    {name: item.get(name) for name in ("word", *SOURCES)} for item in row["words"]
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadDataError(
                    f"{os.fspath(path)}:{number}: not a line of OUTPUT.words.jsonl; pass the file that "
                    "`hf-speechllm decode --word_times` writes"
                ) from error
    return words


@dataclass(frozen=True)
class JudgedWord:
    """A word of a hypothesis: its probabilities, and whether the reference has it."""

    id: str
    correct: bool
    ctc: float | None
    llm: float | None


def judge_words(
    utterances: Iterable[ScoredUtterance], words: Mapping[str, Sequence[Mapping[str, Any]]], normalize: bool = True
) -> list[JudgedWord]:
    """Finds the correct words of hypotheses: all tokens of the word are equal in the alignment with the reference.

    Args:
        utterances: scored utterances.
        words: result of `read_words`.
        normalize: see `scoring.tokenize`.
    """
    judged = []
    for utterance in utterances:
        found = words.get(utterance.id, ())
        tokens = [tokenize(str(item["word"]), normalize, utterance.rules) for item in found]
        flat = [token for item in tokens for token in item]
        equal = [pair.operation == "equal" for pair in align(utterance.reference, flat) if pair.hypothesis]
        at = 0
        for item, own in zip(found, tokens, strict=True):
            if own:
                judged.append(JudgedWord(utterance.id, all(equal[at : at + len(own)]), item["ctc"], item["llm"]))
            at += len(own)
    return judged


def fit(words: Sequence[JudgedWord]) -> Calibration | None:
    """Fits a calibration; `None` without words that have a probability.

    If the LLM's probabilities are unknown, as after beam search, only those of the CTC head have a weight.
    """
    sources = [name for name in SOURCES if any(getattr(word, name) is not None for word in words)]
    known = [word for word in words if all(getattr(word, name) is not None for name in sources)]
    if not sources or not known:
        return None
    features = np.array([[1.0, *(log_odds(getattr(word, name)) for name in sources)] for word in known])
    correct = np.array([word.correct for word in known], dtype=float)
    weights = np.zeros(features.shape[1])
    for _ in range(100):  # Newton's method
        predicted = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        gradient = features.T @ (predicted - correct) / len(known) + PENALTY * weights
        curvature = (features.T * (predicted * (1 - predicted))) @ features / len(known)
        step = np.linalg.solve(curvature + PENALTY * np.eye(len(weights)), gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    named = dict(zip(sources, weights[1:].tolist(), strict=True))
    return Calibration(float(weights[0]), named.get("ctc", 0.0), named.get("llm", 0.0))


def held_out_confidence(words: Sequence[JudgedWord]) -> list[tuple[float, bool]]:
    """Returns confidence and correctness of words; each half of the utterances is calibrated on the other half."""
    ids = {id_: index for index, id_ in enumerate(dict.fromkeys(word.id for word in words))}
    halves = [[word for word in words if ids[word.id] % 2 == half] for half in (0, 1)]
    result: list[tuple[float, bool]] = []
    for half, other in (halves, halves[::-1]):
        calibration = fit(other)
        if calibration is not None:
            pairs = ((calibration(word.ctc, word.llm), word.correct) for word in half)
            result += [(confidence, correct) for confidence, correct in pairs if confidence is not None]
    return result


def raw_confidence(words: Iterable[JudgedWord]) -> list[tuple[float, bool]]:
    """Returns the confidence without calibration, the geometric mean of the known probabilities, and correctness."""
    result = []
    for word in words:
        known = [value for value in (word.ctc, word.llm) if value is not None]
        if known:
            result.append((math.prod(known) ** (1 / len(known)), word.correct))
    return result


def calibration_error(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Returns the expected calibration error: the mean difference of confidence and accuracy, over the words."""
    bins = bins_of(pairs)
    total = sum(count for *_, count in bins)
    return sum(count * abs(mean - accuracy) for mean, accuracy, count in bins) / total if total else None


def bins_of(pairs: Sequence[tuple[float, bool]]) -> list[tuple[float, float, int]]:
    """Returns mean confidence, accuracy and size of each bin that has words."""
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for pair in pairs:
        groups[min(int(pair[0] * NUM_BINS), NUM_BINS - 1)].append(pair)
    return [
        (sum(value for value, _ in group) / len(group), sum(ok for _, ok in group) / len(group), len(group))
        for group in groups
        if group
    ]


def summarize(words: Sequence[JudgedWord]) -> dict[str, Any]:
    """Returns the section `confidence` of score.json."""
    return {
        "words": len(words),
        "correct": sum(word.correct for word in words),
        "calibration_error": calibration_error(raw_confidence(words)),
        "calibration_error_calibrated": calibration_error(held_out_confidence(words)),
    }


def least_confident(
    words: Sequence[JudgedWord], calibration: Calibration, number: int
) -> list[tuple[str, float, int]]:
    """Returns ID, mean confidence and number of words of the utterances with the lowest mean confidence."""
    by_id: dict[str, list[float]] = {}
    for word in words:
        confidence = calibration(word.ctc, word.llm)
        if confidence is not None:
            by_id.setdefault(word.id, []).append(confidence)
    means = [(id_, sum(values) / len(values), len(values)) for id_, values in by_id.items()]
    return sorted(means, key=lambda item: item[1])[:number]
