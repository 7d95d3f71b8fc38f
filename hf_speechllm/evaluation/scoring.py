"""Errors of transcripts: tokens, alignment, counts, languages.

What is counted is what `normalize_text` makes a token: a character of Chinese, Japanese or Korean, a digit, a word of
other scripts. So one count gives the character error rate (CER) of Chinese lines, the word error rate (WER) of English
ones, and the mixed error rate (MER) of lines and sets that have both. The alignment is compute-wer's, and so are the
numbers: substitutions, deletions and insertions of the same normalised files are equal, but for letters with combining
marks (Hindi, Thai), which compute-wer takes apart or drops.

>>> count_errors("turn on the 空调", "turn on 空条")
ErrorCounts(substitutions=1, deletions=1, insertions=0, reference_tokens=5)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pool
from typing import Any, NamedTuple

from compute_wer import normalize as compute_wer_tokens
from rapidfuzz.distance import Levenshtein

from .languages import HAN, HANGUL, KANA, is_english, known_language
from .normalizers import UNSPACED_CHARACTER, language_of, normalize_text
from .statistics import rate_interval

_LETTER = re.compile(r"[^\W\d_]")
NUM_TEXTS_FOR_POOL = 5000  # fewer are tokenised before other processes have started


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of one or several transcripts; `sum(..., ErrorCounts())` adds them up.

    Args:
        substitutions: reference tokens with another token in their place.
        deletions: reference tokens that the hypothesis lacks.
        insertions: hypothesis tokens that the reference lacks.
        reference_tokens: tokens of the reference.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_tokens: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions: the edit distance."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference token; beyond 1 with many insertions.

        An empty reference counts as one token long, so that its rate is 0 if the hypothesis is empty, too, and else
        the number of insertions: finite, and worse the more there are.
        """
        return self.errors / max(self.reference_tokens, 1)

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_tokens + other.reference_tokens,
        )


class AlignedPair(NamedTuple):
    """A step of an alignment: "equal", "replace", "delete" or "insert"; the token that is not there is empty."""

    operation: str
    reference: str
    hypothesis: str


def tokenize(text: str, normalize: bool = True, language: str | None = None) -> list[str]:
    """The tokens that are counted.

    Args:
        text: one transcript.
        normalize: whether `normalize_text` is applied, which finds the tokens, too. Without it they are those that
            the compute-wer command finds in the text as it is: punctuation counts.
        language: whose rules `normalize_text` applies; a hypothesis gets those of its reference.
    """
    if normalize:
        return normalize_text(text, language).split()
    return compute_wer_tokens(text, case_sensitive=True, remove_tag=True)


def _folded(tokens: list[str]) -> list[str]:
    # As compute-wer does; after normalisation it only makes the likes of ß and ss meet.
    return [token.upper() for token in tokens]


def rules_for(reference: str, language: str | None = None) -> str:
    """The language whose rules a reference and its hypotheses get: the one named, if known, or the reference's.

    A reference without any letter or digit has none (""): its hypotheses decide for themselves.
    """
    return known_language(language or "") or (language_of(reference) if re.search(r"\w", reference) else "")


def count_token_errors(reference: list[str], hypothesis: list[str]) -> ErrorCounts:
    """Errors of tokens, by an alignment of least edit distance; upper and lower case are the same.

    Where several alignments have that distance, rapidfuzz chooses, as in compute-wer, so that substitutions,
    deletions and insertions are its numbers.
    """
    counts = {"replace": 0, "delete": 0, "insert": 0}
    if reference != hypothesis:
        for edit in Levenshtein.editops(_folded(reference), _folded(hypothesis)):
            counts[edit.tag] += 1
    return ErrorCounts(counts["replace"], counts["delete"], counts["insert"], len(reference))


def count_errors(reference: str, hypothesis: str, normalize: bool = True, language: str | None = None) -> ErrorCounts:
    """Errors of a transcript.

    Args:
        reference: what was said.
        hypothesis: what was recognised.
        normalize: as in `tokenize`.
        language: whose rules both texts get; by default, the language of the reference.
    """
    rules = rules_for(reference, language)
    return count_token_errors(tokenize(reference, normalize, rules), tokenize(hypothesis, normalize, rules))


