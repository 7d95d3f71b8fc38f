"""Checks that compare rows with each other: duplicates, splits, styles, pace, prompts."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..audio.time_range import split_time_range
from ..data.utterance import SPLITS
from ..evaluation.languages import is_english
from .kinds import limit
from .measurement import Measurement
from .rows import DataRow
from .scripts import main_script, scripts, syllables
from .text_checks import show

Found = tuple[int, str, str]  # number of the row, kind, detail
CorpusCheck = Callable[["Corpus"], Iterator[Found]]

MIN_ROWS = 20  # rows from which a style can be rare
MOST = 0.9  # share of a style that makes others unusual
MIN_PACE_ROWS, MIN_PACE_SCALE = 30, 0.05  # rows, and scale of log durations: read speech has 0.1
MAX_PACE_FACTOR = 3.0  # from the median of seconds per syllable; other rows do not change what is expected
PACE_FACTOR, PACE_SECONDS = 1.8, 0.55  # by which a row must differ, besides the threshold
SHORT_SECONDS = 0.35  # or by which the whole recording is shorter than expected: single words may be drawn out
MIN_UNIQUE = 0.5  # share of different texts from which a repeated text is unusual
MIN_SYLLABLES = 4.0  # of a text in another script
MIN_WORDS = 6  # of a text in another language
CUT_LEVEL, CUT_MARGIN = 12.0, 10.0  # dB below speech, and above noise: an edge inside a word
CUT_SECONDS = 0.65  # shorter recordings, of single words, often have no pauses at the edges
CASED = ("LATIN", "CYRILLIC", "GREEK")
CLOSING = " \"'”’」』）)]"
FINAL_MARKS = frozenset(".!?…。！？")


@dataclass
class Corpus:
    """All readable rows.

    Args:
        rows: the rows.
        measured: measurements of the recordings of each row.
    """

    rows: Sequence[DataRow]
    measured: Sequence[Sequence[Measurement]]

    @cached_property
    def usable(self) -> list[int]:
        """Numbers of the rows with one recording that has sound."""
        return [
            index
            for index, found in enumerate(self.measured)
            if len(found) == 1 and found[0].error is None and found[0].peak > 0
        ]

    @cached_property
    def texts(self) -> list[str]:
        """Texts without case, spaces and punctuation."""
        return ["".join(filter(str.isalnum, row.text.casefold())) for row in self.rows]

    @cached_property
    def scripts(self) -> list[str | None]:
        """Main scripts of the texts."""
        return [main_script(row.text) for row in self.rows]

    @cached_property
    def syllables(self) -> list[float]:
        """Estimated syllables of the texts."""
        return [syllables(row.text) for row in self.rows]

    @cached_property
    def expected(self) -> dict[int, float]:
        """Seconds of speech that a text takes, by number of the row, from a line fitted to the rows of its script."""
        by_script: dict[str | None, list[int]] = defaultdict(list)
        for index in self.usable:
            if self.syllables[index] > 0 and self.measured[index][0].sounding_seconds > 0:
                by_script[self.scripts[index]].append(index)
        found: dict[int, float] = {}
        for rows in by_script.values():
            if len(rows) >= MIN_PACE_ROWS:
                spoken = np.array([self.syllables[index] for index in rows])
                seconds = np.array([self.measured[index][0].sounding_seconds for index in rows])
                found |= zip(rows, fit_line(spoken, seconds).tolist(), strict=True)
        return found

    def place(self, index: int) -> str:
        """Returns file and line of a row."""
        return f"{os.path.relpath(self.rows[index].file)}:{self.rows[index].line}"


def check_corpus(corpus: Corpus) -> Iterator[Found]:
    """Yields all faults that need several rows."""
    for check in CORPUS_CHECKS:
        yield from check(corpus)


def order_of(split: str) -> int:
    """Returns the position of a split: a row of training is removed before one of dev or test."""
    return SPLITS.index(split)


def _groups(keys: Iterable[tuple[int, Hashable]]) -> dict[Hashable, list[int]]:
    """Returns the rows of each key that several rows have."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in keys:
        found[key].append(index)
    return {key: rows for key, rows in found.items() if len(rows) > 1}


