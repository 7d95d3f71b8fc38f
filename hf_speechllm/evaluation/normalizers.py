"""Text normalisation for scoring: different spellings of the same words become the same tokens.

>>> normalize_text("35%的人选择了 iPhone 15。")
'百 分 之 3 5 的 人 选 择 了 iphone 1 5'
>>> normalize_text("百分之三十五的人选择了iPhone十五")
'百 分 之 3 5 的 人 选 择 了 iphone 1 5'
"""

import re
import unicodedata
from functools import cache

import zhconv

from .languages import CJK, LETTER, detect_language, is_turkish, known_language, script_language
from .numbers_zh import numerals_to_digits, read_symbols
from .signs import SIGNS
from .words import drop_fillers, join_suffixes, normalize_english, normalize_other

_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer

UNSPACED_CHARACTER = re.compile(f"[{CJK}{_SOUTH_EAST_ASIAN}]")
# Text from the first to the last letter between CJK characters, with digits and punctuation in between. An ordinal
# (1st) is a word, and an amount belongs to the word after the amount ("10 dollars").
_AMOUNT_OF_WORD = (
    r"(?<![\d,.])\d[\d,.]*\s*"
    r"(?=(?:dollars?|euros?|pounds?|cents?|percent|per cent|point|hundred|thousand|[mbtr]+illion)\b)"
)
_WORDS = re.compile(rf"(?:{_AMOUNT_OF_WORD}|\d(?=(?:st|nd|rd|th)\b))?{LETTER}(?:[^{CJK}]*{LETTER})?")
_SPACE_IN_CJK = re.compile(rf"(?<=[{CJK}])\s+(?=[{CJK}\d])|(?<=\d)\s+(?=[{CJK}])")

# Replaced before NFKC, which would turn ™ into letters and ´ into a combining mark.
_PLAIN_MARKS = str.maketrans({**dict.fromkeys("™℠®©", " "), **dict.fromkeys("’‘ʼ`´", "'"), "∶": ":"})
_TAG = re.compile(r"<\|?[a-z_/-]+\|?>|\[[a-z_-]+\]")
_BRACKETS = re.compile(r"[()<>\[\]{}]|(?<!\d)=|=(?!\d)")
# NFKC would turn 2½ into 21/2 and 10² into 102.
_AFTER_DIGIT = re.compile("(?<=\\d)[¼-¾⅐-⅞²³⁴-⁹]")
_AFTER_DIGIT_MARKS = {"²": "^2", "³": "^3", **{chr(0x2070 + power): f"^{power}" for power in range(4, 10)}}
_CJK_RUN = re.compile(f"([{CJK}]+)")
_TEMPERATURES = {
    "zh": {"c": "摄氏度", "f": "华氏度", "": "度"},
    "ja": {"c": "度", "f": "度", "": "度"},
    "ko": {"c": "도", "f": "도", "": "도"},
}
# Taiwan and Hong Kong write 著 for the particle 着; the word 著 (to write, outstanding) keeps its character.
_PARTICLE_ZHE = re.compile("(?<![显名原专编巨论土卓昭译遗拙合])著(?![作名称者书述录])")


@cache
def _simplify_character(character: str) -> str:
    return zhconv.convert(character, "zh-cn")


def _simplify(text: str) -> str:
    """Converts traditional to simplified Chinese by character: zhconv's phrases also replace regional words (軟體)."""
    text = "".join(map(_simplify_character, text))
    return _PARTICLE_ZHE.sub("着", text).replace("甚么", "什么")


def _plain(text: str, turkish: bool = False) -> str:
    """Converts text to lower case and ASCII digits; removes full width, ligatures, tags, brackets, invisible signs."""
    text = _AFTER_DIGIT.sub(
        lambda match: _AFTER_DIGIT_MARKS.get(match[0], f" {match[0]}"), text.translate(_PLAIN_MARKS)
    )
    # Python's lower case of İ is i with a combining mark, which nobody writes.
    text = unicodedata.normalize("NFKC", text).replace("İ", "i")
    if turkish:
        text = text.replace("I", "ı")
    characters = []
    for character in unicodedata.normalize("NFKC", text.lower()).replace("⁄", "/"):
        category = unicodedata.category(character)
        if category == "Nd":
            character = str(unicodedata.digit(character))
        elif category == "Cf":  # soft hyphens, zero-width spaces, byte order marks
            continue
        elif category[0] == "C":
            character = " "
        characters.append(character)
    return _BRACKETS.sub(" ", _TAG.sub(" ", "".join(characters)))


