"""Scripts of texts, and the number of syllables that they stand for."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

# Letters per syllable: English has 2.7 (CMUdict over its own words weighted by frequency), other alphabets are near;
# Arabic and Hebrew do not write vowels; a character of Chinese, a kana or a Hangul block is a syllable.
LETTERS_PER_SYLLABLE = {
    "LATIN": 2.7, "CYRILLIC": 2.4, "GREEK": 2.3, "ARABIC": 1.8, "HEBREW": 1.8, "THAI": 2.5, "LAO": 2.5,
    "CJK": 1.0, "HIRAGANA": 1.0, "KATAKANA": 1.0, "HANGUL": 1.0, "BOPOMOFO": 2.0,
}  # fmt: skip
OTHER_LETTERS_PER_SYLLABLE = 1.5  # the scripts of India and others, which write most vowels as marks
SYLLABLES_PER_DIGIT = 1.3
# Scripts of languages that prompts and rows name; Latin is the script of all others.
SCRIPTS_OF_LANGUAGES = {
    "zh": ("CJK",), "yue": ("CJK",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ko": ("HANGUL",), "th": ("THAI",),
    "ar": ("ARABIC",), "fa": ("ARABIC",), "hi": ("DEVANAGARI",), "bg": ("CYRILLIC",), "ru": ("CYRILLIC",),
    "uk": ("CYRILLIC",), "el": ("GREEK",), "he": ("HEBREW",),
}  # fmt: skip
_LATIN = "en vi id ms tl hr cs da nl et fi hu ga lv lt mt pl pt ro sk sl sv de fr es it tr no"
LATIN_LANGUAGES = frozenset(_LATIN.split())
_WORD = re.compile(r"[A-Za-zÀ-ɏ]+")
_VOWELS = re.compile("[aeiouyàáâãäåèéêëìíîïòóôõöùúûüýæœøıąęěůű]+", re.IGNORECASE)
_CONSONANTS = re.compile("[B-DF-HJ-NP-TV-XZ]{2,6}")  # an acronym without vowels is spelled
LOOK_ALIKE = frozenset({"LATIN", "CYRILLIC", "GREEK"})  # alphabets with letters that look the same


@functools.lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """Returns the script of a letter, as in its Unicode name; `None` for other characters."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "")
    first = name.split(" ", 1)[0].partition("-")[0]
    if first in ("FULLWIDTH", "HALFWIDTH"):
        first = name.split(" ")[1]
    return first or None


def scripts(text: str) -> Counter[str]:
    """Counts the letters of each script."""
    return Counter(script for script in map(script_of, text) if script is not None)


def main_script(text: str) -> str | None:
    """Returns the script of most syllables of a text; Japanese is HIRAGANA. `None` without letters."""
    counts = scripts(text)
    if not counts:
        return None
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * counts.total():
        return "HIRAGANA"
    return max(counts, key=lambda name: counts[name] / LETTERS_PER_SYLLABLE.get(name, OTHER_LETTERS_PER_SYLLABLE))


def syllables(text: str) -> float:
    """Estimates the number of syllables of a text in any script."""
    spoken = 0.0
    for name, count in scripts(text).items():
        if name == "LATIN":
            spoken += sum(map(_latin_syllables, _WORD.findall(text)))
        else:
            spoken += count / LETTERS_PER_SYLLABLE.get(name, OTHER_LETTERS_PER_SYLLABLE)
    return spoken + SYLLABLES_PER_DIGIT * sum(map(str.isdigit, text))


@functools.lru_cache(maxsize=1 << 16)
def _latin_syllables(word: str) -> float:
    """Returns the mean of two estimates, by letters and by groups of vowels; a spelled letter is a syllable."""
    if len(word) == 1 or _CONSONANTS.fullmatch(word):
        return len(word)
    groups = len(_VOWELS.findall(word))
    silent = groups > 1 and word[-1] in "eE"
    return (max(1, groups - silent) + len(word) / LETTERS_PER_SYLLABLE["LATIN"]) / 2


def fits_language(text: str, language: str) -> bool:
    """Returns whether the script of a text is one of a language; true for unknown languages and for short texts."""
    found = main_script(text)
    expected = SCRIPTS_OF_LANGUAGES.get(language, ("LATIN",) if language in LATIN_LANGUAGES else ())
    return found is None or not expected or found in expected or syllables(text) < 2
