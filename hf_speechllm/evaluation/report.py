"""Score reports: the text file of compute-wer, and one self-contained HTML page."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib import resources
from itertools import islice
from typing import IO, Any

import numpy as np
from compute_wer.utils import default_cluster
from compute_wer.wer import SER, WER

from .confidence import JudgedWord, fit, least_confident, reliability_diagram
from .hotword_scores import HotwordCounts
from .report_audio import Sound
from .scoring import ErrorCounts, ScoredUtterance, align
from .statistics import Comparison, rate_interval

RULE = "=" * 75
NUM_BINS = 8  # bins of the chart, with equal numbers of utterances
NUM_DOTS = 2000  # dots in the chart, at most, which limits the size of the page
NUM_NAMED = 200  # IDs per list on the page, at most; score.json contains all IDs
NUM_UNSURE = 50  # utterances on the page, those with the lowest confidence
NUM_HOTWORDS = 100  # hotwords on the page, at most, hotwords with most errors first

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


def duration_chart(
    utterances: Sequence[ScoredUtterance], durations: Mapping[str, float], links: Mapping[str, str]
) -> str:
    """Draws error rates against durations, as SVG: one dot per utterance, one step per eighth of the utterances.

    Args:
        utterances: at least one must have a duration.
        durations: seconds by ID.
        links: link targets of dots, by ID.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    timed = sorted((u for u in utterances if u.id in durations), key=lambda u: durations[u.id])
    seconds = np.array([durations[u.id] for u in timed])
    rates = np.array([100 * u.counts.rate for u in timed])
    steps = []
    for group in np.array_split(np.arange(len(timed)), min(NUM_BINS, len(timed))):
        counts = [timed[index].counts for index in group]
        interval = rate_interval([c.errors for c in counts], [c.reference_tokens for c in counts], 1000)
        rate = sum(counts, ErrorCounts()).rate
        steps.append((seconds[group[0]], seconds[group[-1]], 100 * rate, *(100 * end for end in interval)))
    top = max(10.0, min(1.15 * max(rates.max(), *(step[4] for step in steps)), 110.0))
    dots = np.arange(len(timed))
    if len(dots) > NUM_DOTS:
        linked = np.array([u.id in links for u in timed])
        others = np.random.default_rng(0).permutation(dots[~linked])[:NUM_DOTS]
        dots = np.sort(np.concatenate([dots[linked], others]))

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        has_link = np.array([timed[index].id in links for index in dots])
        for chosen, colour, size in ((~has_link, "#94a3b8", 12), (has_link, "#c2410c", 18)):
            part = dots[chosen]
            points = axes.scatter(
                seconds[part],
                np.minimum(rates[part], top),
                s=size,
                color=colour,
                alpha=0.6,
                linewidths=0,
                clip_on=False,
            )
            points.set_urls([links.get(timed[index].id, "") for index in part])
        for start, end, rate, low, high in steps:
            axes.fill_between([start, end], [low] * 2, [min(high, top)] * 2, color="#2563eb", alpha=0.15, linewidth=0)
            axes.plot([start, end], [min(rate, top)] * 2, color="#1d4ed8", linewidth=2.2)
        if seconds[-1] > 20 * seconds[0]:
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="duration (s)", ylabel="error rate (%)", ylim=(0, top))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def worst_utterances(utterances: Iterable[ScoredUtterance], number: int) -> list[ScoredUtterance]:
    """Returns up to `number` utterances with errors, sorted by errors, then by error rate, highest first."""
    wrong = (utterance for utterance in utterances if utterance.counts.errors)
    return sorted(wrong, key=lambda u: (-u.counts.errors, -u.counts.rate))[:number]


def html_report(
    score: Mapping[str, Any],
    utterances: Sequence[ScoredUtterance],
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    worst: Sequence[ScoredUtterance],
    durations: Mapping[str, float],
    sounds: Mapping[str, Sound],
    hotwords: Sequence[HotwordCounts] = (),
    comparison: Comparison | None = None,
    words: Sequence[JudgedWord] = (),
) -> str:
    """Returns the HTML page: summary, comparison, tables, chart, worst utterances. Jinja escapes all texts.

    Args:
        score: content of score.json.
        utterances: all scored utterances.
        references: unnormalised texts by ID.
        hypotheses: unnormalised texts by ID.
        worst: utterances to show.
        durations: seconds by ID; may lack some utterances.
        sounds: recordings to embed, by ID; may lack some of the worst utterances.
        hotwords: hotword counts.
        comparison: comparison with the second hypotheses.
        words: judged words, for the section about confidence.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda rate: "–" if rate is None else f"{100 * rate:.2f}\u00a0%"
    environment.filters["points"] = lambda rate: f"{100 * rate:+.2f}".replace("-", "−")
    environment.filters["number"] = lambda number: f"{number:,}".replace(",", "\u202f")
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    links = {utterance.id: f"#worst-{rank}" for rank, utterance in enumerate(worst, start=1)}
    has_durations = any(utterance.id in durations for utterance in utterances)
    occurring = [hotword for hotword in hotwords if hotword.said or hotword.written]
    wrong_hotwords = sorted(occurring, key=lambda h: (h.found - h.said, h.found - h.written, h.hotword))
    return template.render(
        score=score,
        today=date.today().isoformat(),
        groups=[(name, score[name]) for name in ("datasets", "languages") if len(score[name]) > 1],
        chart=Markup(duration_chart(utterances, durations, links)) if has_durations else "",
        hours=sum(durations.get(utterance.id, 0) for utterance in utterances) / 3600,
        worst=[(utterance, align(utterance.reference, utterance.hypothesis)) for utterance in worst],
        references=references,
        hypotheses=hypotheses,
        # Missing hypotheses have a list of their own.
        empty_hypotheses=[id_ for id_ in score["empty_hypotheses"] if id_ in hypotheses],
        durations=durations,
        sounds=sounds,
        hotwords=list(islice(wrong_hotwords, NUM_HOTWORDS)),
        comparison=comparison,
        reliability=Markup(reliability_diagram(words)) if words else "",
        least_confident=least_confident(words, calibration, NUM_UNSURE) if (calibration := fit(words)) else [],
        num_named=NUM_NAMED,
        num_dots=NUM_DOTS,
    )
