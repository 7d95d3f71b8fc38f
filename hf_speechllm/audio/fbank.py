"""Fbank features: Kaldi filterbanks and low-frame-rate stacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BatchFeature, SequenceFeatureExtractor

from .decoders import MAX_RATE, MIN_RATE

FRAMES_AT_ONCE = 200_000  # frames per chunk on a GPU: 33 minutes, 1.3 GB of temporary memory
FBANK_FRAMES_AT_ONCE = 30_000  # frames per chunk on a CPU: 5 minutes, 0.3 GB of temporary memory
FRAME_SHIFT = 0.01  # seconds between two frames before stacking, in every supported front end


# Minimum and maximum of each option. The options come from a checkpoint, which may be untrusted.
LIMITS = {
    "feature_size": (1, 1000), "sampling_rate": (MIN_RATE, MAX_RATE), "frame_length": (1, 1000),
    "frame_shift": (1, 1000), "num_frames_lfr": (1, 100), "stride_lfr": (1, 100), "waveform_scale": (1e-9, 1e9),
    "dither": (0.0, 1e9), "padding_value": (-1e9, 1e9),
}  # fmt: skip
WINDOWS = ("hamming", "hanning", "povey", "rectangular", "blackman")


class FbankFeatureExtractor(SequenceFeatureExtractor):
    """Computes Kaldi's log-mel filterbanks and stacks them to a low frame rate, as FunASR's `WavFrontend`.

    Args:
        feature_size: number of mel bins.
        sampling_rate: rate of the waveforms in Hz.
        frame_length: length of a frame in ms.
        frame_shift: time between two frames in ms.
        window_type: `"hamming"`, `"hanning"`, `"povey"`, ... as in Kaldi.
        num_frames_lfr: frames stacked into one encoder frame (`lfr_m`).
        stride_lfr: frames between two encoder frames (`lfr_n`); 6 x 10 ms = 60 ms.
        waveform_scale: factor for waveforms in [-1, 1]; 2^15 gives the log floor of 16-bit samples.
        dither: standard deviation of the noise added to the scaled waveform. The original always adds 1.0, which makes
            decoding random; the default here is no dither.

    Raises:
        ValueError: if an option has a wrong type or an impossible value.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        frame_length: int = 25,
        frame_shift: int = 10,
        window_type: str = "hamming",
        num_frames_lfr: int = 7,
        stride_lfr: int = 6,
        waveform_scale: float = 32768.0,
        dither: float = 0.0,
        padding_value: float = 0.0,
        **kwargs,
    ):
        _check(locals())
        kwargs["return_attention_mask"] = True
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.frame_length = frame_length
        self.frame_shift = frame_shift
        self.window_type = window_type
        self.num_frames_lfr = num_frames_lfr
        self.stride_lfr = stride_lfr
        self.waveform_scale = waveform_scale
        self.dither = dither

    def fbank(self, waveform: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Computes filterbanks before stacking.

        Args:
            waveform: shape = (samples,), in [-1, 1], at `sampling_rate`.

        Returns:
            shape = (frames, feature_size), float32; one frame every `frame_shift` ms. A recording shorter than
            `frame_length` has one frame of the recording's length, as in the original.

        Raises:
            ValueError: if the waveform has less than two samples.
        """
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.shape[-1] < 2:
            raise ValueError(f"the waveform has {waveform.shape[-1]} samples; filterbanks need at least 2")
        length, shift = (self.sampling_rate * ms // 1000 for ms in (self.frame_length, self.frame_shift))
        step = FBANK_FRAMES_AT_ONCE * shift
        if self.dither or waveform.shape[-1] < step + length:
            return self._fbank(waveform)
        # Chunks overlap, so every frame is complete in one chunk.
        starts = range(0, waveform.shape[-1] - length + 1, step)
        return torch.cat([self._fbank(waveform[start : start + step + length - shift]) for start in starts])

    def _fbank(self, waveform: torch.Tensor) -> torch.Tensor:
        from torchaudio.compliance import kaldi  # slow to import, and not needed to load a model

        waveform = waveform * self.waveform_scale
        duration_ms = waveform.shape[-1] * 1000 / self.sampling_rate
        return kaldi.fbank(
            waveform.unsqueeze(0),
            num_mel_bins=self.feature_size,
            frame_length=min(self.frame_length, duration_ms),
            frame_shift=self.frame_shift,
            dither=self.dither,
            energy_floor=0.0,
            window_type=self.window_type,
            sample_frequency=self.sampling_rate,
            snip_edges=True,
        )

    def stack(self, fbank: torch.Tensor) -> torch.Tensor:
        """Stacks neighbouring frames, as `apply_lfr` in FunASR's `wav_frontend.py`.

        Args:
            fbank: shape = (frames, feature_size).

        Returns:
            shape = (ceil(frames / stride_lfr), feature_size * num_frames_lfr). Stacks that exceed the recording repeat
            the first or last frame.
        """
        frames = fbank.shape[0]
        stacks = -(-frames // self.stride_lfr)
        left = (self.num_frames_lfr - 1) // 2
        index = torch.arange(stacks).unsqueeze(1) * self.stride_lfr + torch.arange(self.num_frames_lfr) - left
        return fbank[index.clamp(0, frames - 1)].reshape(stacks, -1)

    def extract(
        self, waveforms: Sequence[np.ndarray | torch.Tensor], device: torch.device | str
    ) -> list[torch.Tensor]:
        """Computes stacked features of several recordings at once, on a GPU.

        Performs the steps of `fbank` and `stack` on the frames of all recordings, without padding. With dither or very
        short recordings, computes on the CPU, one recording after the other.

        Args:
            waveforms: each of shape = (samples,), in [-1, 1], at `sampling_rate`.
            device: device of the computation and of the results.

        Returns:
            For each recording, shape = (ceil(frames / stride_lfr), feature_size * num_frames_lfr), float32.
        """
        length, shift = (self.sampling_rate * ms // 1000 for ms in (self.frame_length, self.frame_shift))
        if self.dither or any(len(waveform) < length for waveform in waveforms):
            return [self.stack(self.fbank(waveform)).to(device) for waveform in waveforms]
        on_gpu = torch.device(device).type == "cuda"
        sizes = torch.tensor([len(waveform) for waveform in waveforms])
        frames = (sizes - length) // shift + 1
        stacks = (frames + self.stride_lfr - 1) // self.stride_lfr
        # One copy into pinned memory, from which the GPU reads directly.
        samples = torch.empty(int(sizes.sum()), pin_memory=on_gpu)
        torch.cat([torch.as_tensor(waveform, dtype=torch.float32) for waveform in waveforms], out=samples)
        samples = samples.to(device, non_blocking=True)
        num_frames, num_stacks, lengths = int(frames.sum()), int(stacks.sum()), stacks.tolist()
        table = torch.stack([sizes, frames, stacks])
        sizes, frames, stacks = (table.pin_memory() if on_gpu else table).to(device, non_blocking=True)
        # First sample of each frame; then the frame indices of each stack.
        starts = (_offsets(sizes) - _offsets(frames) * shift).repeat_interleave(frames, output_size=num_frames)
        starts = starts + torch.arange(num_frames, device=device) * shift
        rows = torch.arange(len(lengths), device=device).repeat_interleave(stacks, output_size=num_stacks)
        middle = (torch.arange(num_stacks, device=device) - _offsets(stacks)[rows]) * self.stride_lfr
        index = middle.unsqueeze(1) + torch.arange(self.num_frames_lfr, device=device)
        index = (index - (self.num_frames_lfr - 1) // 2).clamp(min=0).minimum((frames[rows] - 1).unsqueeze(1))
        index = index + _offsets(frames)[rows].unsqueeze(1)
        window, filterbank = _tables(
            self.window_type, self.sampling_rate, length, self.feature_size, self.waveform_scale, str(device)
        )
        chunks = [  # bounds temporary memory, whatever the size of the batch
            _log_mel(samples[chunk.unsqueeze(1) + torch.arange(length, device=device)], window, filterbank)
            for chunk in starts.split(FRAMES_AT_ONCE)
        ]
        return list(torch.cat(chunks)[index].flatten(1).split(lengths))

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **kwargs,
    ) -> BatchFeature:
        """Computes features of one or several recordings, padded to the longest recording.

        Args:
            raw_speech: waveform, shape = (samples,), in [-1, 1], or a list of waveforms.
            sampling_rate: rate of the waveforms in Hz.

        Returns:
            `input_features`, shape = (recordings, frames, feature_size * num_frames_lfr), and `input_features_mask`.

        Raises:
            ValueError: if `sampling_rate` is not the extractor's rate.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the audio has {sampling_rate} Hz, the feature extractor needs {self.sampling_rate} Hz; "
                "resample the audio"
            )
        single = isinstance(raw_speech, (np.ndarray, torch.Tensor)) and raw_speech.ndim == 1
        waveforms: list = [raw_speech] if single or np.isscalar(raw_speech[0]) else list(raw_speech)
        features = [self.stack(self.fbank(waveform)).numpy() for waveform in waveforms]
        batch = self.pad(
            BatchFeature({"input_features": features}), padding=padding, return_tensors=return_tensors, **kwargs
        )
        batch["input_features_mask"] = batch.pop("attention_mask")
        return batch


