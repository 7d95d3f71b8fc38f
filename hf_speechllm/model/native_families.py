"""Table of the native speech LLMs of transformers that this package trains: modules, prompts, answers.

A new family is an entry here and a test in `tests/native`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import chat
from .languages import LANGUAGES

PARTS = ENCODER, ADAPTOR, LLM = "audio_encoder", "audio_adaptor", "llm"
CTC_HEAD = "ctc_head"
ALL_PARTS = (*PARTS, CTC_HEAD)  # with the part that a model may lack


@dataclass(frozen=True)
class TranscriptionRequest:
    """One recording and its prompt, independent of the family.

    Args:
        seconds: duration of the recording.
        language: ISO 639 code; `None` if the prompt names no language.
        context: text and hotwords that may occur in the recording; empty without both.
        instruction: replaces the default instruction of the family.
    """

    seconds: float
    language: str | None = None
    context: str = ""
    instruction: str | None = None


Messages = list[dict[str, Any]]
AUDIO = {"type": "audio", "audio": ""}  # the chat template writes a placeholder


@dataclass(frozen=True)
class Family:
    """What one model type of transformers needs.

    Args:
        messages: builds the messages of a request for the family's own chat template.
        modules: names of modules by part, as they occur in parameter names.
        max_seconds: longest recording that the family's processor encodes without truncation.
        window_seconds: the family pads a recording with audio tokens of silence to a multiple of this.
        fixed_seconds: seconds that the encoder computes at least for every recording; 0: as many as it has.
        languages: whether the prompt can name the language.
        contexts: whether the prompt can have a context and hotwords.
        prefill: text after the generation prompt, which the model does not generate.
        answer_start: text before the transcript that the model generates; may contain special tokens.
        answer: writes a transcript in the form that the model generates.
        transcript: reads the transcript from a generated text.
        frozen_encoder: whether the forward pass computes no gradient of the encoder.
        options: keyword arguments of the forward pass, without which results would be random.
        encode: replaces the call of the family's processor; see `default_encoding`.
    """

    messages: Callable[[TranscriptionRequest], Messages]
    modules: dict[str, tuple[str, ...]]
    max_seconds: float
    window_seconds: float = 0.0
    fixed_seconds: float = 0.0
    languages: bool = False
    contexts: bool = False
    prefill: Callable[[TranscriptionRequest], str] = lambda request: ""
    answer_start: Callable[[TranscriptionRequest], str] = lambda request: ""
    answer: Callable[[str, TranscriptionRequest], str] = lambda text, request: text
    transcript: Callable[[str], str] = chat.clean_answer
    frozen_encoder: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    encode: Callable[..., dict[str, Any]] | None = None


TOWER = {ENCODER: ("audio_tower",), ADAPTOR: ("multi_modal_projector",), LLM: ("language_model", "lm_head")}


def _user(*parts: dict[str, Any]) -> Messages:
    return [{"role": "user", "content": list(parts)}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _instruction_after(default: str) -> Callable[[TranscriptionRequest], Messages]:
    return lambda request: _user(AUDIO, _text(request.instruction or default))


def _instruction_before(default: str) -> Callable[[TranscriptionRequest], Messages]:
    return lambda request: _user(_text(request.instruction or default), AUDIO)


# Qwen3-ASR: the system prompt is the context; the answer starts with the language unless the prompt names it.


def _qwen3_asr_messages(request: TranscriptionRequest) -> Messages:
    context = "\n".join(filter(None, (request.instruction, request.context)))
    system = [{"role": "system", "content": [_text(context)]}] if context else []
    return [*system, *_user(AUDIO)]


def _qwen3_asr_prefill(request: TranscriptionRequest) -> str:
    return "" if request.language is None else f"language {_qwen3_asr_language(request.language)}<asr_text>"


def _qwen3_asr_language(code: str) -> str:
    from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

    code = {"tl": "fil"}.get(code, code)  # Fun-ASR and Qwen3-ASR use different codes for Filipino
    if code not in LANGUAGE_CODE_TO_NAME:
        raise chat.ChatError(f"Qwen3-ASR does not know the language {code!r}; leave the language out of the prompt")
    return LANGUAGE_CODE_TO_NAME[code]


def _qwen3_asr_start(request: TranscriptionRequest) -> str:
    # Qwen3-ASR's own fine-tuning script writes "None" where the language is unknown.
    return "" if request.language is not None else "language None<asr_text>"


def _qwen3_asr_transcript(text: str) -> str:
    return chat.clean_answer(text.rpartition("<asr_text>")[2])


# VibeVoice-ASR: JSON with times and speakers. A row has one transcript, hence one segment of one speaker.


def _vibevoice_messages(request: TranscriptionRequest) -> Messages:
    context = "\n".join(filter(None, (request.instruction, request.context)))
    return _user(AUDIO, *([_text(context)] if context else []))


def _vibevoice_answer(text: str, request: TranscriptionRequest) -> str:
    segment = {"Start": 0.0, "End": round(request.seconds, 2), "Speaker": 0, "Content": text}
    return json.dumps([segment], ensure_ascii=False, separators=(",", ":"))


def _vibevoice_transcript(text: str) -> str:
    contents = re.findall(r'"Content":\s*("(?:[^"\\]|\\.)*")', text)  # also of an answer without its end
    try:
        return chat.clean_answer(" ".join(json.loads(content) for content in contents) if contents else text)
    except json.JSONDecodeError:
        return chat.clean_answer(text)


# MOSS-Transcribe-Diarize: segments with times and speakers in brackets.


def _moss_messages(request: TranscriptionRequest) -> Messages:
    keywords = {"type": "keywords", "keywords": [request.context]}
    instruction = [_text(request.instruction)] if request.instruction else []
    return _user(AUDIO, *instruction, *([keywords] if request.context else []))


def _moss_transcript(text: str) -> str:
    contents = re.findall(r"\[[^\[\]]+\]\[S\d+\]([^\[]*)", text)
    return chat.clean_answer(" ".join(contents) if contents else text)


# Voxtral: the tokenizer of mistral-common builds the ids of a request.


def _encode_voxtral(
    native: Any, requests: Sequence[TranscriptionRequest], waveforms: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Builds Voxtral's inputs; see `Family.encode`."""
    return native.apply_transcription_request(
        audio=list(waveforms), model_id="voxtral", language=[request.language for request in requests],
        sampling_rate=native.feature_extractor.sampling_rate, format="wav",
    )  # fmt: skip