def _ids(corpus: Corpus) -> Iterator[Found]:
    for id, rows in _groups((i, row.id) for i, row in enumerate(corpus.rows) if row.has_id).items():
        for index in rows[1:]:
            yield index, "duplicate-id", f"{id} is the ID of {corpus.place(rows[0])}, too"


def _duplicates(corpus: Corpus) -> Iterator[Found]:
    keys = ((i, m.digest) for i in corpus.usable for m in corpus.measured[i])
    for rows in _groups(keys).values():
        yield from same_recording(corpus, rows, "duplicate-recording", "")


def same_recording(corpus: Corpus, rows: list[int], kind: str, how: str) -> Iterator[Found]:
    """Yields findings for rows with the same recording: in two splits, with two transcripts, or twice."""
    rows = sorted(rows, key=lambda index: -order_of(corpus.rows[index].split))
    first = rows[0]
    texts = {corpus.texts[index] for index in rows}
    for index in rows[1:]:
        if corpus.rows[index].split != corpus.rows[first].split:
            split = corpus.rows[first].split
            yield index, "recording-in-two-splits", f"also in {split}: {corpus.place(first)}{how}"
        elif len(texts) == 1:
            yield index, kind, f"same recording as {corpus.place(first)}{how}"
    if len(texts) > 1:
        for index in rows:
            other = next(i for i in rows if corpus.texts[i] != corpus.texts[index])
            shown = [show(corpus.rows[i].text, 30) for i in (index, other)]
            detail = f"{shown[0]} here, {shown[1]} in {corpus.place(other)}{how}"
            yield index, "conflicting-transcripts", detail


def _parts(corpus: Corpus) -> Iterator[Found]:
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for index, row in enumerate(corpus.rows):
        for source in row.recordings:
            whole, part = split_time_range(source)
            if part is not None:
                found[whole].append((part.start, part.end if part.end is not None else np.inf, index))
    for parts in found.values():
        parts.sort()
        splits = {corpus.rows[index].split: index for _, _, index in parts}
        last = max(splits, key=order_of)
        end, before = -1.0, -1
        for start, stop, index in parts:
            same = before >= 0 and corpus.rows[before].recordings == corpus.rows[index].recordings
            if end - start > limit("overlapping-parts") and not same:
                yield index, "overlapping-parts", f"{end - start:.2f} s are also in {corpus.place(before)}"
            if stop > end:
                end, before = stop, index
            if corpus.rows[index].split != last:
                detail = f"another part of the file is in {last}: {corpus.place(splits[last])}"
                yield index, "file-in-two-splits", detail


def _texts_in_splits(corpus: Corpus) -> Iterator[Found]:
    for text, rows in _groups(enumerate(corpus.texts)).items():
        first = max(rows, key=lambda index: order_of(corpus.rows[index].split))
        letters = len(str(text)) * (1 if corpus.scripts[first] in CASED else 3)
        if letters < limit("text-in-two-splits"):
            continue
        split = corpus.rows[first].split
        for index in rows:
            if corpus.rows[index].split != split:
                detail = f"{show(corpus.rows[index].text, 40)} is also in {split}: {corpus.place(first)}"
                yield index, "text-in-two-splits", detail


def _repeated_texts(corpus: Corpus) -> Iterator[Found]:
    counts = Counter(text for text in corpus.texts if text)
    if len(counts) < MIN_UNIQUE * len(corpus.rows) or len(corpus.rows) < MIN_ROWS:
        return
    most = max(5.0, limit("repeated-text") * len(corpus.rows))
    for index, text in enumerate(corpus.texts):
        if counts[text] >= most:
            yield index, "repeated-text", f"{counts[text]} rows have the text {show(corpus.rows[index].text, 30)}"