def align(reference: list[str], hypothesis: list[str]) -> list[AlignedPair]:
    """The alignment that `count_token_errors` counts, with the equal tokens."""
    pairs: list[AlignedPair] = []
    for code in Levenshtein.opcodes(_folded(reference), _folded(hypothesis)):
        left = reference[code.src_start : code.src_end] or [""] * (code.dest_end - code.dest_start)
        right = hypothesis[code.dest_start : code.dest_end] or [""] * (code.src_end - code.src_start)
        pairs.extend(AlignedPair(code.tag, *both) for both in zip(left, right, strict=True))
    return pairs


@dataclass(frozen=True)
class ScoredUtterance:
    """An utterance and its errors.

    Args:
        id: from the lists.
        reference: tokens.
        hypothesis: tokens.
        counts: errors.
        metric: "CER" where all words are of characters, "WER" where none are, "MER" for both in one line, "" for a
            line without letters, which fits any.
        language: given, or as `describe_line` finds it.
        rules: the language whose rules normalise the reference and its hypotheses (`rules_for`).
        dataset: given, or empty.
    """

    id: str
    reference: list[str]
    hypothesis: list[str]
    counts: ErrorCounts
    metric: str
    language: str
    rules: str
    dataset: str = ""


def describe_line(tokens: list[str], text: str) -> tuple[str, str]:
    """Metric and language of a reference, by its script.

    Languages are zh, ja, ko, en, "other" (words of another language, characters of another script), two of them with
    a plus between (zh+en), and "none" for a line without letters. "Seven", a digit once it is normalised, is English.

    Args:
        tokens: of the reference, normalised or not.
        text: the reference as it was written; it decides where it or the tokens have no letters (百分之 of 50%).

    Returns:
        "CER", "WER", "MER" or "", and the language.
    """
    line, written = " ".join(tokens).lower(), unicodedata.normalize("NFKC", text).lower()
    if not _LETTER.search(line) or not _LETTER.search(written):
        line = written
    words, has_characters = UNSPACED_CHARACTER.subn(" ", line)
    has_words = _LETTER.search(words)
    languages = []
    if has_characters:
        hangul, han = len(re.findall(f"[{HANGUL}]", line)), len(re.findall(f"[{HAN}]", line))
        if re.search(f"[{KANA}]", line):
            languages.append("ja")
        elif hangul or han:
            languages.append("ko" if hangul > han else "zh")
        else:
            languages.append("other")
    if has_words:
        languages.append("en" if is_english(words) else "other")
    if not languages:
        return "", "none"
    metric = "MER" if has_characters and has_words else "CER" if has_characters else "WER"
    return metric, "+".join(dict.fromkeys(languages))


def _tokenize_pair(pair: tuple[str, str], normalize: bool) -> list[str]:
    return tokenize(pair[0], normalize, pair[1])


def tokenize_all(
    texts: Iterable[str], normalize: bool = True, num_workers: int = 1, languages: Iterable[str] | None = None
) -> list[list[str]]:
    """`tokenize` for many texts, each different one once.

    Args:
        num_workers: processes, if there are texts enough for them to pay.
        languages: of the texts, one each.
    """
    texts = list(texts)
    pairs = list(zip(texts, languages or [""] * len(texts), strict=True))
    different = list(dict.fromkeys(pairs))
    function = partial(_tokenize_pair, normalize=normalize)
    if num_workers > 1 and len(different) >= NUM_TEXTS_FOR_POOL:
        with Pool(num_workers) as pool:
            tokens = dict(zip(different, pool.imap(function, different, chunksize=500), strict=True))
    else:
        tokens = {pair: function(pair) for pair in different}
    return [tokens[pair] for pair in pairs]