# The fingerprint of cached features includes this module path; an unchanged path keeps caches of release 0.1 valid.
FbankFeatureExtractor.__module__ = "hf_speechllm.features"


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return sizes.cumsum(0) - sizes


@lru_cache(maxsize=8)
def _tables(
    window_type: str, sampling_rate: int, length: int, num_mel_bins: int, scale: float, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the window times `scale`, and the mel filters, shape = (spectrum bins, mel bins), on a device."""
    from torchaudio.compliance import kaldi  # slow to import, and not needed to load a model

    padded = 1 << (length - 1).bit_length()
    banks, _ = kaldi.get_mel_banks(num_mel_bins, padded, float(sampling_rate), 20.0, 0.0, 100.0, -500.0, 1.0)
    filterbank = functional.pad(banks, (0, 1)).T  # zero weight for the highest bin
    return (_window(window_type, length) * scale).to(device), filterbank.to(device)


def _window(name: str, length: int) -> torch.Tensor:
    """Returns one of Kaldi's window functions (feat/feature-window.cc), symmetric."""
    if name == "hamming":
        return torch.hamming_window(length, periodic=False)
    if name == "rectangular":
        return torch.ones(length)
    hanning = torch.hann_window(length, periodic=False)
    if name == "hanning":
        return hanning
    if name == "povey":
        return hanning.pow(0.85)
    raise ValueError(f"window_type is {name!r}; a GPU supports only hamming, hanning, povey and rectangular")


def _log_mel(frames: torch.Tensor, window: torch.Tensor, filterbank: torch.Tensor) -> torch.Tensor:
    """Applies Kaldi's steps (feat/feature-fbank.cc): offset, pre-emphasis, window, power spectrum, mel, log."""
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    spectrum = torch.fft.rfft(frames * window, n=2 * (len(filterbank) - 1))
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ filterbank).clamp(min=torch.finfo(torch.float32).eps).log()


def _check(options: Mapping[str, Any]) -> None:
    for name, (least, most) in LIMITS.items():
        value, kinds = options[name], (int, float) if isinstance(least, float) else (int,)
        if type(value) not in kinds or not least <= value <= most:
            raise ValueError(f"{name} is {str(value)[:50]!r}; it must be a number from {least:g} to {most:g}")
    if options["window_type"] not in WINDOWS:
        raise ValueError(f"window_type is {str(options['window_type'])[:50]!r}; choose one of {', '.join(WINDOWS)}")
