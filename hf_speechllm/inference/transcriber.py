"""Recordings in, transcripts out: in batches by audio seconds, loading while the model works."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import chat
from ..audio import AudioError, load_audio, probe_audio
from ..data.sampler import BudgetBatchSampler
from ..modeling import SpeechLLMForConditionalGeneration
from ..processing import SpeechLLMProcessor

logger = logging.getLogger(__name__)

PREFETCHED_BATCHES = 4  # loaded ahead of the model


@dataclass(frozen=True)
class Request:
    """What is to be transcribed.

    Args:
        id: of the recording.
        messages: the dialogue that asks for the transcript; its last turn has no answer.
        hotwords: named before the first prompt.
    """

    id: str
    messages: list[dict]
    hotwords: tuple[str, ...] = ()

    @property
    def dialogue(self) -> chat.Dialogue:
        """The messages, parsed."""
        return chat.parse_messages(self.messages, self.hotwords)


@dataclass(frozen=True)
class Transcript:
    """A result.

    Args:
        index: position of the request.
        text: what was said; empty if it failed.
        seconds: of audio.
        error: why it failed; `None` if it did not.
    """

    index: int
    text: str = ""
    seconds: float = 0.0
    error: str | None = None


class Transcriber:
    """Decodes requests with a model.

    Example:

    ```python
    >>> transcriber = Transcriber(model, processor)
    >>> transcriber.transcribe(["a.wav", "b.wav"], language="en")
    ['hello', 'good morning']
    ```

    Args:
        model: on its device, in its dtype.
        processor: the model's.
        batch_seconds: padded audio seconds in a batch.
        max_new_tokens: the longest transcript.
        num_beams: 1 is greedy search.
        num_workers: threads that load recordings.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        batch_seconds: float = 240.0,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        num_workers: int = 4,
    ):
        self.model = model.eval()
        self.processor = processor
        self.batch_seconds = batch_seconds
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.num_workers = num_workers

    def transcribe(self, recordings: Sequence[Any], **prompt_options) -> list[str]:
        """Transcripts of recordings, in their order.

        Args:
            recordings: paths, URLs or waveforms.
            **prompt_options: `language`, `itn`, `hotwords`, `prompt` of `chat.transcription_prompt`.

        Raises:
            AudioError: if one of them can't be used.
        """
        prompt = chat.transcription_prompt(**prompt_options)
        requests = [Request(str(i), chat.transcription_messages(item, prompt)) for i, item in enumerate(recordings)]
        texts = [""] * len(requests)
        for transcript in self(requests):
            if transcript.error is not None:
                raise AudioError(transcript.error)
            texts[transcript.index] = transcript.text
        return texts

    def __call__(self, requests: Sequence[Request]) -> Iterator[Transcript]:
        """Decodes requests, sorted by length; each result tells its position.

        A request that fails, since its recording can't be read or is too long, gives a `Transcript` with an `error`.
        """
        with ThreadPoolExecutor(self.num_workers) as pool:
            seconds: dict[int, float] = {}
            for index, result in enumerate(pool.map(self._measure, requests)):
                if isinstance(result, str):
                    yield Transcript(index, error=result)
                else:
                    seconds[index] = result
            if not seconds:
                return
            indices = list(seconds)
            lengths = np.array([seconds[index] for index in indices])
            budget = max(self.batch_seconds, float(lengths.max()))
            # Longest first: if memory does not suffice, that is known at once.
            batches = BudgetBatchSampler(lengths, budget, shuffle=False).batches(0)[::-1]
            waiting: list[tuple[list[int], Future]] = []
            for batch in batches:
                chosen = [indices[position] for position in batch]
                waiting.append((chosen, pool.submit(self._load, [requests[index] for index in chosen])))
                if len(waiting) >= PREFETCHED_BATCHES:
                    yield from self._decode(*waiting.pop(0), seconds)
            for chosen, loaded in waiting:
                yield from self._decode(chosen, loaded, seconds)

    def _measure(self, request: Request) -> float | str:
        """Audio seconds of a request, or why it can't be decoded."""
        try:
            sources = request.dialogue.recordings
            if not sources:
                return "no recording"
            durations = []
            for source in sources:
                if isinstance(source, np.ndarray):
                    durations.append(len(source) / self.processor.sampling_rate)
                else:
                    samples, rate = probe_audio(source)
                    durations.append(samples / rate)
        except (AudioError, chat.ChatError) as error:
            return str(error)
        limit = self.model.config.max_feature_frames * self.processor.frame_seconds
        if max(durations) > limit:
            return f"{sources[0]}: {max(durations):.1f} s; the encoder takes at most {limit:.1f} s"
        if min(durations) == 0:
            return f"{sources[0]}: no samples"
        return sum(durations)

    def _load(self, requests: list[Request]) -> list[tuple[chat.Dialogue, list[np.ndarray]] | str]:
        loaded: list[tuple[chat.Dialogue, list[np.ndarray]] | str] = []
        for request in requests:
            dialogue = request.dialogue
            try:
                loaded.append(
                    (dialogue, [load_audio(source, self.processor.sampling_rate) for source in dialogue.recordings])
                )
            except AudioError as error:  # vanished since it was measured
                loaded.append(str(error))
        return loaded

    def _decode(self, indices: list[int], loaded: Future, seconds: dict[int, float]) -> Iterator[Transcript]:
        items = list(zip(indices, loaded.result(), strict=True))
        yield from (Transcript(index, error=item) for index, item in items if isinstance(item, str))
        usable = [(index, *item) for index, item in items if not isinstance(item, str)]
        if not usable:
            return
        waveforms = [waveform for _, _, recordings in usable for waveform in recordings]
        inputs = self.processor.batch([dialogue for _, dialogue, _ in usable], waveforms, return_labels=False)
        for (index, _, _), text in zip(usable, self.generate(inputs), strict=True):
            yield Transcript(index, text, seconds[index])

    @torch.inference_mode()
    def generate(self, inputs) -> list[str]:
        """Texts for a batch of the processor."""
        inputs = inputs.to(self.model.device)
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, do_sample=False
        )
        tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
