"""Checks of requests before decoding: duration of the recordings, and limits of the model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio.waveform import AudioError, display_name
from ..console import is_first_process, progress_bar
from ..model import chat
from ..model.configuration import SpeechLLMConfig
from ..model.native_families import max_feature_frames
from ..model.native_processing import NativeProcessor
from ..model.processing import SpeechLLMProcessor
from .prefetch import measure_seconds
from .requests import Request


@dataclass
class RequestMeter:
    """Measures requests without loading the model.

    Args:
        config: of the model.
        processor: of the model.
        segment_seconds: largest duration of a segment, with voice detection; `None` decodes whole recordings.
        num_workers: number of threads that open recordings.
    """

    config: SpeechLLMConfig
    processor: SpeechLLMProcessor
    segment_seconds: float | None = None
    num_workers: int = 4
    max_seconds: float = field(init=False)  # limit of the encoder
    _prompt_tokens: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self):
        self.max_seconds = max_feature_frames(self.config) * self.processor.frame_seconds

    def __call__(self, requests: Sequence[Request]) -> list[float | str]:
        """Returns the audio seconds of each request, or an error message.

        If the header of a recording contains the duration, only the header is read; loading finds other damage.
        """
        with ThreadPoolExecutor(self.num_workers) as pool:
            measured = pool.map(self._measure, requests, chunksize=1)
            hidden = not is_first_process()
            bar = progress_bar(
                measured, desc="measuring", total=len(requests), unit=" recordings", leave=False, disable=hidden
            )
            return list(bar)

    def is_segmented(self, dialogue: chat.Dialogue) -> bool:
        """Whether the recording is split into segments; dialogues with several recordings are never split."""
        return self.segment_seconds is not None and len(dialogue.recordings) == 1

    def _measure(self, request: Request) -> float | str:
        try:
            dialogue = request.dialogue
            durations = [measure_seconds(source, self.processor.sampling_rate) for source in dialogue.recordings]
            if isinstance(self.processor, NativeProcessor):
                self.processor.request(dialogue, sum(durations))
        except (AudioError, chat.ChatError) as error:
            return str(error)
        if not durations:
            return "no recording; add a recording to the request"
        source = dialogue.recordings[int(np.argmax(durations))]
        if min(durations) == 0:
            return f"{_name(source)}: no samples"
        if max(durations) > self.max_seconds and not self.is_segmented(dialogue):
            return (
                f"{_name(source)}: {max(durations):.1f} s; the encoder accepts at most {self.max_seconds:.1f} s; use "
                "--vad, which splits long recordings into segments"
            )
        return self._context_error(dialogue, durations) or sum(durations)

    def _context_error(self, dialogue: chat.Dialogue, durations: Sequence[float]) -> str | None:
        """Returns an error message if a request exceeds the context of the LLM, for example with many hotwords."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return None
        if self.segment_seconds is not None and self.is_segmented(dialogue):
            durations = [min(*durations, self.segment_seconds)]
        texts = [piece for turn in dialogue.turns for piece in turn.pieces if isinstance(piece, str)]
        text = "".join([dialogue.system or "", *texts])
        if text not in self._prompt_tokens:
            self._prompt_tokens[text] = len(self.processor.tokenizer.encode(text, add_special_tokens=False))
        frames = [int(duration / self.processor.frame_seconds) for duration in durations]
        tokens = self._prompt_tokens[text] + sum(map(self.processor.num_audio_tokens, frames))
        if tokens < limit:
            return None
        return f"{tokens} tokens of prompt and audio; the LLM accepts fewer than {limit}; use fewer hotwords or --vad"


def _name(source: Any) -> str:
    return display_name(source) if isinstance(source, str) else "the waveform"
