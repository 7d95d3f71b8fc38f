"""Hotwords of training rows: true ones, distractors among them, and rows without any.

A model that only ever sees lists whose words are all said learns to copy lists; one that never sees a list forgets how
to use it. Rows therefore get lists as in decoding, where most words are not said. The method is that of Pundak et al.,
"Deep context: end-to-end contextual speech recognition" (2018, arXiv:1808.02480), section 3.2: phrases of up to four
words from the row's own transcript for a share of the rows (there 0.5), others' phrases as distractors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..model import chat

if TYPE_CHECKING:
    from datasets import Dataset

    from .options import DataOptions

MAX_UNITS = 4  # words or characters of a phrase taken from a transcript
MIN_LETTERS = 4  # of such a phrase, a character of Chinese or Japanese counting as 2: "of the" is in every transcript
MINED_ROWS = 20_000  # of a corpus whose phrases become distractors
# Scripts without spaces, whose characters are units of their own: kana, Han and its extensions.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LETTER = rf"[^\W_{_CHARACTERS}]"
_UNIT = re.compile(rf"[{_CHARACTERS}]|{_LETTER}+(?:['’.-]{_LETTER}+)*")
_STREAM = 1  # of a row's random numbers; augmentation draws from the others, which hotwords must not shift


@dataclass
class HotwordSampler:
    """Draws the hotwords that a row has in training.

    Args:
        known: words that are hotwords of every row whose answers hold them, if the row has none of its own.
        distractors: what words that are not said are drawn from.
        num_distractors: the most of them in a row; their number is drawn evenly from 0 to this.
        dropout: share of rows that get no hotwords at all.
        from_text: share of rows without a hotword that get one: a phrase of their own answers.
    """

    known: Sequence[str] = ()
    distractors: Sequence[str] = ()
    num_distractors: int = 0
    dropout: float = 0.0
    from_text: float = 0.0

    def __post_init__(self):
        self._folded = [word.casefold() for word in self.known]

    def __call__(self, own: Sequence[str], answers: Sequence[str], seed: int | Sequence[int]) -> list[str]:
        """The hotwords of a row, in random order.

        Args:
            own: hotwords that the row carries; they all stay, unless the row is to have none.
            answers: its transcripts.
            seed: of the row in this epoch; the same seed gives the same hotwords.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        if rng.random() < self.dropout:
            return []
        text = "\n".join(answers).casefold()
        words = list(own) or [
            word for word, folded in zip(self.known, self._folded, strict=True) if says(text, folded)
        ]
        if not words and rng.random() < self.from_text:
            candidates = [phrase for answer in answers for phrase in phrases(answer)]
            if candidates:
                words = [candidates[rng.integers(len(candidates))]]
        number = min(int(rng.integers(self.num_distractors + 1)), len(self.distractors))
        for index in rng.choice(len(self.distractors), number, replace=False) if number else ():
            word = self.distractors[index]
            if word not in words and not says(text, word.casefold()):
                words.append(word)
        return [words[index] for index in rng.permutation(len(words))]


def says(text: str, word: str) -> bool:
    """Whether a text holds a word, not as a part of a longer one (`art` in `party`); both case-folded."""
    if word not in text:
        return False
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1]) else ""
    return re.search(before + re.escape(word) + after, text) is not None


def phrases(text: str) -> list[str]:
    """All phrases of a transcript that could be hotwords: runs of up to `MAX_UNITS` words, or characters of Chinese or
    Japanese, without punctuation between them, with `MIN_LETTERS` letters or more."""
    units = list(_UNIT.finditer(text))
    found = []
    for first, unit in enumerate(units):
        letters, end = 0, unit.start()
        for following in units[first : first + MAX_UNITS]:
            if text[end : following.start()].strip():
                break
            letters += 2 if re.match(f"[{_CHARACTERS}]", following[0]) else len(following[0])
            end = following.end()
            if letters >= MIN_LETTERS:
                found.append(text[unit.start() : end])
    return found


def read_words(path: str | Path) -> list[str]:
    """The different words of a list with one in each line, in its order.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or a word holds a token that dialogues are made of.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: save the list as UTF-8") from error
    try:
        return _different(chat.parse_hotwords(lines))
    except chat.ChatError as error:
        raise ValueError(f"{path}: {error}") from error


def listed_words(words_or_file: str | None) -> list[str]:
    """The different words of an option: a file with one in each line, or the words themselves with commas between.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or what looks like a file's name is none.
    """
    words = chat.parse_hotwords(words_or_file)
    if words_or_file and os.path.isfile(words_or_file):  # Path.is_file raises where a list is too long for a name
        return read_words(words_or_file)
    if len(words) == 1 and words[0].endswith((".txt", ".list")):
        raise ValueError(f"{words[0]}: no such file")
    return _different(words)


def mine_words(rows: Dataset, with_phrases: bool, seed: int) -> list[str]:
    """Distractors from training rows: the hotwords of all rows, and a random phrase of each row.

    Args:
        rows: from `dataset.prepare_rows`.
        with_phrases: whether phrases are wanted too; of at most `MINED_ROWS` rows, spread over all.
        seed: of the choice of phrases.
    """
    words = [word for own in rows["hotwords"] for word in own or ()]
    if with_phrases:
        rng = np.random.default_rng(seed)
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MINED_ROWS)).astype(int))
        for messages in rows.select_columns(["messages"]).select(chosen)["messages"]:
            candidates = [phrase for answer in answers_of(messages) for phrase in phrases(answer)]
            if candidates:
                words.append(candidates[rng.integers(len(candidates))])
    return _different(words)


def answers_of(messages: str) -> list[str]:
    """The answers of a row's `messages` (JSON)."""
    return [turn.answer for turn in chat.parse_messages(json.loads(messages)).turns if turn.answer is not None]


def hotword_sampler(options: DataOptions, rows: Dataset | None, seed: int = 0) -> HotwordSampler | None:
    """What the options of training ask for; `None` if rows are to keep the hotwords they carry.

    Args:
        options: those about hotwords are used.
        rows: training rows, from which distractors come without `--hotword_file`; `None` when streaming.
        seed: of the choice of phrases.

    Raises:
        OSError: if `--hotword_file` cannot be read.
        ValueError: if it is not UTF-8, or there are no distractors.
    """
    if not (
        options.hotword_file or options.hotword_distractors or options.hotword_dropout or options.hotwords_from_text
    ):
        return None
    known, distractors = [], []
    if options.hotword_file is not None:
        known = distractors = read_words(options.hotword_file)
        if not known:
            raise ValueError(f"{options.hotword_file}: no words; write one in each line")
    elif options.hotword_distractors and rows is not None:
        distractors = mine_words(rows, options.hotwords_from_text > 0, seed)
        if not distractors:
            raise ValueError(
                f'--hotword_distractors {options.hotword_distractors}: no row carries "hotwords"; give '
                "--hotword_file, or --hotwords_from_text"
            )
    return HotwordSampler(
        known, distractors, options.hotword_distractors, options.hotword_dropout, options.hotwords_from_text
    )


def _different(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word))