def _speakers(corpus: Corpus) -> Iterator[Found]:
    rows = corpus.rows
    speakers = {row.speaker for row in rows} - {None}
    for index, row in enumerate(rows):
        if row.text in speakers and row.text != row.speaker and not row.text.isalpha():
            yield index, "wrong-column", f"the text is a speaker: {show(row.text)}"
    divisible = len(speakers) > 1  # the only speaker is in every split, there is no other way
    for speaker, found in _groups((i, row.speaker) for i, row in enumerate(rows) if row.speaker and divisible).items():
        splits = Counter(rows[index].split for index in found)
        if len(splits) > 1:
            first = min(found, key=lambda index: order_of(rows[index].split))
            counts = ", ".join(f"{count} in {split}" for split, count in splits.items())
            yield first, "speaker-in-two-splits", f"speaker {speaker} has rows in several splits: {counts}"
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.speaker:
            spelled["".join(filter(str.isalnum, row.speaker.casefold()))][row.speaker] += 1
    for names in spelled.values():
        usual = names.most_common(1)[0][0]
        for index, row in enumerate(rows):
            if len(names) > 1 and row.speaker in names and row.speaker != usual:
                yield index, "speaker-spelling", f"speaker {row.speaker!r}, elsewhere {usual!r}"
    missing = [index for index, row in enumerate(rows) if not row.speaker]
    if 0 < len(missing) <= 0.5 * len(rows):
        for index in missing:
            yield index, "missing-speaker", f"no speaker, but {len(rows) - len(missing)} other rows have one"


def _rare(keys: Mapping[int, Hashable], share: float) -> Iterator[tuple[int, Hashable, Hashable]]:
    """Yields rows with a rare key, the key and the usual key, if nearly all rows have the usual one."""
    counts = Counter(keys.values())
    if len(keys) < MIN_ROWS or len(counts) < 2:
        return
    usual, most = counts.most_common(1)[0]
    if most < MOST * len(keys):
        return
    for index, key in keys.items():
        if counts[key] <= share * len(keys):
            yield index, key, usual


def _rates(corpus: Corpus) -> Iterator[Found]:
    rates = {index: corpus.measured[index][0].rate for index in corpus.usable}
    unusual = set()
    for index, rate, usual in _rare(rates, limit("unusual-sampling-rate")):
        unusual.add(index)
        yield index, "unusual-sampling-rate", f"{rate} Hz; nearly all other rows have {usual} Hz"
    low = [index for index, rate in rates.items() if rate < limit("low-sampling-rate") and index not in unusual]
    if low:
        yield low[0], "low-sampling-rate", f"{len(low)} of {len(rates)} recordings have {rates[low[0]]} Hz"


def _cut_speech(corpus: Corpus) -> Iterator[Found]:
    def loud_edges(m: Measurement) -> tuple[bool, ...]:
        noise = min(m.quiet_level, *m.edge_levels)
        return tuple(level > max(m.level - CUT_LEVEL, noise + CUT_MARGIN) for level in m.edge_levels)

    found = {index: corpus.measured[index][0] for index in corpus.usable}
    edges = {index: loud_edges(m) for index, m in found.items() if m.seconds >= CUT_SECONDS}
    for index, _, usual in _rare({index: any(loud) for index, loud in edges.items()}, limit("cut-speech")):
        if not usual:
            places = " and ".join(place for place, loud in zip(("starts", "ends"), edges[index], strict=True) if loud)
            yield index, "cut-speech", f"{places} in the middle of speech, unlike nearly all other recordings"


def _case(text: str) -> str | None:
    letters = [character for character in text if character.isupper() or character.islower()]
    if len(letters) < 8:
        return None
    upper = sum(map(str.isupper, letters))
    return "capitals" if upper == len(letters) else "lower case" if not upper else "upper and lower case"


def _styles(corpus: Corpus) -> Iterator[Found]:
    known = {index: found for index, found in enumerate(corpus.scripts) if found is not None}
    for index, name, usual in _rare(known, limit("unusual-script")):
        if scripts(corpus.rows[index].text)[str(usual)] or corpus.syllables[index] < MIN_SYLLABLES:
            continue  # a foreign name, or spelled letters
        names = [str(script).capitalize() for script in (name, usual)]
        text = show(corpus.rows[index].text, 40)
        yield index, "unusual-script", f"{names[0]} letters; nearly all other rows have {names[1]}: {text}"
    cased = {index: corpus.rows[index].text for index, found in known.items() if found in CASED}
    cases = {index: style for index, text in cased.items() if (style := _case(text)) is not None}
    for index, case, usual in _rare(cases, limit("unusual-case")):
        yield index, "unusual-case", f"{case}; nearly all other rows have {usual}: {show(cased[index], 40)}"
    marks = {index: row.text.rstrip(CLOSING)[-1:] in FINAL_MARKS for index, row in enumerate(corpus.rows)}
    for index, mark, _ in _rare(marks, limit("unusual-punctuation")):
        detail = f"{'a' if mark else 'no'} final mark, unlike nearly all other rows"
        yield index, "unusual-punctuation", f"{detail}: {show(corpus.rows[index].text[-40:], 40)}"
    latin = {i: is_english(text.lower()) for i, text in cased.items() if known[i] == "LATIN"}
    for index, english, _ in _rare(latin, limit("unusual-language")):
        if not english and _is_foreign(cased[index].lower().split()):
            yield index, "unusual-language", f"not English, unlike nearly all other rows: {show(cased[index], 40)}"


