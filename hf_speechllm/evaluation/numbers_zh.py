"""Numbers and symbols in Chinese text, spoken or written; also in Japanese and Korean, where the writing is the same.

The grammar of numerals is everyday Mandarin: units decrease from left to right (千 百 十 within a group, 万 and 亿
between groups), 零 marks a gap, a single digit after 百, 千, 万 or 亿 counts the next smaller unit (一百二 is 120),
and digits without units are read one by one (二零二四).
"""

import re

from .signs import RATIO, READINGS, is_score, read_between_numbers

_DIGIT = "[一二三四五六七八九]"
_DIGIT_BEFORE_UNIT = "[一二两三四五六七八九]"
_ANY = "零一二两三四五六七八九十百千万亿億兆0-9"
_TENS = f"{_DIGIT}?十{_DIGIT}?"
# 5000 in 5000万 and 3千 in 3千万; not the fraction in 3.5万, nor the last of several digits with spaces in between.
_WRITTEN_HEAD = r"(?<![\d.点])(?<!\d )[1-9](?:\d{0,15}(?=[万亿億兆](?!分之))|千(?![克瓦]|分之)|百(?!分之))"
_WRITTEN_TAIL = r"[1-9]\d{0,3}千?(?!\d| \d|[.,:/%点]\d|[百万亿億兆])"
# In Japanese, 百 or 千 without a digit is a numeral before these characters (百円, 千年), but not in 百貨店 or 千葉.
_JAPANESE_COUNTERS = "[円人年個本回台名件枚歳度点冊匹頭万億兆メキグトドポパユセリヶヵカか日時分秒倍]"


def _number_pattern(japanese: bool) -> re.Pattern[str]:
    """Returns a pattern of numerals; in Japanese, 百 and 千 need no digit: 千二百, 三千百五十."""
    digit = f"{_DIGIT_BEFORE_UNIT}?" if japanese else _DIGIT_BEFORE_UNIT
    no_digit = f"(?<![{_ANY}])(?=[百千](?:[一二三四五六七八九十百]|{_JAPANESE_COUNTERS}))" if japanese else "(?!)"
    hundreds = "{}百(?:零?" + _TENS + "|零?" + _DIGIT + ")?"
    # 千 in 千克 and 千瓦 belongs to the unit: 五千克 is written 5千克.
    thousands = "{}千(?![克瓦])(?:零?(?:" + hundreds.format(digit) + "|" + _TENS + ")|零?" + _DIGIT + ")?"
    below_10_000 = (
        f"(?:{thousands.format(_DIGIT_BEFORE_UNIT)}|{hundreds.format(_DIGIT_BEFORE_UNIT)}"
        f"|{no_digit}(?:{thousands.format('')}|{hundreds.format('')})|{_TENS}|{_DIGIT})"
    )
    inner = f"(?:{thousands.format(digit)}|{hundreds.format(digit)}|{_TENS}|{_DIGIT})"
    head = f"(?:{below_10_000}|两|{_WRITTEN_HEAD})"
    tail = f"(?:零?{inner}|{_WRITTEN_TAIL})?"
    below_100_million = f"{head}万{tail}"
    rest = f"(?:{inner}|两|{_WRITTEN_HEAD})万{tail}"
    number = f"(?:{below_100_million}|{head})[亿億](?:零?{rest}|{tail})|{below_100_million}"
    if japanese:
        number = f"{head}兆(?:{number}|{tail})|{number}"
    return re.compile(f"{number}|{below_10_000}|{_WRITTEN_HEAD}")


_NUMBERS = {"zh": _number_pattern(japanese=False), "ja": _number_pattern(japanese=True)}
_NUMBERS["ko"] = _NUMBERS["zh"]
_UNITS = (("兆", 10**12), ("亿", 10**8), ("万", 10**4), ("千", 1000), ("百", 100), ("十", 10))
_UNIT_ZEROS = {"万": 4, "亿": 8, "億": 8, "万亿": 12}
_DECIMAL_WITH_UNIT = re.compile(r"(?<![\d.点])(\d{1,15})[.点](\d{1,12})(万亿|[万亿億])(?!分之)")
_DIGITS = "零一二三四五六七八九"
_DIGIT_VALUES = {digit: str(value) for value, digit in enumerate(_DIGITS)}
_DIGIT_VALUES["两"] = "2"
_CHINESE_DIGITS = {ord(str(value)): digit for value, digit in enumerate(_DIGITS)}

# After 点, digits without a unit are decimals; with 十 they are minutes.
_DECIMALS = re.compile(
    "(?<=[零一二两三四五六七八九十百千万亿億0-9]点)[零一二三四五六七八九]+(?![零一二两三四五六七八九十百千])"
)
_MINUTES_WITHOUT_UNIT = re.compile(
    f"([一二两三四五六七八九十0-9]点)([二三四五]?十{_DIGIT}?)(?![零一二三四五六七八九十百千万亿億0-9分秒点多几来])"
)
# 两 is a digit before a noun (两个人) and a weight after a number (二两).
_TWO = re.compile(r"(?<![\d几半])(?<!\d )两(?!\W*$)")


