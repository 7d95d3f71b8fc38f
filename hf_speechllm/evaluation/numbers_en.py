"""Numbers in English text that Whisper's rules do not handle: times, fractions, ranges, degrees, days of months."""

import re

from .signs import NUMBER, RATIO, SIGNS, read_between_numbers

_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {
    **{word: value for value, word in enumerate([*_ONES, *_TEENS], start=1)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
}
_NUMBER_WORD = "|".join([*_VALUES, "zero", "oh", "hundred", "thousand", "[mbtr]+illion"])
_ONE = "|".join(_ONES)

_DENOMINATORS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20,
}  # fmt: skip
_FRACTION = re.compile(rf"(?<![\w.-])(\d{{1,2}}|{_ONE}|{'|'.join(_TEENS)})[ -]({'|'.join(_DENOMINATORS)})(s?)\b")
_IN_A_NUMBER = re.compile(rf"(?:\d|\b(?:{'|'.join(_TENS)}|(?:hundred|thousand|[mbtr]+illion)(?: and)?))[ -]$")
_HALF = re.compile(rf"\b({NUMBER}|{_NUMBER_WORD}) (?:and (?:a|one) half|(?:and )?1/2)\b(?!/)")

_MINUTES = rf"(?:(?:twenty|thirty|forty|fifty)(?:[ -](?:{_ONE}))?|{'|'.join(_TEENS)}|(?:oh|o|zero) (?:{_ONE}))"
_HOUR = rf"(?:{_ONE}|ten|eleven|twelve)"
_AM_PM = r"(?:[ap]\.? ?m\b\.?)"
# Numbers after these words are spoken digit by digit or in pairs and are no times: room five thirty is room 530.
_NO_TIME_BEFORE = (
    r"\b(?:rooms?|flight|route|highway|number|bus|year|page|channel|chapter|apartment|extension|code|unit|line|in|since"
    rf"|point|and|minus|negative|plus|double|triple|\d|{_NUMBER_WORD}) $"
)
_NO_TIME_AFTER = (
    rf"(?! ?(?:\d|%|-)| (?:{_NUMBER_WORD}|dollars?|euros?|pounds?|cents?|percent|per cent|point)\b)"
    r"(?! (?:degrees?|volts?|people)\b)"
    rf"(?! (?:{_HOUR} )?(?:hundred|thousand|[mbtr]+illion)s?\b)"
)
_TIME = re.compile(rf"\b({_HOUR})[ -]({_MINUTES})\b(?![-'])" + _NO_TIME_AFTER)
_ONE_IS_AN_HOUR = re.compile(r"\b(?:at|by|until|till|before|after|around|about|from|to) $")
_CLOCK = re.compile(r"(?<![\d.:/])(\d|1[0-2]):00(?![\d:])( ?[ap]\.? ?m\b)?")

_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_DAY = re.compile(rf"\b({_MONTHS}) (\d{{1,2}}) ?(?:st|nd|rd|th)\b")
_CURRENCIES = {
    "¥": "yen",
    "₩": "won",
    "₹": "rupee",
    "₽": "ruble",
    "฿": "baht",
    "₺": "lira",
    "₫": "dong",
    "₪": "shekel",
}
_SIGN = re.compile(rf"(?<=\d)[{re.escape(SIGNS)}](?=\d)")
_PRIVATE = {sign: chr(0xE010 + index) for index, sign in enumerate(SIGNS)}


def _value(words: str) -> int:
    return sum(_VALUES.get(word, 0) for word in re.split("[ -]", words))


def _read_time(match: re.Match[str]) -> str:
    hour, minutes = match.groups()
    before = match.string[max(0, match.start() - 16) : match.start()]
    after = match.string[match.end() :]
    if re.search(_NO_TIME_BEFORE, before):
        return match[0]
    if hour == "one" and not _ONE_IS_AN_HOUR.search(before) and not re.match(rf" ?{_AM_PM}", after):
        return match[0]
    return f"{_value(hour)}:{_value(minutes):02d}"


def _read_fraction(match: re.Match[str]) -> str:
    numerator, denominator, plural = match.groups()
    count = int(numerator) if numerator.isdecimal() else _value(numerator)
    before = match.string[max(0, match.start() - 16) : match.start()]
    if (count == 1) == bool(plural) or _IN_A_NUMBER.search(before):  # one thirds, two third, twenty one third
        return match[0]
    return f"{count}/{_DENOMINATORS[denominator]}"


def spoken_to_written(text: str) -> str:
    """Writes spoken numbers with signs: "two thirds" as 2/3, "five thirty" as 5:30, "a hundred" as "one hundred".

    Args:
        text: lower-case English text without thousands separators.
    """
    text = re.sub(r"(?<!half )(?<!of )(?<!many )\ba (?=(?:hundred|thousand|million|billion|trillion)\b)", "one ", text)
    text = re.sub(r"\bhalf a (?=(?:million|billion|trillion)\b)", "zero point five ", text)
    text = _HALF.sub(r"\1 and a half", text)
    text = _FRACTION.sub(_read_fraction, text)
    return _TIME.sub(_read_time, text)


def read_signs(text: str) -> str:
    """Replaces signs in English text by words: degrees, currencies (after the number), ranges, scores, full hours."""
    text = re.sub(r"° ?c\b", " degrees celsius", text)
    text = re.sub(r"° ?f\b", " degrees fahrenheit", text)
    text = re.sub(r"(?<=\d) ?°", " degrees", text).replace("‰", " per mille")
    signs = "".join(_CURRENCIES)
    text = re.sub(rf"([{signs}]) ?(\d+(?:[.,]\d+)*)", lambda match: f"{match[2]} {_CURRENCIES[match[1]]}", text)
    text = re.sub(rf"(?<=\d) ?([{signs}])", lambda match: f" {_CURRENCIES[match[1]]}", text)
    text = re.sub(r"(?<=\d) (rupee|ruble|shekel)s\b", r" \1", text)
    text = read_between_numbers(text, "en")
    return RATIO.sub(_read_ratio, _CLOCK.sub(_read_clock, text))


def read_days(text: str) -> str:
    """Rewrites "march 3 rd" (from "March third") as "march 3"."""
    return _DAY.sub(r"\1 \2", text)


def _read_clock(match: re.Match[str]) -> str:
    hour, am_pm = match.groups()
    return f"{hour} {am_pm.strip()}" if am_pm else f"{hour} o clock"


def _read_ratio(match: re.Match[str]) -> str:
    first, second = match.groups()
    return match[0] if len(second) == 2 and int(first) < 25 and int(second) < 60 else f"{first} to {second}"


def protect_signs(text: str) -> str:
    """Replaces signs between digits by private-use characters, which Whisper's rules ignore."""
    return _SIGN.sub(lambda match: f" {_PRIVATE[match[0]]} ", text)


def restore_signs(text: str) -> str:
    """Reverts `protect_signs`."""
    for sign, private in _PRIVATE.items():
        text = re.sub(rf" *{private} *", sign, text)
    return text


def split_am_pm(text: str) -> str:
    """Rewrites "7 am" as "7 a m" (from "7 a.m.")."""
    return re.sub(r"(?<=\d) ?([ap])\.? ?m\b(?! i\b)", r" \1 m", text)
