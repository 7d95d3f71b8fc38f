"""Errors by training frequency: how often the tokens of the references occur in the training transcripts."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..console import progress_bar
from ..data.bad_rows import BadDataError, BadRows
from ..data.hotword_lists import answers_of
from .scoring import UNITS, ScoredUtterance, align, fold, tokenize_all

RANGES = ("0", "1-5", "6-20", "21-100", "101-1000", "1001+")  # occurrences in the training transcripts
LARGEST = (0, 5, 20, 100, 1000)  # number of each range except the last
NUM_RARE = 2  # ranges of rare words
BATCH = 100_000  # texts in memory: enough for several processes

logger = logging.getLogger(__name__)

Occurrences = Mapping[str, Mapping[str, int]]  # by language whose rules normalise, and token


def training_texts(files: Iterable[str], bad_rows: BadRows) -> Iterator[str]:
    """Yields all answers of the rows of training files; reads no recordings.

    Args:
        files: absolute paths of files or sources, as `generate_rows` reads them.
        bad_rows: receives unusable rows.

    Raises:
        BadDataError: if a whole source is unusable.
        OSError: if a file cannot be read.
    """
    from ..data.row_files import foreign_format, generate_rows  # slow: imports `datasets`

    for file in files:
        for row in generate_rows(file, "", foreign_format(file)):
            if row["error"] is None:
                yield from answers_of(row["messages"])
            else:
                bad_rows.add(row["file"], row["line"], row["error"])


def count_occurrences(
    texts: Iterable[str], rules: Collection[str], normalize: bool = True, num_workers: int = 1
) -> tuple[Occurrences, int]:
    """Counts the tokens of training transcripts, without case, and the transcripts.

    The rules of each language of the references normalise all transcripts, so that a transcript that equals a
    reference always has the tokens of the reference.

    Args:
        texts: training transcripts.
        rules: `ScoredUtterance.rules` of the references.
        normalize: the value that scoring used; the language has no effect on texts that are not normalised.
        num_workers: number of processes that normalise.
    """
    counts: dict[str, Counter[str]] = {rule: Counter() for rule in (rules if normalize else [""])}
    texts, total = iter(texts), 0
    while batch := Counter(islice(texts, BATCH)):
        total += batch.total()
        for rule, occurrences in counts.items():
            tokenized = tokenize_all(batch, normalize, num_workers, [rule] * len(batch))
            for tokens, number in zip(tokenized, batch.values(), strict=True):
                for token in fold(tokens):
                    occurrences[token] += number
    return counts if normalize else dict.fromkeys(rules, counts[""]), total


def read_occurrences(
    files: Iterable[str], utterances: Iterable[ScoredUtterance], normalize: bool = True, num_workers: int = 1
) -> tuple[Occurrences, dict[str, int]]:
    """Counts the tokens of training files, with a progress bar and a warning about bad rows.

    Args:
        files: see `training_texts`.
        utterances: scored utterances.
        normalize, num_workers: see `count_occurrences`.

    Returns:
        The occurrences, and the numbers of transcripts and of bad rows.

    Raises:
        BadDataError, OSError: see `training_texts`; also if no row is usable.
    """
    bad_rows = BadRows(1.0)
    rules = list(dict.fromkeys(utterance.rules for utterance in utterances if utterance.reference))
    texts = progress_bar(training_texts(files, bad_rows), desc="counting training words", unit=" texts")
    occurrences, total = count_occurrences(texts, rules, normalize, num_workers)
    example = next(iter(bad_rows), None)
    if not total:
        raise BadDataError(f"--train_file: no row is usable, for example {example}")
    if example:
        logger.warning("--train_file: %d bad rows are skipped, for example %s", len(bad_rows), example)
    return occurrences, {"texts": total, "bad_rows": len(bad_rows)}


def summarize(utterances: Iterable[ScoredUtterance], occurrences: Occurrences) -> dict[str, Any]:
    """Counts errors by the number of occurrences of the reference token; ready for JSON.

    Returns:
        `ranges`: for each of `RANGES`, `reference_tokens`, `substitutions`, `deletions`, their `rate`, and their
        `share_of_errors`; insertions are errors, but belong to no range. `unseen_words`: tokens with letters or digits
        that have errors and never occur, those with most errors first, with `errors` and `reference_tokens`.
    """
    ranges: list[Counter[str]] = [Counter() for _ in RANGES]
    unseen: dict[str, Counter[str]] = {}
    names: dict[str, str] = {}
    errors = 0
    for utterance in utterances:
        errors += utterance.counts.errors
        pairs = [pair for pair in align(utterance.reference, utterance.hypothesis) if pair.operation != "insert"]
        for pair, key in zip(pairs, fold(utterance.reference), strict=True):
            number = occurrences[utterance.rules].get(key, 0)
            ranges[bisect_left(LARGEST, number)][pair.operation] += 1
            if not number and re.search(r"[^\W_]", key):
                unseen.setdefault(key, Counter())[pair.operation] += 1
                names.setdefault(key, pair.reference)
    words = [
        {"word": names[key], "errors": counts.total() - counts["equal"], "reference_tokens": counts.total()}
        for key, counts in unseen.items()
        if counts.total() > counts["equal"]
    ]
    return {
        "ranges": {name: _as_row(counts, errors) for name, counts in zip(RANGES, ranges, strict=True)},
        "unseen_words": sorted(words, key=lambda word: (-word["errors"], -word["reference_tokens"], word["word"])),
    }


def _as_row(counts: Counter[str], errors: int) -> dict[str, Any]:
    wrong = counts.total() - counts["equal"]
    return {
        "reference_tokens": counts.total(),
        "substitutions": counts["replace"],
        "deletions": counts["delete"],
        "rate": wrong / counts.total() if counts.total() else None,
        "share_of_errors": wrong / max(errors, 1),
    }


def describe(score: Mapping[str, Any], unseen_file: str) -> dict[str, str]:
    """Returns the table for the console, and a line that says what to do.

    Args:
        score: content of score.json.
        unseen_file: name of the file with the unseen words.
    """
    found, unit = score["training_frequency"], UNITS[score["metric"]]
    errors = sum(score[kind] for kind in ("substitutions", "deletions", "insertions"))
    width = max(len(unit), len(f"{score['reference_tokens']}"))
    lines = {"in training": f"{unit:>{width}}    wrong  of all errors"}
    for name, row in found["ranges"].items():
        rate = "-" if row["rate"] is None else f"{100 * row['rate']:.1f} %"
        lines[f"{name} times"] = (
            f"{row['reference_tokens']:{width}}  {rate:>7}  {100 * row['share_of_errors']:11.1f} %"
        )
    share = 100 * score["insertions"] / max(errors, 1)
    lines["inserted"] = f"{'-':>{width}}  {'-':>7}  {share:11.1f} %"
    never, rare = (
        sum(row["substitutions"] + row["deletions"] for row in list(found["ranges"].values())[:number])
        for number in (1, NUM_RARE)
    )
    line = f"{rare} of {errors} errors are {unit} with at most {LARGEST[NUM_RARE - 1]} occurrences in training"
    if found["unseen_words"]:
        line += f", {never} of them with none; add recordings or synthetic speech with the words in {unseen_file}"
    return {**lines, "rare": line}
