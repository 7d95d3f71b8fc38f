"""Checks of one transcript. Each takes the text and the threshold, and returns a detail if there is a fault."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from ..data.hotword_lists import MARKS
from ..data.jsonl import recording_id
from ..model.languages import LANGUAGES
from .kinds import KINDS
from .rows import DataRow
from .scripts import LOOK_ALIKE, fits_language, script_of

TextCheck = Callable[[str, float], str | None]

WITHOUT_ITN = "不进行文本规整"  # in the prompts of Fun-ASR (`chat.transcription_prompt`)
_LANGUAGE_IN_PROMPT = re.compile(f"语音转写成({'|'.join(map(re.escape, LANGUAGES.values()))})")
_CODES = {name: code for code, name in LANGUAGES.items()}
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9:_-]*(?:\s[^<>]*)?/?>|<!--|<\?xml|<!\[CDATA\[")
_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#[xX][0-9a-fA-F]{2,5});|&(?:amp|lt|gt|quot|apos|nbsp)\b")
_MARKDOWN = re.compile(r"\*\*\S[^*]*\*\*|\[[^\]]+\]\([^)]+\)|```|\\[nrtu\"/]|\{\\[a-z]|^#{1,6} \S|^\*[^*\s][^*]*\*$")
# Markup of subtitles, tokenizers, pronunciation dictionaries, URLs and programming languages.
_NOTATION = re.compile(
    r"-->|\d:\d\d[.,]\d\d|^\s*\d{1,2}:\d\d:\d\d\b|[\[(<]\d{1,2}:\d\d(?::\d\d)?[\])>]|▁|\w@@(?:\s|$)|(?:^|\s)##\w"
    r"|\w%[2-7][0-9A-Fa-f]\w|[ˈˌː]|(?:\b[A-Z]{2}[012]\b[^a-z]*){2}|(?:\b[a-zü]{2,6}[1-5]\b[^a-z]*){3}|^\s*[\[{]\s*([\"']).*\1\s*[\]}]\s*$|^b([\"']).*\2$",
    re.DOTALL,
)
_TAGS = (
    "a abbr article b blockquote body br center code div em font h1 h2 h3 h4 h5 h6 head hr html i img input li link"
    " meta ol option p pre ruby rt s script section small span strike strong style sub sup table tbody td tr tt u ul"
    " xml speak prosody phoneme"
)
_HTML_TAGS = frozenset(_TAGS.split())
_SPECIAL = re.compile(
    r"<[|/]?[A-Za-z_][\w ./:-]*\|?>|\[(?:unk|pad|cls|sep|mask|[a-z]+(?:[ _-][a-z]+)?)\]|\{[A-Za-z]+\}"
    r"|%(?:hes|uh|um|bcack)\w*|<\|[\d.]+\|>|\(\s*\)|\[\s*\]|\{\s*\}|<\s*>|\(\([^()]*\)\)|^\s*(?:>>|-\s)",
    re.IGNORECASE,
)
_SOUND = re.compile(
    r"[(（](?:laugh|noise|music|applause|inaudible|unintelligible|unclear|crosstalk|silence|cough|breath|pause|beep|sigh|xxx)"
    r"\w*[)）]|[(（](?:笑|笑声|噪音|音乐|掌声)[)）]|♪|♫",
    re.IGNORECASE,
)
_URL = re.compile(r"https?:/|\bwww\.\w|\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b", re.IGNORECASE)
_SPEAKER_TAG = re.compile(
    r"^\s*(?:[A-Z]|(?:spk|speaker|agent|customer|caller|interviewer)[ _-]?\w{0,3})[:：]\s", re.IGNORECASE
)
_FILE_NAME = re.compile(
    r"\S+\.(?:wav|flac|mp3|ogg|opus|m4a|sph|pcm|txt|json)\Z|(?:/|[A-Z]:\\)\S+[/\\]\S+\Z", re.IGNORECASE
)
_MISSING = frozenset(
    ("None", "nan", "NaN", "NULL", "N/A", "n/a", "<NA>", "#N/A", "undefined", "#NAME?", "#REF!", "#VALUE!")
)
_HASH = re.compile(r"(?=.*[a-f])(?=.*\d)(?:[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50-\u2b55\ufe0f]")
_WORD = re.compile(rf"[\w{MARKS}'’]+")
_BREAK = re.compile(r"[\t\n\r\v\f\u2028\u2029\u0085]")
_FULL_WIDTH = re.compile("[\ufb00-\ufb06\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uff9d]")
_SPACES = re.compile(
    r"[^\S \t\n\r\v\f\u2028\u2029\u0085]|  +|(?<=\w)_+(?=\w)|(?<=[\u4e00-\u9fff])(?: [\u4e00-\u9fff]){3}"
)
_QUOTES = re.compile(r'""|^"[^"]*$|^[^"]*"$')
MOST_DECODED = 0.5  # share of characters in one script that shows UTF-8 in another encoding
_JOINERS = "\u200c\u200d"  # needed in Persian, and in the scripts of India
_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_REPEATED_PHRASE = re.compile(r"(.{2,40}?)\1{3,}", re.DOTALL)
_TWICE = re.compile(r"(.{24,}|[^\x00-\x7f]{8,}) ?\1 ?\Z", re.DOTALL)  # the whole text; shorter ones are said twice
_DIGITS = (
    "zero oh one two three four five six seven eight nine ten null eins zwei drei vier fünf sechs sieben acht neun"
    " un deux trois quatre cinq sept huit neuf uno dos tres cuatro cinco seis siete ocho nueve"
)
_NUMBERS = frozenset(_DIGITS.split())
_NUMBER_CHARACTERS = frozenset("零一二三四五六七八九十百千万亿〇幺两")
_REPEATABLE = "no yes yeah ha hee la na very bye go hey okay ok knock so well please nein ja non oui si"
_OFTEN_REPEATED = frozenset(_REPEATABLE.split())
LONGEST_RUN = 12  # equal digits, or words that people repeat, in a row: fewest for a finding


def check_text(row: DataRow) -> Iterator[tuple[str, str]]:
    """Yields kinds and details of all faults of a row's transcripts."""
    for kind, check in TEXT_CHECKS.items():
        limit = KINDS[kind].limit or 0.0
        if details := [detail for answer in row.answers if (detail := check(answer, limit)) is not None]:
            yield kind, details[0]
    if detail := next(filter(None, (_wrong_column(answer, row) for answer in row.answers)), None):
        yield "wrong-column", detail
    if WITHOUT_ITN in row.prompt and (match := re.search(r"\d+", row.text)):
        yield "digits", f"{match[0]!r}, but the prompt asks for no normalisation"
    named = _LANGUAGE_IN_PROMPT.search(row.prompt)
    language = _CODES[named[1]] if named else row.language
    if language and not fits_language(row.text, language):
        yield "wrong-language", f"the {'prompt' if named else 'row'} says {language}: {show(row.text)}"


