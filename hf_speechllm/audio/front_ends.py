"""Front ends of audio encoders: what is stored for a recording, and how stored features become the encoder's input.

Every front end stores one frame per 10 ms. Encoders of raw waveforms receive frames of 10 ms of samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import SequenceFeatureExtractor

from .fbank import FRAME_SHIFT, FbankFeatureExtractor

FRAMES_PER_SECOND = round(1 / FRAME_SHIFT)
MIN_SECONDS = 0.1  # shorter recordings get silence: normalization and strided convolutions need some frames
SILENT_FRAMES = 32  # after a recording; matrix products may round their first or last few frames in another way
TIME_LAST = ("WhisperFeatureExtractor", "Qwen3ASRFeatureExtractor")  # features of shape = (mel bins, frames)


def reads_waveforms(feature_extractor: SequenceFeatureExtractor) -> bool:
    """Returns whether the encoder's input is the waveform, as for HuBERT and Moonshine."""
    return "input_values" in feature_extractor.model_input_names


def stacked_frames(feature_extractor: SequenceFeatureExtractor) -> int:
    """Returns the number of 10 ms frames between two frames of the encoder's input."""
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return feature_extractor.stride_lfr
    return getattr(feature_extractor, "stride", 1)  # Wav2Vec2-BERT: 2


def stored_width(feature_extractor: SequenceFeatureExtractor) -> int:
    """Returns the numbers per stored 10 ms frame: mel bins or samples."""
    if reads_waveforms(feature_extractor):
        return feature_extractor.sampling_rate // FRAMES_PER_SECOND
    return feature_extractor.feature_size


def cacheable_features(feature_extractor: SequenceFeatureExtractor, waveform: np.ndarray) -> np.ndarray:
    """Computes the features to store: fbank before stacking, a spectrogram without padding, or the waveform.

    Args:
        feature_extractor: `FbankFeatureExtractor`, or a feature extractor of transformers.
        waveform: shape = (samples,), in [-1, 1], at the extractor's sampling rate.

    Returns:
        shape = (frames, `stored_width`), float32, one frame every 10 ms. The last frame of a waveform is completed
        with zeros.
    """
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return feature_extractor.fbank(waveform).numpy()
    rate, length = feature_extractor.sampling_rate, len(waveform)
    is_whisper = type(feature_extractor).__name__ == "WhisperFeatureExtractor"
    is_short = is_whisper and _short_silence_suffices(feature_extractor)
    if is_short:
        waveform = np.pad(waveform, (0, SILENT_FRAMES * feature_extractor.hop_length))
    elif not is_whisper:
        waveform = np.pad(waveform, (0, max(0, round(MIN_SECONDS * rate) - length)))
    padding = {"padding": "longest"} if is_short else {}
    batch = feature_extractor(waveform, sampling_rate=rate, return_attention_mask=True, return_tensors="np", **padding)
    if reads_waveforms(feature_extractor):
        samples, width = batch["input_values"][0], stored_width(feature_extractor)
        return np.pad(samples, (0, -len(samples) % width)).reshape(-1, width).astype(np.float32)
    features, mask = batch["input_features"][0], batch["attention_mask"][0].astype(bool)
    if is_short:
        mask[-(-length // feature_extractor.hop_length) :] = False
    features = features[:, mask].T if type(feature_extractor).__name__ in TIME_LAST else features[mask]
    return features.reshape(-1, stored_width(feature_extractor))


def _short_silence_suffices(feature_extractor: SequenceFeatureExtractor) -> bool:
    """Returns whether `SILENT_FRAMES` give the same frames as Whisper's padding to 30 s, in a fraction of the time.

    The frames are equal to the bit if the padding is silence, if no random numbers are drawn for the padding, and if
    the last frames contain only padding.
    """
    is_silent = feature_extractor.padding_value == 0 and feature_extractor.dither == 0
    return is_silent and feature_extractor.n_fft < (SILENT_FRAMES - 1) * feature_extractor.hop_length


def encoder_input(feature_extractor: SequenceFeatureExtractor, features: torch.Tensor) -> torch.Tensor:
    """Converts stored features to input frames of the encoder, shape = (frames, feature size)."""
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return feature_extractor.stack(features)
    if (stack := stacked_frames(feature_extractor)) == 1:
        return features
    return features[: len(features) // stack * stack].reshape(-1, stack * features.shape[1])


def num_encoder_input_frames(feature_extractor: SequenceFeatureExtractor, num_stored_frames: int) -> int:
    """Returns the number of frames that `encoder_input` returns for a number of stored frames."""
    stack = stacked_frames(feature_extractor)
    if isinstance(feature_extractor, FbankFeatureExtractor):
        return -(-num_stored_frames // stack)
    return num_stored_frames // stack


def pad_features(features: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pads the encoder's inputs of several recordings.

    Args:
        features: each of shape = (frames, feature size).

    Returns:
        `input_features`, shape = (recordings, longest, feature size), zero in padding, and `input_features_mask`.
    """
    lengths = torch.tensor([len(item) for item in features])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
    return {
        "input_features": torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True),
        "input_features_mask": mask.long(),
    }