def _is_foreign(words: list[str]) -> bool:
    """Returns whether a text is not English, whatever word is left out: one may be a foreign name."""
    without = (" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))
    return len(words) >= MIN_WORDS and not any(map(is_english, without))


def _prompts(corpus: Corpus) -> Iterator[Found]:
    rows = corpus.rows
    used: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        used[row.split].add(row.prompt)
    for split, prompts in used.items():
        for prompt in sorted(prompts - used.get("train", prompts)):
            same = [index for index, row in enumerate(rows) if row.split == split and row.prompt == prompt]
            detail = f"{len(same)} rows of {split} ask {show(prompt.partition(chr(10))[2])!r}, which train never asks"
            yield same[0], "prompt-mismatch", detail
    if len(rows) >= 1 / limit("rare-prompt"):
        for index, _, _ in _rare({i: row.prompt for i, row in enumerate(rows)}, limit("rare-prompt")):
            yield index, "rare-prompt", f"only a few rows ask {show(rows[index].prompt.partition(chr(10))[2])!r}"


def _pace(corpus: Corpus) -> Iterator[Found]:
    """Finds rows whose time of speech is far from what their text takes."""
    by_script: dict[str | None, list[int]] = defaultdict(list)
    for index in corpus.expected:
        by_script[corpus.scripts[index]].append(index)
    for rows in by_script.values():
        seconds = np.array([corpus.measured[index][0].sounding_seconds for index in rows])
        expected = np.array([corpus.expected[index] for index in rows])
        ratios = np.log(seconds / expected)
        middle = float(np.median(ratios))
        scale = max(1.4826 * float(np.median(np.abs(ratios - middle))), MIN_PACE_SCALE)
        unusual = np.abs(ratios - middle) > limit("unusual-pace") * scale
        total = np.array([corpus.measured[index][0].seconds for index in rows])
        differs = (np.abs(seconds - expected) > PACE_SECONDS) | (expected - total > SHORT_SECONDS)
        unusual &= (np.abs(ratios) > np.log(PACE_FACTOR)) & differs
        for place in np.flatnonzero(unusual).tolist():
            more = "long" if ratios[place] > 0 else "short"
            detail = f"{seconds[place]:.1f} s of speech are {more} for this text; expected {expected[place]:.1f} s"
            yield rows[place], "unusual-pace", f"{detail}: {show(corpus.rows[rows[place]].text, 40)}"


def fit_line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fits y = a + b x by repeated medians of weighted least squares; returns the values of the line, above 0.

    Args:
        x, y: shape = (points,), positive.
    """
    paces = np.log(y / x)
    # A text of hundreds of words on a second would tilt the line.
    plausible = np.abs(paces - np.median(paces)) < np.log(MAX_PACE_FACTOR)
    weights, line = plausible.astype(float), np.full_like(y, float(np.median(y)))
    for _ in range(10):
        centre, height = np.average(x, weights=weights), np.average(y, weights=weights)
        spread = float(np.average((x - centre) ** 2, weights=weights))
        slope = float(np.average((x - centre) * (y - height), weights=weights)) / spread if spread > 1e-6 else 0.0
        line = np.maximum(height + max(slope, 0.0) * (x - centre), 0.05)
        errors = np.abs(np.log(y / line))
        weights = plausible / np.maximum(errors, np.median(errors) + 1e-3) / line  # long rows have larger errors
    return line


# A new check is one entry here, and its threshold one entry of `KINDS`.
CORPUS_CHECKS: tuple[CorpusCheck, ...] = (
    _ids,
    _duplicates,
    _parts,
    _texts_in_splits,
    _repeated_texts,
    _speakers,
    _rates,
    _cut_speech,
    _styles,
    _prompts,
    _pace,
)
