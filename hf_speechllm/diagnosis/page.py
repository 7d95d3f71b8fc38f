"""The report as one self-contained HTML page: table of kinds, histograms, findings with players."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import resources
from typing import Any

import numpy as np

from ..audio.time_range import add_time_range, split_time_range
from ..evaluation.report_audio import Sound, embed_sound
from ..files import atomic_write
from .doctor import Diagnosis, Finding
from .kinds import KINDS, SEVERITIES
from .scripts import syllables
from .text_checks import show

NUM_FINDINGS = 20  # findings of a kind on the page, at most; the JSON report has all
NUM_PLAYERS = 5  # findings of a kind with a player, at most
MAX_PLAYERS = 200  # on the page, at most
PLAYER_SECONDS = 20.0  # of a recording on the page, at most
TEXT_LENGTH = 300  # characters of a transcript on the page
NUM_BINS = 24
WIDTH, HEIGHT, BASE = 320, 130, 100  # of a histogram, and the position of its axis
LEFT = 4  # of the first bar


def write_page(diagnosis: Diagnosis, path: str, data: Sequence[str], audio: bool = True) -> None:
    """Writes the page.

    Args:
        diagnosis: result of the examination.
        path: file to write.
        data: names of the examined data.
        audio: whether to embed recordings of findings.

    Raises:
        OSError: if the file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda number: f"{number:,}".replace(",", "\u202f")
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    flagged = {item.row for item in diagnosis.findings if item.row is not None and item.severity != "note"}
    page = template.render(
        data=data,
        today=date.today().isoformat(),
        num_rows=len(diagnosis.rows) + diagnosis.num_unreadable,
        hours=diagnosis.seconds / 3600,
        clean=len(diagnosis.rows) - len(flagged),
        counts={severity: diagnosis.count(severity) for severity in SEVERITIES},
        has_vad=diagnosis.has_vad,
        kinds=KINDS,
        sections=list(_sections(diagnosis, audio)),
        histograms=list(_histograms(diagnosis)),
        splits=_splits(diagnosis),
    )
    with atomic_write(path) as file:
        file.write(page)


def _splits(diagnosis: Diagnosis) -> list[tuple[str, int, float]]:
    """Returns rows and hours of each split."""
    found: dict[str, list[float]] = {}
    for row, measured in zip(diagnosis.rows, diagnosis.measured, strict=True):
        found.setdefault(row.split, []).append(sum(one.seconds for one in measured))
    return [(split, len(seconds), sum(seconds) / 3600) for split, seconds in found.items()]


def _sections(diagnosis: Diagnosis, audio: bool) -> Iterator[dict[str, Any]]:
    """Yields the findings of each kind, with place, transcript and player."""
    players = 0
    for kind, findings in diagnosis.kinds():
        shown = []
        for number, finding in enumerate(findings[:NUM_FINDINGS]):
            sound = None
            if audio and finding.row is not None and number < NUM_PLAYERS and players < MAX_PLAYERS:
                sound = _sound(diagnosis, finding)
                players += sound is not None
            row = None if finding.row is None else diagnosis.rows[finding.row]
            seconds = 0.0 if finding.row is None else sum(one.seconds for one in diagnosis.measured[finding.row])
            shown.append(
                {
                    "finding": finding,
                    "place": f"{os.path.basename(finding.file)}:{finding.line}",
                    "text": show(row.text, TEXT_LENGTH) if row else "",
                    "recording": row.recordings[0] if row else "",
                    "seconds": seconds,
                    "sound": sound,
                }
            )
        yield {"kind": kind, "count": len(findings), "shown": shown}


def _sound(diagnosis: Diagnosis, finding: Finding) -> Sound | None:
    """Returns the recording of a finding; `None` if it cannot be played."""
    assert finding.row is not None
    measured = diagnosis.measured[finding.row]
    if not measured or measured[0].error is not None:
        return None
    source = diagnosis.rows[finding.row].recordings[0]
    whole, part = split_time_range(source)
    if part is None and measured[0].seconds > PLAYER_SECONDS:
        source = add_time_range(whole, 0, PLAYER_SECONDS)
    sound = embed_sound(source)
    note = f"first {PLAYER_SECONDS:.0f} s" if source != diagnosis.rows[finding.row].recordings[0] else sound.note
    return Sound(sound.uri, note) if sound.uri else None


def _histograms(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str]]:
    """Yields title, unit and SVG of each histogram."""
    from markupsafe import Markup

    good = [
        (row, measured)
        for row, measured in zip(diagnosis.rows, diagnosis.measured, strict=True)
        if measured and all(one.error is None for one in measured)
    ]
    sounding = [one for _, measured in good for one in measured if one.peak > 0]
    paces = []
    for row, measured in good:
        seconds = sum(one.sounding_seconds for one in measured)
        if seconds > 0:
            paces.append(min(syllables(row.text) / seconds, 30.0))
    for title, unit, values, log in (
        ("Duration", "s", [sum(one.seconds for one in measured) for _, measured in good], True),
        ("Level of speech", "dBFS", [one.level for one in sounding], False),
        ("Speaking rate", "syllables per second of speech, estimated", paces, False),
        ("Bandwidth", "kHz", [(one.bandwidth or one.rate / 2) / 1000 for one in sounding], False),
    ):
        if values:
            yield title, unit, Markup(histogram(np.array(values), log))


def histogram(values: np.ndarray, log: bool) -> str:
    """Draws a histogram as SVG; the page's style sheet colours it.

    Args:
        values: at least one.
        log: whether the axis is logarithmic; values must then be positive.
    """
    scaled = np.log10(np.maximum(values, 1e-3)) if log else values
    low, high = float(scaled.min()), float(scaled.max())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(scaled, NUM_BINS, (low, high))
    width = (WIDTH - 2 * LEFT) / NUM_BINS
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for index, count in enumerate(counts.tolist()):
        if count:
            height = max(1.5, (BASE - 8) * count / counts.max())
            ends = [10**edge if log else edge for edge in edges[index : index + 2]]
            title = f"{ends[0]:.3g} to {ends[1]:.3g}: {count}"
            x = LEFT + index * width
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{BASE - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}">'
                f"<title>{title}</title></rect>"
            )
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{BASE}" y2="{BASE}"/>')
    for value, label in _ticks(low, high, log):
        x = LEFT + (WIDTH - 2 * LEFT) * (value - low) / (high - low)
        anchor = "start" if x < 16 else "end" if x > WIDTH - 16 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BASE}" y2="{BASE + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BASE + 18}" text-anchor="{anchor}">{label}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """Returns positions and labels of three to eight round values."""
    if log and high - low > 0.7:
        values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        ticks = [(math.log10(value), f"{value:g}") for value in values if low <= math.log10(value) <= high]
        return ticks if len(ticks) < 8 else [tick for tick in ticks if tick[1][0] == "1" or tick[1][-1] == "1"]
    first, last = (10**low, 10**high) if log else (low, high)
    step = 10 ** math.floor(math.log10((last - first) / 2))
    step = next(step * m for m in (1, 2, 5, 10) if (last - first) / (step * m) <= 6)
    values = [step * n for n in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return [
        (math.log10(value) if log else value, f"{value:g}".replace("-", "−"))
        for value in values
        if not log or value > 0
    ]
