"""Alignment of given transcripts: word times without decoding, for recordings of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..audio.waveform import AudioError, load_audio
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor, pad_features
from .ctc_reader import CTCReader
from .pieces import Transcript
from .segments import Segment

WINDOW_SECONDS = 30.0  # a longer recording is encoded in windows, whose margins are not used
MARGIN_SECONDS = 3.0


class Aligner:
    """Aligns transcripts with the CTC head of a model.

    Args:
        model: on the target device, with a CTC head.
        processor: of the model.
        batch_seconds: audio seconds per batch of windows.

    Raises:
        ValueError: if the model has no CTC head, or the head's vocabulary is unusable.
    """

    def __init__(
        self, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, batch_seconds: float = 240.0
    ):
        self.reader = CTCReader(model, processor)
        self.model = model.eval()
        self.processor = processor
        self.batch_seconds = batch_seconds
        longest = model.config.max_feature_frames * processor.frame_seconds
        self.window = min(WINDOW_SECONDS, longest)

    def __call__(self, items: Iterable[tuple[object, str]]) -> Iterator[Transcript]:
        """Aligns recordings in order; a transcript of an unreadable recording has an `error`.

        Args:
            items: recording, as for `load_audio`, and its transcript.
        """
        for index, (source, text) in enumerate(items):
            try:
                waveform = load_audio(source, self.processor.sampling_rate)
            except AudioError as error:
                yield Transcript(index, error=str(error))
                continue
            seconds = len(waveform) / self.processor.sampling_rate
            words = self.reader.words(self.log_probabilities(waveform), text, 0.0)
            yield Transcript(index, text, seconds, segments=(Segment(0.0, seconds, text, words=words),))

    @torch.inference_mode()
    def log_probabilities(self, waveform: np.ndarray) -> torch.Tensor:
        """Returns the log-probabilities of the CTC head, shape = (frames, vocabulary).

        Args:
            waveform: shape = (samples,), of any length, at the processor's rate.
        """
        rate, frame = self.processor.sampling_rate, self.reader.frame_seconds
        if len(waveform) <= self.window * rate:
            return self._encode([waveform])[0]
        margin = round(MARGIN_SECONDS / frame)
        hop = int(self.window / frame) - 2 * margin
        total = -(-len(waveform) // round(frame * rate))
        starts = list(range(0, max(1, total - 2 * margin), hop))
        pieces = [waveform[round(at * frame * rate) :][: round(self.window * rate)] for at in starts]
        size = max(1, int(self.batch_seconds / self.window))
        encoded = [item for at in range(0, len(pieces), size) for item in self._encode(pieces[at : at + size])]
        kept = [
            item[margin if number else 0 : None if number + 1 == len(encoded) else hop + margin]
            for number, item in enumerate(encoded)
        ]
        return torch.cat(kept)

    def _encode(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        features = pad_features(self.processor.extract_features(waveforms, self.model.device))
        states, mask = self.model.encode_audio(**{key: value.to(self.model.device) for key, value in features.items()})
        log_probabilities, lengths = self.model.ctc_head(states, mask)
        return [item[:length] for item, length in zip(log_probabilities, lengths.tolist(), strict=True)]
