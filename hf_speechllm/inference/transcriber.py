"""Transcribes recordings in batches: greedy or beam search, word times, joining of segments."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from ..audio.inputs import as_list, to_source
from ..audio.vad import VoiceDetector
from ..audio.waveform import SAMPLE_RATE, AudioError
from ..fast.attention import disable_host_syncs, enable_host_syncs
from ..formats.untrusted import one_line, reading
from ..model import chat
from ..model.calibration import Calibration
from ..model.generation import generation_lock, ignored_settings, transcription_config
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import fixed_seconds, is_native
from ..model.processing import SpeechLLMProcessor
from .batches import Batch, BatchLoader, default_batch_seconds
from .ctc_reader import CTCReader
from .drafts import Drafter
from .measuring import RequestMeter
from .pieces import Transcript
from .repetition import cut_loop
from .requests import Request
from .rescoring import Rescorer
from .search import search
from .segments import Segment, join_texts

logger = logging.getLogger(__name__)

TOKEN_INPUTS = ("input_ids", "attention_mask")  # inputs with one entry per row; others have one entry per recording
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): the weights are damaged, or overflow in this dtype; check "
    "the checkpoint, or try --dtype float32"
)


class Transcriber:
    """Transcribes recordings with a model.

    Threads can share a transcriber, and transcribers a model: a model decodes one batch at a time.

    Example:

    ```python
    >>> transcriber = Transcriber(model, processor)
    >>> transcriber.transcribe(["a.wav", "b.wav"], language="en")
    ['hello', 'good morning']

    >>> transcriber = Transcriber(model, processor, vad=VoiceDetector(max_seconds=30))
    >>> for segment in transcriber.transcripts(["lecture.mp3"])[0].segments:
    ...     print(segment.start, segment.end, segment.text)
    ```

    Args:
        model: on the target device, in the target dtype.
        processor: of the model.
        batch_seconds: padded audio seconds per batch; `None`: see `default_batch_seconds`.
        max_new_tokens: maximum length of a transcript, or of the transcript of a segment.
        num_beams: number of beams; 1 is greedy search.
        num_workers: number of threads that load recordings, detect speech, and compute features.
        repetition_guard: whether to stop and cut loops at the end of hypotheses; see `repetition`.
        vad: splits recordings into segments; `None` decodes whole recordings.
        cuda_graphs: has no effect; deprecated.
        word_times: whether transcripts have the times and confidence of their words; requires a CTC head.
        ctc_guard: whether a text that the CTC head contradicts is replaced by the text of the CTC head.
        calibration: of the confidence of words, see `model.calibration`.
        ctc_draft: whether the LLM verifies drafts of a CTC head over its tokens, in greedy search; see `drafts`.
        ctc_draft_threshold: with `ctc_draft`: probability of a draft, from 0 to 1, from which it is the text, without
            the LLM; `None`: the LLM verifies all drafts.
        ctc_weight: weight of a CTC head, from 0 to below 1, in the choice among the hypotheses of beam search; see
            `rescoring.Rescorer`. 0: the LLM chooses.
        fast: whether to use fast paths: on a GPU padded-mask attention and the FSMN kernel, and no attention of
            cuDNN. If false, the model uses the plain paths of torch and transformers (slower, with the
            same numbers), even after use by a fast transcriber.

    Raises:
        ValueError: if an end token of the generation configuration is invalid; if the model has no
            CTC head, which `word_times`, `ctc_guard`, `ctc_draft` and `ctc_weight` require; if `ctc_weight` is out of
            range, or used without beams; with `vad`, if the sampling rate of the processor differs from the rate of
            the voice detection.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        batch_seconds: float | None = None,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        num_workers: int = 4,
        repetition_guard: bool = False,
        vad: VoiceDetector | None = None,
        cuda_graphs: bool | None = None,
        fast: bool = True,
        word_times: bool = False,
        ctc_guard: bool = False,
        ctc_draft: bool = False,
        calibration: Calibration | None = None,
        ctc_draft_threshold: float | None = None,
        ctc_weight: float = 0.0,
    ):
        self.model = model.eval()
        if cuda_graphs is not None:
            warnings.warn("Transcriber(cuda_graphs=...) has no effect; leave it out", FutureWarning, stacklevel=2)
        self.fast = fast
        transcription_config(model)
        if ignored := ignored_settings(model.generation_config):
            logger.warning("ignored settings in the generation configuration of the model: %s", one_line(ignored))
        own = not is_native(model)
        if not fast and own:
            enable_host_syncs(model)
        if fast and own and model.device.type == "cuda":
            disable_host_syncs(model)
        self.processor = processor
        if ctc_draft and (num_beams > 1 or ctc_weight):
            raise ValueError("ctc_draft is not supported with num_beams and ctc_weight: drafts are verified greedily")
        uses_ctc = word_times or ctc_guard or ctc_draft
        self.reader = CTCReader(model, processor, ctc_guard, calibration) if uses_ctc else None
        self.rescorer = None
        if ctc_weight:
            self.rescorer = Rescorer(self.reader or CTCReader(model, processor), processor, ctc_weight, num_beams)
        self.drafter = Drafter(self.reader, processor, ctc_draft_threshold) if self.reader and ctc_draft else None
        self.batch_seconds = batch_seconds or default_batch_seconds(model.device, num_beams)
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.num_workers = num_workers
        self.repetition_guard = repetition_guard
        self.vad = vad
        self.meter = RequestMeter(model.config, processor, vad.max_seconds if vad else None, num_workers)
        if vad is not None and processor.sampling_rate != SAMPLE_RATE:
            raise ValueError(
                f"--vad requires a processor with {SAMPLE_RATE} Hz; this processor has {processor.sampling_rate} Hz"
            )
        if vad is not None and vad.max_seconds > self.meter.max_seconds:
            raise ValueError(
                f"--vad_max_seconds {vad.max_seconds:g}: the encoder accepts at most {self.meter.max_seconds:.1f} s; "
                "lower --vad_max_seconds"
            )

    def rehearse(self, name: Any) -> None:
        """Computes one step for half a second of silence. Some bad settings of a checkpoint fail only when used.

        Args:
            name: of the checkpoint, for the error message.

        Raises:
            CheckpointError: if the step fails.
        """
        with reading(name, "cannot transcribe"), torch.inference_mode():
            silence = np.zeros(self.processor.sampling_rate // 2, np.float32)
            inputs = self.processor.apply_transcription_request(silence).to(self.model.device)
            self.model(**inputs, logits_to_keep=1)

    def transcribe(self, recordings: Any, sampling_rate: int | None = None, **prompt_options) -> Any:
        """Transcribes one recording or several.

        Args:
            recordings: a recording or an iterable of recordings: path, URL, bytes of a file, open file, waveform,
                `(waveform, rate)`, row of `datasets`; see `audio.inputs.to_source`.
            sampling_rate: of waveforms without a rate, in Hz; default the rate of the processor.
            **prompt_options: `language`, `itn`, `hotwords`, `prompt`, `context` of `chat.transcription_prompt`.

        Returns:
            A text for a single recording; otherwise a list of texts in the same order.

        Raises:
            AudioError: if a recording is unusable.
        """
        texts = [item.text for item in self.transcripts(recordings, sampling_rate, **prompt_options)]
        return texts[0] if as_list(recordings)[1] else texts

    def transcripts(self, recordings: Any, sampling_rate: int | None = None, **prompt_options) -> list[Transcript]:
        """Transcribes recordings as `transcribe` does, with times and texts of segments, and flags of loops.

        Returns:
            A list, also for a single recording.

        Raises:
            AudioError: if a recording is unusable.
        """
        prompt = chat.transcription_prompt(**prompt_options)
        requests = []
        for index, item in enumerate(as_list(recordings)[0]):
            try:
                source = to_source(item, self.processor.sampling_rate, sampling_rate)
            except AudioError as error:
                raise AudioError(f"recording {index}: {error}") from error
            requests.append(Request(f"recording {index}", chat.transcription_messages(source, prompt)))
        results = sorted(self(requests), key=lambda transcript: transcript.index)
        for transcript in results:
            if transcript.error is not None:
                raise AudioError(f"{requests[transcript.index].id}: {transcript.error}")
        return results

    def __call__(
        self, requests: Sequence[Request], lengths: Sequence[float | str] | None = None
    ) -> Iterator[Transcript]:
        """Decodes requests in order of duration; yields transcripts with the index of the request.

        The transcript of an unusable request, for example with an unreadable recording, has an `error`.

        Args:
            requests: all requests.
            lengths: result of `measure`; default computed here.
        """
        lengths = self.measure(requests) if lengths is None else lengths
        usable = [index for index, length in enumerate(lengths) if not isinstance(length, str)]
        seconds = {index: float(lengths[index]) for index in usable}
        yield from (Transcript(i, error=length) for i, length in enumerate(lengths) if isinstance(length, str))
        found: dict[int, list[tuple[float, Segment]]] = {index: [] for index in usable}
        loader = BatchLoader(
            self.processor, self.meter, self.batch_seconds, self.model.device, self.num_workers, self.vad,
            fixed_seconds(self.model.config),
        )  # fmt: skip
        for result in loader(requests, seconds):
            if isinstance(result, Transcript):
                yield result
                continue
            yield from result.failed
            for piece, segment in zip(result.pieces, self._decode(result), strict=True):
                if piece.waveform is None:  # the recording may have been replaced since the measurement
                    seconds[piece.index] = piece.seconds
                if piece.index not in found:  # another segment of this recording has failed
                    continue
                if segment is None:
                    del found[piece.index]
                    yield Transcript(piece.index, error=NOT_FINITE)
                    continue
                found[piece.index].append((piece.start, segment))
                if len(found[piece.index]) == piece.pieces:
                    segments = tuple(item for _, item in sorted(found.pop(piece.index), key=lambda part: part[0]))
                    text = join_texts(item.text for item in segments)
                    yield Transcript(piece.index, text, seconds[piece.index], segments=segments)

    def measure(self, requests: Sequence[Request]) -> list[float | str]:
        """Returns the audio seconds of each request, or an error message.

        If the header of a recording contains the duration, only the header is read; loading finds other damage.
        """
        return self.meter(requests)

    def _decode(self, batch: Batch) -> Iterator[Segment | None]:
        """Decodes a batch; yields a segment with text for each piece, or `None` (see `generate`)."""
        hypotheses = self._generate(batch.inputs, batch.counts) if batch.inputs is not None else []
        for piece, hypothesis in zip(batch.pieces, hypotheses, strict=True):
            if hypothesis.text is None:
                yield None
                continue
            text, looped = cut_loop(hypothesis.text) if self.repetition_guard else (hypothesis.text, False)
            segment = Segment(piece.start, piece.end, text, looped)
            yield segment if self.reader is None else self.reader.segment(segment, hypothesis.evidence)

    def _generate(self, inputs: BatchFeature, counts: Sequence[int]) -> list[Hypothesis]:
        """Decodes a batch; splits a batch that does not fit into memory."""
        try:
            return self._search(inputs, counts)
        except torch.OutOfMemoryError:
            if len(counts) == 1:
                raise
        logger.warning("%d rows do not fit into memory and are split; lower --batch_seconds", len(counts))
        torch.cuda.empty_cache()
        middle = len(counts) // 2
        recordings = sum(counts[:middle])
        hypotheses: list[Hypothesis] = []
        for rows, places in (slice(middle), slice(recordings)), (slice(middle, None), slice(recordings, None)):
            part = {name: value[rows if name in TOKEN_INPUTS else places] for name, value in inputs.items()}
            hypotheses += self._generate(BatchFeature(part), counts[rows])
        return hypotheses

    @torch.inference_mode()
    def _search(self, inputs: BatchFeature, counts: Sequence[int]) -> list[Hypothesis]:
        if self.reader is None:
            return [Hypothesis(text) for text in self.generate(inputs)]
        with generation_lock(self.model):
            with self.reader.listening():
                texts = self.generate(inputs)
            evidence = self.reader.evidence(counts)
        return [Hypothesis(*pair) for pair in zip(texts, evidence, strict=True)]

    @torch.inference_mode()
    def generate(self, inputs) -> list[str | None]:
        """Decodes a batch of the processor. With `repetition_guard`, loops are stopped, but not cut.

        Returns:
            Text of each row; `None` if logits were not finite in a step that the text depends on.
        """
        inputs = inputs.to(self.model.device)
        find = partial(
            search, self.model, num_beams=self.num_beams, fast=self.fast, keep_scores=self.reader is not None,
            loop_stop_tokenizer=self.processor.tokenizer if self.repetition_guard else None, rescorer=self.rescorer,
        )  # fmt: skip
        with generation_lock(self.model):
            if self.drafter is not None:
                found = self.drafter.search(inputs, self.max_new_tokens, find)
            else:
                found = find(inputs, self.max_new_tokens)
            if self.reader is not None:
                self.reader.notice(found.tokens, found.scores)
        texts = self.processor.transcripts(found.tokens)
        return [text if ok else None for text, ok in zip(texts, found.finite, strict=True)]


@dataclass(frozen=True)
class Hypothesis:
    """Text of a row, and evidence for it; the text is `None` if logits were not finite."""

    text: str | None
    evidence: Any = None
