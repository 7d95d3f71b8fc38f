"""The dialogue format: prompts, hotwords, label mask and number of audio tokens; with `chat_layout`, the layout.

No other module defines the format. Training and decoding build prompts with the same functions, so their prompts
agree. The ChatML layout follows Fun-ASR (`load_data_template` and `get_prompt` in `model.py`) and FunASR
(`fun_asr_datasets/datasets.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .chat_layout import CHATML, THINK_BLOCK, TURN_END, TURN_START, ChatLayout
from .languages import language_name

IGNORE_INDEX = -100  # label of a token that is not supervised
AUDIO_TOKEN = "<|object_ref_start|>"  # placeholder in `input_ids`; a spare special token of the Qwen tokenizers
SPEECH_START, SPEECH_END = "<|startofspeech|>", "<|endofspeech|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
_SILENCE = re.compile("/sil(?![a-z])")  # how Fun-ASR may write a pause
_SPEECH = re.compile(f"({re.escape(SPEECH_START)}.*?{re.escape(SPEECH_END)})", re.DOTALL)


class ChatError(ValueError):
    """An invalid dialogue; the message says what is wrong and how to fix it."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Args:
        pieces: parts of the user's message, in order: text (`str`) or `Recording`.
        answer: the assistant's message; `None` if the model must generate one.
        prefix: text before the answer in the assistant's message, which is not supervised.
    """

    pieces: tuple[str | Recording, ...]
    answer: str | None
    prefix: str = ""


@dataclass(frozen=True)
class Recording:
    """A recording inside a message.

    Args:
        source: path, URL, bytes or waveform, shape = (samples,), at 16 kHz.
    """

    source: Any


@dataclass(frozen=True)
class Dialogue:
    """A system prompt and the turns that follow it."""

    system: str | None
    turns: tuple[Turn, ...]

    @property
    def recordings(self) -> list[Any]:
        """Sources of all recordings, in order of appearance."""
        return [piece.source for turn in self.turns for piece in turn.pieces if isinstance(piece, Recording)]


@dataclass
class TokenizedDialogue:
    """Token ids and labels. Only the answers and their end tokens are supervised; other labels are -100."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        """Appends ids; their labels are the ids if `supervised`, otherwise -100."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE_INDEX] * len(ids))


