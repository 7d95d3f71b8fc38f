"""The dialogue format: ChatML layout, prompts, hotwords, label mask, number of audio tokens. The only place that
knows them.

Training and decoding build their prompts here, from the same functions, so they can't drift apart. The layout is that
of Fun-ASR: `load_data_template` and `get_prompt` of its `model.py`, `FunASR`'s `fun_asr_datasets/datasets.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .configuration import LOW_FRAME_RATE

IGNORE_INDEX = -100  # label of a token that is not supervised
AUDIO_TOKEN = "<|object_ref_start|>"  # placeholder in `input_ids`; a spare special token of the Qwen tokenizers
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPEECH_START, SPEECH_END = "<|startofspeech|>", "<|endofspeech|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
THINK_BLOCK = "<think>\n\n</think>\n\n"
_SILENCE = re.compile("/sil(?![a-z])")  # how Fun-ASR may write a pause
_SPEECH = re.compile(f"({re.escape(SPEECH_START)}.*?{re.escape(SPEECH_END)})", re.DOTALL)

# ISO 639 code: the name that Fun-ASR's prompts use.
LANGUAGES = {
    "zh": "中文", "en": "英文", "ja": "日文", "yue": "粤语", "ko": "韩文", "vi": "越南语", "id": "印尼语",
    "th": "泰语", "ms": "马来语", "tl": "菲律宾语", "ar": "阿拉伯语", "hi": "印地语", "bg": "保加利亚语",
    "hr": "克罗地亚语", "cs": "捷克语", "da": "丹麦语", "nl": "荷兰语", "et": "爱沙尼亚语", "fi": "芬兰语",
    "el": "希腊语", "hu": "匈牙利语", "ga": "爱尔兰语", "lv": "拉脱维亚语", "lt": "立陶宛语",
    "mt": "马耳他语", "pl": "波兰语", "pt": "葡萄牙语", "ro": "罗马尼亚语", "sk": "斯洛伐克语",
    "sl": "斯洛文尼亚语", "sv": "瑞典语",
}  # fmt: skip


class ChatError(ValueError):
    """A dialogue that can't be understood; the message says what is wrong and how to mend it."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Args:
        pieces: the user's message in order: text (`str`) or a recording (`Recording`).
        answer: the assistant's message; `None` where it is to be generated.
    """

    pieces: tuple[str | Recording, ...]
    answer: str | None


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
        """Sources of all recordings, in the order of their places."""
        return [piece.source for turn in self.turns for piece in turn.pieces if isinstance(piece, Recording)]


@dataclass
class TokenizedDialogue:
    """Token ids, and labels that are -100 except for the answers and the `<|im_end|>` that closes each."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        """Appends ids, with themselves or -100 as labels."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE_INDEX] * len(ids))


