"""Augmentation of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional


@dataclass(frozen=True)
class TempoPerturb:
    """Speaks faster or slower at the same pitch: features are stretched in time.

    On features rather than waveforms, so that it works on cached ones and costs next to nothing; its model is the
    tempo perturbation of Ko et al. 2015 ("Audio augmentation for speech recognition"), which uses waveforms.

    Args:
        spread: durations are multiplied by a number drawn evenly from 1 - spread to 1 + spread.
    """

    spread: float

    def __call__(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Stretches features, shape = (frames, mel bins), by linear interpolation between frames."""
        frames = max(1, round(len(features) * rng.uniform(1 - self.spread, 1 + self.spread)))
        return functional.interpolate(features.T.unsqueeze(0), size=frames, mode="linear")[0].T


@dataclass(frozen=True)
class SpecAugment:
    """Masks stripes of the spectrogram: time and frequency masking of Park et al. 2019, without time warping.

    Args:
        num_frequency_masks: number of stripes across frequency.
        frequency_width: the widest, in mel bins.
        num_time_masks: number of stripes across time.
        time_width: the longest, in 10 ms frames.
        time_fraction: the longest as a share of the recording.
    """

    num_frequency_masks: int = 2
    frequency_width: int = 20
    num_time_masks: int = 2
    time_width: int = 30
    time_fraction: float = 0.1

    def __call__(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Masks features, shape = (frames, mel bins), with their mean; the input is left as it is."""
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
    """What the options of training ask for, in the order in which it is applied."""
    return [
        *([TempoPerturb(tempo_perturb)] if tempo_perturb else []),
        *([SpecAugment()] if spec_augment else []),
    ]
