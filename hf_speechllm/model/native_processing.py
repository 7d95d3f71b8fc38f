"""Processors of native speech LLMs of transformers with the interface of `SpeechLLMProcessor`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from ..audio.fbank import FRAME_SHIFT
from . import chat
from .native_families import FAMILIES, Family, TranscriptionRequest, parse_prompt
from .processing import SpeechLLMProcessor

logger = logging.getLogger(__name__)

MEASURED_SECONDS = 10.0  # length of the silence whose audio tokens are counted


class NativeProcessor(SpeechLLMProcessor):
    """Builds the inputs of a native speech LLM from the rows of this package, with labels on the answer only.

    Args:
        native: processor of transformers.
        model_type: key of `native_families.FAMILIES`.
    """

    think_block, system_prompt, use_low_frame_rate = False, False, False
    encoder_convolutions = chat_layout = None
    downsample_rate = encoder_downsample_rate = 1

    def __init__(self, native: ProcessorMixin, model_type: str):
        # Not the parent's: the parts belong to the processor of transformers.
        self.native = native
        self.model_type = model_type
        self.tokenizer = native.tokenizer
        self.feature_extractor = getattr(native, "feature_extractor", None) or native.audio_processor
        self.audio_token = native.audio_token
        self.audio_token_id = self.tokenizer.convert_tokens_to_ids(self.audio_token)
        self.chat_template = getattr(native, "chat_template", None)
        self._tokens_per_second: float | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_type}, {type(self.native).__name__})"

    @property
    def family(self) -> Family:
        """Entry of the model type in `native_families.FAMILIES`."""
        return FAMILIES[self.model_type]

    @property
    def sampling_rate(self) -> int:
        """Rate of the waveforms, in Hz."""
        rate = getattr(self.feature_extractor, "sampling_rate", None)
        return rate or self.feature_extractor.melspec_kwargs["sample_rate"]

    @property
    def frame_seconds(self) -> float:
        """Seconds per frame of the length columns of rows."""
        return FRAME_SHIFT

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's input tensors."""
        return self.native.model_input_names

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the processor of transformers."""
        return self.native.save_pretrained(save_directory, **kwargs)

    def num_audio_tokens(self, num_frames: int, encoded: bool = False) -> int:
        """Estimates the number of audio tokens of a recording from the number for some seconds of silence."""
        window = self.family.window_seconds
        if self._tokens_per_second is None:
            measured = window or MEASURED_SECONDS
            silence = np.zeros(round(measured * self.sampling_rate), np.float32)
            inputs = self.encode([TranscriptionRequest(measured)], [silence])
            self._tokens_per_second = int((inputs["input_ids"] == self.audio_token_id).sum()) / measured
        seconds = num_frames * self.frame_seconds
        if window:
            seconds = math.ceil(seconds / window) * window
        return math.ceil(seconds * self._tokens_per_second)

    def request(self, dialogue: chat.Dialogue, seconds: float) -> TranscriptionRequest:
        """Converts a dialogue to a request of the family.

        Args:
            seconds: duration of the recording.

        Raises:
            ChatError: if the family cannot represent the dialogue.
        """
        if len(dialogue.turns) != 1 or len(dialogue.recordings) != 1:
            raise chat.ChatError(
                f"{self.model_type} models are trained on one turn with one recording; this dialogue has "
                f"{len(dialogue.turns)} turns and {len(dialogue.recordings)} recordings"
            )
        turn = dialogue.turns[0]
        request = parse_prompt("".join(piece for piece in turn.pieces if isinstance(piece, str)), seconds)
        if request.context and not self.family.contexts:
            raise chat.ChatError(f"{self.model_type} has no context or hotwords; leave them out")
        if turn.prefix:
            raise chat.ChatError(f'{self.model_type} has no "prev_content"; leave it out')
        if request.language and not self.family.languages:
            if not self._warned:
                self._warned = True
                logger.warning("%s has no language option: the languages of prompts are ignored", self.model_type)
            request = TranscriptionRequest(request.seconds, None, request.context, request.instruction)
        return request

    def prompt(self, request: TranscriptionRequest) -> str:
        """Returns the text before the answer, with one placeholder for the recording."""
        template = self.native.apply_chat_template
        text = template([self.family.messages(request)], tokenize=False, add_generation_prompt=True)[0]
        return text + self.family.prefill(request)

    def encode(self, requests: Sequence[TranscriptionRequest], waveforms: Sequence[np.ndarray]) -> dict[str, Any]:
        """Builds the inputs of `generate` with the family's own processor, padded.

        Args:
            waveforms: one per request, shape = (samples,).
        """
        if self.family.encode is not None:
            inputs = self.family.encode(self.native, requests, waveforms)
        else:
            texts = [self.prompt(request) for request in requests]
            # Padding of the features is the family's own: some encoders need windows of 30 s.
            inputs = self.native(
                text=texts, audio=list(waveforms), return_tensors="pt", text_kwargs={"padding": True},
                audio_kwargs={"sampling_rate": self.sampling_rate},
            )  # fmt: skip
        unused = getattr(self.native, "unused_input_names", ())
        return {name: value for name, value in inputs.items() if name not in unused}

    def batch(
        self,
        dialogues: Sequence[chat.Dialogue],
        waveforms: Sequence[np.ndarray],
        return_labels: bool,
        padding_side: str | None = None,
        device: torch.device | str = "cpu",
    ) -> BatchFeature:
        """Pads dialogues and recordings into a batch; arguments as in `SpeechLLMProcessor.batch`.

        A training row is the prompt of decoding and the ids of the answer and of the end token, which have labels.
        """
        requests = [
            self.request(dialogue, len(waveform) / self.sampling_rate)
            for dialogue, waveform in zip(dialogues, waveforms, strict=True)
        ]
        inputs = self.encode(requests, waveforms)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        columns: dict[str, list[list[int]]] = {"input_ids": []}
        for row, keep in zip(ids, mask, strict=True):
            columns["input_ids"].append(row[keep].tolist())
        if return_labels:
            columns["labels"] = []
            for prompt, dialogue, request in zip(columns["input_ids"], dialogues, requests, strict=True):
                answer = self.answer_ids(dialogue.turns[0].answer or "", request)
                columns["labels"].append([chat.IGNORE_INDEX] * len(prompt) + answer)
                prompt += answer
        side = padding_side or ("right" if return_labels else "left")
        return BatchFeature({**self.pad_tokens(columns, side), **inputs})

    def answer_ids(self, text: str, request: TranscriptionRequest) -> list[int]:
        """Returns the supervised ids: the transcript in the form of the family, and the end token."""
        start = self.tokenizer.encode(self.family.answer_start(request), add_special_tokens=False)
        answer = chat.answer_ids(self.tokenizer, self.family.answer(text, request))
        return [*start, *answer, self.tokenizer.eos_token_id]

    def transcripts(self, tokens: torch.Tensor | list[list[int]]) -> list[str]:
        """Returns the transcripts of generated answers, shape = (rows, tokens)."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [self.family.transcript(text) for text in texts]
