"""Chooses what to cache: fbank, encoder output or adaptor output (`data.encoder_cache`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.options import DataOptions
    from .arguments import SpeechLLMTrainingArguments
    from .options import TrainedPartsOptions

LEVELS = ("fbank", "encoder", "adaptor")


def _refusal(level: str, data: DataOptions, parts: TrainedPartsOptions) -> str | None:
    """Returns why a cache level would give wrong results, or `None`.

    Args:
        level: `fbank`, `encoder` or `adaptor`.
    """
    if level == "fbank":
        return None
    if used := data.changes_features:
        return f"{used}: augmentation must change the features in every epoch; leave it out or use --cache_level fbank"
    if not parts.freeze_audio_encoder:
        return "the encoder is trained; set --freeze_audio_encoder"
    if level == "adaptor" and parts.ctc_head is not None:
        return "the CTC head needs the encoder's output; set --cache_level encoder"
    if level == "adaptor" and not parts.freeze_audio_adaptor:
        return "the adaptor is trained; set --freeze_audio_adaptor"
    if data.feature_cache == "off" or data.streaming:
        return "requires cached features; leave out --streaming and --feature_cache off"
    return None


def choose_cache_level(data: DataOptions, parts: TrainedPartsOptions, args: SpeechLLMTrainingArguments) -> str:
    """Returns the cache level for `--cache_level`; for `auto` the last level that gives correct results.

    For runs of up to one epoch, `auto` is `fbank`: other caches might never be read.

    Raises:
        ValueError: if the level is unknown or would give wrong results.
    """
    if data.cache_level not in ("auto", *LEVELS):
        raise ValueError(f"--cache_level is {data.cache_level!r}; choose auto, {', '.join(LEVELS)}")
    if data.cache_level == "auto":
        if args.max_steps > 0 or args.num_train_epochs <= 1:
            return "fbank"
        return next(level for level in LEVELS[::-1] if _refusal(level, data, parts) is None)
    reason = _refusal(data.cache_level, data, parts)
    if reason:
        raise ValueError(f"--cache_level {data.cache_level}: {reason}")
    return data.cache_level
