"""Augmentation of waveforms: speed, rooms, noise, gain, telephone band, codecs.

A transform is called with a waveform, float32, shape = (samples,), and a random generator. It returns a new waveform
and does not change its argument. All randomness comes from the generator. To add a transform, write a class here, add
its options to `data.augmentation_options`, and its construction to `data.augmentation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .codecs import fit_length, round_trip
from .noise import RecordingFolder, SimulatedRooms
from .resampling import resample

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Noise = Callable[[int, np.random.Generator], np.ndarray | None]

TELEPHONE_RATE = 8000  # Hz
TELEPHONE_BAND = 300.0, 3400.0  # Hz; limits of a telephone line


@dataclass(frozen=True)
class WaveformAugmentation:
    """Applies transforms in order, each with a probability.

    Args:
        steps: probabilities and transforms.
    """

    steps: Sequence[tuple[float, Transform]]

    @property
    def noises(self) -> list[Noise]:
        """All sources of noise."""
        return [noise for _, step in self.steps if isinstance(step, AddNoise) for noise in step.sources]

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the transformed waveform; after each transform, a peak above 1 is scaled to 1 instead of clipped."""
        for probability, transform in self.steps:
            if rng.random() < probability:
                waveform = transform(waveform, rng)
                waveform = waveform / max(1.0, float(np.abs(waveform).max()))
        return waveform


@dataclass(frozen=True)
class ChangeSpeed:
    """Changes speed and pitch by resampling, as Kaldi's speed perturbation.

    Args:
        factors: speeds to choose from; 1.1: 10 % faster.
        sampling_rate: rate of the waveform in Hz.
        max_samples: maximum length of the result; a recording that would become longer is unchanged.
    """

    factors: Sequence[float]
    sampling_rate: int
    max_samples: float = np.inf

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the waveform at a random speed, shape = (samples / factor,)."""
        factor = float(rng.choice(self.factors))
        if len(waveform) / factor > self.max_samples - 1:
            return waveform
        return resample(waveform, round(factor * self.sampling_rate), self.sampling_rate)


@dataclass(frozen=True)
class AddReverb:
    """Convolves with a room impulse response. The direct sound keeps its time, the recording its length and power.

    Args:
        sources: sources of impulse responses, chosen with equal probability.
    """

    sources: Sequence[RecordingFolder | SimulatedRooms]

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the reverberant waveform, shape = (samples,)."""
        from torchaudio.functional import fftconvolve

        response = self.sources[int(rng.integers(len(self.sources)))].random_recording(rng)
        direct = int(np.abs(response).argmax())
        wet = fftconvolve(torch.from_numpy(waveform), torch.from_numpy(np.ascontiguousarray(response))).numpy()
        wet = wet[direct : direct + len(waveform)]
        energy = float(np.square(wet).sum())
        if not energy:
            return waveform
        return wet * np.float32(np.sqrt(float(np.square(waveform).sum()) / energy))


@dataclass(frozen=True)
class AddNoise:
    """Adds noise at a random signal-to-noise ratio (SNR).

    Args:
        sources: sources of noise, chosen with equal probability; see `audio.noise`.
        snr_db: smallest and largest ratio of the mean powers of the whole recording and of the noise, in dB.
    """

    sources: Sequence[Noise]
    snr_db: tuple[float, float]

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the noisy waveform; a waveform without sound stays unchanged."""
        from torchaudio.functional import add_noise

        snr = torch.tensor(rng.uniform(*self.snr_db), dtype=torch.float32)
        noise = self.sources[int(rng.integers(len(self.sources)))](len(waveform), rng)
        if noise is None or not noise.any() or not waveform.any():
            return waveform
        return add_noise(torch.from_numpy(waveform), torch.from_numpy(np.ascontiguousarray(noise)), snr).numpy()


@dataclass(frozen=True)
class ChangeGain:
    """Changes the level.

    Args:
        decibels: smallest and largest change in dB.
    """

    decibels: tuple[float, float]

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the waveform at another level."""
        return waveform * np.float32(10 ** (rng.uniform(*self.decibels) / 20))


@dataclass(frozen=True)
class LimitToTelephoneBand:
    """Limits a recording to 300 to 3,400 Hz and codes the samples by G.711, mu-law or A-law.

    Args:
        sampling_rate: rate of the waveform in Hz.
    """

    sampling_rate: int

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the narrow-band waveform, shape = (samples,), at the original rate."""
        from torchaudio.functional import highpass_biquad, lowpass_biquad

        narrow = torch.from_numpy(resample(waveform, self.sampling_rate, TELEPHONE_RATE))
        narrow = highpass_biquad(narrow, TELEPHONE_RATE, TELEPHONE_BAND[0])
        narrow = lowpass_biquad(narrow, TELEPHONE_RATE, TELEPHONE_BAND[1])
        encoder = ("pcm_mulaw", "pcm_alaw")[int(rng.integers(2))]
        coded = round_trip(narrow.numpy(), TELEPHONE_RATE, encoder)
        return fit_length(resample(coded, TELEPHONE_RATE, self.sampling_rate), len(waveform))


@dataclass(frozen=True)
class CompressWithCodec:
    """Encodes and decodes a recording with Opus or MP3.

    Args:
        kbps: smallest and largest bit rate in kbit/s.
        sampling_rate: rate of the waveform in Hz.
    """

    kbps: tuple[float, float]
    sampling_rate: int

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the decoded waveform, shape = (samples,), without a delay."""
        encoder = ("libopus", "libmp3lame")[int(rng.integers(2))]
        return round_trip(waveform, self.sampling_rate, encoder, rng.uniform(*self.kbps))
