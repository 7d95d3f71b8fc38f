"""Families of audio encoders: how an encoder of transformers is built and called, and how many frames it returns.

`FAMILIES` is the only place that knows model types of encoders. A new family needs one row in the table, and one test.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from ..audio.fbank import FbankFeatureExtractor
from ..audio.front_ends import FRAMES_PER_SECOND
from .audio_lengths import Convolution, after_convolutions

UNLIMITED = 1 << 24  # frames; the encoder has no position table
POSITIONS = threading.Lock()  # held while the number of positions of an encoder is changed
# Settings of encoders that change the input at random or skip layers, apart from dropout. The options of training do
# the former; a skipped layer has no gradient, which DDP does not support.
WITHOUT = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}
INNER_CONFIGS = ("audio_encoder_config", "audio_config", "encoder_config", "encoder")
# Encoders of waveforms whose convolutions between or before the layers also see the padding.
CONVOLVE_PADDING = ("data2vec-audio", "sew", "sew-d", "wav2vec2-conformer")


@dataclass(frozen=True)
class EncoderFamily:
    """A family of encoders.

    Args:
        run: computes the states, see `encode`.
        max_frames: maximum number of input frames, according to the encoder's config.
        feature_extractor: the feature extractor of an encoder that is published without one.
        inner: attribute that contains the encoder in the model that `AutoModel` builds, if any.
        downsample_rate: input frames per encoder frame, for families without `convolutions`.
        convolutions: kernel, stride and padding of the strided convolutions over time (frames, or samples if the
            encoder reads waveforms), according to the encoder's config.
        window: number of frames of the windows in which the convolutions run; 0: no windows.
        packs: whether the encoder supports padding-free batches (`packing.Positions.frames`).
        windows: whether the encoder supports `window_seconds`, the unit of the length of its windows.
        passes: whether the encoder runs a different number of times for each batch, according to its config.
        unused: names of parameters or modules that the encoder of transformers has and never uses.
    """

    run: Callable[..., torch.Tensor]
    max_frames: Callable[[Any], int]
    feature_extractor: Callable[[Any], SequenceFeatureExtractor]
    inner: str | None = None
    downsample_rate: int = 1
    convolutions: Callable[[Any], Sequence[Convolution]] = lambda config: ()
    window: Callable[[Any], int] = lambda config: 0
    packs: bool = False
    windows: bool = False
    passes: Callable[[Any], bool] = lambda config: False
    unused: tuple[str, ...] = ()


def encoder_family(config: PreTrainedConfig) -> EncoderFamily:
    """Returns the family of an encoder.

    Raises:
        ValueError: if the model type is in no family.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the audio encoder is a {config.model_type} model; encoders that are supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def find_encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the config of the encoder in the config of a model, for example of an encoder-decoder.

    Raises:
        ValueError: if the model has no supported encoder.
    """
    inner = (getattr(config, name, None) for name in INNER_CONFIGS)
    for candidate in (config, *inner):
        if isinstance(candidate, PreTrainedConfig) and candidate.model_type in FAMILIES:
            return candidate
    encoder_family(config)
    return config


def fixed_seconds(config: PreTrainedConfig) -> float:
    """Returns the seconds that an encoder computes for every recording; 0 if they follow the recording."""
    family = encoder_family(config)
    if not family.windows or getattr(config, "window_seconds", None):
        return 0.0
    return family.max_frames(config) / FRAMES_PER_SECOND


def set_window(config: PreTrainedConfig, seconds: float) -> None:
    """Lets an encoder run in windows that are multiples of a length, instead of one fixed length.

    Raises:
        ValueError: if the encoder does not support it, or the length is out of range.
    """
    family = encoder_family(config)
    if not family.windows:
        raise ValueError(f"encoder_window: {config.model_type} encoders have no windows; leave it out")
    longest = family.max_frames(config) / FRAMES_PER_SECOND
    if type(seconds) not in (int, float) or not 0.02 <= seconds <= longest:
        raise ValueError(f"encoder_window is {seconds!r}; it must be between 0.02 and {longest:g} seconds")
    config.window_seconds = round(50 * seconds) / 50  # whole encoder frames


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds an encoder with random weights."""
    family = encoder_family(config)
    model = AutoModel.from_config(config)
    return getattr(model, family.inner) if family.inner else model


def freeze_unused(encoder: torch.nn.Module, config: PreTrainedConfig) -> None:
    """Freezes the parameters of an encoder, with or without adapters, that never have a gradient: DDP waits for it."""
    if not (unused := encoder_family(config).unused):  # the trainer calls `train`, and so this function, in each step
        return
    for name, parameter in encoder.named_parameters():
        if any(f".{item}" in f".{name}" for item in unused):
            parameter.requires_grad_(False)


