"""Signs between numbers and their spoken words: ranges, scores, dates, times, telephone numbers.

Without the sign, different numbers would be equal: 1/2 and 12, 3-2 and 32. A sign becomes a spoken word, if there is
one. Otherwise the sign is a token between digits. Only the hyphens of telephone numbers are removed, because nobody
speaks them.
"""

import re
from typing import NamedTuple

SIGNS = "-:/^+×*÷="  # tokens between digits, unless replaced by words
DASH = "[-‐‒–—−~〜∼]"
NUMBER = r"\d+(?:\.\d+)?"
_UNIT = "[点时分秒年月日号度元块角圆円時人個个号歳岁%℃]"


class Readings(NamedTuple):
    """Spoken words of a language for signs between numbers; `date` is a format of year, month and day."""

    date: str
    range: str
    ratio: str
    operators: dict[str, str]


READINGS = {
    "zh": Readings("{}年{}月{}日", "到", "比", {"+": "加", "×": "乘", "*": "乘", "÷": "除以", "=": "等于"}),
    "ja": Readings("{}年{}月{}日", "から", "対", {"+": "足す", "×": "掛ける", "*": "掛ける", "÷": "割る", "=": "は"}),
    "ko": Readings(
        "{}년{}월{}일", "에서", "대", {"+": "더하기", "×": "곱하기", "*": "곱하기", "÷": "나누기", "=": "는"}
    ),
    "en": Readings(
        "{}/{}/{}",
        " to ",
        " to ",
        {"+": " plus ", "×": " times ", "*": " times ", "÷": " divided by ", "=": " equals "},
    ),
    "other": Readings("{}/{}/{}", "-", ":", {sign: sign for sign in "+×*÷="}),
}

_DATE = re.compile(r"(?<![\d.,/:-])([12]\d{3})([-/.])(0?[1-9]|1[0-2])\2(0?[1-9]|[12]\d|3[01])(?!\d|[/.:-]\d)")
_GROUPS = re.compile(r"(?<![\d.,/:-])\d+(?:-\d+)+(?!\d|[.,/:]\d)")
_PAIR = re.compile(rf"(?<![\d./:])({NUMBER}[千万亿億]*%?) ?{DASH} ?(?=[-−]?\d)")
_SCORE_BEFORE = re.compile(r"(?:比分|比例|比率|比值|配比|スコア|スコアは|得点)[^\d,。]{0,4}$")
RATIO = re.compile(r"(?<![\d:.])(\d+):(\d+)(?![\d:])")


def is_telephone_number(groups: list[str]) -> bool:
    """Whether groups of digits, joined by hyphens, are a telephone number rather than a range or a score."""
    lengths = list(map(len, groups))
    if len(groups) > 2:
        return sum(lengths) >= 7
    area, number = groups
    if lengths == [3, 4]:  # 555-0123; a range has round ends: 100-1000
        return not (area.endswith("0") and number.endswith("0"))
    return (3 <= lengths[0] <= 4 and lengths[1] in (7, 8)) or (area[0] == "0" and lengths[1] >= 6)


def _read_groups(match: re.Match[str]) -> str:
    groups = match[0].split("-")
    return "".join(groups) if is_telephone_number(groups) else match[0]


def is_score(text: str, start: int) -> bool:
    """Whether the words before a position announce a score or a ratio rather than a time or a range."""
    return bool(_SCORE_BEFORE.search(text, max(0, start - 10), start))


def read_between_numbers(text: str, language: str) -> str:
    """Replaces signs between numbers by spoken words.

    Args:
        text: lower-case text with ASCII digits, without thousands separators.
        language: a key of `READINGS`.
    """
    readings = READINGS[language]
    # Normalised text has spaces: "2 4 / 7".
    text = re.sub(rf"(?<!\d)(?<!\d )\d(?: \d)+(?= [{SIGNS}] \d)", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(rf"(?<=\d) ([{SIGNS}]) (?=\d)", r"\1", text)
    text = _DATE.sub(lambda match: readings.date.format(int(match[1]), int(match[3]), int(match[4])), text)
    text = _GROUPS.sub(_read_groups, text)
    text = re.sub(rf"([$£€¢¥₩]) ?({NUMBER}) ?{DASH} ?\1?(?=\d)", rf"\2{readings.range}\1", text)
    if language in ("zh", "ja", "ko"):
        text = re.sub(rf"(?<=\d)({_UNIT}) ?{DASH} ?(?=[-−]?\d)", rf"\1{readings.range}", text)
    text = _PAIR.sub(
        lambda match: match[1] + (readings.ratio if is_score(match.string, match.start()) else readings.range), text
    )
    return re.sub(r"(?<=[\d%]) ?([+×*÷=]) ?(?=[$£€]?\d)", lambda match: readings.operators[match[1]], text)
