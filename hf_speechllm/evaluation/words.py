"""Words of languages written with spaces: English by Whisper's rules, the others with their letters kept."""

import re

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishNumberNormalizer, EnglishTextNormalizer


class _NumberNormalizer(EnglishNumberNormalizer):
    """Whisper's arithmetic without its last step, which makes "one" of the 1 in $1 and 1%, and so loses the signs."""

    def postprocess(self, s: str) -> str:
        """Joins cents to their dollars, as the parent does, and stops there."""
        s = re.sub(r"[$€£]0\.(\d\d)\b", lambda match: f"¢{int(match[1])}", s)
        return re.sub(r"([$€£]\d+) (?:and )?¢(\d{1,2})\b", lambda match: f"{match[1]}.{int(match[2]):02d}", s)


# Marks of Thai or Hindi are vowels: they stay.
_normalize_basic = BasicTextNormalizer(preserve_marks=True)
_normalize_english = EnglishTextNormalizer()
_normalize_english.standardize_numbers = _NumberNormalizer()
_normalize_english.ignore_patterns = "(?!)"  # fillers are dropped here, where mm after a number is a unit
_NUMBER_WORDS = "|".join(sorted(_normalize_english.standardize_numbers.decimals))
_MULTIPLIERS = "|".join(_normalize_english.standardize_numbers.multipliers)

# Frequent words that tell English from its neighbours; without those that they share (in, an, was, on).
_ENGLISH = (
    "the and of to is are you that it for with he she they this have had be not at but from by what we my your his"
    " her their our there which would can will been has if out all up who when"
)
_OTHER = (
    "der die das und ist nicht ich ein eine mit auf wir sie den dem zu"
    " le la les des est et un une que qui dans pas pour il elle je vous nous"
    " el los las con para del una muy está yo"
    " che di non sono questo della anche"
    " um uma com os não ele isso"
    " het een van niet dat zijn voor"
)
_ENGLISH_WORDS, _OTHER_WORDS = frozenset(_ENGLISH.split()), frozenset(_OTHER.split())

_FILLERS = re.compile(rf"(\d\s*mm\b|\b(?:{_NUMBER_WORDS})\s+mm\b)|(?<![a-z0-9'])(?:hmm|mm|mhm|mmm|uh|um)(?![a-z0-9'])")
_PERCENT_WORDS = re.compile(
    r"(?<=\d)\s*(?:%|(?:percent|per cent|prozent|pour cent|pourcent|por ciento|por cento|per cento|procent)\b)"
)
_CURRENCY_WORDS = {"€": "euro", "$": "dollar", "£": "pound", "¢": "cent", "¥": "yen"}

# Appended to a word that Whisper's number rules must not see; a private-use character passes through them.
_SHIELD = "\ue000"
_NOT_A_DECIMAL_POINT = re.compile(rf"\bpoint\b(?! (?:\d|(?:{_NUMBER_WORDS})\b))")
_NEGATIVE = re.compile(rf"\bnegative(?= (?:[$€£¢]?\d|(?:{_NUMBER_WORDS}|{_MULTIPLIERS})\b))")


def is_english(text: str) -> bool:
    """Tells whether lower-case text is English rather than another language written with spaces.

    Votes are frequent words and, against English, words with letters outside a to z. Without any evidence, text
    counts as English.
    """
    words = re.findall(r"[^\W\d_]+", text)
    other = sum(word in _OTHER_WORDS or not word.isascii() for word in words)
    return other <= sum(word in _ENGLISH_WORDS for word in words)


def drop_fillers(text: str) -> str:
    """Drops the English fillers of Whisper's rules (uh, um, hmm, mm, mhm, mmm), but not mm after a number."""
    return _FILLERS.sub(lambda match: match[1] or "", text)


def join_suffixes(text: str) -> str:
    """Joins what normalised text has apart and Whisper's rules want together: "1 st" (not saint), "5 %"."""
    return re.sub(r"(?<=1) (?=st\b)|(?<=2) (?=nd\b)|(?<=3) (?=rd\b)|(?<=\d) (?=(?:th|s)\b|%)", "", text)