def _value(numeral: str, language: str) -> int:
    for unit, size in _UNITS:
        head, found, tail = numeral.rpartition(unit)
        if found:
            count = _value(head, language) if head else 1
            if len(tail) == 1 and tail != "十" and size >= 100 and language != "ja":  # 一百二: 120, Japanese 百二: 102
                return count * size + _value(tail, language) * size // 10
            return count * size + (_value(tail.lstrip("零"), language) if tail else 0)
    return int(_DIGIT_VALUES.get(numeral, numeral))


def _write_out(match: re.Match[str]) -> str:
    """Rewrites 3.5万 as 35000; returns the text unchanged if decimals would remain."""
    whole, decimals, unit = match.groups()
    zeros = _UNIT_ZEROS[unit]
    return str(int(whole + decimals.ljust(zeros, "0"))) if len(decimals) <= zeros else match[0]


# Two consecutive digits are an approximate number before a unit, after a unit, or before a measure word: 二三十 is 20
# to 30, 十五六 is 15 or 16, 七八个 is 7 or 8. They must differ from 230, 156 and 78.
_MEASURES = (
    "(?:[个個天次块元岁歳斤位名件条只张辆家间句遍匹碗杯瓶颗支吨倍人枚冊](?!分)"
    f"|个?月|公里|公斤|小时|分钟|秒钟|星期|点(?![{_ANY}])|時間)"
)
_ROUGH = re.compile(
    f"(?<![{_ANY}点第])((?:[一二两三四五六七八九十百千万亿億零]*[十百千万亿億])?)"
    "([一二两三四五六七八])([二两三四五六七八九])"
    f"(?:([十百千万亿億]+)(?![{_ANY}年])|(?=({_MEASURES}))|(?![{_ANY}点]))"
)
_WRITTEN_WITH_UNITS = re.compile(r"(?<![\d.点])(?<!\d )[1-9](?:[千百十][1-9])+(?![\d.点]| \d)")  # 3千5百


def _read_rough(match: re.Match[str], word: str) -> str:
    head, first, second, unit, measure = match.groups()
    step = int(_DIGIT_VALUES[second]) - int(_DIGIT_VALUES[first])
    neighbours = step == 1 and (head or unit or measure)
    if not neighbours and not (first + second == "三五" and (unit or measure)):
        return match[0]
    unit = unit or ""
    return f"{head}{first}{unit}{word}{head}{second}{unit}"


def numerals_to_digits(text: str, language: str = "zh") -> str:
    """Converts Chinese numerals to Arabic digits: 一百零八 to 108, 二零二四 to 2024, 三点一四 to 3点14.

    万 and 亿 are written out: 三亿五千万, 3亿5000万, 三点五亿 and 3.5亿 all become 350000000. A unit without a digit
    (百 in 百货, 千万 in 千万不要) is a word and does not change; in Japanese, a unit before a numeral or a counter is
    a number (百円). Idioms are handled as numbers (一起 becomes 1起), in references and hypotheses alike.

    Args:
        text: simplified Chinese or Japanese text without spaces between characters.
        language: "zh", "ja" or "ko".
    """
    text = re.sub(f"(?<=[{_ANY}])[○◯]|[○◯](?=[{_ANY}])", "零", text).replace("〇", "零").replace("幺", "一")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _MINUTES_WITHOUT_UNIT.sub(r"\1\2分", text)
    text = _DECIMALS.sub(lambda match: "".join(_DIGIT_VALUES[digit] for digit in match[0]), text)
    text = _ROUGH.sub(lambda match: _read_rough(match, READINGS[language].range), text)
    text = _WRITTEN_WITH_UNITS.sub(lambda match: match[0].translate(_CHINESE_DIGITS), text)
    text = _NUMBERS[language].sub(lambda match: str(_value(match[0].replace("億", "亿"), language)), text)
    text = _DECIMAL_WITH_UNIT.sub(_write_out, text)
    return _TWO.sub("2", text.replace("零", "0"))


