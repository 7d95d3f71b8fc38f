"""The processor: converts recordings and dialogues to inputs of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, is_typeddict

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.processing_utils import ProcessingKwargs
from transformers.tokenization_utils_base import TextInput

from ..audio.decoders import MAX_RATE, MIN_RATE
from ..audio.fbank import FRAME_SHIFT, FbankFeatureExtractor
from ..audio.front_ends import (
    cacheable_features,
    encoder_input,
    pad_features,
    reads_waveforms,
    stacked_frames,
    stored_width,
)
from ..audio.inputs import as_list
from ..audio.waveform import load_audio
from . import chat, pretrained
from .audio_lengths import after_convolutions, check_convolutions, num_audio_tokens
from .chat_layout import CHATML, ChatLayout
from .configuration import SpeechLLMConfig

MAX_DOWNSAMPLING = 1000  # frames merged into one, at most
# Options of a call, grouped by the dict that may contain them (`text_kwargs`, ...).
OPTIONS = {
    group: frozenset(options.__annotations__ if is_typeddict(options) else ())
    for group, options in {"common_kwargs": None, **ProcessingKwargs.__annotations__}.items()
}


class SpeechLLMProcessor(ProcessorMixin):
    """Combines feature extractor, tokenizer and dialogue format.

    Args:
        feature_extractor: `FbankFeatureExtractor`, or the feature extractor of the encoder.
        tokenizer: tokenizer of the LLM, with `audio_token` and, without `chat_layout`, `<|im_start|>`, `<|im_end|>`.
        audio_token: placeholder for an audio token in `input_ids`.
        downsample_rate, use_low_frame_rate, encoder_downsample_rate, encoder_convolutions, encoder_window: frame
            rates; must equal the model's config, see `SpeechLLMConfig.encoder_lengths`.
        think_block: whether an empty thinking block precedes each answer (the original's `do_think: false`).
        system_prompt: whether dialogues start with a system prompt (the original's `sys_prompt`).
        chat_layout: fields of `chat_layout.ChatLayout`; default: ChatML.

    Raises:
        ValueError: if an option has a wrong type or an impossible value, or the tokenizer lacks a token.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        chat_template: str | None = None,
        audio_token: str = chat.AUDIO_TOKEN,
        downsample_rate: int = 1,
        use_low_frame_rate: bool = False,
        encoder_downsample_rate: int = 1,
        think_block: bool = False,
        system_prompt: bool = True,
        encoder_convolutions: list[list[int]] | None = None,
        encoder_window: int = 0,
        chat_layout: dict | None = None,
    ):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        rates = {"downsample_rate": downsample_rate, "encoder_downsample_rate": encoder_downsample_rate}
        flags = {"use_low_frame_rate": use_low_frame_rate, "think_block": think_block, "system_prompt": system_prompt}
        for kind, options in ((int, rates), (bool, flags)):
            for name, value in options.items():
                if type(value) is not kind or kind is int and not 1 <= value <= MAX_DOWNSAMPLING:
                    asked = f"a number from 1 to {MAX_DOWNSAMPLING}" if kind is int else "true or false"
                    raise ValueError(f"{name} is {str(value)[:50]!r}; it must be {asked}")
        rate = feature_extractor.sampling_rate
        if type(rate) is not int or not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"sampling_rate is {str(rate)[:50]!r}; it must be from {MIN_RATE} to {MAX_RATE} Hz")
        check_convolutions(encoder_convolutions, encoder_window)
        self.layout = CHATML if chat_layout is None else ChatLayout.from_dict(chat_layout)
        marks = (chat.TURN_START, chat.TURN_END) if chat_layout is None else (self.layout.answer_end,)
        for token in (*marks, audio_token):
            if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
                raise ValueError(
                    f"the tokenizer lacks {token}; add {token} as a special token, or use the tokenizer of the LLM"
                )
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.downsample_rate = downsample_rate
        self.use_low_frame_rate = use_low_frame_rate
        self.encoder_downsample_rate = encoder_downsample_rate
        self.think_block = think_block
        self.system_prompt = system_prompt
        self.encoder_convolutions = encoder_convolutions
        self.encoder_window = encoder_window
        self.chat_layout = chat_layout

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> SpeechLLMProcessor:
        """Loads a processor from a folder or the Hub, in any layout that the model's `from_pretrained` supports.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        return pretrained.formats().load_processor(cls, pretrained_model_name_or_path, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, token: str | bool | None = None, **kwargs):
        """Uploads the processor, as a `fun_asr_nano` processor of transformers if possible, otherwise as this class.

        Arguments and result: see `SpeechLLMForConditionalGeneration.push_to_hub`.
        """
        return pretrained.hub().push_processor(self, repo_id, private, token, **kwargs)

    def num_audio_tokens(self, num_frames: int, encoded: bool = False) -> int:
        """Returns the number of audio tokens for a number of feature frames (encoder input).

        Args:
            encoded: whether the frames are encoder frames (encoder output).
        """
        frames = num_frames if encoded else self._num_encoder_frames(num_frames)
        return num_audio_tokens(frames, self.downsample_rate, self.use_low_frame_rate)

    def _num_encoder_frames(self, num_frames: int) -> int:
        if not self.encoder_convolutions:
            return -(-num_frames // self.encoder_downsample_rate)
        unit = stored_width(self.feature_extractor) if reads_waveforms(self.feature_extractor) else 1
        return after_convolutions(num_frames * unit, self.encoder_convolutions, self.encoder_window)

    def tokenize(self, dialogue: chat.Dialogue, num_frames: Sequence[int]) -> chat.TokenizedDialogue:
        """Returns ids and labels of a dialogue.

        Args:
            num_frames: feature frames (encoder input) of each recording in the dialogue.
        """
        counts = [self.num_audio_tokens(frames) for frames in num_frames]
        if not self.system_prompt:
            dialogue = dataclasses.replace(dialogue, system=None)
        return chat.tokenize(dialogue, self.tokenizer, counts, self.audio_token_id, self.think_block, self.layout)

    def __call__(
        self, audio: AudioInput | None = None, text: TextInput | list[TextInput] | None = None, **kwargs
    ) -> BatchFeature:
        """Builds the model's inputs for recordings, or for texts with recordings.

        Args:
            audio: a path, URL or waveform (shape = (samples,), at `sampling_rate`), or a list of these.
            text: one text or a list, with one `audio_token` per recording, as returned by
                `apply_chat_template(tokenize=False)`; default: transcription requests, see
                `apply_transcription_request`.
            **kwargs: options in `transformers.ProcessingKwargs`: options of the tokenizer, and `sampling_rate` of the
                waveforms in Hz. By default, texts get no special tokens and are padded on the left for `generate`.

        Returns:
            `input_ids`, `attention_mask`, shape = (texts, tokens), and, with recordings, `input_features`,
            shape = (recordings, frames, feature size), `input_features_mask`.

        Raises:
            TypeError: if an option is unknown.
            ValueError: if texts and recordings do not match, or `sampling_rate` is not the processor's rate.
            AudioError: if a recording cannot be loaded.
        """
        nested = {name: value for name, value in kwargs.items() if name in OPTIONS and isinstance(value, dict)}
        known = {*OPTIONS, *(name for names in OPTIONS.values() for name in names)}
        unknown = kwargs.keys() - known
        for group, options in nested.items():
            unknown |= options.keys() - (known if group == "common_kwargs" else OPTIONS[group])
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no options {', '.join(sorted(unknown))}; see transformers.ProcessingKwargs"
            )
        if text is None and audio is not None:
            text = [self._transcription_text] * len(_list_of(audio))
        defaults = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
        if "padding" in self.tokenizer.init_kwargs:
            del defaults["padding"]
        for name, value in defaults.items():
            if not any(name in options for options in (kwargs, *nested.values())):
                kwargs[name] = value
        return super().__call__(text=text, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Loads recordings and converts texts to a list; overrides the method of transformers."""
        if audio is not None:
            audio = [load_audio(source, self.sampling_rate) for source in _list_of(audio)]
        return images, [text] if isinstance(text, str) else text and list(text), videos, audio

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """Returns the placeholders of a recording: `audio_token`, once for each audio token."""
        return self.audio_token * self.num_audio_tokens(int(audio_inputs["input_features_mask"][audio_idx].sum()))

    def _process_audio(self, audio, sampling_rate: int | None = None, **kwargs) -> tuple[dict, list[str]]:
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"the audio has {sampling_rate} Hz, the processor needs {self.sampling_rate} Hz; resample the audio"
            )
        if isinstance(self.feature_extractor, FbankFeatureExtractor):
            inputs = self.feature_extractor(audio, **kwargs)
        else:  # Whisper's feature extractor pads to 30 s; here the model pads
            inputs = pad_features(self.extract_features(audio))
        return inputs, [self.replace_audio_token(inputs, index) for index in range(len(audio))]

    @property
    def _transcription_text(self) -> str:
        messages = chat.transcription_messages(b"", chat.transcription_prompt())
        return self._render(chat.parse_messages(messages))

    def _render(self, dialogue: chat.Dialogue) -> str:
        if not self.system_prompt:
            dialogue = dataclasses.replace(dialogue, system=None)
        return chat.render(dialogue, self.audio_token, self.think_block, self.layout)

    def apply_chat_template(
        self,
        conversation: Sequence[dict] | Sequence[Sequence[dict]],
        hotwords: Sequence[str] = (),
        return_labels: bool = True,
        padding_side: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool | None = None,
        return_dict: bool = True,
        return_tensors: str = "pt",
        continue_final_message: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> BatchFeature | torch.Tensor | str | list[str]:
        """Builds the model's inputs for dialogues: for training if all turns have answers, otherwise for decoding.

        Args:
            conversation: one list of messages, or several lists; see `chat.parse_messages`.
            hotwords: written before the first prompt of each dialogue.
            return_labels: whether to add `labels`; ignored if a last answer is missing.
            padding_side: default `right` with labels and `left` (for `generate`) without labels.
            tokenize: if false, returns the text of a dialogue, or a list of texts, and loads no recordings.
            add_generation_prompt: whether the dialogues end before an answer; by default detected, and another value
                than the detected one is an error.
            return_dict: if false, returns only `input_ids`.
            return_tensors: `"pt"`.
            continue_final_message, processor_kwargs: passed by transformers' pipelines; must be false and empty.

        Returns:
            `input_ids`, `attention_mask`, `labels`, shape = (dialogues, tokens), and, with recordings,
            `input_features`, shape = (recordings, frames, feature size), `input_features_mask`.

        Raises:
            chat.ChatError: if a dialogue is invalid, or does not match `add_generation_prompt`.
            AudioError: if a recording cannot be loaded.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported")
        if continue_final_message:
            raise chat.ChatError(
                "continue_final_message is not supported: the model cannot continue a given transcript; leave it out"
            )
        if processor_kwargs:
            raise ValueError(f"processor_kwargs are not supported: {', '.join(processor_kwargs)}; leave them out")
        single = isinstance(conversation[0], dict)
        conversations: Sequence = [conversation] if single else conversation
        dialogues = [chat.parse_messages(messages, chat.parse_hotwords(hotwords)) for messages in conversations]
        answered = [dialogue.turns[-1].answer is not None for dialogue in dialogues]
        if add_generation_prompt is not None and add_generation_prompt in answered:
            end = "an answer" if add_generation_prompt else "a question"
            raise chat.ChatError(
                f"add_generation_prompt is {add_generation_prompt}, but dialogue "
                f"{answered.index(add_generation_prompt)} ends with {end}; leave the option out"
            )
        if not tokenize:
            texts = [self._render(dialogue) for dialogue in dialogues]
            return texts[0] if single else texts
        waveforms = [
            load_audio(source, self.sampling_rate) for dialogue in dialogues for source in dialogue.recordings
        ]
        inputs = self.batch(dialogues, waveforms, return_labels and all(answered), padding_side)
        return inputs if return_dict else inputs["input_ids"]

    def apply_transcription_request(
        self,
        audio: Any,
        language: str | None = None,
        itn: bool = True,
        hotwords: str | Sequence[str] | None = None,
        prompt: str | None = None,
        context: str | None = None,
    ) -> BatchFeature:
        """Builds inputs of `generate` for a transcription.

        Args:
            audio: a path, URL or waveform (shape = (samples,), at `sampling_rate`), or a list of these.
            language, itn, hotwords, prompt, context: see `chat.transcription_prompt`; apply to all recordings.

        Returns:
            See `apply_chat_template`; padded on the left.
        """
        recordings = _list_of(audio)
        text = chat.transcription_prompt(language, itn, hotwords, prompt, context)
        return self.apply_chat_template([chat.transcription_messages(item, text) for item in recordings])

    def batch(
        self,
        dialogues: Sequence[chat.Dialogue],
        waveforms: Sequence[np.ndarray],
        return_labels: bool,
        padding_side: str | None = None,
        device: torch.device | str = "cpu",
    ) -> BatchFeature:
        """Pads parsed dialogues and loaded recordings into a batch; for other arguments see `apply_chat_template`.

        Args:
            waveforms: recordings of all dialogues, in order, each of shape = (samples,).
            device: device that computes and keeps the features; ids stay on the CPU.
        """
        features = self.extract_features(waveforms, device)
        audio = pad_features(features) if features else {}
        frames = [len(item) for item in features]
        examples = []
        for dialogue in dialogues:
            count = len(dialogue.recordings)
            examples.append(self.tokenize(dialogue, frames[:count]))
            frames = frames[count:]
        side = padding_side or ("right" if return_labels else "left")
        columns = {"input_ids": [example.input_ids for example in examples]}
        if return_labels:
            columns["labels"] = [example.labels for example in examples]
        return BatchFeature({**self.pad_tokens(columns, side), **audio})

    def extract_features(
        self, waveforms: Sequence[np.ndarray], device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """Computes encoder inputs of waveforms, each of shape = (frames, feature size), on `device`."""
        extractor = self.feature_extractor
        if torch.device(device).type == "cuda" and isinstance(extractor, FbankFeatureExtractor):
            return extractor.extract(waveforms, device) if waveforms else []
        features = (torch.from_numpy(cacheable_features(extractor, waveform)) for waveform in waveforms)
        return [encoder_input(extractor, item).to(device) for item in features]

    def pad_tokens(self, columns: dict[str, list[list[int]]], side: str) -> dict[str, torch.Tensor]:
        """Pads `input_ids` (and `labels`) to the longest row on the given side and adds `attention_mask`."""
        width = max(len(row) for row in columns["input_ids"])
        pad_token_id = self.tokenizer.pad_token_id
        fill = {
            "input_ids": self.tokenizer.eos_token_id if pad_token_id is None else pad_token_id,
            "labels": chat.IGNORE_INDEX,
        }
        columns = {**columns, "attention_mask": [[1] * len(row) for row in columns["input_ids"]]}
        padded = {}
        for name, rows in columns.items():
            padding = [[fill.get(name, 0)] * (width - len(row)) for row in rows]
            ordered = [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]
            padded[name] = torch.tensor(ordered, dtype=torch.long)
        return padded

    def transcripts(self, tokens: torch.Tensor | list[list[int]]) -> list[str]:
        """Returns the transcripts of generated answers, shape = (rows, tokens)."""
        return [chat.clean_answer(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @property
    def sampling_rate(self) -> int:
        """Rate of the waveforms, in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def frame_seconds(self) -> float:
        """Seconds between two frames of the encoder's input: 0.06 with low-frame-rate stacking, otherwise 0.01."""
        return FRAME_SHIFT * stacked_frames(self.feature_extractor)

    @property
    def encoder_frame_seconds(self) -> float:
        """Seconds between two frames of the encoder's output, on average."""
        return self.frame_seconds * 1_000_000 / self._num_encoder_frames(1_000_000)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's input tensors."""
        return ["input_ids", "attention_mask", "input_features", "input_features_mask"]


def _list_of(audio: Any) -> list:
    return as_list(audio)[0]


class NoSpeechSeq2Seq:
    """Placeholder for `pipeline("automatic-speech-recognition")`; the error names the supported alternatives."""

    config_class = SpeechLLMConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Raises `AttributeError`, the only exception that the pipeline reports without tracebacks of its own."""
        raise AttributeError(
            'a speech LLM needs a prompt, and the pipeline "automatic-speech-recognition" has none; use '
            'hf_speechllm.Transcriber(model, processor).transcribe(audio), or pipeline("any-to-any")'
        )


AutoModelForSpeechSeq2Seq.register(SpeechLLMConfig, NoSpeechSeq2Seq)
AutoFeatureExtractor.register(SpeechLLMConfig, FbankFeatureExtractor)
AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor)
