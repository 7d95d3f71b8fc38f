"""Hotword lists of training rows: spoken hotwords, distractors, and rows without hotwords.

Training only with lists of spoken words teaches the model to copy lists; training without lists makes it ignore them.
Therefore training lists resemble lists in decoding, where most words are not spoken. The method follows Pundak et al.,
"Deep context: end-to-end contextual speech recognition" (2018, arXiv:1808.02480), section 3.2: a share of the rows
(0.5 in the paper) gets a phrase of up to four words from the transcript; phrases of other rows are distractors.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..model import chat
from .column_values import read_column

if TYPE_CHECKING:
    from datasets import Dataset

    from .options import DataOptions

MAX_UNITS = 4  # maximum of words or characters in a phrase from a transcript
MIN_LETTERS = 4  # minimum of letters in a phrase, to exclude common words; a Chinese or Japanese character counts as 2
MINED_ROWS = 20_000  # maximum of rows whose phrases become distractors
# Scripts without spaces, whose characters are separate units: kana, Han and extensions.
CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Parts of words that `\w` lacks: combining marks, for example the vowel signs of Hindi, and the joiners of Persian.
MARKS = "\u200c\u200d" + "".join(
    character for character in map(chr, range(0x300, 0x1F000)) if unicodedata.category(character) in ("Mn", "Mc")
)
_LETTER = rf"(?:[^\W_{CHARACTERS}]|[{MARKS}])"
_LETTERS = rf"(?:[^\W_{CHARACTERS}][{MARKS}]*)+"  # emoji have marks, too
_UNIT = re.compile(rf"[{CHARACTERS}][{MARKS}]*|{_LETTERS}(?:['’.-]{_LETTERS})*")
_STREAM = 1  # spawn key of the random numbers for hotwords, independent of the numbers for augmentation


@dataclass
class HotwordSampler:
    """Samples the hotwords of a row in training.

    Args:
        known: hotwords of all rows that have no hotwords and whose answers contain these words.
        distractors: candidates for words that are not spoken.
        num_distractors: maximum number of distractors per row; the number is uniform from 0 to this maximum.
        dropout: share of rows that get no hotwords.
        from_text: share of rows without hotwords that get a phrase of their answers as a hotword.
    """

    known: Sequence[str] = ()
    distractors: Sequence[str] = ()
    num_distractors: int = 0
    dropout: float = 0.0
    from_text: float = 0.0

    def __post_init__(self):
        self._folded = [word.casefold() for word in self.known]

    def __call__(self, own: Sequence[str], answers: Sequence[str], seed: int | Sequence[int]) -> list[str]:
        """Returns the hotwords of a row, in random order.

        Args:
            own: hotwords of the row; all are kept unless dropout removes all hotwords.
            answers: transcripts of the row.
            seed: seed of the row in this epoch; the same seed returns the same hotwords.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        if rng.random() < self.dropout:
            return []
        text = "\n".join(answers).casefold()
        words = list(own) or [
            word for word, folded in zip(self.known, self._folded, strict=True) if contains_word(text, folded)
        ]
        if not words and rng.random() < self.from_text:
            candidates = [phrase for answer in answers for phrase in phrases(answer)]
            if candidates:
                words = [candidates[rng.integers(len(candidates))]]
        number = min(int(rng.integers(self.num_distractors + 1)), len(self.distractors))
        for index in rng.choice(len(self.distractors), number, replace=False) if number else ():
            word = self.distractors[index]
            if word not in words and not contains_word(text, word.casefold()):
                words.append(word)
        return [words[index] for index in rng.permutation(len(words))]


def contains_word(text: str, word: str) -> bool:
    """Returns whether a text contains a word as a whole (not `art` in `party`); both must be case-folded."""
    if word not in text:
        return False
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1]) else ""
    return re.search(before + re.escape(word) + after, text) is not None