def transcription_prompt(
    language: str | None = None,
    itn: bool = True,
    hotwords: str | Sequence[str] | None = (),
    prompt: str | None = None,
    context: str | None = None,
) -> str:
    """Builds the user's text before a recording, as `get_prompt` in Fun-ASR's `model.py`.

    Args:
        language: ISO code or Chinese name of the transcript's language; `None`: the model detects the language.
        itn: whether to apply inverse text normalisation (digits instead of number words).
        hotwords: words that may occur; a list, or a string with commas between them.
        prompt: replaces the instruction; must not be combined with `language` or `itn=False`.
        context: free text about the recording.

    Raises:
        ValueError: if `prompt` is combined with `language` or `itn=False`, the language is unknown, a hotword has a
            special token, or a value has the wrong type.
    """
    for name, value in (("language", language), ("prompt", prompt), ("context", context)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; it must be a string")
    if prompt is not None:
        if language is not None or not itn:
            raise ValueError(
                "prompt replaces the instruction, so language and itn=False have no effect; give one or the other"
            )
        instruction = prompt
    else:
        instruction = "语音转写" if language is None else f"语音转写成{language_name(language)}"
        instruction += "：" if itn else "，不进行文本规整："
    return hotword_context(parse_hotwords(hotwords), context) + instruction


def hotword_context(hotwords: Sequence[str], context: str | None = None) -> str:
    """Builds the header with context and hotwords, as the original does in decoding; empty without both.

    The context precedes the hotwords, as in transformers' `fun_asr_nano` processor.
    """
    if not hotwords and not context:
        return ""
    header = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n**上下文信息：**\n\n\n"
    header += f"{context}\n" if context else ""
    return header + (f"热词列表：[{', '.join(hotwords)}]\n" if hotwords else "")


def parse_hotwords(hotwords: str | Sequence[str] | None) -> list[str]:
    """Returns hotwords as a list.

    Args:
        hotwords: a list, or a string with commas (ASCII or Chinese) between hotwords.

    Raises:
        ChatError: if a hotword contains a special token of the dialogue format, or the value has the wrong type.
    """
    if hotwords is None:
        return []
    words = re.split("[,，]", hotwords) if isinstance(hotwords, str) else hotwords
    words = list(words) if isinstance(words, Iterable) else [words]
    if not all(isinstance(word, str) for word in words):
        raise ChatError(f"hotwords is {hotwords!r}; it must be a list of strings, or a string with commas")
    for word in words:
        _refuse_markers(word, "a hotword")
    return [word.strip() for word in words if word.strip()]


def clean_answer(text: str) -> str:
    """Removes silence marks (`/sil`) from a generated answer and collapses whitespace, as the original does."""
    return " ".join(_SILENCE.sub(" ", text).split())


def transcription_messages(recording: Any, prompt: str, text: str | None = None) -> list[dict]:
    """Builds the messages of a transcription: default system prompt, prompt with recording, and optional transcript.

    Args:
        recording: path or URL (written as `<|startofspeech|>!PATH<|endofspeech|>`), or another source of `load_audio`.
        prompt: result of `transcription_prompt`.
        text: transcript; `None` for decoding.
    """
    if isinstance(recording, str):
        content: Any = f"{prompt}{SPEECH_START}!{recording}{SPEECH_END}"
    else:
        content = [{"type": "text", "text": prompt}, {"type": "audio", "audio": recording}]
    messages = [{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": content}]
    return messages if text is None else [*messages, {"role": "assistant", "content": text}]


def parse_messages(messages: Sequence[dict], hotwords: Sequence[str] = ()) -> Dialogue:
    """Checks a list of messages and splits it into turns.

    Args:
        messages: dicts with `role` (`system`, `user`, `assistant`) and `content`. The content is a list of
            `{"type": "text", "text": ...}` and `{"type": "audio", "audio": ...}`, or a string that marks recordings
            with `<|startofspeech|>!PATH<|endofspeech|>`. The first user message may have a `context`, which is
            written before the prompt, together with the hotwords. An assistant message may have a `prev_content`, as
            in Fun-ASR: text before the answer, which is not supervised.
        hotwords: written before the first prompt, as in decoding.

    Raises:
        ChatError: if roles are missing or out of order, or the marks of a recording are invalid.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise ChatError('"messages" must be a list of {"role": ..., "content": ...}')
    messages = list(messages)
    system = DEFAULT_SYSTEM
    if messages and messages[0].get("role") == "system":
        system = _text_of(messages.pop(0), "system")
    if not messages:
        raise ChatError('no "user" message')
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message.get("role") != expected:
            raise ChatError(
                f'message {index + 1} after the system prompt has role {message.get("role")!r}; expected "{expected}"'
            )
        if expected == "user":
            context = _optional_text(message, "context") if not turns else ""
            header = (hotword_context(hotwords, context),) if (hotwords or context) and not turns else ()
            turns.append(Turn((*header, *_pieces_of(message)), None))
        else:
            prefix = _optional_text(message, "prev_content")
            turns[-1] = Turn(turns[-1].pieces, _text_of(message, "assistant"), prefix)
    return Dialogue(system, tuple(turns))


def _text_of(message: dict, role: str) -> str:
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(_text_of_part(part, role) for part in text)
    if not isinstance(text, str):
        raise ChatError(f'the "content" of the {role} message must be a string')
    _refuse_markers(text, f"the {role} message")
    if role == "assistant" and not text.strip():
        raise ChatError("the assistant message (the transcript) is empty; write a transcript or remove the row")
    return text


def _optional_text(message: dict, key: str) -> str:
    text = message.get(key)
    if not isinstance(text, (str, type(None))):
        raise ChatError(f'the "{key}" of the {message["role"]} message must be a string')
    _refuse_markers(text or "", f'the "{key}" of the {message["role"]} message')
    return text or ""


def _refuse_markers(text: str, place: str) -> None:
    for marker in (TURN_START, TURN_END, AUDIO_TOKEN, SPEECH_START, SPEECH_END):
        if marker in text:
            raise ChatError(f"{place} contains {marker}; remove this special token")


def _text_of_part(part: Any, role: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise ChatError(f'the parts of the {role} message must be {{"type": "text", "text": "..."}}')
    return part["text"]


def _pieces_of(message: dict) -> list[str | Recording]:
    content = message.get("content")
    if isinstance(content, list):
        pieces: list[str | Recording] = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "audio"):
                raise ChatError(
                    'the parts of the user message must be {"type": "text", ...} or {"type": "audio", ...}'
                )
            if part["type"] == "text":
                pieces.extend(_split_speech(_text_of_part(part, "user")))
            else:
                sources = [part[key] for key in ("audio", "path", "url") if part.get(key) is not None]
                if len(sources) != 1:
                    raise ChatError('an audio part needs exactly one of "audio", "path", "url"')
                pieces.append(Recording(sources[0]))
    elif isinstance(content, str):
        pieces = _split_speech(content)
    else:
        raise ChatError('the "content" of the user message must be a string or a list of parts')
    if sum(isinstance(piece, Recording) for piece in pieces) > 1:
        raise ChatError("two recordings in one user message; use one turn per recording")
    return pieces


def _split_speech(text: str) -> list[str | Recording]:
    pieces: list[str | Recording] = []
    for index, piece in enumerate(_SPEECH.split(text)):
        if index % 2:  # `split` returns matches at odd indices and the text between at even indices
            source = piece[len(SPEECH_START) : -len(SPEECH_END)]
            if SPEECH_START in source:
                raise ChatError(f"{SPEECH_START} without {SPEECH_END} before the next one; add {SPEECH_END}")
            if not source.startswith("!"):
                raise ChatError(f"no '!' after {SPEECH_START}: write {SPEECH_START}!{source}{SPEECH_END}")
            if not source[1:].strip():
                raise ChatError(f"no path between {SPEECH_START}! and {SPEECH_END}; add the path of the recording")
            pieces.append(Recording(source[1:]))
        elif SPEECH_START in piece:
            raise ChatError(f"{SPEECH_START} without {SPEECH_END}; add {SPEECH_END}")
        elif SPEECH_END in piece:
            raise ChatError(f"{SPEECH_END} without {SPEECH_START} before it; add {SPEECH_START}")
        elif piece:
            if TURN_START in piece or TURN_END in piece or AUDIO_TOKEN in piece:
                raise ChatError(f"the user message contains {TURN_START}, {TURN_END} or {AUDIO_TOKEN}; remove it")
            pieces.append(piece)
    return pieces


def tokenize(
    dialogue: Dialogue,
    tokenizer,
    audio_tokens: Sequence[int],
    audio_token_id: int,
    think_block: bool = False,
    layout: ChatLayout = CHATML,
) -> TokenizedDialogue:
    """Returns token ids and labels of a dialogue.

    Each text between recordings and answers is tokenized separately, as in the original. So the ids of an answer do
    not depend on the preceding text. The last turn may lack an answer; the result is then a prompt for decoding.

    Args:
        tokenizer: tokenizer of the LLM.
        audio_tokens: number of audio tokens of each recording.
        audio_token_id: id of the placeholder for an audio token.
        think_block: whether an empty thinking block precedes each answer (the original's `do_think: false`).
        layout: text around the contents.

    Raises:
        ChatError: if an answer is missing before the last turn, the number of recordings differs, or a content
            contains a special token of the layout.
    """
    counts = list(audio_tokens)
    if len(counts) != len(dialogue.recordings):
        raise ChatError(
            f"the dialogue has {len(dialogue.recordings)} recordings, but {len(counts)} lengths were given"
        )
    result = TokenizedDialogue()
    text = ""
    for piece in _parts(dialogue, think_block, layout):
        if isinstance(piece, str):
            text += piece
            continue
        result.add(_prompt_ids(tokenizer, len(tokenizer), text))
        text = ""
        if isinstance(piece, Recording):
            result.add([audio_token_id] * counts.pop(0))
        else:
            result.add(answer_ids(tokenizer, piece.prefix))
            if piece.text is not None:
                result.add(answer_ids(tokenizer, piece.text) + _ids(tokenizer, layout.answer_end), supervised=True)
    result.add(_prompt_ids(tokenizer, len(tokenizer), text))
    return result


def render(dialogue: Dialogue, audio_token: str, think_block: bool = False, layout: ChatLayout = CHATML) -> str:
    """Returns the text of a dialogue with one `audio_token` per recording; raises the errors of `tokenize`."""
    text = ""
    for piece in _parts(dialogue, think_block, layout):
        if isinstance(piece, Recording):
            text += audio_token
        else:
            text += piece if isinstance(piece, str) else piece.prefix
            text += piece.text + layout.answer_end if isinstance(piece, _Answer) and piece.text is not None else ""
    return text


@dataclass(frozen=True)
class _Answer:
    prefix: str
    text: str | None  # `None`: the model must generate the answer


def _parts(dialogue: Dialogue, think_block: bool, layout: ChatLayout) -> Iterator[str | Recording | _Answer]:
    """Yields the parts of a dialogue in order: layout and prompt text, recordings, answers."""
    contents = (dialogue.system, *(piece for turn in dialogue.turns for piece in turn.pieces))
    for text in [content for content in contents if isinstance(content, str)]:
        for marker in layout.markers:
            if marker in text:
                raise ChatError(f"the dialogue contains {marker}; remove this special token")
    if dialogue.system is None:
        yield layout.start
    else:
        yield layout.system_start + dialogue.system + layout.system_end
    for number, turn in enumerate(dialogue.turns, start=1):
        yield layout.next_start if number > 1 else ""
        yield from turn.pieces
        yield layout.question_end + (THINK_BLOCK if think_block else "")
        if turn.answer is None and number < len(dialogue.turns):
            raise ChatError(f"turn {number} has no assistant message")
        yield _Answer(turn.prefix, turn.answer)


@lru_cache(maxsize=64)
def _prompt_ids(tokenizer, num_tokens: int, text: str) -> tuple[int, ...]:
    """Caches `_ids`, since most rows share their prompts. `num_tokens` invalidates entries when tokens are added."""
    return tuple(_ids(tokenizer, text))


@lru_cache(maxsize=8)
def _added_tokens(tokenizer, num_tokens: int) -> re.Pattern:
    """Compiles a pattern that matches the first character of each added token (for example `<think>`)."""
    # The tokenizer of mistral-common has no such tokens: texts never become special tokens.
    contents = sorted(map(str, getattr(tokenizer, "get_added_vocab", dict)()), key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in contents) or r"(?!)")


def answer_ids(tokenizer, text: str) -> list[int]:
    """Tokenizes an answer as plain text. A transcript that spells a special token must not become that token."""
    ids, start = [], 0
    for match in _added_tokens(tokenizer, len(tokenizer)).finditer(text):
        ids += _ids(tokenizer, text[start : match.end()])
        start = match.end()
    return ids + _ids(tokenizer, text[start:])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
