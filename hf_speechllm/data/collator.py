"""Collator: converts rows to padded batches."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..audio.augmentation import WaveformAugmentation
from ..audio.decoders import TooLongError
from ..audio.fbank import FRAME_SHIFT, FbankFeatureExtractor
from ..audio.front_ends import (
    cacheable_features,
    encoder_input,
    num_encoder_input_frames,
    pad_features,
    reads_waveforms,
    stored_width,
)
from ..audio.noise import Babble
from ..audio.waveform import MAX_SECONDS, AudioError, load_audio
from ..model import chat
from ..model.ctc import pad_ctc_targets
from ..model.ctc_vocabulary import CTCVocabulary
from ..model.loss import label_positions
from ..model.native_processing import NativeProcessor
from ..model.packing import Positions, non_padding_positions
from ..model.processing import SpeechLLMProcessor
from .augmentation import augmentations, waveform_augmentation
from .augmentation_options import AugmentationOptions
from .hotword_lists import HotwordSampler, answers_of
from .native_collator import training_batch
from .sampler import ROW_COST

ENCODED_COLUMNS = ("encoder_states", "audio_tokens")  # columns written by `data.encoder_cache`
# A recording may exceed the length in its row by this factor and one second, because tools count frames differently.
LENGTH_TOLERANCE = 1.1
_STREAM = 2  # spawn key of the random numbers for waveforms, independent of those for features and hotwords
Augmentation = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


@dataclass
class SpeechLLMCollator:
    """Builds the model's training inputs from rows; see `data.dataset`.

    Augmentation, dither and hotword sampling use random numbers from each row's `seed`, so they depend only on the
    seed of the run, the row and the epoch.

    Args:
        processor: processor of the model.
        augmentations: functions applied to the features, in order.
        dither: noise added to recordings without cached features; see `FbankFeatureExtractor`.
        hotwords: samples the hotwords of each row; with `None`, each row keeps its own hotwords.
        padding_free: whether to add the positions for padding-free computation.
        ctc_vocabulary: of the CTC head that is trained; adds its labels.
        waveform_augmentation: applied to the waveforms; needs rows without cached features.
        largest_stretch: factor by which `waveform_augmentation` lengthens a recording at most.
        row_cost: constant cost of a row, in seconds of audio; see `BudgetBatchSampler`.

    Raises:
        ValueError: if the feature extractor does not support dither or the augmentations.
    """

    processor: SpeechLLMProcessor
    augmentations: Sequence[Augmentation] = ()
    dither: float = 0.0
    hotwords: HotwordSampler | None = None
    padding_free: bool = False
    ctc_vocabulary: CTCVocabulary | None = None
    waveform_augmentation: WaveformAugmentation | None = None
    largest_stretch: float = 1.0
    row_cost: float = ROW_COST

    def __post_init__(self):
        extractor = self.processor.feature_extractor
        if self.dither and not isinstance(extractor, FbankFeatureExtractor):
            raise ValueError("--dither requires fbank features; this model uses another feature extractor")
        if self.augmentations and reads_waveforms(extractor):
            raise ValueError(
                "--spec_augment and --tempo_perturb change spectrograms, but the encoder of this model reads "
                "waveforms; leave the options out"
            )

    @classmethod
    def augmenting(
        cls,
        processor: SpeechLLMProcessor,
        options: AugmentationOptions,
        max_feature_frames: float = math.inf,
        fixed_seconds: float = 0.0,
    ) -> SpeechLLMCollator:
        """Builds a collator for training with the augmentation that the options select.

        Args:
            processor: processor of the model.
            options: see `AugmentationOptions`.
            max_feature_frames: maximum number of feature frames per recording, see
                `SpeechLLMConfig.max_feature_frames`; a slower speed does not exceed it.
            fixed_seconds: seconds that the encoder computes for every recording, see `SpeechLLMConfig.fixed_seconds`.

        Raises:
            ValueError: if a source of noise or reverberation is not available.
        """
        rate = processor.sampling_rate
        return cls(
            processor,
            augmentations(options.tempo_perturb, options.spec_augment),
            options.dither,
            waveform_augmentation=waveform_augmentation(
                options, rate, max_feature_frames / (1 + options.tempo_perturb) * processor.frame_seconds * rate
            ),
            largest_stretch=options.largest_stretch,
            row_cost=max(ROW_COST, fixed_seconds),
        )

    def row_cost_of(self, rows: Any) -> float:
        """Returns the constant cost of a row; the encoder does not compute rows with its states."""
        return self.row_cost if {*ENCODED_COLUMNS}.isdisjoint(rows.column_names) else ROW_COST

    def without_augmentation(self) -> SpeechLLMCollator:
        """Returns a copy for validation."""
        return replace(self, augmentations=(), dither=0.0, waveform_augmentation=None, largest_stretch=1.0)

    def use_training_rows(self, rows: Any) -> None:
        """Sets the rows whose speech becomes babble, and checks that these rows support the augmentation.

        Raises:
            ValueError: if waveforms are augmented, but the rows have cached features; or if babble has no rows.
        """
        if self.waveform_augmentation is None and not self.dither:
            return
        cached = {"features", *ENCODED_COLUMNS} & {*(getattr(rows, "column_names", None) or ())}
        if cached and not isinstance(self.processor, NativeProcessor):  # whose rows contain waveforms
            raise ValueError(
                "augmentation of waveforms would not change the cached features of the rows; prepare the rows with "
                "--feature_cache off, or prepare_dataset(..., feature_dtype='off')"
            )
        for source in self.waveform_augmentation.noises if self.waveform_augmentation is not None else ():
            if isinstance(source, Babble):
                if not hasattr(rows, "__len__"):
                    raise ValueError("--noise_source babble needs rows with random access; a stream has none")
                source.recordings, source.num_rows = RowRecordings(rows), len(rows)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads a batch.

        Returns:
            `input_ids`, `attention_mask`, `labels`, shape = (rows, tokens), padded on the right; `positions`, see
            `model.packing.Positions`; `input_features_mask`, and `input_features`, shape = (recordings, frames,
            feature size). With rows from `data.encoder_cache`, `encoder_states` or `audio_tokens` replace
            `input_features`. With `ctc_vocabulary`, also `model.ctc.CTC_INPUTS`.
        """
        if isinstance(self.processor, NativeProcessor):
            return training_batch(self.processor, rows, self.row_waveforms, self.padding_free)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        ctc_targets: list[list[int] | None] = []
        audio: list[torch.Tensor] = []
        num_frames: list[int] = []
        level = next((name for name in ENCODED_COLUMNS if rows[0].get(name) is not None), None)
        for row in rows:
            if level is None:
                inputs = self.row_inputs(row)
                lengths = [len(item) for item in inputs]
            else:
                inputs = [stored_states(item) for item in row[level]]
                lengths = [num_encoder_input_frames(self.processor.feature_extractor, n) for n in row["num_frames"]]
            hotwords = row["hotwords"] or ()
            if self.hotwords is not None:
                hotwords = self.hotwords(hotwords, answers_of(row["messages"]), row["seed"])
            dialogue = chat.parse_messages(json.loads(row["messages"]), hotwords)
            example = self.processor.tokenize(dialogue, lengths)
            columns["input_ids"].append(example.input_ids)
            supervised = row.get("supervised", True)
            columns["labels"].append(example.labels if supervised else [chat.IGNORE_INDEX] * len(example.labels))
            if self.ctc_vocabulary is not None:
                ctc_targets += self._ctc_targets(dialogue, supervised)
            audio.extend(inputs)
            num_frames.extend(lengths)
        batch = self.processor.pad_tokens(columns, "right")
        if self.ctc_vocabulary is not None:
            batch.update(pad_ctc_targets(ctc_targets))
        positions: Positions = {"labels": label_positions(batch["labels"])}
        if self.padding_free:
            positions["tokens"] = non_padding_positions(batch["attention_mask"])
        if level == "audio_tokens":
            frames = torch.tensor(num_frames)  # the mask only provides the lengths
            batch["input_features_mask"] = torch.arange(int(frames.max())) < frames.unsqueeze(-1)
            return {**batch, "positions": positions, "audio_tokens": torch.cat(audio)}
        padded = pad_features(audio)
        if level == "encoder_states":
            padded["encoder_states"] = padded.pop("input_features")
        if self.padding_free:
            positions["frames"] = non_padding_positions(padded["input_features_mask"])
        return {**batch, "positions": positions, **padded}

    def _ctc_targets(self, dialogue: chat.Dialogue, supervised: bool) -> list[list[int] | None]:
        """Returns the ids of each recording's transcript, without silence marks; `None` for rows that fill a batch."""
        heard = (turn for turn in dialogue.turns if any(isinstance(piece, chat.Recording) for piece in turn.pieces))
        return [
            self.ctc_vocabulary.encode(chat.clean_answer(turn.answer or "")) if supervised else None for turn in heard
        ]

    def row_inputs(self, row: dict[str, Any]) -> list[torch.Tensor]:
        """Returns encoder inputs of a row's recordings, each of shape = (frames, feature size)."""
        return [encoder_input(self.processor.feature_extractor, item) for item in self.row_features(row)]

    def row_features(self, row: dict[str, Any]) -> list[torch.Tensor]:
        """Returns features of a row's recordings, each of shape = (10 ms frames, mel bins), cached or computed."""
        if row.get("features") is not None:
            features = [
                stored_features(data, frames, stored_width(self.processor.feature_extractor))
                for data, frames in zip(row["features"], row["num_frames"], strict=True)
            ]
        else:
            extractor = self.processor.feature_extractor
            with torch.random.fork_rng(devices=[], enabled=self.dither > 0):
                if self.dither:
                    extractor = copy.copy(extractor)  # decoding and validation use the original, without dither
                    extractor.dither = self.dither
                    torch.manual_seed(int(np.random.default_rng(row["seed"]).integers(2**63)))
                features = [
                    torch.from_numpy(cacheable_features(extractor, waveform)) for waveform in self.row_waveforms(row)
                ]
        if self.augmentations:
            rng = np.random.default_rng(row["seed"])
            for augmentation in self.augmentations:
                features = [augmentation(item, rng) for item in features]
        return features

    def row_waveforms(self, row: dict[str, Any]) -> list[np.ndarray]:
        """Returns the waveforms of a row's recordings, each of shape = (samples,), with augmentation."""
        sources = row_sources(row)
        lengths = np.broadcast_to(row.get("num_frames", np.inf), len(sources))
        waveforms = [self._load(item, frames * FRAME_SHIFT) for item, frames in zip(sources, lengths, strict=True)]
        if self.waveform_augmentation is None:
            return waveforms
        rng = np.random.default_rng(np.random.SeedSequence(row["seed"], spawn_key=(_STREAM,)))
        return [self.waveform_augmentation(waveform, rng) for waveform in waveforms]

    def _load(self, source: Any, seconds: float) -> np.ndarray:
        """Loads a waveform. The length must agree with the row's length, for which the batch was built."""
        try:
            limit = min(MAX_SECONDS, LENGTH_TOLERANCE * seconds + 1.0)
            return load_audio(source, self.processor.sampling_rate, limit)
        except TooLongError as error:
            raise AudioError(f"{error}; the length in its row, or when it was measured, is {seconds:.1f} s") from error


