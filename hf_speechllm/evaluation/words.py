"""Words of languages written with spaces: English according to Whisper's rules, other languages without changes."""

import re

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishNumberNormalizer, EnglishTextNormalizer

from .numbers_en import protect_signs, read_days, read_signs, restore_signs, split_am_pm, spoken_to_written
from .signs import read_between_numbers


class _NumberNormalizer(EnglishNumberNormalizer):
    """Whisper's rules for numbers without the last step, which replaces 1 in $1 and 1% by "one" and drops the sign."""

    def postprocess(self, s: str) -> str:
        """Joins dollars and cents, as the parent class does, and omits the other steps of the parent class."""
        s = re.sub(r"[$€£]0\.(\d\d)\b", lambda match: f"¢{int(match[1])}", s)
        return re.sub(r"([$€£]\d+) (?:and )?¢(\d{1,2})\b", lambda match: f"{match[1]}.{int(match[2]):02d}", s)


# Combining marks of Thai or Hindi are vowels and must stay.
_normalize_basic = BasicTextNormalizer(preserve_marks=True)
_normalize_english = EnglishTextNormalizer()
_normalize_english.standardize_numbers = _NumberNormalizer()
for _words in ("ones_ordinal", "ones_suffixed"):  # Whisper's table has "nineth"
    getattr(_normalize_english.standardize_numbers, _words)["ninth"] = (9, "th")
_normalize_english.standardize_numbers.words.add("ninth")
_normalize_english.ignore_patterns = "(?!)"  # `drop_fillers` removes fillers, but keeps mm after a number, a unit
_NUMBER_WORDS = "|".join(sorted(_normalize_english.standardize_numbers.decimals))
_MULTIPLIERS = "|".join(_normalize_english.standardize_numbers.multipliers)

_FILLERS = re.compile(rf"(\d\s*mm\b|\b(?:{_NUMBER_WORDS})\s+mm\b)|(?<![a-z0-9'])(?:hmm|mm|mhm|mmm|uh|um)(?![a-z0-9'])")
_PERCENT_WORDS = re.compile(
    r"(?<=\d)\s*(?:%|(?:percent|per cent|prozent|pour cent|pourcent|por ciento|por cento|per cento|procent)\b)"
)
_PRICE_WORDS = (
    "euro|eur|dollar|dólar|pound|pfund|libra|livre|franc|franken|cent|yen|kron|rubl|złot|lira|peso|real|reais"
)
_CURRENCY_WORDS = {"€": "euro", "$": "dollar", "£": "pound", "¢": "cent", "¥": "yen"}

# A private-use character; appended to a word, it hides the word from Whisper's rules for numbers.
_SHIELD = "\ue000"
_DECIMAL_MARK = "\ue001"
_NOT_A_DECIMAL_POINT = re.compile(rf"\bpoint\b(?! (?:\d|(?:{_NUMBER_WORDS})\b))")
_NEGATIVE = re.compile(rf"\bnegative(?= (?:[$€£¢]?\d|(?:{_NUMBER_WORDS}|{_MULTIPLIERS})\b))")


def drop_fillers(text: str) -> str:
    """Removes the English fillers of Whisper's rules (uh, um, hmm, mm, mhm, mmm), but not mm after a number."""
    return _FILLERS.sub(lambda match: match[1] or "", text)


def join_suffixes(text: str) -> str:
    """Joins suffixes to their numbers, as Whisper's rules require: "1 st" (otherwise "saint"), "5 %"."""
    return re.sub(r"(?<=1) (?=st\b)|(?<=2) (?=nd\b)|(?<=3) (?=rd\b)|(?<=\d) (?=(?:th|s)\b|%)", "", text)


def _join_digits(text: str) -> str:
    """Joins the separate digits of normalised text, so that normalising twice changes nothing."""
    text = re.sub(r"(?<![\d.,])\d(?: \d)+(?![\d.,])", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"(?<=\d) \. (?=\d)", ".", text)
    return re.sub(r"([$€£¢]) (?=\d)", r"\1", join_suffixes(text))


