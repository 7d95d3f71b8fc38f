"""Batches of requests by audio seconds: threads load, segment and prepare the next ones while the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import BatchFeature

from ..audio.vad import VoiceDetector
from ..audio.waveform import SAMPLE_RATE, AudioError, load_audio
from ..data.sampler import BudgetBatchSampler
from ..model.processing import SpeechLLMProcessor
from .measuring import RequestMeter
from .pieces import Piece, Transcript
from .prefetch import prefetch
from .requests import Request

SMALLEST_BATCH, LARGEST_BATCH, SECONDS_PER_GB = 240.0, 8192.0, 200.0  # audio seconds, see `default_batch_seconds`
PREFETCHED_BATCHES = 2  # number of batches that are prepared in advance, at least
PREFETCHED_SECONDS = 3600.0  # audio that is prepared in advance, at least; 230 MB, and 460 MB as features
WINDOW_SECONDS = 3600.0  # duration of the recordings whose segments are sorted together
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


@dataclass(frozen=True)
class Batch:
    """Pieces that are decoded together.

    Args:
        pieces: loaded pieces, one for each row of the inputs.
        counts: number of recordings of each piece.
        inputs: of the model, padded; `None` without pieces.
        failed: transcripts of requests with unusable recordings, which have no piece here.
    """

    pieces: list[Piece]
    counts: list[int]
    inputs: BatchFeature | None
    failed: list[Transcript]


class BatchLoader:
    """Loads requests as batches of model inputs.

    Args:
        processor: of the model.
        meter: measures the requests.
        batch_seconds: padded audio seconds per batch.
        device: of the features.
        num_workers: number of threads.
        vad: splits recordings into segments; `None`: whole recordings.
        fixed_seconds: seconds that the encoder computes at least for every recording.
    """

    def __init__(
        self,
        processor: SpeechLLMProcessor,
        meter: RequestMeter,
        batch_seconds: float,
        device: torch.device,
        num_workers: int,
        vad: VoiceDetector | None = None,
        fixed_seconds: float = 0.0,
    ):
        self.processor = processor
        self.meter = meter
        self.batch_seconds = batch_seconds
        self.device = device
        self.num_workers = num_workers
        self.vad = vad
        self.fixed_seconds = fixed_seconds

    def __call__(self, requests: Sequence[Request], seconds: dict[int, float]) -> Iterator[Batch | Transcript]:
        """Yields batches, and transcripts of recordings without speech or with an error.

        Args:
            requests: all requests.
            seconds: duration of each usable request, by index.
        """
        with ThreadPoolExecutor(self.num_workers) as listeners, ThreadPoolExecutor(self.num_workers) as loaders:
            if self.vad is None:
                pieces = [Piece(index, 0.0, length) for index, length in seconds.items()]
                batches: Iterable[list[Piece] | Transcript] = self._batches(pieces)
            else:
                batches = self._segmented(listeners, requests, seconds)

            def prepare(batch):
                return batch if isinstance(batch, Transcript) else self._prepare(listeners, requests, batch)

            room = max(PREFETCHED_SECONDS, PREFETCHED_BATCHES * self.batch_seconds)
            yield from prefetch(loaders, prepare, ((batch, _seconds(batch)) for batch in batches), room)

    def _batches(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Returns batches of pieces, the longest first, so that insufficient memory shows immediately."""
        if not pieces:
            return []
        pieces = sorted(pieces, key=lambda piece: piece.seconds)  # also those that cost the same
        seconds = np.array([max(self.fixed_seconds, piece.seconds) for piece in pieces])
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

    def _prepare(self, pool: ThreadPoolExecutor, requests: Sequence[Request], batch: list[Piece]) -> Batch:
        """Loads the recordings of a batch, and computes the inputs of the model."""

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
            inputs = self.processor.batch(dialogues, waveforms, return_labels=False, device=self.device)
        return Batch(decodable, counts, inputs, failed)


def _seconds(batch: list[Piece] | Transcript) -> float:
    return 0.0 if isinstance(batch, Transcript) else sum(piece.seconds for piece in batch)
