"""Hotword recall and precision."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import zhconv

from .scoring import ScoredUtterance, tokenize_all


@dataclass(frozen=True)
class HotwordCounts:
    """Counts of one hotword, or sums over several hotwords.

    Args:
        hotword: the hotword as listed by the user; empty for a sum.
        said: occurrences in the references.
        written: occurrences in the hypotheses.
        found: sum of min(occurrences in the reference, occurrences in the hypothesis) over the utterances.
    """

    hotword: str = ""
    said: int = 0
    written: int = 0
    found: int = 0

    @property
    def recall(self) -> float | None:
        """`found / said`; `None` if the references do not contain the hotword."""
        return self.found / self.said if self.said else None

    @property
    def precision(self) -> float | None:
        """`found / written`; `None` if the hypotheses do not contain the hotword."""
        return self.found / self.written if self.written else None

    def __add__(self, other: HotwordCounts) -> HotwordCounts:
        return HotwordCounts("", self.said + other.said, self.written + other.written, self.found + other.found)


def count_hotwords(
    utterances: Iterable[ScoredUtterance],
    hotwords: Sequence[str] = (),
    hotwords_of: Mapping[str, Sequence[str]] | None = None,
    normalize: bool = True,
    num_workers: int = 1,
) -> list[HotwordCounts]:
    """Counts hotwords in references and hypotheses, as sequences of whole tokens.

    A hotword within a longer hotword also counts. The comparison ignores case, diacritics and traditional characters:
    the normalizer handles them according to the language, which a hotword alone does not show (Zürich in an English
    utterance). The number of hotwords affects the time for their normalisation only.

    Args:
        utterances: scored utterances.
        hotwords: counted in all utterances.
        hotwords_of: hotwords that are counted in one utterance only, by utterance ID.
        normalize: the value that scoring used.
        num_workers: number of processes that normalise.

    Returns:
        One entry for each different hotword of at least one token, in the order of the arguments.
    """
    hotwords_of = hotwords_of or {}
    listed = list(dict.fromkeys([*hotwords, *(word for words in hotwords_of.values() for word in words)]))
    tokens_of = dict(zip(listed, map(_keys, tokenize_all(listed, normalize, num_workers)), strict=True))
    everywhere = {tokens_of[word] for word in hotwords}
    names: dict[tuple[str, ...], str] = {}
    lengths: defaultdict[str, set[int]] = defaultdict(set)  # lengths of the hotwords that start with a token
    for word, tokens in tokens_of.items():
        if tokens:
            names.setdefault(tokens, word)
            lengths[tokens[0]].add(len(tokens))

    def occurrences(tokens: tuple[str, ...], wanted: set[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
        runs = (
            tokens[start : start + length]
            for start, token in enumerate(tokens)
            if token in lengths
            for length in lengths[token]
            if start + length <= len(tokens)
        )
        return Counter(run for run in runs if run in wanted)

    said: Counter[tuple[str, ...]] = Counter()
    written: Counter[tuple[str, ...]] = Counter()
    found: Counter[tuple[str, ...]] = Counter()
    for utterance in utterances:
        own = {tokens_of[word] for word in hotwords_of.get(utterance.id, ())}
        wanted = everywhere | own if own else everywhere
        in_reference = occurrences(_keys(utterance.reference), wanted)
        in_hypothesis = occurrences(_keys(utterance.hypothesis), wanted)
        said.update(in_reference)
        written.update(in_hypothesis)
        found.update(in_reference & in_hypothesis)
    return [HotwordCounts(name, said[run], written[run], found[run]) for run, name in names.items()]


@cache
def _key(token: str) -> str:
    """Returns a token in lower case, without accents (kana keep their marks), in simplified characters."""
    letters = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", token.casefold()))
    return zhconv.convert(unicodedata.normalize("NFC", letters), "zh-cn")


def _keys(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(_key, tokens))


def summarize(counted: Sequence[HotwordCounts]) -> dict[str, Any]:
    """Returns recall and precision of all hotwords together, and of each hotword that occurs; ready for JSON."""
    return {
        **_as_row(sum(counted, HotwordCounts())),
        "hotwords": len(counted),
        "each": [_as_row(word) for word in counted if word.said or word.written],
    }


def _as_row(word: HotwordCounts) -> dict[str, Any]:
    return {**asdict(word), "recall": word.recall, "precision": word.precision}
