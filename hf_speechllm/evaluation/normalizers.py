"""Text normalisation for scoring: two ways of writing the same words become the same tokens.

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
# From the first to the last letter between CJK characters, with digits and punctuation in between; 1st is a word too,
# and so is an amount before its word ("10 dollars").
_AMOUNT_OF_WORD = (
    r"(?<![\d,.])\d[\d,.]*\s*"
    r"(?=(?:dollars?|euros?|pounds?|cents?|percent|per cent|point|hundred|thousand|[mbtr]+illion)\b)"
)
_WORDS = re.compile(rf"(?:{_AMOUNT_OF_WORD}|\d(?=(?:st|nd|rd|th)\b))?{LETTER}(?:[^{CJK}]*{LETTER})?")
_SPACE_IN_CJK = re.compile(rf"(?<=[{CJK}])\s+(?=[{CJK}\d])|(?<=\d)\s+(?=[{CJK}])")

# Before NFKC, which would make letters of ™ and a combining mark of ´.
_PLAIN_MARKS = str.maketrans({**dict.fromkeys("™℠®©", " "), **dict.fromkeys("’‘ʼ`´", "'"), "∶": ":"})
_TAG = re.compile(r"<\|?[a-z_/-]+\|?>|\[[a-z_-]+\]")
_BRACKETS = re.compile(r"[()<>\[\]{}]|(?<!\d)=|=(?!\d)")
# Behind a digit, NFKC would make 21/2 of 2½ and 102 of 10².
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
    """Traditional to simplified Chinese, by character: zhconv's phrases also swap regional words (軟體 for 软件)."""
    text = "".join(map(_simplify_character, text))
    return _PARTICLE_ZHE.sub("着", text).replace("甚么", "什么")


def _plain(text: str, turkish: bool = False) -> str:
    """Lower case, ASCII digits; no compatibility forms (full width, ligatures), tags, brackets, invisible signs."""
    text = _AFTER_DIGIT.sub(
        lambda match: _AFTER_DIGIT_MARKS.get(match[0], f" {match[0]}"), text.translate(_PLAIN_MARKS)
    )
    # In lower case, İ is i and a mark of its own, which nobody writes.
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
    """Normalises words in a line of Chinese, Japanese or Korean: Latin ones are mostly English, others keep marks."""
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
    """Normalises text of a language written with spaces; characters of CJK in it get the rules of their script."""
    parts = _CJK_RUN.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = _normalize_cjk(part, script_language(part) or "zh")
        elif part.strip():
            parts[index] = normalize_english(drop_fillers(part)) if english else normalize_other(part)
    return " ".join(parts)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    previous = ""  # what came before: "word", "character", or "" for a gap
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
    """The language whose rules `normalize_text` applies to a text if none is named.

    Returns:
        "zh" (also for digits alone), "ja", "ko", "en", "tr" or "other".
    """
    language = detect_language(_plain(text))
    return "tr" if language == "other" and is_turkish(text) else language


def normalize_text(text: str, language: str | None = None) -> str:
    """Normalises a transcript, or a part of one, for scoring by word or character error rate.

    A token is a character in Chinese, Japanese, Korean (syllables: spacing is optional in practice, and the language
    is scored by character), Thai and its neighbours, a single digit, or a word in other scripts. Spacing between
    characters of Chinese, Japanese and Korean does not matter. What is dropped: punctuation, symbols that are not
    read out, one-word tags such as [noise] and <unk>, and English fillers (uh, um). docs/normalization.md lists the
    rules.

    Args:
        text: one line in any language, or several mixed.
        language: code or name; by default, and if it is not known, `language_of` decides. A reference and its
            hypotheses must get the same one.

    Returns:
        Tokens, separated by single spaces; empty for text without letters and digits.
    """
    rules = known_language(language or "") or language_of(text)
    text = _plain(text, turkish=rules == "tr")
    if rules in _TEMPERATURES:
        text = _normalize_cjk(text, rules)
        if not script_language(text):  # the text has no such characters, or 一 of "part 一" is a digit now
            text = _normalize_foreign_words(text)
    else:
        text = _normalize_spaced(text, english=rules == "en")
    return " ".join(_tokens(text))