def num_audio_tokens(
    num_frames: int, downsample_rate: int, use_low_frame_rate: bool, encoder_downsample_rate: int = 1
) -> int:
    """How many audio tokens the LLM gets for a recording.

    Args:
        num_frames: feature frames given to the encoder.
        downsample_rate: encoder frames per adaptor frame.
        use_low_frame_rate: whether only the first `ceil(n / 8)` adaptor frames are kept. The original writes this as
            three strided convolutions' lengths, which is the same for every length.
        encoder_downsample_rate: feature frames per encoder frame.
    """
    tokens = -(-num_frames // encoder_downsample_rate)
    tokens = -(-tokens // downsample_rate)
    return -(-tokens // LOW_FRAME_RATE) if use_low_frame_rate else tokens


def language_name(language: str) -> str:
    """The name of a language in the prompts: from an ISO 639 code, or the Chinese name itself, known here or not.

    Raises:
        ValueError: if the language is neither a known code nor a name in Chinese.
    """
    name = LANGUAGES.get(language.lower(), language)
    if not name or name.isascii():
        raise ValueError(
            f"unknown language {language!r}; give its name in Chinese, or one of: "
            f"{', '.join(f'{k} ({v})' for k, v in LANGUAGES.items())}"
        )
    return name


def transcription_prompt(
    language: str | None = None,
    itn: bool = True,
    hotwords: Sequence[str] = (),
    prompt: str | None = None,
    context: str | None = None,
) -> str:
    """The user's text before a recording: `get_prompt` of Fun-ASR's `model.py`.

    Args:
        language: ISO code or Chinese name of the language to write; `None` lets the model find out.
        itn: whether numbers and the like are written as one writes them (inverse text normalisation).
        hotwords: words that may occur.
        prompt: replaces the instruction; language and `itn` can't be given with it.
        context: what the recording is about.

    Raises:
        ValueError: if `prompt` comes with a language or without ITN, or the language is unknown.
    """
    if prompt is not None:
        if language is not None or not itn:
            raise ValueError(
                "a prompt of one's own says language and text normalisation itself; give one or the other"
            )
        instruction = prompt
    else:
        instruction = "语音转写" if language is None else f"语音转写成{language_name(language)}"
        instruction += "：" if itn else "，不进行文本规整："
    return hotword_context(hotwords, context) + instruction


def hotword_context(hotwords: Sequence[str], context: str | None = None) -> str:
    """The header that names hotwords, as the original sends it when decoding; empty if there is nothing to say.

    Free text about the recording stands before the hotwords, where transformers' `fun_asr_nano` processor puts it.
    """
    if not hotwords and not context:
        return ""
    header = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n**上下文信息：**\n\n\n"
    header += f"{context}\n" if context else ""
    return header + (f"热词列表：[{', '.join(hotwords)}]\n" if hotwords else "")


def parse_hotwords(hotwords: str | Sequence[str] | None) -> list[str]:
    """A list of hotwords from a list, or from a string with commas (ASCII or Chinese) between them.

    Raises:
        ChatError: if one of them holds a token that dialogues are made of.
    """
    if hotwords is None:
        return []
    words = re.split("[,，]", hotwords) if isinstance(hotwords, str) else hotwords
    for word in words:
        for token in (TURN_START, TURN_END, AUDIO_TOKEN, SPEECH_START, SPEECH_END):
            if token in word:
                raise ChatError(f"a hotword contains {token}; remove it")
    return [word.strip() for word in words if word.strip()]


def clean_answer(text: str) -> str:
    """What a generated answer says: without marks of silence and runs of white space, as the original gives it."""
    return " ".join(_SILENCE.sub(" ", text).split())


def transcription_messages(recording: Any, prompt: str, text: str | None = None) -> list[dict]:
    """The dialogue of a transcription: default system prompt, the prompt with the recording, and the text if known.

    Args:
        recording: path or URL (written as `<|startofspeech|>!PATH<|endofspeech|>`), or anything that loads as audio.
        prompt: what `transcription_prompt` gives.
        text: the transcript; `None` for decoding.
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
        messages: dicts with `role` (`system`, `user`, `assistant`) and `content`: a string with
            `<|startofspeech|>!PATH<|endofspeech|>` where a recording goes, or a list of
            `{"type": "text", "text": ...}` and `{"type": "audio", "audio": ...}`.
        hotwords: put before the first prompt, as in decoding.

    Raises:
        ChatError: if roles are missing or out of order, or a recording is not well marked.
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
            header = (hotword_context(hotwords),) if hotwords and not turns else ()
            turns.append(Turn((*header, *_pieces_of(message)), None))
        else:
            turns[-1] = Turn(turns[-1].pieces, _text_of(message, "assistant"))
    return Dialogue(system, tuple(turns))


def _text_of(message: dict, role: str) -> str:
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(_text_of_part(part, role) for part in text)
    if not isinstance(text, str):
        raise ChatError(f'the "content" of the {role} message must be a string')
    for marker in (TURN_START, TURN_END, AUDIO_TOKEN, SPEECH_START, SPEECH_END):
        if marker in text:
            raise ChatError(f"the {role} message contains {marker}, which would break the dialogue; remove it")
    if role == "assistant" and not text.strip():
        raise ChatError("the assistant message (the transcript) is empty")
    return text


def _text_of_part(part: Any, role: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise ChatError(f'the parts of the {role} message must be {{"type": "text", "text": ...}}, with a string')
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
        raise ChatError("two recordings in one user message; put each into a turn of its own")
    return pieces


def _split_speech(text: str) -> list[str | Recording]:
    pieces: list[str | Recording] = []
    for index, piece in enumerate(_SPEECH.split(text)):
        if index % 2:  # what the expression matches; what lies between has even places
            source = piece[len(SPEECH_START) : -len(SPEECH_END)]
            if SPEECH_START in source:
                raise ChatError(f"{SPEECH_START} without {SPEECH_END} before the next one; close it")
            if not source.startswith("!"):
                raise ChatError(f"no '!' after {SPEECH_START}: write {SPEECH_START}!{source}{SPEECH_END}")
            if not source[1:].strip():
                raise ChatError(f"no path between {SPEECH_START}! and {SPEECH_END}")
            pieces.append(Recording(source[1:]))
        elif SPEECH_START in piece:
            raise ChatError(f"{SPEECH_START} without {SPEECH_END}; close it")
        elif SPEECH_END in piece:
            raise ChatError(f"{SPEECH_END} without {SPEECH_START} before it")
        elif piece:
            if TURN_START in piece or TURN_END in piece or AUDIO_TOKEN in piece:
                raise ChatError(f"the user message contains {TURN_START}, {TURN_END} or {AUDIO_TOKEN}; remove it")
            pieces.append(piece)
    return pieces


def tokenize(
    dialogue: Dialogue, tokenizer, audio_tokens: Sequence[int], audio_token_id: int, think_block: bool = False
) -> TokenizedDialogue:
    """Token ids and labels of a dialogue.

    Every stretch of text between recordings and answers is tokenised by itself, as the original does, so that the ids
    of an answer don't depend on what stands before it. The last turn may lack its answer: that is the prompt for
    decoding.

    Args:
        tokenizer: of the LLM.
        audio_tokens: how many audio tokens each recording has.
        audio_token_id: their placeholder.
        think_block: whether an empty thinking block precedes each answer (the original's `do_think: false`).

    Raises:
        ChatError: if an answer is missing before the last turn, or the number of recordings differs.
    """
    counts = list(audio_tokens)
    if len(counts) != len(dialogue.recordings):
        raise ChatError(
            f"the dialogue has {len(dialogue.recordings)} recordings, but {len(counts)} lengths were given"
        )
    result = TokenizedDialogue()
    text = ""
    for piece in _layout(dialogue, think_block):
        if isinstance(piece, str):
            text += piece
            continue
        result.add(_prompt_ids(tokenizer, len(tokenizer), text))
        text = ""
        if isinstance(piece, Recording):
            result.add([audio_token_id] * counts.pop(0))
        else:
            result.add(_answer_ids(tokenizer, piece.text) + _ids(tokenizer, TURN_END), supervised=True)
    result.add(_prompt_ids(tokenizer, len(tokenizer), text))
    return result


def render(dialogue: Dialogue, audio_token: str, think_block: bool = False) -> str:
    """The text of a dialogue, with one `audio_token` for each recording; raises as `tokenize` does."""
    text = ""
    for piece in _layout(dialogue, think_block):
        if isinstance(piece, Recording):
            text += audio_token
        else:
            text += piece if isinstance(piece, str) else piece.text + TURN_END
    return text


@dataclass(frozen=True)
class _Answer:
    text: str


def _layout(dialogue: Dialogue, think_block: bool) -> Iterator[str | Recording | _Answer]:
    """The pieces of a dialogue in order: text of the layout and of the prompts, recordings, answers."""
    if dialogue.system is not None:
        yield f"{TURN_START}system\n{dialogue.system}{TURN_END}\n"
    for number, turn in enumerate(dialogue.turns, start=1):
        # No newline after the `<|im_end|>` of an answer: the original's layout, which the released weights have seen.
        yield f"{TURN_START}user\n"
        yield from turn.pieces
        yield f"{TURN_END}\n{TURN_START}assistant\n" + (THINK_BLOCK if think_block else "")
        if turn.answer is not None:
            yield _Answer(turn.answer)
        elif number < len(dialogue.turns):
            raise ChatError(f"turn {number} has no assistant message")


@lru_cache(maxsize=64)
def _prompt_ids(tokenizer, num_tokens: int, text: str) -> tuple[int, ...]:
    """As `_ids`, remembered: most rows have the same prompts. `num_tokens` tells when tokens were added since."""
    return tuple(_ids(tokenizer, text))


@lru_cache(maxsize=8)
def _added_tokens(tokenizer, num_tokens: int) -> re.Pattern:
    """Finds the first character of each token that was added to the vocabulary, such as `<think>`."""
    contents = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in contents) or r"(?!)")


def _answer_ids(tokenizer, text: str) -> list[int]:
    """Ids of an answer as plain text: a transcript that spells a special token must not teach the model to emit it."""
    ids, start = [], 0
    for match in _added_tokens(tokenizer, len(tokenizer)).finditer(text):
        ids += _ids(tokenizer, text[start : match.end()])
        start = match.end()
    return ids + _ids(tokenizer, text[start:])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
