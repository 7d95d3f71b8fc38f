"""Recordings in, transcripts out: in batches by audio seconds, prepared in threads while the model works."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from ..audio.inputs import as_list, to_source
from ..audio.vad import VoiceDetector
from ..audio.waveform import SAMPLE_RATE, AudioError, load_audio
from ..data.sampler import BudgetBatchSampler
from ..fast.attention import disable_host_syncs, enable_host_syncs, without_cudnn_attention
from ..fast.cuda_graphs import CudaGraphDecoder, supports_cuda_graphs
from ..formats.untrusted import one_line, reading
from ..model import chat
from ..model.generation import ignored_settings, transcribing, transcription_config
from ..model.kv_cache import CACHE
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from .finite import LogitsWatch
from .measuring import RequestMeter
from .pieces import Piece, Transcript
from .prefetch import in_background
from .repetition import LoopStop, cut_loop
from .requests import Request
from .segments import Segment, join_texts

logger = logging.getLogger(__name__)

TOKEN_INPUTS = ("input_ids", "attention_mask")  # of each row; the others are of each recording
PREFETCHED_BATCHES = 2  # prepared ahead of the model
PREFETCHED_SECONDS = 3600.0  # or as many batches as have so much audio; 230 MB, and twice that as features
WINDOW_SECONDS = 3600.0  # of recordings whose segments are sorted together
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): its weights are damaged, or overflow in this dtype; check "
    "the checkpoint, or try --dtype float32"
)
LISTENED_SECONDS = 4 * WINDOW_SECONDS  # of recordings that are held in memory to find their segments; 230 MB an hour


class Transcriber:
    """Decodes requests with a model.

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
        model: on its device, in its dtype.
        processor: the model's.
        batch_seconds: padded audio seconds in a batch.
        max_new_tokens: the longest transcript, of each segment.
        num_beams: 1 is greedy search.
        num_workers: threads that load recordings, detect voices, and compute features.
        repetition_guard: whether a hypothesis that ends in a loop is stopped and cut; see `repetition`.
        vad: makes segments of recordings; `None` decodes each at once.
        cuda_graphs: whether, on a GPU, greedy search replays a step of the LLM; see `steps`.
        fast: whether fast paths are used: on a GPU padded-mask attention, the FSMN kernel and CUDA graphs, and no
            attention of cuDNN. If false, the model computes as torch and transformers do, also if an earlier fast
            transcriber has set it up: the same numbers, slower.

    Raises:
        ValueError: if an end token of the generation configuration is no token; with `vad`, if the processor's
            sampling rate is not that of the voice detection.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        batch_seconds: float = 240.0,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        num_workers: int = 4,
        repetition_guard: bool = False,
        vad: VoiceDetector | None = None,
        cuda_graphs: bool = True,
        fast: bool = True,
    ):
        self.model = model.eval()
        self.steps: CudaGraphDecoder | None = None
        self.fast = fast
        transcription_config(model)
        if ignored := ignored_settings(model.generation_config):
            logger.warning("not used of the model's generation configuration: %s", one_line(ignored))
        if not fast:
            enable_host_syncs(model)
        if fast and model.device.type == "cuda":
            disable_host_syncs(model)
            if cuda_graphs and num_beams == 1 and supports_cuda_graphs(model.llm.get_decoder()):
                self.steps = CudaGraphDecoder(model.llm.get_decoder())
        self.processor = processor
        self.batch_seconds = batch_seconds
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.num_workers = num_workers
        self.repetition_guard = repetition_guard
        self.vad = vad
        self.meter = RequestMeter(model.config, processor, vad.max_seconds if vad else None, num_workers)
        if vad is not None and processor.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"voice detection needs {SAMPLE_RATE} Hz, the processor has {processor.sampling_rate} Hz")
        if vad is not None and vad.max_seconds > self.meter.max_seconds:
            raise ValueError(
                f"segments of {vad.max_seconds:g} s; the encoder takes at most {self.meter.max_seconds:.1f} s: lower "
                "--vad_max_seconds"
            )

    def rehearse(self, name: Any) -> None:
        """Computes one step for half a second of silence: settings of a stranger's checkpoint show only when used.

        Args:
            name: of the checkpoint, for the message.

        Raises:
            CheckpointError: if that is not possible.
        """
        with reading(name, "can't transcribe"), torch.inference_mode():
            silence = np.zeros(self.processor.sampling_rate // 2, np.float32)
            inputs = self.processor.apply_transcription_request(silence).to(self.model.device)
            self.model(**inputs, logits_to_keep=1)

    def transcribe(self, recordings: Any, sampling_rate: int | None = None, **prompt_options) -> Any:
        """Transcripts of recordings, in their order; of a single one, which is not in a list, its transcript alone.

        Args:
            recordings: one or an iterable of: path, URL, bytes of a file, open file, waveform, `(waveform, rate)`, row
                of `datasets`; see `audio.inputs.to_source`.
            sampling_rate: of waveforms that come without a rate, in Hz; default the processor's.
            **prompt_options: `language`, `itn`, `hotwords`, `prompt`, `context` of `chat.transcription_prompt`.

        Returns:
            A text, or a list of texts.

        Raises:
            AudioError: if one of them can't be used.
        """
        texts = [item.text for item in self.transcripts(recordings, sampling_rate, **prompt_options)]
        return texts[0] if as_list(recordings)[1] else texts

    def transcripts(self, recordings: Any, sampling_rate: int | None = None, **prompt_options) -> list[Transcript]:
        """As `transcribe`, with all that is known of each: the times and texts of its segments, and whether it looped.

        Returns:
            A list, of a single recording, too.

        Raises:
            AudioError: if one of them can't be used.
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
        """Decodes requests, sorted by length; each result tells its position.

        A request that fails, since its recording can't be read or is too long, gives a `Transcript` with an `error`.

        Args:
            lengths: what `measure` gave, if it is known already.
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
            for result in in_background(loaders, prepare, ((batch, _seconds(batch)) for batch in batches), room):
                if isinstance(result, Transcript):
                    yield result
                    continue
                failed, decodable, counts, inputs = result
                yield from failed
                for piece, segment in zip(decodable, self._decode(decodable, inputs, counts), strict=True):
                    if piece.waveform is None:
                        seconds[piece.index] = piece.seconds  # a recording may have been replaced meanwhile
                    if piece.index not in found:  # another segment of the recording has failed
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
        """Audio seconds of each request, or why it can't be decoded.

        Where a recording's header says how long it is, nothing else is read; damage behind it is found on loading.
        """
        return self.meter(requests)

    def _batches(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Batches of pieces, the longest first: if memory does not suffice, that is known at once."""
        if not pieces:
            return []
        seconds = np.array([piece.seconds for piece in pieces])
        sampler = BudgetBatchSampler(seconds, max(self.batch_seconds, float(seconds.max())), shuffle=False)
        return [[pieces[position] for position in batch] for batch in sampler.batches(0)[::-1]]

    def _segmented(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], seconds: dict[int, float]
    ) -> Iterator[list[Piece] | Transcript]:
        """Batches of segments of an hour of recordings after the other; and what needs none, since nothing is said."""
        window: list[Piece] = []
        heard = 0.0
        todo = ((index, seconds[index]) for index in seconds)
        for result in in_background(pool, lambda index: self._segment(index, requests[index]), todo, LISTENED_SECONDS):
            if isinstance(result, Transcript):
                yield result if result.error else Transcript(result.index, seconds=seconds[result.index])
                continue
            window += result
            heard += seconds[result[0].index]
            if heard >= WINDOW_SECONDS:
                yield from self._batches(window)
                window, heard = [], 0.0
        yield from self._batches(window)

    def _segment(self, index: int, request: Request) -> list[Piece] | Transcript:
        """The pieces of a request; a result if it fails, or has none."""
        dialogue = request.dialogue
        try:
            waveforms = [load_audio(source, SAMPLE_RATE) for source in dialogue.recordings]
        except AudioError as error:
            return Transcript(index, error=str(error))
        if not self.meter.is_segmented(dialogue):
            return [Piece(index, 0.0, sum(map(len, waveforms)) / SAMPLE_RATE)]
        spans = self.vad.segments(waveforms[0])
        return [
            # Copied, so that the silence between them need not stay in memory.
            Piece(index, start / SAMPLE_RATE, end / SAMPLE_RATE, len(spans), waveforms[0][start:end].copy())
            for start, end in spans
        ] or Transcript(index)

    def _prepare(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], batch: list[Piece]
    ) -> tuple[list[Transcript], list[Piece], list[int], BatchFeature | None]:
        """What failed to load, the other pieces, how many recordings each has, and the model's inputs for these."""

        def load(piece: Piece) -> list[np.ndarray] | AudioError:
            if piece.waveform is not None:
                return [piece.waveform]
            try:
                recordings = requests[piece.index].dialogue.recordings
                # As for `measure`: a recording may have been replaced by a longer one, or not be what its header says.
                limit = self.meter.max_seconds + self.processor.frame_seconds
                return [load_audio(source, self.processor.sampling_rate, limit) for source in recordings]
            except AudioError as error:
                return error

        failed, decodable, counts, dialogues, waveforms = [], [], [], [], []
        for piece, loaded in zip(batch, pool.map(load, batch), strict=True):
            if isinstance(loaded, AudioError):
                failed.append(Transcript(piece.index, error=str(loaded)))
                continue
            if piece.waveform is None:  # as long as it is now, not as it was when it was measured
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
        """The segment that each piece is, with its text, or `None` as of `generate`; `counts`: recordings of each."""
        texts = self._generate(inputs, counts) if pieces else []
        for piece, text in zip(pieces, texts, strict=True):
            if text is None:
                yield None
                continue
            text, looped = cut_loop(text) if self.repetition_guard else (text, False)
            yield Segment(piece.start, piece.end, text, looped)

    def _generate(self, inputs: BatchFeature, counts: Sequence[int]) -> list[str | None]:
        """As `generate`; a batch that does not fit into memory is decoded in halves."""
        try:
            return self.generate(inputs)
        except torch.OutOfMemoryError:
            if len(counts) == 1:
                raise
        logger.warning("%d rows don't fit into memory and are decoded in halves; lower --batch_seconds", len(counts))
        torch.cuda.empty_cache()
        middle = len(counts) // 2
        recordings = sum(counts[:middle])
        texts: list[str | None] = []
        for rows, places in (slice(middle), slice(recordings)), (slice(middle, None), slice(recordings, None)):
            part = {name: value[rows if name in TOKEN_INPUTS else places] for name, value in inputs.items()}
            texts += self._generate(BatchFeature(part), counts[rows])
        return texts

    @torch.inference_mode()
    def generate(self, inputs) -> list[str | None]:
        """Texts for a batch of the processor; loops are stopped if they are guarded against, but not yet cut.

        Returns:
            The text of each row; `None` if its logits were not finite in a step on which the text depends.
        """
        inputs = inputs.to(self.model.device)
        rows, prompt_tokens = inputs["input_ids"].shape
        options = {}
        if self.repetition_guard:
            options["stopping_criteria"] = [LoopStop(self.processor.tokenizer, prompt_tokens)]
        if self.steps is not None:
            options[CACHE] = self.steps.new_cache()
        attention = without_cudnn_attention() if self.fast else nullcontext()
        search = transcribing(self.model, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        with self.steps or nullcontext(), attention, search as config, LogitsWatch(self.model) as watch:
            output = self.model.generate(**inputs, generation_config=config, **options)
        tokens = output[:, prompt_tokens:]
        finite = watch.finite(rows, tokens if self.num_beams == 1 else None)
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [chat.clean_answer(text) if ok else None for text, ok in zip(texts, finite, strict=True)]


def _seconds(batch: list[Piece] | Transcript) -> float:
    return 0.0 if isinstance(batch, Transcript) else sum(piece.seconds for piece in batch)
