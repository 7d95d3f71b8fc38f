"""Errors of transcripts: tokens, alignment, counts, languages.

`normalize_text` defines the tokens: a character of Chinese, Japanese or Korean, a digit, or a word of other scripts.
The same count is the character error rate (CER) of Chinese lines, the word error rate (WER) of English lines, and the
mixed error rate (MER) of lines and sets with both. The alignment is the same as in compute-wer: for the same
normalised files, substitutions, deletions and insertions are equal. Letters with combining marks (Hindi, Thai) are an
exception: compute-wer splits or drops them.

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
UNITS = {"WER": "words", "CER": "characters", "MER": "tokens"}  # what a metric counts
NUM_TEXTS_FOR_POOL = 5000  # with fewer texts, starting processes takes longer than tokenising


@dataclass(frozen=True)
class ErrorCounts:
    """Error counts of one or several transcripts; `sum(..., ErrorCounts())` adds counts.

    Args:
        substitutions: number of reference tokens that the hypothesis replaces by another token.
        deletions: number of reference tokens that the hypothesis lacks.
        insertions: number of hypothesis tokens that the reference lacks.
        reference_tokens: number of reference tokens.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_tokens: int = 0

    @property
    def errors(self) -> int:
        """Sum of substitutions, deletions and insertions: the edit distance."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference token; more than 1 with many insertions.

        An empty reference counts as one token, so that the rate is finite: 0 for an empty hypothesis, otherwise the
        number of insertions.
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
    """One step of an alignment: "equal", "replace", "delete" or "insert", and two tokens; a missing token is empty."""

    operation: str
    reference: str
    hypothesis: str


def tokenize(text: str, normalize: bool = True, language: str | None = None) -> list[str]:
    """Splits a transcript into the tokens that are counted.

    Args:
        text: one transcript.
        normalize: whether to apply `normalize_text`. Otherwise the tokens are those of the compute-wer command, with
            punctuation.
        language: language whose rules `normalize_text` applies; a hypothesis gets the language of the reference.
    """
    if normalize:
        return normalize_text(text, language).split()
    return compute_wer_tokens(text, case_sensitive=True, remove_tag=True)


def fold(tokens: list[str]) -> list[str]:
    """Returns tokens without case, as in compute-wer; in normalised text this changes only ß and the like, to SS."""
    return [token.upper() for token in tokens]


def rules_for(reference: str, language: str | None = None) -> str:
    """Returns the language whose rules apply to a reference and the hypotheses for the reference.

    The language is `language`, if known, otherwise the language of the reference. For a reference without letters and
    digits, the result is "": each hypothesis decides.
    """
    return known_language(language or "") or (language_of(reference) if re.search(r"\w", reference) else "")


def count_token_errors(reference: list[str], hypothesis: list[str]) -> ErrorCounts:
    """Counts the errors of an alignment with minimum edit distance; ignores case.

    If several alignments have the minimum distance, rapidfuzz chooses one, as in compute-wer, so that substitutions,
    deletions and insertions are equal to those of compute-wer.
    """
    counts = {"replace": 0, "delete": 0, "insert": 0}
    if reference != hypothesis:
        for edit in Levenshtein.editops(fold(reference), fold(hypothesis)):
            counts[edit.tag] += 1
    return ErrorCounts(counts["replace"], counts["delete"], counts["insert"], len(reference))


def count_errors(reference: str, hypothesis: str, normalize: bool = True, language: str | None = None) -> ErrorCounts:
    """Counts the errors of a transcript.

    Args:
        reference: correct transcript.
        hypothesis: recognised transcript.
        normalize: see `tokenize`.
        language: language whose rules apply to both texts; by default, the language of the reference.
    """
    rules = rules_for(reference, language)
    return count_token_errors(tokenize(reference, normalize, rules), tokenize(hypothesis, normalize, rules))


def align(reference: list[str], hypothesis: list[str]) -> list[AlignedPair]:
    """Returns the alignment that `count_token_errors` counts, including equal tokens."""
    pairs: list[AlignedPair] = []
    for code in Levenshtein.opcodes(fold(reference), fold(hypothesis)):
        left = reference[code.src_start : code.src_end] or [""] * (code.dest_end - code.dest_start)
        right = hypothesis[code.dest_start : code.dest_end] or [""] * (code.src_end - code.src_start)
        pairs.extend(AlignedPair(code.tag, *both) for both in zip(left, right, strict=True))
    return pairs


@dataclass(frozen=True)
class ScoredUtterance:
    """An utterance with error counts.

    Args:
        id: utterance ID.
        reference: tokens.
        hypothesis: tokens.
        counts: error counts.
        metric: "CER" if all tokens are characters, "WER" if all are words, "MER" for a mixed line, "" for a line
            without letters.
        language: from the list of languages, otherwise from `describe_line`.
        rules: language whose rules normalise reference and hypothesis (`rules_for`).
        dataset: name of the data set; empty if unknown.
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
    """Finds metric and language of a reference by script.

    Languages are zh, ja, ko, en, "other" (words of another language or characters of another script), two of these
    joined by a plus sign (zh+en), and "none" for a line without letters. "Seven" becomes a digit, but is English.

    Args:
        tokens: tokens of the reference, normalised or not.
        text: unnormalised reference; decides if the text or the tokens have no letters (50% becomes 百分之 5 0).

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
    """Calls `tokenize` for many texts, once for each different text.

    Args:
        num_workers: number of processes; used for at least `NUM_TEXTS_FOR_POOL` different texts.
        languages: language of each text.
    """
    texts = list(texts)
    pairs = list(zip(texts, languages or [""] * len(texts), strict=True))
    different = list(dict.fromkeys(pairs))
    function = partial(_tokenize_pair, normalize=normalize)
    if num_workers > 1 and len(different) >= NUM_TEXTS_FOR_POOL:
        from ..data.processes import end_with_parent  # slow: imports the readers of recordings

        with Pool(num_workers, end_with_parent) as pool:
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
    """Scores all references, in their order; a missing hypothesis counts as an empty text.

    Args:
        references: texts by ID.
        hypotheses: texts by ID; hypotheses without a reference are ignored.
        normalize: see `tokenize`.
        languages: known languages by ID, for the rules of normalisation and the results by language; others are
            detected.
        datasets: names of data sets by ID.
        num_workers: number of processes that normalise.
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
    """Scores other hypotheses for the same references; arguments as for `score_utterances`."""
    utterances = list(utterances)
    texts = (hypotheses.get(utterance.id, "") for utterance in utterances)
    tokens = tokenize_all(texts, normalize, num_workers, [utterance.rules for utterance in utterances])
    return [
        replace(utterance, hypothesis=hypothesis, counts=count_token_errors(utterance.reference, hypothesis))
        for utterance, hypothesis in zip(utterances, tokens, strict=True)
    ]


def metric_of(utterances: Iterable[ScoredUtterance]) -> str:
    """Returns the metric of a set: that of all lines with letters, "MER" if they differ, "WER" without letters."""
    return common_metric(utterance.metric for utterance in utterances)


def common_metric(metrics: Iterable[str]) -> str:
    """Returns the metric of lines with these metrics, see `metric_of`."""
    different = set(metrics) - {""}
    return "MER" if len(different) > 1 else different.pop() if different else "WER"


def summarize(utterances: list[ScoredUtterance], num_resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Computes the score of a set, ready for JSON.

    Args:
        utterances: at least one.
        num_resamples: number of bootstrap samples for the interval (`statistics.rate_interval`).
        seed: seed of the bootstrap.

    Returns:
        `metric`; `rate` and `interval_95` as fractions; error counts; numbers of utterances and of utterances with
        errors.
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
    """Computes the scores of a set and of each data set and language, and lists IDs of empty texts; ready for JSON."""
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