def _wrong_column(text: str, row: DataRow) -> str | None:
    text = text.strip()
    if text in (row.id, recording_id(row.recordings[0])) and not all(map(str.isalpha, text.split())):
        return None if text.isdigit() else f"the text is the ID: {show(text)}"  # a file may be called after a word
    for name in (row.id, recording_id(row.recordings[0])):
        # The whole line of a list `ID TEXT` or `TEXT (ID)`; a short name or word may be said.
        first = text.startswith(name) and re.match(r"\W", text[len(name) :])
        if len(name) > 3 and not name.isalpha() and (first or text.endswith(f"({name})")):
            return f"the text contains the ID: {show(text)}"
    if text == row.speaker:
        return f"the text is the speaker: {show(text)}"
    kind = "file name" if _FILE_NAME.match(text) else "missing value" if text in _MISSING else None
    kind = kind or ("hash" if _HASH.fullmatch(text) else None)
    return kind and f"the text is a {kind}: {show(text)}"


def show(text: str, length: int = 60) -> str:
    """Returns the start of a text with visible control characters."""
    shown = "".join(_visible(character) for character in text[: length + 1])
    return f"{shown[:length]}…" if len(text) > length else shown


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")
    return f"\\u{ord(character):04x}" if hidden else character


def _name(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()


def _first(pattern: re.Pattern) -> TextCheck:
    def check(text: str, limit: float) -> str | None:
        match = pattern.search(text)
        return show(match[0]) if match else None

    return check


def _no_words(text: str, limit: float) -> str | None:
    return None if any(map(str.isalnum, text)) else show(text)


def _replacement(text: str, limit: float) -> str | None:
    found = next((c for c in text if c == "\ufffd" or unicodedata.category(c) in ("Co", "Cn")), None)
    return _name(found) if found else None


def _mojibake(text: str, limit: float) -> str | None:
    for match in _NOT_ASCII.finditer(text):
        for encoding, script, shortest in (("cp1252", None, 2), ("gbk", "CJK", 3), ("cp1251", "CYRILLIC", 4)):
            try:
                data = b"".join(_encode(character, encoding) for character in match[0])
                # The conversion may have lost bytes; but chance does not make many characters of one script.
                decoded = data.decode("utf-8", "replace" if script else "strict")
            except UnicodeError:
                continue
            fitting = sum(script is None or script_of(character) == script for character in decoded)
            enough = fitting >= (MOST_DECODED * len(decoded) if script else len(decoded)) and (
                not script or fitting > 1
            )
            if len(match[0]) >= shortest and enough:
                return f"{show(match[0], 20)} is {show(decoded, 20)}"
    return "锟斤拷" if "锟斤拷" in text else None


def _encode(character: str, encoding: str) -> bytes:
    """Encodes as Windows does: the bytes without a character in cp1252 become control characters."""
    if encoding == "cp1252" and "\x80" <= character <= "\x9f":
        return character.encode("latin-1")
    return character.encode(encoding)


def _control(text: str, limit: float) -> str | None:
    found = next((c for c in text if unicodedata.category(c) == "Cc" and not _BREAK.match(c)), None)
    return _name(found) if found else None


def _invisible(text: str, limit: float) -> str | None:
    for index, character in enumerate(text):
        if unicodedata.category(character) == "Cf":
            before = text[index - 1 : index]
            marked = unicodedata.category(before or " ")[0] == "M"  # a virama
            joins = character in _JOINERS and (marked or script_of(before or " ") not in ("LATIN", "CJK", None))
            if not joins and not _EMOJI.search(text[max(0, index - 2) : index + 2]):
                return _name(character)
    return None


def _not_normalized(text: str, limit: float) -> str | None:
    if unicodedata.is_normalized("NFC", text):
        return None
    normal = unicodedata.normalize("NFC", text)
    index = next((i for i, pair in enumerate(zip(text, normal, strict=False)) if pair[0] != pair[1]), len(normal))
    return f"{' '.join(map(_name, text[index : index + 2]))} instead of {_name(normal[index : index + 1] or ' ')}"


def _mixed_script(text: str, limit: float) -> str | None:
    for match in _WORDS.finditer(text):
        found = {script_of(character) for character in match[0]} & LOOK_ALIKE
        if len(found) > 1:
            return f"{match[0]}: {' and '.join(sorted(name.capitalize() for name in found if name))} letters"
    return None


def _markup(text: str, limit: float) -> str | None:
    for match in _TAG.finditer(text):
        name = re.split(r"[\s/>:]", match[0].strip("<>/"))[0].lower()
        if name in _HTML_TAGS or name.startswith(("!", "?")) or "=" in match[0]:
            return show(match[0])
    other = _ENTITY.search(text) or _MARKDOWN.search(text) or _NOTATION.search(text)
    return show(other[0]) if other else None


def _annotation(text: str, limit: float) -> str | None:
    for match in (*_SPECIAL.finditer(text), *_SOUND.finditer(text), *_SPEAKER_TAG.finditer(text)):
        if _markup(match[0], 0) is None:
            return show(match[0])
    return None


def _repetition(text: str, limit: float) -> str | None:
    words = [word.casefold() for word in _WORD.findall(text)]
    run = 1
    for before, word in zip(words, words[1:], strict=False):
        run = run + 1 if word == before else 1
        often = word in _NUMBERS or word in _OFTEN_REPEATED or word.isdigit()
        if run >= (LONGEST_RUN if often else limit):
            return f"{word} {run} times or more in a row"
    joined = " ".join(words) + " "
    for match in (*_REPEATED_PHRASE.finditer(joined), *filter(None, [_TWICE.match(joined)])):
        letters = {character for character in match[1] if character.isalnum()}
        number = (
            letters <= _NUMBER_CHARACTERS
            or set(match[1].split()) <= _NUMBERS | _OFTEN_REPEATED
            or match[1].strip().isdigit()
        )
        if letters and not number and len(match[1].strip()) > 1:
            return f"{show(match[1].strip(), 20)} repeated in a row"
    return None


def _long_word(text: str, limit: float) -> str | None:
    longest = max((match[0] for match in _WORDS.finditer(text)), key=len, default="")
    alphabetic = longest and script_of(longest[0]) in ("LATIN", "CYRILLIC", "GREEK")
    return f"{show(longest, 20)}, {len(longest)} letters" if alphabetic and len(longest) > limit else None


def _odd_spaces(text: str, limit: float) -> str | None:
    match = _SPACES.search(text)
    if match is None or match[0].isspace():
        return match and (_name(match[0][0]) if match[0][0] != " " else f"{len(match[0])} spaces")
    return f"spaces between characters: {show(match[0])}" if " " in match[0] else _name(match[0][0])


# A new check is one entry here, and its threshold one entry of `KINDS`.
TEXT_CHECKS: dict[str, TextCheck] = {
    "no-words": _no_words,
    "replacement-character": _replacement,
    "mojibake": _mojibake,
    "control-character": _control,
    "line-break": _first(_BREAK),
    "invisible-character": _invisible,
    "not-normalized": _not_normalized,
    "full-width": _first(_FULL_WIDTH),
    "mixed-script": _mixed_script,
    "markup": _markup,
    "annotation": _annotation,
    "url": _first(_URL),
    "emoji": _first(_EMOJI),
    "repetition": _repetition,
    "long-word": _long_word,
    "odd-spaces": _odd_spaces,
    "odd-quotes": _first(_QUOTES),
}