_AMOUNT = r"(?<!\d)(?<!\d )\d+(?: \d+)*(?:[.点]\d+(?: \d+)*)?"
_CURRENCIES = {
    "zh": {"¥": "元", "$": "美元", "€": "欧元", "£": "英镑", "¢": "美分", "₩": "韩元"},
    "ja": {"¥": "円", "$": "ドル", "€": "ユーロ", "£": "ポンド", "¢": "セント", "₩": "ウォン"},
    "ko": {"¥": "엔", "$": "달러", "€": "유로", "£": "파운드", "¢": "센트", "₩": "원"},
}
_PERCENT = {"zh": r"百分之\1", "ja": r"\1パーセント", "ko": r"\1퍼센트"}
_FRACTION = {"zh": "分之", "ja": "分の", "ko": "분의"}
_AND = {"zh": "又", "ja": "と", "ko": "와"}
_PER_MILLE = {"zh": r"千分之\1", "ja": r"\1パーミル", "ko": r"\1퍼밀"}
_MINUS = {"zh": "负", "ja": "マイナス", "ko": "마이너스"}
_TIME_UNITS = {"zh": "点分秒", "ja": "時分秒", "ko": "시분초"}
_FOREIGN_DOLLARS = {
    "us": "美元",
    "hk": "港元",
    "nt": "新台币",
    "a": "澳元",
    "au": "澳元",
    "c": "加元",
    "ca": "加元",
    "s": "新加坡元",
}
_TIME = re.compile(r"(?<![\d:.])([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?![\d:])")
_DAYTIME = "(?:[上中下]午|[早晚]上|凌晨|清晨|傍晚|半夜|夜里|[今明昨][早晚])"


def _read_time(match: re.Match[str], language: str) -> str:
    hour, minute, second = match.groups()
    hours, minutes, seconds = tuple(_TIME_UNITS[language])
    if language == "zh" and not second and is_score(match.string, match.start()):
        return match[0]
    hour = hour.lstrip("0") or "0"
    if minute == "00" and second is None:
        return f"{hour}{hours}"
    if language != "zh":  # only Chinese reads 零 before minutes
        minute = minute.lstrip("0") or "0"
    return f"{hour}{hours}{minute}{minutes}" + (f"{second}{seconds}" if second else "")


def _read_fraction(match: re.Match[str], word: str) -> str:
    numerator, denominator = match.groups()
    # 24/7 is no fraction. A date such as 3/15 cannot be distinguished from a fraction.
    return match[0] if match[0] == "24/7" else f"{denominator}{word}{numerator}"


def read_symbols(text: str, language: str) -> str:
    """Replaces symbols next to digits by spoken words: 35% by 百分之35, -5.5 by 负5点5, $3 by 3美元, 1/3 by 3分之1.

    Also replaces times (10:05 by 10点05分, 三点半 by 3点30分), dates (2024/5/1 by 2024年5月1日), scores (3:2 by 3比2)
    and ranges (5-6 by 5到6).

    Args:
        text: lower-case text, after `numerals_to_digits`.
        language: "zh", "ja" or "ko".
    """
    currencies = _CURRENCIES[language]
    symbols = "".join(map(re.escape, currencies))
    readings = READINGS[language]
    text = re.sub(r"(?<=\d) (?=\d{1,2}/\d)", _AND[language], text)  # 2 1/3
    hours = _TIME_UNITS[language][0]
    if language == "zh":
        text = re.sub(
            rf"(?<![a-z])(us|hk|nt|au?|ca?|s) ?\$ ?({_AMOUNT}[百千万亿億]*)",
            lambda match: match[2] + _FOREIGN_DOLLARS[match[1]],
            text,
        )
    text = read_between_numbers(_TIME.sub(lambda match: _read_time(match, language), text), language)
    text = re.sub(rf"([{symbols}])\s*({_AMOUNT}[百千万亿億]*)", lambda m: m[2] + currencies[m[1]], text)
    text = re.sub(rf"(?<=\d)\s*([{symbols}])", lambda m: currencies[m[1]], text)
    text = re.sub(rf"(?<=\d){hours}半", f"{hours}30{_TIME_UNITS[language][1]}", text)
    if language == "zh":
        text = re.sub(r"(?<=\d)点([13])刻", lambda m: f"点{15 * int(m[1])}分", text)
        text = re.sub(rf"({_DAYTIME}\d{{1,2}}点[0-5]\d)(?![\d分点%元])", r"\1分", text)
        text = re.sub(r"(?<![\d零])0(?=[1-9][月日号])", "", text).replace("百分之百", "百分之100")
    text = RATIO.sub(rf"\1{readings.ratio}\2", text)
    text = re.sub(r"(?<![0-9a-z%)])[-−](?=\d)", _MINUS[language], text)
    text = re.sub(rf"({_AMOUNT})\s*‰", _PER_MILLE[language], text)
    text = re.sub(r"(?<![\d/.])(\d{1,9})/(\d{1,9})(?![\d/.])", lambda m: _read_fraction(m, _FRACTION[language]), text)
    if language == "zh":
        text = re.sub(rf"({_AMOUNT})%?到({_AMOUNT})\s*%", _read_percent_range, text)
    text = re.sub(rf"({_AMOUNT})\s*%", _PERCENT[language], text)
    return re.sub(r"(?<=\d)\.(?=\d)", "点", text)


def _read_percent_range(match: re.Match[str]) -> str:
    low, high = match.groups()
    both = "%到" in match[0].replace(" ", "")
    return f"百分之{low}到百分之{high}" if both else f"百分之{low}到{high}"