def _no_instruction(request: TranscriptionRequest) -> Messages:
    if request.instruction is not None:
        raise chat.ChatError("Voxtral's transcription mode has no instruction; leave the prompt out")
    return _user(AUDIO)


FAMILIES: dict[str, Family] = {
    "qwen3_asr": Family(
        _qwen3_asr_messages, TOWER, 1200.0, languages=True, contexts=True, prefill=_qwen3_asr_prefill,
        answer_start=_qwen3_asr_start, transcript=_qwen3_asr_transcript,
    ),
    "glmasr": Family(_instruction_after("Please transcribe this audio into text"), TOWER, 655.0, fixed_seconds=30.0),
    "audioflamingo3": Family(_instruction_before("Transcribe the input speech."), TOWER, 600.0, fixed_seconds=30.0),
    "musicflamingo": Family(_instruction_before("Transcribe the input speech."), TOWER, 1200.0, fixed_seconds=30.0),
    "qwen2_audio": Family(_instruction_after("Transcribe the speech into text."), TOWER, 30.0, fixed_seconds=30.0),
    "voxtral": Family(_no_instruction, TOWER, 1800.0, 30.0, 30.0, languages=True, encode=_encode_voxtral),
    "granite_speech": Family(
        lambda request: [
            {
                "role": "user",
                "content": f"<|audio|>{request.instruction or 'can you transcribe the speech into a written format?'}",
            }
        ],
        {ENCODER: ("encoder",), ADAPTOR: ("projector",), LLM: ("language_model", "lm_head")},
        600.0,
    ),
    "vibevoice_asr": Family(
        _vibevoice_messages,
        {
            ENCODER: ("acoustic_tokenizer_encoder", "semantic_tokenizer_encoder"),
            ADAPTOR: ("multi_modal_projector",),
            LLM: ("language_model", "lm_head"),
        },
        3600.0, contexts=True, answer=_vibevoice_answer, transcript=_vibevoice_transcript, frozen_encoder=True,
        options=(("sample", False),),
    ),
    "moss_transcribe_diarize": Family(
        _moss_messages, TOWER, 3600.0, fixed_seconds=30.0, contexts=True,
        answer=lambda text, request: f"[0.00][S01]{text}[{request.seconds:.2f}]", transcript=_moss_transcript,
    ),
}  # fmt: skip

