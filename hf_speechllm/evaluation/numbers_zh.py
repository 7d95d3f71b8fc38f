"""Numbers and symbols in Chinese (and, as far as they are written alike, Japanese and Korean) text, spoken or written.

The numeral grammar is that of everyday Mandarin: units fall from left to right (千 百 十 within a group, 万 and 亿
between groups), 零 marks a gap, a bare digit after 百, 千, 万 or 亿 counts the next smaller unit (一百二 is 120), and
digits without any unit are read one by one (二零二四).
"""

import re

_DIGIT = "[一二三四五六七八九]"
_DIGIT_BEFORE_UNIT = "[一二两三四五六七八九]"
_TENS = f"{_DIGIT}?十{_DIGIT}?"
_HUNDREDS = f"{_DIGIT_BEFORE_UNIT}百(?:零?{_TENS}|零?{_DIGIT})?"
# 千 in 千克 and 千瓦 belongs to the unit: 五千克 is written 5千克.
_THOUSANDS = f"{_DIGIT_BEFORE_UNIT}千(?![克瓦])(?:零?(?:{_HUNDREDS}|{_TENS})|零?{_DIGIT})?"
_BELOW_10_000 = f"(?:{_THOUSANDS}|{_HUNDREDS}|{_TENS}|{_DIGIT})"
# 5000 of 5000万, 3千 of 3千万; not the fraction of 3.5万, nor the last of single digits set apart by spaces.
_WRITTEN_HEAD = r"(?<![\d.点])(?<!\d )[1-9](?:\d{0,15}(?=[万亿億](?!分之))|千(?![克瓦]|分之)|百(?!分之))"
_WRITTEN_TAIL = r"[1-9]\d{0,3}千?(?!\d| \d|[.,:/%点]\d|[百万亿億])"
_HEAD = f"(?:{_BELOW_10_000}|两|{_WRITTEN_HEAD})"
_TAIL = f"(?:零?{_BELOW_10_000}|{_WRITTEN_TAIL})?"
_BELOW_100_MILLION = f"{_HEAD}万{_TAIL}"
_NUMBER = re.compile(
    f"(?:{_BELOW_100_MILLION}|{_HEAD})[亿億](?:零?{_BELOW_100_MILLION}|{_TAIL})"
    f"|{_BELOW_100_MILLION}|{_BELOW_10_000}|{_WRITTEN_HEAD}"
)
_UNITS = (("亿", 10**8), ("万", 10**4), ("千", 1000), ("百", 100), ("十", 10))
_UNIT_ZEROS = {"万": 4, "亿": 8, "億": 8, "万亿": 12}
_DECIMAL_WITH_UNIT = re.compile(r"(?<![\d.点])(\d{1,15})[.点](\d{1,12})(万亿|[万亿億])(?!分之)")
_DIGIT_VALUES = {digit: str(value) for value, digit in enumerate("零一二三四五六七八九")}
_DIGIT_VALUES["两"] = "2"

# After 点, digits without a unit are decimals; with 十 they are minutes.
_DECIMALS = re.compile(
    "(?<=[零一二两三四五六七八九十百千万亿億0-9]点)[零一二三四五六七八九]+(?![零一二两三四五六七八九十百千])"
)
_MINUTES_WITHOUT_UNIT = re.compile(
    f"([一二两三四五六七八九十0-9]点)([二三四五]?十{_DIGIT}?)(?![零一二三四五六七八九十百千万亿億0-9分秒点多几来])"
)
# 两 is a digit before a noun (两个人) and a weight after a number (二两).
_TWO = re.compile(r"(?<![\d几半])(?<!\d )两(?!\W*$)")


def _value(numeral: str) -> int:
    for unit, size in _UNITS:
        head, found, tail = numeral.rpartition(unit)
        if found:
            count = _value(head) if head else 1
            if len(tail) == 1 and size >= 100:
                return count * size + _value(tail) * size // 10
            return count * size + (_value(tail.lstrip("零")) if tail else 0)
    return int(_DIGIT_VALUES.get(numeral, numeral))


def _write_out(match: re.Match[str]) -> str:
    """3.5万 as 35000; unchanged where decimals would remain."""
    whole, decimals, unit = match.groups()
    zeros = _UNIT_ZEROS[unit]
    return str(int(whole + decimals.ljust(zeros, "0"))) if len(decimals) <= zeros else match[0]


def numerals_to_digits(text: str) -> str:
    """Turns Chinese numerals into Arabic digits: 一百零八 into 108, 二零二四 into 2024, 三点一四 into 3点14.

    万 and 亿 are written out: 三亿五千万, 3亿5000万, 三点五亿 and 3.5亿 all become 350000000. A unit without a digit
    before it (百 in 百货, 千万 in 千万不要) is a word and stays. Idioms are not told from numbers (一起 becomes 1起):
    both sides of a comparison are treated alike.

    Args:
        text: simplified Chinese or Japanese text without spaces between characters.
    """
    text = text.replace("〇", "零").replace("幺", "一")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _MINUTES_WITHOUT_UNIT.sub(r"\1\2分", text)
    text = _DECIMALS.sub(lambda match: "".join(_DIGIT_VALUES[digit] for digit in match[0]), text)
    text = _NUMBER.sub(lambda match: str(_value(match[0].replace("億", "亿"))), text)
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


def _read_time(match: re.Match[str]) -> str:
    hour, minute, second = match.groups()
    if minute == "00" and second is None:
        return f"{hour}点"
    return f"{hour}点{minute}分" + (f"{second}秒" if second else "")


def _read_fraction(match: re.Match[str], word: str) -> str:
    numerator, denominator = match.groups()
    # 24/7 is no fraction; a date such as 3/15 cannot be told from one.
    return f"{denominator}{word}{numerator}" if int(numerator) < int(denominator) else match[0]


def read_symbols(text: str, language: str) -> str:
    """Writes symbols next to digits as they are read out: 35% as 百分之35, -5.5 as 负5点5, $3 as 3美元, 1/3 as 3分之1.

    In Chinese also times (10:05 as 10点05分, 三点半 as 3点30分) and scores (3:2 as 3比2).

    Args:
        text: lower-case text whose numerals are digits.
        language: "zh", "ja" or "ko".
    """
    currencies = _CURRENCIES[language]
    symbols = "".join(map(re.escape, currencies))
    text = re.sub(rf"([{symbols}])\s*({_AMOUNT}[百千万亿億]*)", lambda m: m[2] + currencies[m[1]], text)
    text = re.sub(rf"(?<=\d)\s*([{symbols}])", lambda m: currencies[m[1]], text)
    if language == "zh":
        text = re.sub(r"(?<![\d:.])([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?![\d:])", _read_time, text)
        text = re.sub(r"(?<=\d)点半", "点30分", text)
        text = re.sub(r"(?<![\d:])(\d+):(\d+)(?![\d:])", r"\1比\2", text)
        text = re.sub(r"(?<![0-9a-z%)])[-−](?=\d)", "负", text)
        text = re.sub(rf"({_AMOUNT})\s*‰", r"千分之\1", text.replace("百分之百", "百分之100"))
    text = re.sub(r"(?<![\d/.])(\d{1,9})/(\d{1,9})(?![\d/.])", lambda m: _read_fraction(m, _FRACTION[language]), text)
    text = re.sub(rf"({_AMOUNT})\s*%", _PERCENT[language], text)
    return re.sub(r"(?<=\d)\.(?=\d)", "点", text)
