"""Forced alignment of a text to the probabilities of a CTC head: start, end and confidence of each word."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torchaudio.functional import forced_align, merge_tokens

from ..model.ctc_vocabulary import CTCVocabulary, is_spoken
from .segments import is_unspaced

# CTC marks a token by a short peak inside the sound. A word starts before the first peak and ends after the last, at
# most in the middle of the gap to the neighbouring word. Long frames have late peaks.
LEAD, LEAD_FRAMES, TRAIL = 0.04, 1.75, 0.06  # the larger of seconds and frames; seconds
SHORTEST = 0.01  # seconds, of a word without a time


@dataclass(frozen=True)
class Word:
    """A word of a transcript; in scripts without spaces between words, a character.

    Args:
        text: with the punctuation that is written next to the word.
        start, end: in the recording, in seconds.
        ctc: geometric mean of the CTC head's probabilities of the word's tokens, from 0 to 1; `None` if its vocabulary
            has no token of the word, so that the times are interpolated.
        spaced: whether a space is written before the word.
        llm: geometric mean of the LLM's probabilities of the word's tokens; `None` if unknown.
        calibrated: probability that the word is correct, from a calibration; `None` without one.
    """

    text: str
    start: float
    end: float
    ctc: float | None = None
    spaced: bool = True
    llm: float | None = None
    calibrated: float | None = None

    @property
    def confidence(self) -> float | None:
        """`calibrated`, or the geometric mean of the known probabilities of CTC head and LLM; `None` if unknown."""
        if self.calibrated is not None:
            return self.calibrated
        known = [value for value in (self.ctc, self.llm) if value is not None]
        return math.prod(known) ** (1 / len(known)) if known else None


def split_words(text: str) -> list[tuple[int, int]]:
    """Returns start and end of each word in a text; punctuation belongs to the word next to it.

    Words are separated by spaces. In scripts without spaces between words, each character is a word.
    """
    words: list[list[int]] = []
    glued = False  # whether the next character continues the last word
    opening = False  # whether the last word has punctuation only
    for index, character in enumerate(text):
        if character.isspace():
            glued = opening = False
            continue
        spoken = is_spoken(character)
        continues = glued and (
            opening
            or not spoken
            or unicodedata.category(character).startswith("M")
            or not (is_unspaced(character) or is_unspaced(_last_spoken(text, words[-1])))
        )
        if continues:
            words[-1][1] = index + 1
        else:
            words.append([index, index + 1])
        opening = not spoken and (opening or not continues)
        glued = True
    return [(start, end) for start, end in words if any(map(is_spoken, text[start:end]))]


def _last_spoken(text: str, word: Sequence[int]) -> str:
    return next((character for character in reversed(text[word[0] : word[1]]) if is_spoken(character)), "")


def align(
    log_probabilities: torch.Tensor, text: str, vocabulary: CTCVocabulary, frame_seconds: float, start: float = 0.0
) -> tuple[Word, ...]:
    """Aligns a text.

    If the recording has fewer frames than the text has tokens, the words are spread over the recording, with a
    probability of 0.

    Args:
        log_probabilities: of one recording, shape = (frames, vocabulary).
        text: transcript.
        vocabulary: of the CTC head.
        frame_seconds: time between two frames.
        start: of the recording in a longer one, in seconds.

    Returns:
        The words in order; their times do not overlap.
    """
    places = split_words(text)
    if not places:
        return ()
    ids, spans = vocabulary.encode_with_spans(text)
    seconds = len(log_probabilities) * frame_seconds
    lead = max(LEAD, LEAD_FRAMES * frame_seconds)
    needed = len(ids) + sum(left == right for left, right in pairwise(ids))
    times: list[tuple[float, float, float] | None] = [None] * len(places)
    if ids and needed <= len(log_probabilities):
        tokens = _align_tokens(log_probabilities, ids, vocabulary.blank, frame_seconds)
        times = [_word_time(tokens, spans, place) for place in places]
    unaligned = 0.0 if needed > len(log_probabilities) else None
    confidences = [unaligned if time is None else time[2] for time in times]
    return tuple(
        Word(text[a:b], round(start + first, 3), round(start + last, 3), confidence, a > 0 and text[a - 1].isspace())
        for (a, b), (first, last), confidence in zip(
            places, _interpolate(_widen(times, seconds, lead), seconds), confidences, strict=True
        )
    )


def _align_tokens(
    log_probabilities: torch.Tensor, ids: Sequence[int], blank: int, frame_seconds: float
) -> list[tuple[float, float, float]]:
    """Returns start, end and log-probability of each token."""
    # Only the columns of the text and the blank: an LLM has 150,000 tokens.
    columns, targets = torch.tensor([blank, *ids]).unique(return_inverse=True)
    # `forced_align` returns wrong indices for NaN.
    scores = log_probabilities[:, columns.to(log_probabilities.device)].float().cpu().nan_to_num(-1e4).clamp(min=-1e4)
    path, path_scores = forced_align(scores.unsqueeze(0), targets[1:].int().unsqueeze(0), blank=int(targets[0]))
    return [
        (token.start * frame_seconds, token.end * frame_seconds, float(path_scores[0, token.start : token.end].max()))
        for token in merge_tokens(path[0], path_scores[0], blank=int(targets[0]))
    ]


def _word_time(tokens, spans, place: tuple[int, int]) -> tuple[float, float, float] | None:
    """Returns start, end and confidence of a word; `None` if no token has a character of the word.

    A token with characters of several words is shared among the words by number of characters.
    """
    first, last = place
    parts = []
    for (start, end, score), (a, b) in zip(tokens, spans, strict=True):
        left, right = max(a, first), min(b, last)
        if left < right:
            rate = (end - start) / (b - a)
            parts.append((start + (left - a) * rate, start + (right - a) * rate, score))
    if not parts:
        return None
    return parts[0][0], parts[-1][1], math.exp(sum(score for *_, score in parts) / len(parts))


def _widen(times: list, seconds: float, lead: float) -> list:
    """Moves starts before the first peaks and ends after the last, without overlaps."""
    known = [index for index, time in enumerate(times) if time is not None]
    result = [None if time is None else time[:2] for time in times]
    for number, index in enumerate(known):
        before = times[known[number - 1]][1] if number else -math.inf
        after = times[known[number + 1]][0] if number + 1 < len(known) else math.inf
        start, end, _ = times[index]
        result[index] = (
            max(0.0, start - min(lead, (start - before) * lead / (lead + TRAIL))),
            min(seconds, end + min(TRAIL, (after - end) * TRAIL / (lead + TRAIL))),
        )
    return result


def _interpolate(times: Sequence[tuple[float, float] | None], seconds: float) -> list[tuple[float, float]]:
    """Spreads words without times over the gaps between their neighbours.

    In a gap that is too short, the words share the time of the word before the gap, or else of the word after.
    """
    result: list[tuple[float, float]] = []
    index = 0
    while index < len(times):
        if (time := times[index]) is not None:
            result.append(time)
            index += 1
            continue
        ahead = next((later for later in range(index, len(times)) if times[later] is not None), len(times))
        after = times[ahead] if ahead < len(times) else None
        count, first, last = ahead - index, result[-1][1] if result else 0.0, after[0] if after else seconds
        index = ahead
        if last - first < SHORTEST * count:
            if result:
                count, first, last = count + 1, result.pop()[0], max(first, last)
            elif after:
                count, last, index = count + 1, after[1], index + 1
        step = max(0.0, last - first) / count
        result += [(first + number * step, first + (number + 1) * step) for number in range(count)]
    return result
