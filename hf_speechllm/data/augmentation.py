"""Augmentation of features, and the augmentation that options select."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..audio.augmentation import (
    AddNoise,
    AddReverb,
    ChangeGain,
    ChangeSpeed,
    CompressWithCodec,
    LimitToTelephoneBand,
    Transform,
    WaveformAugmentation,
)
from ..audio.noise import Babble, RecordingFolder, SimulatedRooms, pink_noise, white_noise
from .augmentation_options import BABBLE, ROOMS, AugmentationOptions


@dataclass(frozen=True)
class TempoPerturb:
    """Changes the speed of speech at constant pitch by stretching features in time.

    Works on features, so it is cheap and supports cached features. The original, the tempo perturbation of Ko et al.
    2015 ("Audio augmentation for speech recognition"), works on waveforms.

    Args:
        spread: durations are multiplied by a uniform random number from 1 - spread to 1 + spread.
    """

    spread: float

    def __call__(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Stretches features, shape = (frames, mel bins), by linear interpolation between frames."""
        frames = max(1, round(len(features) * rng.uniform(1 - self.spread, 1 + self.spread)))
        return functional.interpolate(features.T.unsqueeze(0), size=frames, mode="linear")[0].T


@dataclass(frozen=True)
class SpecAugment:
    """Applies SpecAugment (Park et al. 2019): time and frequency masking, without time warping.

    Args:
        num_frequency_masks: number of frequency masks.
        frequency_width: maximum width of a frequency mask, in mel bins.
        num_time_masks: number of time masks.
        time_width: maximum length of a time mask, in 10 ms frames.
        time_fraction: maximum length of a time mask, as a share of the recording.
    """

    num_frequency_masks: int = 2
    frequency_width: int = 20
    num_time_masks: int = 2
    time_width: int = 30
    time_fraction: float = 0.1

    def __call__(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Returns a copy of features, shape = (frames, mel bins), masked with their mean."""
        features = features.clone()
        frames, bins = features.shape
        fill = features.mean()
        for _ in range(self.num_frequency_masks):
            width = int(rng.integers(0, min(self.frequency_width, bins) + 1))
            start = int(rng.integers(0, bins - width + 1))
            features[:, start : start + width] = fill
        for _ in range(self.num_time_masks):
            width = int(rng.integers(0, min(self.time_width, int(frames * self.time_fraction)) + 1))
            start = int(rng.integers(0, frames - width + 1))
            features[start : start + width] = fill
        return features


def augmentations(tempo_perturb: float = 0.0, spec_augment: bool = False) -> list[TempoPerturb | SpecAugment]:
    """Returns the augmentations that the options select, in order of application."""
    return [
        *([TempoPerturb(tempo_perturb)] if tempo_perturb else []),
        *([SpecAugment()] if spec_augment else []),
    ]


def waveform_augmentation(
    options: AugmentationOptions, sampling_rate: int, max_samples: float = np.inf
) -> WaveformAugmentation | None:
    """Builds the transforms of waveforms that the options select; `None` without such options.

    Args:
        options: see `AugmentationOptions`.
        sampling_rate: rate of the waveforms in Hz.
        max_samples: length up to which a slower speed may lengthen a recording.

    Raises:
        ValueError: if a folder is missing or contains no readable recordings, or pyroomacoustics is missing.
    """
    builders: dict[str, Callable[[], Transform]] = {
        "speed_prob": lambda: ChangeSpeed(options.speed_factors, sampling_rate, max_samples),
        "reverb_prob": lambda: AddReverb(
            [_reverb_source(name, options, sampling_rate) for name in options.reverb_source]
        ),
        "noise_prob": lambda: AddNoise(
            [_noise_source(name, sampling_rate) for name in options.noise_source], _pair(options.noise_snr)
        ),
        "gain_prob": lambda: ChangeGain(_pair(options.gain_db)),
        "telephone_prob": lambda: LimitToTelephoneBand(sampling_rate),
        "codec_prob": lambda: CompressWithCodec(_pair(options.codec_kbps), sampling_rate),
    }
    steps = [(getattr(options, name), build()) for name, build in builders.items() if getattr(options, name)]
    return WaveformAugmentation(steps) if steps else None


def _reverb_source(name: str, options: AugmentationOptions, sampling_rate: int) -> RecordingFolder | SimulatedRooms:
    if name != ROOMS:
        return _folder(name, "reverb_source", sampling_rate)
    if importlib.util.find_spec("pyroomacoustics") is None:
        raise ValueError(
            "--reverb_source simulated needs the package pyroomacoustics; pip install 'hf_speechllm[augment]', or "
            "name a folder of impulse responses"
        )
    return SimulatedRooms(_pair(options.reverb_seconds), sampling_rate)


def _noise_source(name: str, sampling_rate: int) -> Any:
    if name == BABBLE:
        return Babble(sampling_rate)
    generated = {"white": white_noise, "pink": pink_noise}
    return generated[name] if name in generated else _folder(name, "noise_source", sampling_rate)


def _folder(name: str, option: str, sampling_rate: int) -> RecordingFolder:
    try:
        return RecordingFolder(name, sampling_rate)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from error


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]
