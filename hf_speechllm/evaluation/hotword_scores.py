"""Hotword recall and precision: were the words that matter recognised, and written only where they were said?"""

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
    """Occurrences of one hotword, or of several.

    Args:
        hotword: as it was given; empty for several.
        said: occurrences in the references.
        written: occurrences in the hypotheses.
        found: of those said, those written in the same utterance: the smaller of both numbers there.
    """

    hotword: str = ""
    said: int = 0
    written: int = 0
    found: int = 0

    @property
    def recall(self) -> float | None:
        """Found of those said; `None` if none was said."""
        return self.found / self.said if self.said else None

    @property
    def precision(self) -> float | None:
        """Found of those written; `None` if none was written."""
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
    """Counts hotwords in references and hypotheses, as runs of whole tokens.

    A hotword within a longer one counts, too. Case, diacritics and traditional characters make no difference: the
    normaliser treats them as the language asks, which a word alone does not show (Zürich in an English line). The time
    does not depend on the number of hotwords, apart from normalising them.

    Args:
        utterances: scored.
        hotwords: looked for everywhere.
        hotwords_of: by utterance ID, those that are looked for in that utterance only.
        normalize: as it was in scoring.
        num_workers: processes that normalise.

    Returns:
        One entry for each different hotword that is a token at least, in the order given.
    """
    hotwords_of = hotwords_of or {}
    given = list(dict.fromkeys([*hotwords, *(word for words in hotwords_of.values() for word in words)]))
    tokens_of = dict(zip(given, map(_keys, tokenize_all(given, normalize, num_workers)), strict=True))
    everywhere = {tokens_of[word] for word in hotwords}
    names: dict[tuple[str, ...], str] = {}
    lengths: defaultdict[str, set[int]] = defaultdict(set)  # of the hotwords that begin with a token
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
    """What is compared of a token: no case, no accents of alphabets (kana keep their marks), simplified characters."""
    letters = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", token.casefold()))
    return zhconv.convert(unicodedata.normalize("NFC", letters), "zh-cn")


def _keys(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(_key, tokens))


def summarize(counted: Sequence[HotwordCounts]) -> dict[str, Any]:
    """Recall and precision over all hotwords, and those that occur one by one; ready for JSON."""
    return {
        **_as_row(sum(counted, HotwordCounts())),
        "hotwords": len(counted),
        "each": [_as_row(word) for word in counted if word.said or word.written],
    }


def _as_row(word: HotwordCounts) -> dict[str, Any]:
    return {**asdict(word), "recall": word.recall, "precision": word.precision}
