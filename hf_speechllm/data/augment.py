"""Augmentation of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


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
