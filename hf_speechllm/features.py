"""The front-end: Kaldi fbank and low-frame-rate stacking."""

from __future__ import annotations

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

FRAME_SHIFT = 0.01  # seconds between two frames before stacking, in every front-end supported


class FbankFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel filterbanks as Kaldi computes them, stacked to a low frame rate; FunASR's `WavFrontend`.

    Args:
        feature_size: number of mel bins.
        sampling_rate: in Hz.
        frame_length: in ms.
        frame_shift: in ms.
        window_type: `"hamming"`, `"hanning"`, `"povey"`, ... as in Kaldi.
        num_frames_lfr: frames stacked into one encoder frame (`lfr_m`).
        stride_lfr: frames between two encoder frames (`lfr_n`); 6 x 10 ms = 60 ms.
        waveform_scale: the waveform in [-1, 1] is multiplied by this; 2^15 makes the log floor that of 16-bit samples.
        dither: standard deviation of the noise added to the scaled waveform; the original adds 1.0 always, which makes
            decoding random, so the default is none.
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
        """Filterbanks before stacking: what is worth caching.

        Args:
            waveform: shape = (samples,), in [-1, 1], at `sampling_rate`.

        Returns:
            shape = (frames, feature_size), float32; one frame every `frame_shift` ms. A recording shorter than
            `frame_length` gives one frame of its own length, as in the original.
        """
        from torchaudio.compliance import kaldi  # heavy, and not needed to load a model

        waveform = torch.as_tensor(waveform, dtype=torch.float32) * self.waveform_scale
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
        """Stacks neighbouring frames: `apply_lfr` of FunASR's `wav_frontend.py`.

        Args:
            fbank: shape = (frames, feature_size).

        Returns:
            shape = (ceil(frames / stride_lfr), feature_size * num_frames_lfr); the first and last frame are repeated
            where a stack reaches over the ends.
        """
        frames = fbank.shape[0]
        stacks = -(-frames // self.stride_lfr)
        left = (self.num_frames_lfr - 1) // 2
        index = torch.arange(stacks).unsqueeze(1) * self.stride_lfr + torch.arange(self.num_frames_lfr) - left
        return fbank[index.clamp(0, frames - 1)].reshape(stacks, -1)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **kwargs,
    ) -> BatchFeature:
        """Features of one recording or several, padded to the longest.

        Args:
            raw_speech: waveform, shape = (samples,), in [-1, 1], or a list of such.
            sampling_rate: of the waveforms, in Hz.

        Returns:
            `input_features`, shape = (recordings, frames, feature_size * num_frames_lfr), and `input_features_mask`.

        Raises:
            ValueError: if the sampling rate is not the extractor's.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(f"got audio at {sampling_rate} Hz, need {self.sampling_rate} Hz: resample it first")
        single = isinstance(raw_speech, (np.ndarray, torch.Tensor)) and raw_speech.ndim == 1
        waveforms: list = [raw_speech] if single or np.isscalar(raw_speech[0]) else list(raw_speech)
        features = [self.stack(self.fbank(waveform)).numpy() for waveform in waveforms]
        batch = self.pad(
            BatchFeature({"input_features": features}), padding=padding, return_tensors=return_tensors, **kwargs
        )
        batch["input_features_mask"] = batch.pop("attention_mask")
        return batch


def cacheable_features(feature_extractor: SequenceFeatureExtractor, waveform: np.ndarray) -> np.ndarray:
    """What is stored of one recording: the fbank before stacking, or Whisper's log-mel without its padding.

    Args:
        feature_extractor: `FbankFeatureExtractor` or `WhisperFeatureExtractor`.
        waveform: shape = (samples,), in [-1, 1], at the extractor's rate.

    Returns:
        shape = (frames, mel bins), float32, one frame every 10 ms.
    """
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return feature_extractor.fbank(waveform).numpy()
    batch = feature_extractor(
        waveform, sampling_rate=feature_extractor.sampling_rate, return_attention_mask=True, return_tensors="np"
    )
    return batch["input_features"][0][:, batch["attention_mask"][0].astype(bool)].T


def encoder_input(feature_extractor: SequenceFeatureExtractor, features: torch.Tensor) -> torch.Tensor:
    """Turns stored features into the encoder's input frames, shape = (frames, feature size)."""
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return feature_extractor.stack(features)
    return features


def num_encoder_input_frames(feature_extractor: SequenceFeatureExtractor, num_fbank_frames: int) -> int:
    """Number of frames that `encoder_input` gives for so many stored frames."""
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return -(-num_fbank_frames // feature_extractor.stride_lfr)
    return num_fbank_frames
