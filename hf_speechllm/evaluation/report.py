"""Score reports: the text file of compute-wer, and one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources
from itertools import islice, zip_longest
from typing import IO, Any, NamedTuple

from compute_wer.utils import default_cluster
from compute_wer.wer import SER, WER

from .charts import NUM_DOTS, duration_chart, reliability_diagram
from .confidence import JudgedWord, fit, least_confident
from .hotword_scores import HotwordCounts
from .report_audio import Sound
from .scoring import UNITS, ErrorCounts, ScoredUtterance, align
from .statistics import Comparison

RULE = "=" * 75
NUM_NAMED = 200  # IDs per list on the page, at most; score.json contains all IDs
NUM_UNSURE = 50  # utterances on the page, those with the lowest confidence
NUM_HOTWORDS = 100  # hotwords on the page, at most, hotwords with most errors first
NUM_CONFUSIONS = 15  # substitutions, deletions and insertions on the page, at most, each
NUM_CHANGED = 10  # utterances on the page that the second hypotheses have with more or fewer errors, at most, each

# Cached because words repeat.
_cluster_of = cache(default_cluster)
_width_of = cache(WER.width)


def write_compute_wer(utterances: Iterable[ScoredUtterance], missing: int, extra: int, file: IO[str]) -> None:
    """Writes the output of the compute-wer command: an alignment of each utterance, then sums, in total and by script.

    Args:
        utterances: in output order.
        missing: number of references without a hypothesis (MH).
        extra: number of hypotheses without a reference (ML).
        file: text file, open for writing.
    """
    total: Counter[str] = Counter()
    clusters: dict[str, Counter[str]] = {}
    sentences = SER()
    for utterance in utterances:
        counts: Counter[str] = Counter()
        lines: tuple[list[str], list[str]] = ([], [])
        for operation, *tokens in align(utterance.reference, utterance.hypothesis):
            tokens = [token.upper() for token in tokens]
            counts[operation] += 1
            clusters.setdefault(_cluster_of(tokens[0] or tokens[1]), Counter())[operation] += 1
            widths = [_width_of(token) for token in tokens]
            for line, token, width in zip(lines, tokens, widths, strict=True):
                line.append(token + " " * (max(widths) - width))
        total += counts
        if _as_wer(counts).wer == 0:  # as in compute-wer, 0 also for insertions into an empty reference
            sentences.cor += 1
        else:
            sentences.err += 1
        reference, hypothesis = (" ".join(line) for line in lines)
        file.write(f"utt: {utterance.id}\nWER: {_as_wer(counts)}\nref: {reference}\nhyp: {hypothesis}\n\n")
    file.write(f"{RULE}\nOverall -> {_as_wer(total)}\n")
    for cluster, counts in clusters.items():
        if counts.total() > counts["insert"]:
            file.write(f"{cluster} -> {_as_wer(counts)}\n")
    file.write(f"SER -> {sentences} ML={extra} MH={missing}\n{RULE}\n")


def _as_wer(counts: Counter[str]) -> WER:
    wer = WER()
    for operation, number in counts.items():
        wer[operation] = number
    return wer


class Column(NamedTuple):
    """A column of an alignment: a reference token, and operation and token of each hypothesis (see `align`)."""

    reference: str
    cells: tuple[tuple[str, str], ...]


def align_columns(reference: list[str], *hypotheses: list[str]) -> list[Column]:
    """Aligns several hypotheses with one reference: a column for each reference token, and columns of insertions."""
    inserted: list[list[list[str]]] = [[[] for _ in range(len(reference) + 1)] for _ in hypotheses]
    cells: list[list[tuple[str, str]]] = [[] for _ in hypotheses]
    for number, hypothesis in enumerate(hypotheses):
        for operation, _, token in align(reference, hypothesis):
            if operation == "insert":
                inserted[number][len(cells[number])].append(token)
            else:
                cells[number].append((operation, token))
    columns = []
    for index in range(len(reference) + 1):
        for tokens in zip_longest(*(places[index] for places in inserted)):
            columns.append(
                Column("", tuple(("equal", "") if token is None else ("insert", token) for token in tokens))
            )
        if index < len(reference):
            columns.append(Column(reference[index], tuple(aligned[index] for aligned in cells)))
    return columns


def count_confusions(utterances: Iterable[ScoredUtterance]) -> dict[str, Counter[tuple[str, str]]]:
    """Counts reference token and hypothesis token of "replace", "delete" and "insert"; a missing token is empty."""
    counts: dict[str, Counter[tuple[str, str]]] = {"replace": Counter(), "delete": Counter(), "insert": Counter()}
    for utterance in utterances:
        if utterance.counts.errors:
            for operation, reference, hypothesis in align(utterance.reference, utterance.hypothesis):
                if operation != "equal":
                    counts[operation][reference, hypothesis] += 1
    return counts


def frequent_confusions(
    utterances: Iterable[ScoredUtterance], others: Iterable[ScoredUtterance] = ()
) -> dict[str, list[tuple[tuple[str, str], int, int]]]:
    """Returns confusions that occur more than once, most frequent first, with their numbers in both systems."""
    counts, other_counts = count_confusions(utterances), count_confusions(others)
    result = {}
    for operation, found in counts.items():
        before = other_counts[operation]
        rows = [(pair, found[pair], before[pair]) for pair in (found | before) if max(found[pair], before[pair]) > 1]
        result[operation] = sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))[:NUM_CONFUSIONS]
    return result


def worst_utterances(utterances: Iterable[ScoredUtterance], number: int) -> list[ScoredUtterance]:
    """Returns up to `number` utterances with errors, sorted by errors, then by error rate, highest first."""
    wrong = (utterance for utterance in utterances if utterance.counts.errors)
    return sorted(wrong, key=lambda u: (-u.counts.errors, -u.counts.rate))[:number]


@dataclass(frozen=True)
class Examples:
    """Utterances that the page shows with alignments and recordings.

    Args:
        worst: utterances with most errors.
        better, worse: utterances with fewer and with more errors than in the second hypotheses, largest change first.
    """

    worst: list[ScoredUtterance]
    better: list[ScoredUtterance]
    worse: list[ScoredUtterance]

    def ids(self) -> list[str]:
        """Returns the IDs of all examples, in the order of the page."""
        return list(dict.fromkeys(u.id for u in (*self.worse, *self.better, *self.worst)))


def choose_examples(
    utterances: Sequence[ScoredUtterance],
    number: int,
    missing: Collection[str] = (),
    others: Sequence[ScoredUtterance] = (),
    other_missing: Collection[str] = (),
) -> Examples:
    """Chooses utterances for the page; an utterance without a hypothesis shows nothing and is not chosen.

    Args:
        utterances: all scored utterances.
        number: number of utterances with most errors, at most.
        missing, other_missing: IDs without a first and without a second hypothesis.
        others: the same utterances with the second hypotheses.
    """
    absent = set(missing)
    present = [utterance for utterance in utterances if utterance.id not in absent]
    before = {other.id: other.counts for other in others}
    for id_ in other_missing:
        before.pop(id_, None)
    changes = {u.id: u.counts.errors - before[u.id].errors for u in present if u.id in before}
    limit = min(number, NUM_CHANGED)
    better, worse = (
        sorted(
            (u for u in present if sign * changes.get(u.id, 0) > 0),
            key=lambda u: (-abs(changes[u.id]), -abs(u.counts.rate - before[u.id].rate)),
        )[:limit]
        for sign in (-1, 1)
    )
    return Examples(worst_utterances(present, number), better, worse)


def html_report(
    score: Mapping[str, Any],
    utterances: Sequence[ScoredUtterance],
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    examples: Examples,
    durations: Mapping[str, float],
    sounds: Mapping[str, Sound],
    hotwords: Sequence[HotwordCounts] = (),
    comparison: Comparison | None = None,
    others: Sequence[ScoredUtterance] = (),
    other_hypotheses: Mapping[str, str] | None = None,
    words: Sequence[JudgedWord] = (),
) -> str:
    """Returns the HTML page: summary, comparison, tables, confusions, chart, examples. Jinja escapes all texts.

    Args:
        score: content of score.json.
        utterances: all scored utterances.
        references: unnormalised texts by ID.
        hypotheses: unnormalised texts by ID.
        examples: utterances to show.
        durations: seconds by ID; may lack some utterances.
        sounds: recordings to embed, by ID; may lack some of the examples.
        hotwords: hotword counts.
        comparison: comparison with the second hypotheses.
        others: the same utterances with the second hypotheses.
        other_hypotheses: unnormalised second hypotheses by ID.
        words: judged words, for the section about confidence.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda rate: "–" if rate is None else f"{100 * rate:.2f}\u00a0%"
    environment.filters["points"] = lambda rate: f"{100 * rate:+.2f}".replace("-", "−")
    environment.filters["number"] = lambda number: f"{number:,}".replace(",", "\u202f")
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    missing = set(score["missing_hypotheses"])
    present = [utterance for utterance in utterances if utterance.id not in missing]
    before = {other.id: other for other in others}
    links = {id_: f"#example-{number}" for number, id_ in enumerate(examples.ids(), start=1)}
    occurring = [hotword for hotword in hotwords if hotword.said or hotword.written]
    wrong_hotwords = sorted(occurring, key=lambda h: (h.found - h.said, h.found - h.written, h.hotword))
    return template.render(
        score=score,
        today=date.today().isoformat(),
        groups=[(name, score[name]) for name in ("datasets", "languages") if len(score[name]) > 1],
        chart=duration_chart(utterances, durations, links, missing),
        hours=sum(durations.get(utterance.id, 0) for utterance in utterances) / 3600,
        rate_of_present=sum((u.counts for u in present), ErrorCounts()).rate,
        confusions=frequent_confusions(present, [o for o in others if o.id in (other_hypotheses or {})]),
        examples=examples,
        links=links,
        columns={
            u.id: align_columns(u.reference, u.hypothesis, *([before[u.id].hypothesis] if before else []))
            for u in (*examples.worse, *examples.better, *examples.worst)
        },
        before=before,
        references=references,
        hypotheses=hypotheses,
        other_hypotheses=other_hypotheses or {},
        # Missing hypotheses have a list of their own.
        empty_hypotheses=[id_ for id_ in score["empty_hypotheses"] if id_ in hypotheses],
        durations=durations,
        sounds=sounds,
        hotwords=list(islice(wrong_hotwords, NUM_HOTWORDS)),
        comparison=comparison,
        reliability=reliability_diagram(words) if words else None,
        least_confident=least_confident(words, calibration, NUM_UNSURE) if (calibration := fit(words)) else [],
        unit=UNITS[score["metric"]],
        num_named=NUM_NAMED,
        num_dots=NUM_DOTS,
    )