def _normalize_foreign_words(words: str) -> str:
    """Normalises words in Chinese, Japanese or Korean text: Latin words as English, other words with their marks."""
    latin = all(character < "\u0250" or not character.isalpha() for character in words)
    return normalize_english(words) if latin else normalize_other(words)


def _normalize_cjk(text: str, language: str) -> str:
    text = _SPACE_IN_CJK.sub("", join_suffixes(text))
    if language == "zh":
        text = _simplify(text)
    degrees = _TEMPERATURES[language]
    text = re.sub(r"(?<=\d)\s*°\s*([cf]?)(?![a-z])", lambda match: degrees[match[1]], text)
    text = re.sub(r"(?<=[a-z])[-−](?=\d)", " ", text)  # covid-19 is not below zero
    text = _WORDS.sub(lambda match: f" {_normalize_foreign_words(match[0])} ", drop_fillers(text))
    text = _SPACE_IN_CJK.sub("", re.sub(r"(?<=\d) percent\b", "%", " ".join(text.split())))
    return read_symbols(numerals_to_digits(text, language), language)


def _normalize_spaced(text: str, english: bool) -> str:
    """Normalises text of a language written with spaces; CJK characters follow the rules of their script."""
    parts = _CJK_RUN.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = _normalize_cjk(part, script_language(part) or "zh")
        elif part.strip():
            parts[index] = normalize_english(drop_fillers(part)) if english else normalize_other(part)
    return " ".join(parts)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    previous = ""  # kind of the previous token: "word", "character", or "" after a gap
    for character, following in zip(text, f"{text} "[1:], strict=True):
        category = unicodedata.category(character)
        after_digit = previous == "character" and tokens[-1].isdecimal()
        if category[0] == "M" and previous:
            tokens[-1] += character
        elif (
            category == "Nd"
            or UNSPACED_CHARACTER.match(character)
            or (character in "$£¢" and following.isdecimal())
            or (character == "%" and after_digit)
            or (character in f".{SIGNS}" and after_digit and following.isdecimal())
        ):
            tokens.append(character)
            previous = "character"
        elif category[0] in "LN":
            if previous == "word":
                tokens[-1] += character
            else:
                tokens.append(character)
            previous = "word"
        else:
            previous = ""
    return tokens


def language_of(text: str) -> str:
    """Returns the language whose rules `normalize_text` applies by default.

    Returns:
        "zh" (also for digits only), "ja", "ko", "en", "tr" or "other".
    """
    language = detect_language(_plain(text))
    return "tr" if language == "other" and is_turkish(text) else language


def normalize_text(text: str, language: str | None = None) -> str:
    """Normalises a transcript, or a part of a transcript, for word or character error rates.

    A token is a character of Chinese, Japanese, Korean (a syllable: spacing is optional in practice), Thai, Lao,
    Tibetan, Burmese or Khmer, a single digit, or a word of other scripts. Spaces between characters of Chinese,
    Japanese and Korean do not matter. Punctuation, symbols that are not read out, one-word tags such as [noise] and
    <unk>, and English fillers (uh, um) are removed. docs/explanation/normalization.md lists the rules.

    Args:
        text: one line, in one language or several.
        language: code or name; by default, and for unknown names, `language_of` decides. A reference and the
            hypotheses for the reference must get the same language.

    Returns:
        Tokens, separated by single spaces; empty for text without letters and digits.
    """
    rules = known_language(language or "") or language_of(text)
    text = _plain(text, turkish=rules == "tr")
    if rules in _TEMPERATURES:
        text = _normalize_cjk(text, rules)
        if not script_language(text):  # the text has no CJK characters, or 一 of "part 一" is now a digit
            text = _normalize_foreign_words(text)
    else:
        text = _normalize_spaced(text, english=rules == "en")
    return " ".join(_tokens(text))