def score_utterances(
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    normalize: bool = True,
    languages: Mapping[str, str] | None = None,
    datasets: Mapping[str, str] | None = None,
    num_workers: int = 1,
) -> list[ScoredUtterance]:
    """Scores every reference, in their order; one without a hypothesis is compared with an empty text.

    Args:
        references: texts by ID.
        hypotheses: texts by ID; IDs that no reference has are left out.
        normalize: as in `tokenize`.
        languages: by ID, for those that need not be guessed: of the rules that reference and hypothesis get, and of
            the groups.
        datasets: by ID.
        num_workers: processes that normalise.
    """
    languages, datasets = languages or {}, datasets or {}
    rules = [rules_for(text, languages.get(id_)) for id_, text in references.items()]
    tokens = tokenize_all(references.values(), normalize, num_workers, rules)
    utterances = []
    for (id_, text), reference, rule in zip(references.items(), tokens, rules, strict=True):
        metric, language = describe_line(reference, text)
        language, dataset = languages.get(id_, language), datasets.get(id_, "")
        utterances.append(ScoredUtterance(id_, reference, [], ErrorCounts(), metric, language, rule, dataset))
    return rescore(utterances, hypotheses, normalize, num_workers)


def rescore(
    utterances: Iterable[ScoredUtterance], hypotheses: Mapping[str, str], normalize: bool = True, num_workers: int = 1
) -> list[ScoredUtterance]:
    """The same references with other hypotheses; arguments as for `score_utterances`."""
    utterances = list(utterances)
    texts = (hypotheses.get(utterance.id, "") for utterance in utterances)
    tokens = tokenize_all(texts, normalize, num_workers, [utterance.rules for utterance in utterances])
    return [
        replace(utterance, hypothesis=hypothesis, counts=count_token_errors(utterance.reference, hypothesis))
        for utterance, hypothesis in zip(utterances, tokens, strict=True)
    ]


def metric_of(utterances: Iterable[ScoredUtterance]) -> str:
    """The one metric of a set: that of all its lines with letters, or "MER" where they differ; "WER" without any."""
    metrics = {utterance.metric for utterance in utterances} - {""}
    return "MER" if len(metrics) > 1 else metrics.pop() if metrics else "WER"


def summarize(utterances: list[ScoredUtterance], num_resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """The score of a set, ready for JSON.

    Args:
        utterances: at least one.
        num_resamples: of the bootstrap that gives the interval (`statistics.rate_interval`).
        seed: of the bootstrap.

    Returns:
        `metric`; `rate` and `interval_95`, fractions; the counts; the numbers of utterances and of those with errors.
    """
    total = sum((utterance.counts for utterance in utterances), ErrorCounts())
    errors, tokens = zip(*((u.counts.errors, u.counts.reference_tokens) for u in utterances), strict=True)
    interval = rate_interval(errors, tokens, num_resamples, seed)
    return {
        "metric": metric_of(utterances),
        "rate": total.rate,
        "interval_95": list(interval),
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "reference_tokens": total.reference_tokens,
        "utterances": len(utterances),
        "utterances_with_errors": sum(utterance.counts.errors > 0 for utterance in utterances),
    }


def score_set(utterances: list[ScoredUtterance], num_resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """`summarize` of a set and of its data sets and languages, with the IDs of empty texts; ready for JSON."""
    parts: dict[str, dict[str, list[ScoredUtterance]]] = {"datasets": {}, "languages": {}}
    for utterance in utterances:
        parts["datasets"].setdefault(utterance.dataset, []).append(utterance)
        parts["languages"].setdefault(utterance.language, []).append(utterance)
    return {
        **summarize(utterances, num_resamples, seed),
        **{
            kind: {name: summarize(part, num_resamples, seed) for name, part in sorted(groups.items())}
            for kind, groups in parts.items()
        },
        "empty_references": [u.id for u in utterances if not u.reference],
        "empty_hypotheses": [u.id for u in utterances if not u.hypothesis],
        "bootstrap": {"resamples": num_resamples, "seed": seed},
    }
