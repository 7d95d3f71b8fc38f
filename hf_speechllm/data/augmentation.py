"""Augmentation of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional


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
