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

from .numbers_zh import numerals_to_digits, read_symbols
from .words import drop_fillers, is_english, join_suffixes, normalize_words

HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fd-\u30ff\u31f0-\u31ff"
HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb"
_CJK = f"{HAN}{KANA}{HANGUL}\u30fc\u3105-\u312f"  # with the long-vowel mark and Bopomofo
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer

UNSPACED_CHARACTER = re.compile(f"[{_CJK}{_SOUTH_EAST_ASIAN}]")
_LETTER = rf"[^\W\d_{_CJK}]"
# From the first to the last letter between CJK characters, with digits and punctuation in between; 1st is a word too.
_WORDS = re.compile(rf"(?:\d(?=(?:st|nd|rd|th)\b))?{_LETTER}(?:[^{_CJK}]*{_LETTER})?")
_SPACE_IN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}\d])|(?<=\d)\s+(?=[{_CJK}])")

# Before NFKC, which would make letters of ™ and a combining mark of ´.
_PLAIN_MARKS = str.maketrans({**dict.fromkeys("™℠®©", " "), **dict.fromkeys("’‘ʼ`´", "'"), "∶": ":"})
_TAG = re.compile(r"<\|?[a-z_/-]+\|?>|\[[a-z_-]+\]")
_BRACKETS = re.compile(r"[()<>\[\]{}=]")
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


def _plain(text: str) -> str:
    """Lower case, ASCII digits; no compatibility forms (full width, ligatures), tags, brackets, invisible signs."""
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN_MARKS)).lower()
    characters = []
    for character in unicodedata.normalize("NFKC", text).replace("⁄", "/"):
        category = unicodedata.category(character)
        if category == "Nd":
            character = str(unicodedata.digit(character))
        elif category == "Cf":  # soft hyphens, zero-width spaces, byte order marks
            continue
        elif category[0] == "C":
            character = " "
        characters.append(character)
    return _BRACKETS.sub(" ", _TAG.sub(" ", "".join(characters)))


def _language(text: str) -> str:
    """Language of a line by its script: "zh", "ja", "ko", or "" for languages written with spaces.

    Any kana makes a line Japanese, whose kanji must not be turned into simplified Chinese. Digits alone are Chinese,
    unless signs set apart from them show that they were English before they were normalised: "5 . 6", "5 0 %".
    """
    if re.search(f"[{KANA}]", text):
        return "ja"
    hangul, han = len(re.findall(f"[{HANGUL}]", text)), len(re.findall(f"[{HAN}]", text))
    if hangul > han:
        return "ko"
    words = re.search(rf"{_LETTER}|[$€£¢]|(?<=\d) (?:\. \d|%)", re.sub(r"°\s*[cf]\b", "", text))
    return "zh" if han or not words else ""


def _normalize_cjk(text: str, language: str) -> str:
    text = _SPACE_IN_CJK.sub("", join_suffixes(text))
    if language == "zh":
        text = _simplify(text)
    degrees = _TEMPERATURES[language]
    text = re.sub(r"(?<=\d)\s*°\s*([cf]?)(?![a-z])", lambda match: degrees[match[1]], text)
    text = re.sub(r"(?<=[a-z])[-−](?=\d)", " ", text)  # covid-19 is not below zero
    text = _WORDS.sub(lambda match: f" {normalize_words(match[0])} ", drop_fillers(text))
    text = _SPACE_IN_CJK.sub("", re.sub(r"(?<=\d) percent\b", "%", " ".join(text.split())))
    return read_symbols(numerals_to_digits(text), language)


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
            or (character == "." and after_digit and following.isdecimal())
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


def normalize_text(text: str) -> str:
    """Normalises a transcript, or a part of one, for scoring by word or character error rate.

    A token is a character in Chinese, Japanese, Korean (syllables: spacing is optional in practice, and the language
    is scored by character), Thai and its neighbours, a single digit, or a word in other scripts. Spacing between
    characters of Chinese, Japanese and Korean does not matter. What is dropped: punctuation, symbols that are not
    read out, one-word tags such as [noise] and <unk>, and English fillers (uh, um). docs/normalization.md lists the
    rules.

    Args:
        text: one line in any language, or several mixed.

    Returns:
        Tokens, separated by single spaces; empty for text without letters and digits.
    """
    text = _plain(text)
    language = _language(text)
    if language:
        text = _normalize_cjk(text, language)
    if not _language(text):  # from the start, or once 一 of "part 一" is a digit
        text = normalize_words(drop_fillers(text) if is_english(text) else text)
    return " ".join(_tokens(text))