# Speech models of transformers that cannot be trained with the rows of this package, and why.
REFUSED = {
    "voxtral_realtime": "its audio tokens and text tokens are aligned in time, which transcripts without times lack",
    "phi4_multimodal": "its speech adapters are switched inside the forward pass, which the freeze options cannot see",
    "qwen2_5_omni": "its forward pass belongs to a model that also talks; train its thinker alone",
    "qwen3_omni_moe": "its forward pass belongs to a model that also talks; train its thinker alone",
    "canary": "it is an encoder-decoder, not a speech LLM",
    "whisper": "it is an encoder-decoder, not a speech LLM; `hf-speechllm compose` uses its encoder",
}

# Part of each module name in the table.
PART_OF_MODULE = {
    module: part for family in FAMILIES.values() for part, modules in family.modules.items() for module in modules
}


def part_of(parameter_name: str) -> str:
    """Returns the part of a parameter; the model may be wrapped (peft, DDP, FSDP)."""
    for piece in parameter_name.split("."):
        if piece in ALL_PARTS:
            return piece
        if piece in PART_OF_MODULE:
            return PART_OF_MODULE[piece]
    raise ValueError(f"{parameter_name} belongs to none of {', '.join(ALL_PARTS)}")


def is_native(model_or_config: Any) -> bool:
    """Whether a model, wrapped or not, or a config is one of `FAMILIES`."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "model_type", None) in FAMILIES


def max_feature_frames(config: Any) -> int:
    """Returns the longest recording in frames of the processor's `frame_seconds`, for any model of this package."""
    if is_native(config):
        return round(100 * FAMILIES[config.model_type].max_seconds)
    return config.max_feature_frames


def fixed_seconds(config: Any) -> float:
    """Returns the seconds that the encoder computes at least for every recording, for any model of this package."""
    return FAMILIES[config.model_type].fixed_seconds if is_native(config) else config.fixed_seconds


_HEADER = chat.hotword_context((), "\0").partition("\0")[0]
_CODES = {name: code for code, name in LANGUAGES.items()}
_PROMPT = re.compile(
    rf"(?:{re.escape(_HEADER)}(?P<context>.*?))?语音转写(?:成(?P<language>.+?))?(?:：|，不进行文本规整：)", re.DOTALL
)


def parse_prompt(prompt: str, seconds: float) -> TranscriptionRequest:
    """Converts a user's text to a request.

    Prompts of `chat.transcription_prompt` become language and context; any other text becomes the instruction.

    Args:
        prompt: text of the user's message without the recording.
        seconds: duration of the recording.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        context, _, instruction = prompt.removeprefix(_HEADER).rpartition("\n") if prompt.startswith(_HEADER) else (
            "", "", prompt,
        )  # fmt: skip
        return TranscriptionRequest(seconds, None, _plain(context), instruction.strip() or None)
    language = match["language"]
    code = _CODES.get(language)
    if language and code is None:
        raise chat.ChatError(f"the prompt names an unknown language: {language}")
    return TranscriptionRequest(seconds, code, _plain(match["context"] or ""))


def _plain(context: str) -> str:
    """Returns context and hotwords without Fun-ASR's heading of the hotwords."""
    return re.sub(r"热词列表：\[(.*)\]\n?$", r"\1", context).strip()
