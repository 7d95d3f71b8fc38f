"""Transcribes recordings in batches by audio seconds; threads prepare batches while the model computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from ..audio.inputs import as_list, to_source
from ..audio.vad import VoiceDetector
from ..audio.waveform import SAMPLE_RATE, AudioError, load_audio
from ..data.sampler import BudgetBatchSampler
from ..fast.attention import disable_host_syncs, enable_host_syncs
from ..formats.untrusted import one_line, reading
from ..model import chat
from ..model.calibration import Calibration
from ..model.generation import generation_lock, ignored_settings, transcription_config
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import is_native
from ..model.processing import SpeechLLMProcessor
from .ctc_reader import CTCReader
from .drafts import Drafter
from .measuring import RequestMeter
from .pieces import Piece, Transcript
from .prefetch import prefetch
from .repetition import cut_loop
from .requests import Request
from .rescoring import Rescorer
from .search import search
from .segments import Segment, join_texts

logger = logging.getLogger(__name__)

TOKEN_INPUTS = ("input_ids", "attention_mask")  # inputs with one entry per row; others have one entry per recording
SMALLEST_BATCH, LARGEST_BATCH, SECONDS_PER_GB = 240.0, 8192.0, 200.0  # audio seconds, see `default_batch_seconds`
PREFETCHED_BATCHES = 2  # number of batches that are prepared in advance, at least
PREFETCHED_SECONDS = 3600.0  # audio that is prepared in advance, at least; 230 MB, and 460 MB as features
WINDOW_SECONDS = 3600.0  # duration of the recordings whose segments are sorted together
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): the weights are damaged, or overflow in this dtype; check "
    "the checkpoint, or try --dtype float32"
)
SEGMENTED_SECONDS = 4 * WINDOW_SECONDS  # recordings in memory for segmentation; 230 MB per hour


def default_batch_seconds(device: torch.device, num_beams: int = 1) -> float:
    """Returns the padded audio seconds of a batch that use the free memory of a device well.

    A batch of 8,192 s takes 14 GB with Fun-ASR-Nano. The default leaves room for LLMs with three times as many bytes
    per second of audio.

    Args:
        device: of the model.
        num_beams: number of beams, each with its own key-value cache.
    """
    if device.type != "cuda":
        return SMALLEST_BATCH
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    return min(max(SMALLEST_BATCH, SECONDS_PER_GB * free / num_beams), LARGEST_BATCH)


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
        with ThreadPoolExecutor(self.num_workers) as listeners, ThreadPoolExecutor(self.num_workers) as loaders:
            found: dict[int, list[tuple[float, Segment]]] = {index: [] for index in usable}
            if self.vad is None:
                pieces = [Piece(index, 0.0, seconds[index]) for index in usable]
                batches: Iterable[list[Piece] | Transcript] = self._batches(pieces)
            else:
                batches = self._segmented(listeners, requests, seconds)

            def prepare(batch):
                return batch if isinstance(batch, Transcript) else self._prepare(listeners, requests, batch)

            room = max(PREFETCHED_SECONDS, PREFETCHED_BATCHES * self.batch_seconds)
            for result in prefetch(loaders, prepare, ((batch, _seconds(batch)) for batch in batches), room):
                if isinstance(result, Transcript):
                    yield result
                    continue
                failed, decodable, counts, inputs = result
                yield from failed
                for piece, segment in zip(decodable, self._decode(decodable, inputs, counts), strict=True):
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

    def _batches(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Returns batches of pieces, the longest first, so that insufficient memory shows immediately."""
        if not pieces:
            return []
        seconds = np.array([piece.seconds for piece in pieces])
        sampler = BudgetBatchSampler(seconds, max(self.batch_seconds, float(seconds.max())), shuffle=False)
        return [[pieces[position] for position in batch] for batch in sampler.batches(0)[::-1]]

    def _segmented(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], seconds: dict[int, float]
    ) -> Iterator[list[Piece] | Transcript]:
        """Yields batches of segments, sorted in windows of one hour, and transcripts of recordings without speech."""
        window: list[Piece] = []
        window_seconds = 0.0
        todo = ((index, seconds[index]) for index in seconds)
        for result in prefetch(pool, lambda index: self._segment(index, requests[index]), todo, SEGMENTED_SECONDS):
            if isinstance(result, Transcript):
                yield result if result.error else Transcript(result.index, seconds=seconds[result.index])
                continue
            window += result
            window_seconds += seconds[result[0].index]
            if window_seconds >= WINDOW_SECONDS:
                yield from self._batches(window)
                window, window_seconds = [], 0.0
        yield from self._batches(window)

    def _segment(self, index: int, request: Request) -> list[Piece] | Transcript:
        """Splits a request into pieces; returns a transcript after an error, or without speech."""
        dialogue = request.dialogue
        try:
            waveforms = [load_audio(source, SAMPLE_RATE) for source in dialogue.recordings]
        except AudioError as error:
            return Transcript(index, error=str(error))
        if not self.meter.is_segmented(dialogue):
            return [Piece(index, 0.0, sum(map(len, waveforms)) / SAMPLE_RATE)]
        spans = self.vad.segments(waveforms[0])
        return [
            # Copied, so that silence between segments does not stay in memory.
            Piece(index, start / SAMPLE_RATE, end / SAMPLE_RATE, len(spans), waveforms[0][start:end].copy())
            for start, end in spans
        ] or Transcript(index)

    def _prepare(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], batch: list[Piece]
    ) -> tuple[list[Transcript], list[Piece], list[int], BatchFeature | None]:
        """Loads a batch; returns failures, loaded pieces, numbers of their recordings, and inputs of the model."""

        def load(piece: Piece) -> list[np.ndarray] | AudioError:
            if piece.waveform is not None:
                return [piece.waveform]
            try:
                recordings = requests[piece.index].dialogue.recordings
                # Checked again: a recording may have been replaced by a longer one, or the header may be wrong.
                limit = self.meter.max_seconds + self.processor.frame_seconds
                return [load_audio(source, self.processor.sampling_rate, limit) for source in recordings]
            except AudioError as error:
                return error

        failed, decodable, counts, dialogues, waveforms = [], [], [], [], []
        for piece, loaded in zip(batch, pool.map(load, batch), strict=True):
            if isinstance(loaded, AudioError):
                failed.append(Transcript(piece.index, error=str(loaded)))
                continue
            if piece.waveform is None:  # the current duration, which may differ from the measured one
                length = sum(map(len, loaded)) / self.processor.sampling_rate
                piece = replace(piece, end=piece.start + length)
            decodable.append(piece)
            counts.append(len(loaded))
            dialogues.append(requests[piece.index].dialogue)
            waveforms += loaded
        inputs = None
        if decodable:
            inputs = self.processor.batch(dialogues, waveforms, return_labels=False, device=self.model.device)
        return failed, decodable, counts, inputs

    def _decode(
        self, pieces: list[Piece], inputs: BatchFeature | None, counts: Sequence[int]
    ) -> Iterator[Segment | None]:
        """Decodes pieces with `counts` recordings each; yields segments with texts, or `None` (see `generate`)."""
        hypotheses = self._generate(inputs, counts) if pieces else []
        for piece, hypothesis in zip(pieces, hypotheses, strict=True):
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


def _seconds(batch: list[Piece] | Transcript) -> float:
    return 0.0 if isinstance(batch, Transcript) else sum(piece.seconds for piece in batch)