def encode(
    encoder: PreTrainedModel,
    config: PreTrainedConfig,
    features: torch.Tensor,
    mask: torch.Tensor,
    frame_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs an encoder; the states of a recording do not depend on the padding.

    Args:
        config: config of the encoder, from which it was built.
        features: shape = (recordings, frames, feature size).
        mask: shape = (recordings, frames), 0 for padding.
        frame_positions: see `frames` in `packing.Positions`; for families that support packed rows.

    Returns:
        States, shape = (recordings, encoder frames, width), and their mask, shape = (recordings, encoder frames).
    """
    family = encoder_family(config)
    packing = {"frame_positions": frame_positions} if family.packs and frame_positions is not None else {}
    states = family.run(encoder, config, features, mask, **packing)
    if family.packs:
        return states, mask
    unit = features.shape[-1] if reads_waveforms(encoder) else 1
    lengths = num_encoder_frames(config, mask.sum(-1) * unit)
    return states, torch.arange(states.shape[1], device=mask.device) < lengths.unsqueeze(-1)


def num_encoder_frames(config: PreTrainedConfig, length: Any) -> Any:
    """Returns the number of encoder frames for a number of input frames (samples if the encoder reads waveforms)."""
    family = encoder_family(config)
    if convolutions := family.convolutions(config):
        return after_convolutions(length, convolutions, family.window(config))
    return (length + family.downsample_rate - 1) // family.downsample_rate


def reads_waveforms(encoder: PreTrainedModel) -> bool:
    """Returns whether the input of an encoder is the waveform."""
    return encoder.main_input_name == "input_values"


def _run_san_m(encoder, config, features, mask, **packing) -> torch.Tensor:
    return encoder(input_features=features, input_features_mask=mask, **packing).last_hidden_state


def _run_whisper(encoder, config, features, mask) -> torch.Tensor:
    """Runs Whisper's encoder in windows, which it fills with the spectrogram of silence, and cuts the output.

    The window is 30 s, as in Whisper's training, or the smallest multiple of `window_seconds` in which a recording
    fits. Recordings with the same window run together.
    """
    # Whisper clips log10 values at the recording's maximum minus 8, then divides by 4: silence is maximum minus 2.
    mask = mask.bool()
    silence = features.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=(1, 2), keepdim=True) - 2
    features = torch.where(mask.unsqueeze(-1), features, silence)
    longest, whole = features.shape[1], 2 * encoder.max_source_positions
    unit = 2 * round(50 * getattr(config, "window_seconds", 0.0)) or whole  # frames
    if unit == whole:
        states = encoder(_whisper_input(encoder, whole, features, silence)).last_hidden_state
        return states[:, : (longest + 1) // 2]
    windows = ((mask.sum(-1) + unit - 1) // unit * unit).clamp(unit, whole).tolist()

    def run(window: int, rows: list[int]) -> torch.Tensor:
        return _run_whisper_window(encoder, config, window, features[rows, :window], silence[rows])

    return _run_equal_lengths(windows, run, (longest + 1) // 2)


def _run_equal_lengths(
    lengths: Sequence[int], run: Callable[[int, list[int]], torch.Tensor], longest: int
) -> torch.Tensor:
    """Runs an encoder once for all rows of the same length.

    Args:
        lengths: of the rows.
        run: returns the states of rows for their length and their indices.
        longest: number of frames of the result; longer states are cut.
    """
    states: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    for length in sorted(set(lengths)):
        same = [row for row, other in enumerate(lengths) if other == length]
        for row, found in zip(same, run(length, same), strict=True):
            states[row] = found
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    return functional.pad(padded, (0, 0, 0, longest - padded.shape[1]))


def _whisper_input(encoder, window: int, features: torch.Tensor, silence: torch.Tensor) -> torch.Tensor:
    padding = silence.expand(-1, window - features.shape[1], features.shape[2])
    return torch.cat([features, padding], dim=1).transpose(1, 2).to(encoder.conv1.weight.dtype)


def _run_whisper_window(encoder, config, window: int, features: torch.Tensor, silence: torch.Tensor) -> torch.Tensor:
    """Runs Whisper's encoder, which has a fixed length, with its first positions only."""
    inputs = _whisper_input(encoder, window, features, silence)
    table = encoder.embed_positions
    with POSITIONS:
        if encoder.config is config:
            encoder.config = copy.copy(config)  # other threads read the model's config
        table.num_embeddings = encoder.config.max_source_positions = window // 2
        try:
            return encoder(inputs).last_hidden_state
        finally:
            table.num_embeddings = encoder.config.max_source_positions = encoder.max_source_positions


def _run_masked(encoder, config, features, mask) -> torch.Tensor:
    """Runs an encoder of spectrograms that hides the padding with an attention mask."""
    return encoder(features.to(encoder.dtype), attention_mask=mask.bool()).last_hidden_state


def _run_waveforms(encoder, config, features, mask) -> torch.Tensor:
    """Runs an encoder of waveforms.

    A group norm over time, and some convolutions, also see the padding, which no attention mask hides. Such encoders
    run once for all recordings of the same length, without padding and without a mask.
    """
    if hasattr(encoder, "feature_extractor"):
        features = features.detach()  # these encoders set `requires_grad`, which only a leaf accepts
    samples = features.flatten(1).to(encoder.dtype)
    valid = mask.repeat_interleave(features.shape[-1], dim=1)
    if not _sees_padding(config):
        return encoder(samples, attention_mask=valid.long()).last_hidden_state

    def run(length: int, rows: list[int]) -> torch.Tensor:
        return encoder(samples[rows, :length]).last_hidden_state

    return _run_equal_lengths(valid.sum(-1).tolist(), run, num_encoder_frames(config, samples.shape[1]))


def _sees_padding(config: PreTrainedConfig) -> bool:
    return getattr(config, "feat_extract_norm", "group") == "group" or config.model_type in CONVOLVE_PADDING


def _run_qwen3_asr(encoder, config, features, mask) -> torch.Tensor:
    """Runs Qwen3-ASR's encoder, which requires whole windows and returns the frames of all recordings in one row."""
    frames, window = features.shape[1], 2 * config.n_window
    mask = functional.pad(mask, (0, -frames % window))
    features = functional.pad(features, (0, 0, 0, -frames % window)).transpose(1, 2).contiguous()
    states = encoder(features.to(encoder.dtype), input_features_mask=mask.long()).last_hidden_state
    longest = num_encoder_frames(config, frames)
    valid = torch.arange(longest, device=mask.device) < num_encoder_frames(config, mask.sum(-1)).unsqueeze(-1)
    return states.new_zeros(*valid.shape, states.shape[-1]).masked_scatter(valid.unsqueeze(-1), states)


def _waveform_family(normalize: bool = True, **options: Any) -> EncoderFamily:
    return EncoderFamily(
        _run_waveforms,
        lambda config: UNLIMITED,
        lambda config: transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize),
        passes=_sees_padding,
        **{
            "convolutions": lambda config: [
                (kernel, stride, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)
            ],
            **options,
        },
    )