def phrases(text: str) -> list[str]:
    """Returns all phrases of a transcript that can be hotwords.

    A phrase has up to `MAX_UNITS` words (or Chinese or Japanese characters), at least `MIN_LETTERS` letters, and no
    punctuation between words.
    """
    units = list(_UNIT.finditer(text))
    found = []
    for first, unit in enumerate(units):
        letters, end = 0, unit.start()
        for following in units[first : first + MAX_UNITS]:
            if text[end : following.start()].strip():
                break
            letters += 2 if re.match(f"[{CHARACTERS}]", following[0]) else len(following[0])
            end = following.end()
            if letters >= MIN_LETTERS:
                found.append(text[unit.start() : end])
    return found


def read_words(path: str | Path) -> list[str]:
    """Reads the unique words of a list with one word per line, in order.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not UTF-8, or a word contains a special token of the dialogue format.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8; save the list as UTF-8") from error
    try:
        return _different(chat.parse_hotwords(lines))
    except chat.ChatError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_word_list(words_or_file: str | None) -> list[str]:
    """Returns the unique words of an option: a file with one word per line, or words separated by commas.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not UTF-8, or a name of a text file does not exist.
    """
    words = chat.parse_hotwords(words_or_file)
    if words_or_file and os.path.isfile(words_or_file):  # Path.is_file raises if a list is too long for a path
        return read_words(words_or_file)
    if len(words) == 1 and words[0].endswith((".txt", ".list")):
        raise ValueError(f"{words[0]}: no such file")
    return _different(words)


def mine_words(rows: Dataset, with_phrases: bool, seed: int) -> list[str]:
    """Returns distractors from training rows: the hotwords of all rows, and a random phrase of each row.

    Args:
        rows: result of `dataset.prepare_rows`.
        with_phrases: whether to include phrases, from at most `MINED_ROWS` evenly spaced rows.
        seed: seed of the choice of phrases.
    """
    words = [word for own in read_column(rows, "hotwords") for word in own or ()]
    if with_phrases:
        rng = np.random.default_rng(seed)
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MINED_ROWS)).astype(int))
        for messages in read_column(rows.select(chosen), "messages"):
            candidates = [phrase for answer in answers_of(messages) for phrase in phrases(answer)]
            if candidates:
                words.append(candidates[rng.integers(len(candidates))])
    return _different(words)


def answers_of(messages: str) -> list[str]:
    """Returns the answers in a row's `messages` (JSON)."""
    return [turn.answer for turn in chat.parse_messages(json.loads(messages)).turns if turn.answer is not None]


def hotword_sampler(options: DataOptions, rows: Dataset | None, seed: int = 0) -> HotwordSampler | None:
    """Builds the hotword sampler according to the options; `None` if each row keeps its own hotwords.

    Args:
        options: training options; only options for hotwords are used.
        rows: training rows, the source of distractors without `--hotword_file`; `None` with streaming.
        seed: seed of the choice of phrases.

    Raises:
        OSError: if `--hotword_file` cannot be read.
        ValueError: if `--hotword_file` is empty or not UTF-8, or there are no distractors.
    """
    if not (
        options.hotword_file or options.hotword_distractors or options.hotword_dropout or options.hotwords_from_text
    ):
        return None
    known, distractors = [], []
    if options.hotword_file is not None:
        known = distractors = read_words(options.hotword_file)
        if not known:
            raise ValueError(f"{options.hotword_file}: no words; write one word per line")
    elif options.hotword_distractors and rows is not None:
        distractors = mine_words(rows, options.hotwords_from_text > 0, seed)
        if not distractors:
            raise ValueError(
                f'--hotword_distractors {options.hotword_distractors}: no row has "hotwords"; give --hotword_file or '
                "--hotwords_from_text"
            )
    return HotwordSampler(
        known, distractors, options.hotword_distractors, options.hotword_dropout, options.hotwords_from_text
    )


def _different(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word))