def row_sources(row: Mapping[str, Any]) -> list[Any]:
    """Returns a row's recordings for `load_audio`: what the row contains, or paths and URLs."""
    if row.get("features") is not None:  # waveforms of `prepare_dataset`, for a native speech LLM
        return [np.frombuffer(data, np.float32) for data in row["features"]]
    contents = row.get("contents") or [None] * len(row["recordings"])
    return [name if content is None else content for name, content in zip(row["recordings"], contents, strict=True)]


@dataclass(frozen=True)
class RowRecordings:
    """Returns the recordings of a row by its index, for `audio.noise.Babble`."""

    rows: Any

    def __call__(self, index: int) -> list[Any]:
        """Returns the recordings for `load_audio`."""
        return row_sources(self.rows[index])


def stored_states(data: bytes) -> torch.Tensor:
    """Converts bytes of `data.encoder_cache` to a tensor, shape = (frames or tokens, width).

    Args:
        data: width and bytes per number, both as 32-bit integers, then the numbers as bfloat16 or float32.
    """
    width, size = np.frombuffer(data[:8], dtype=np.int32)
    dtype = {2: torch.bfloat16, 4: torch.float32}[int(size)]
    return torch.frombuffer(bytearray(data[8:]), dtype=dtype).view(-1, int(width))


def stored_features(data: bytes, frames: int, feature_size: int) -> torch.Tensor:
    """Converts cached features (float16 or float32, detected by size) to float32, shape = (frames, feature_size)."""
    dtype = {2: np.float16, 4: np.float32}[len(data) // (frames * feature_size)]
    return torch.from_numpy(np.frombuffer(data, dtype=dtype).astype(np.float32).reshape(frames, feature_size))