FAMILIES = {
    "fun_asr_nano_encoder": EncoderFamily(
        _run_san_m,
        # Positions start at 1, so one entry of the table is unused.
        lambda config: config.max_position_embeddings - 1,
        lambda config: FbankFeatureExtractor(),
        packs=True,
    ),
    "whisper": EncoderFamily(
        _run_whisper,
        lambda config: 2 * config.max_source_positions,
        lambda config: transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins),
        inner="encoder",
        downsample_rate=2,
        windows=True,
        passes=lambda config: bool(getattr(config, "window_seconds", 0.0)),
    ),
    "wav2vec2-bert": EncoderFamily(
        _run_masked,
        lambda config: config.max_source_positions,
        lambda config: transformers.SeamlessM4TFeatureExtractor(),
    ),
    "parakeet_encoder": EncoderFamily(
        _run_masked,
        lambda config: config.subsampling_factor * config.max_position_embeddings,
        lambda config: transformers.ParakeetFeatureExtractor(feature_size=config.num_mel_bins),
        convolutions=lambda config: (
            [
                (
                    config.subsampling_conv_kernel_size,
                    config.subsampling_conv_stride,
                    (config.subsampling_conv_kernel_size - 1) // 2,
                )
            ]
            * round(math.log2(config.subsampling_factor))
        ),
    ),
    "qwen3_asr_encoder": EncoderFamily(
        _run_qwen3_asr,
        lambda config: UNLIMITED,
        lambda config: transformers.Qwen3ASRFeatureExtractor(
            feature_size=config.num_mel_bins, n_window=config.n_window
        ),
        convolutions=lambda config: [(3, 2, 1)] * 3,
        window=lambda config: 2 * config.n_window,
    ),
    "moonshine": _waveform_family(
        normalize=False, inner="encoder", convolutions=lambda config: [(127, 64, 0), (7, 3, 0), (3, 2, 0)]
    ),
    **dict.fromkeys(
        ("hubert", "wavlm", "wav2vec2", "data2vec-audio", "unispeech", "sew", "sew-d"), _waveform_family()
    ),
    "wav2vec2-conformer": _waveform_family(unused=("pos_conv_embed",)),
    "unispeech-sat": _waveform_family(unused=("masked_spec_embed",)),
}
