"""Language of a line, which decides the rules of normalisation: by script and frequent words, or by name."""

import re

HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fd-\u30ff\u31f0-\u31ff"
HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb"
CJK = f"{HAN}{KANA}{HANGUL}\u30fc\u3105-\u312f"  # with the long-vowel mark and Bopomofo
LETTER = rf"[^\W\d_{CJK}]"

# Characters that Japanese uses and Chinese does not: they identify Japanese lines without kana.
_JAPANESE_ONLY = re.compile("[円込働駅気畑峠枠匂辻]")
# Signs with spaces around them show that a normalised line was English: "5 . 6", "5 : 3 0", "5 0 %".
_NORMALIZED_WORDS = re.compile(r"[$€£¢]|(?<=\d) (?:[.:/] \d|%)")

# Frequent words that distinguish English from related languages, without shared words (in, an, was, on).
_ENGLISH = (
    "the and of to is are you that it for with he she they this have had be not at but from by what we my your his"
    " her their our there which would can will been has if out all up who when"
    " about after again any because before could did does every good got how into just know like make many more most"
    " much never now only other over people really said says should some than them then these thing think those"
    " through too very want way well were where while why yes yet its it's i'm don't"
    " two three four five seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety"
    " hundred thousand first third percent"
)
_OTHER = (
    "der die das und ist nicht ich ein eine mit auf wir sie den dem zu"
    " le la les des est et un une que qui dans pas pour il elle je vous nous"
    " el los las con para del una muy está yo"
    " che di non sono questo della anche"
    " um uma com os não ele isso"
    " het een van niet dat zijn voor"
    " jeg ikke og til af på som med har er och det att är inte jag"
    " nie się jest na że ve bir bu için çok ne değil"
)
# No words of the neighbours: each outweighs several borrowed words with accents.
_ENGLISH_ALONE = "the and with that this they you your which would should could because there their"
_ENGLISH_WORDS, _OTHER_WORDS = frozenset(_ENGLISH.split()), frozenset(_OTHER.split())
_ENGLISH_ALONE_WORDS = frozenset(_ENGLISH_ALONE.split())

_LANGUAGE_NAMES = {
    "zh": "zho chi cmn yue wuu nan hak chinese mandarin cantonese 中文 汉语 普通话 国语 粤语",
    "ja": "jpn jp japanese 日文 日语 日本語",
    "ko": "kor kr korean 韩文 韩语 한국어",
    "en": "eng english 英文 英语",
    "tr": "tur az aze turkish azerbaijani",
}
_BY_NAME = {name: code for code, names in _LANGUAGE_NAMES.items() for name in [code, *names.split()]} | {
    "other": "other"
}


def is_english(text: str) -> bool:
    """Whether lower-case text is English rather than another language written with spaces.

    Each frequent English word is a vote for English, or three if no other language has it, and each frequent word of
    another language is a vote against. Each other word with letters outside a to z is half a vote against, because
    English borrows words (café, fiancée). Text without any vote counts as English.
    """
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text)
    english = sum(3 if word in _ENGLISH_ALONE_WORDS else word in _ENGLISH_WORDS for word in words)
    other = sum(word in _OTHER_WORDS for word in words)
    return 2 * english >= 2 * other + sum(not word.isascii() for word in words if word not in _OTHER_WORDS)


def script_language(text: str) -> str:
    """Returns the language of lower-case text by script: "zh", "ja", "ko", or "" for languages written with spaces.

    A line with kana is Japanese: kanji must not become simplified Chinese. A line of digits only is Chinese, unless
    signs with spaces around them show that the line is normalised English.
    """
    if re.search(f"[{KANA}]", text) or _JAPANESE_ONLY.search(text):
        return "ja"
    hangul, han = len(re.findall(f"[{HANGUL}]", text)), len(re.findall(f"[{HAN}]", text))
    if hangul > han:
        return "ko"
    words = re.search(LETTER, re.sub(r"°\s*[cf]\b", "", text)) or _NORMALIZED_WORDS.search(text)
    return "zh" if han or not words else ""


def detect_language(text: str) -> str:
    """Returns the language whose rules apply to lower-case text: "zh", "ja", "ko", "en" or "other"."""
    return script_language(text) or ("en" if is_english(text) else "other")


def is_turkish(text: str) -> bool:
    """Whether unnormalised text has Turkish or Azerbaijani letters and no sign of English."""
    if not re.search("[ıİğĞ]", text) or re.search(r"\bI\b", text):
        return False
    return not is_english(text.replace("İ", "i").lower())


def known_language(name: str) -> str:
    """Returns the language whose rules apply for a language code (en, en-US, eng) or name (English, 中文).

    Returns:
        "zh", "ja", "ko", "en", "tr" (also for Azerbaijani), or "other" for other codes. "" for an unknown name: the
        text decides.
    """
    first = re.split(r"[-_+/,; ]", name.strip().lower(), maxsplit=1)[0]
    return _BY_NAME.get(first) or ("other" if re.fullmatch("[a-z]{2,3}", first) else "")