def _join_digits(text: str) -> str:
    """Joins single digits set apart by spaces, as normalised text has them: normalising it again must not differ."""
    text = re.sub(r"(?<![\d.,])\d(?: \d)+(?![\d.,])", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"(?<=\d) \. (?=\d)", ".", text)
    return re.sub(r"([$€£¢]) (?=\d)", r"\1", join_suffixes(text))


def _protect_digits(text: str) -> str:
    """Rewrites numbers whose zeros Whisper's arithmetic would lose: 007, 05, 2.0."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\d{1000}(?=\d)", r"\g<0> ", text)  # Python converts no integers of more than 4,300 digits
    text = re.sub(
        r"(?<![\d.])(\d+)\.(0+)(?!\d|\.\d|%)", lambda match: f"{match[1]} point{' zero' * len(match[2])}", text
    )
    return re.sub(r"(?<![\d.$€£¢])(0+)(\d*)(?!\d|\.\d|%)", lambda match: f"{'zero ' * len(match[1])}{match[2]}", text)


def _shield_words(text: str) -> str:
    """Keeps Whisper's number rules from dropping words ("minus" before money, "point" before "and", a first "and a
    half") and from adding up numbers that only stand side by side."""
    text = _NEGATIVE.sub("minus", text)
    text = re.sub(r"\b(?:minus|plus|positive|negative)\b", rf"\g<0>{_SHIELD}", text)
    text = _NOT_A_DECIMAL_POINT.sub(rf"\g<0>{_SHIELD}", text)
    text = re.sub(r"(?<![\d.])(\d+) and a half\b", r"\1 point five", text)
    text = re.sub(rf"(?<=\d) (?=(?:{_NUMBER_WORDS})\b)", f" {_SHIELD} ", text)  # "in 2020 one" is not 2021
    return re.sub(r"(^|half )and(?= a half\b)", rf"\1and{_SHIELD}", text)


def normalize_words(text: str) -> str:
    """Normalises lower-case text of a language written with spaces; digits are not yet set apart.

    English: contractions, titles, spelling and numbers by Whisper's rules (Radford et al. 2022, appendix C), with
    percent and the decimal point as signs behind digits, and "minus" written out. Other languages: punctuation goes,
    letters stay as they are, diacritics included; a decimal comma or point is dropped like a thousands separator, as
    languages differ in which is which.
    """
    text = re.sub(r"(?<!\S)[-−](?=[$€£¢]?\d)", "minus ", text)
    if not is_english(text):
        text = re.sub(r"([$€£¢¥])\s*(\d+(?:[.,]\d+)*)", r"\2\1", text)
        text = re.sub(r"(?<=\d)\s*([$€£¢¥])", lambda match: f" {_CURRENCY_WORDS[match[1]]}", text)
        text = _normalize_basic(_PERCENT_WORDS.sub(" percent", text))
        return re.sub(r"(?<=\d) percent\b", "%", text)
    text = _join_digits(" ".join(text.split()))
    text = re.sub(r"(\d+(?:[.,]\d+)*) ?([$€£¢])(?! ?\d)", r"\2\1", text)
    text = _normalize_english(_shield_words(" ".join(_protect_digits(text).split())))
    # As Whisper does, a 1 that is no part of a larger number or amount is the word.
    text = re.sub(rf"(?<![$€£¢.])(?<!\d )(?<!double )(?<!triple )\b1(s?)\b(?![.%]| (?:{_SHIELD} )?\d)", r"one\1", text)
    text = " ".join(text.replace(_SHIELD, "").split())
    text = re.sub(r"(?<!\d)\.(?=\d)", " point ", text)
    # Euros follow the number, as in the languages that use them: short lines in these may be taken for English.
    return re.sub(r"€(\d+(?:\.\d+)*)", r"\1 euro", text)