def _protect_digits(text: str) -> str:
    """Rewrites numbers whose zeros Whisper's rules would drop: 007, 05, 2.0."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\d{1000}(?=\d)", r"\g<0> ", text)  # Python cannot convert integers of more than 4,300 digits
    text = re.sub(
        r"(?<![\d.])(\d+)\.(0+)(?!\d|\.\d|%)", lambda match: f"{match[1]} point{' zero' * len(match[2])}", text
    )
    return re.sub(r"(?<![\d.$€£¢])(0+)(\d*)(?!\d|\.\d|%)", lambda match: f"{'zero ' * len(match[1])}{match[2]}", text)


def _shield_words(text: str) -> str:
    """Protects words that Whisper's rules for numbers would drop ("minus" before money, "point" before "and", an
    initial "and a half") and adjacent numbers that the rules would add."""
    text = _NEGATIVE.sub("minus", text)
    text = re.sub(r"\b(?:minus|plus|positive|negative)\b", rf"\g<0>{_SHIELD}", text)
    text = _NOT_A_DECIMAL_POINT.sub(rf"\g<0>{_SHIELD}", text)
    text = re.sub(r"(?<![\d.])(\d+) and a half\b", r"\1 point five", text)
    text = re.sub(rf"(?<=\d) (?=(?:{_NUMBER_WORDS})\b)", f" {_SHIELD} ", text)  # "in 2020 one" is not 2021
    return re.sub(r"(^|half )and(?= a half\b)", rf"\1and{_SHIELD}", text)


def normalize_english(text: str) -> str:
    """Normalises lower-case English text, without separating digits.

    Contractions, titles, spelling and numbers follow Whisper's rules (Radford et al. 2022, appendix C). Percent and
    the decimal point are signs after digits, "minus" is a word, and signs between numbers become words or stay.
    """
    text = re.sub(r"(?<=\d) (?=\d{1,2}/\d)", " and ", " ".join(text.split()))  # 2 3/4, before digits are joined
    text = _join_digits(text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d+(?:[.,]\d+)*) ?([$€£¢])(?! ?\d)", r"\2\1", text)
    text = read_signs(spoken_to_written(text))
    text = re.sub(r"(?<!\S)[-−](?=[$€£¢]?\d)", "minus ", text)
    text = _normalize_english(_shield_words(" ".join(_protect_digits(protect_signs(text)).split())))
    text = read_days(split_am_pm(restore_signs(text)))
    # As in Whisper, a 1 that is not part of a larger number or amount becomes "one".
    text = re.sub(
        rf"(?<![$€£¢.:/^+×*÷=-])(?<!\d )(?<!double )(?<!triple )\b1(s?)\b(?![.%:/^+×*÷=-]| (?:{_SHIELD} )?\d)",
        r"one\1",
        text,
    )
    text = " ".join(text.replace(_SHIELD, "").split())
    text = re.sub(r"(?<!\d)\.(?=\d)", " point ", text)
    # "Euro" follows the number, as in languages that use euros: short lines in these languages may count as English.
    return re.sub(r"€(\d+(?:\.\d+)*)", r"\1 euro", text)


def normalize_other(text: str) -> str:
    """Normalises lower-case text of another language written with spaces, without separating digits.

    Removes punctuation; letters and diacritics do not change. Decimal marks become points. Removes thousands
    separators, and the decimal mark of a price, which is not spoken (12,50 Euro).
    """
    text = re.sub(r"(?<!\S)[-−](?=[$€£¢]?\d)", "minus ", text)
    text = re.sub(r"(?<=\d) \. (?=\d)", ".", text)
    text = re.sub(r"([$€£¢¥])\s*(\d+(?:[.,]\d+)*)", r"\2\1", text)
    text = re.sub(r"(?<=\d)\s*([$€£¢¥])", lambda match: f" {_CURRENCY_WORDS[match[1]]}", text)
    text = protect_signs(read_between_numbers(text, "other"))
    text = re.sub(r"(?<=\d)[.,](?=\d{3}(?!\d))", "", text)
    text = re.sub(rf"(?<=\d)[.,](?=\d+(?!\d|[.,]\d| (?:{_PRICE_WORDS})))", _DECIMAL_MARK, text)
    text = _normalize_basic(_PERCENT_WORDS.sub(" percent", text))
    text = restore_signs(text).replace(_DECIMAL_MARK, ".")
    return re.sub(r"(?<=\d) percent\b", "%", text)
