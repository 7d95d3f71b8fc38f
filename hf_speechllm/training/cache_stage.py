"""Which rung of the cache's ladder is right: fbank -> encoder output -> audio tokens (`data.encoder_cache`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments

LEVELS = ("fbank", "encoder", "adaptor")


def _refusal(level: str, args: SpeechLLMTrainingArguments) -> str | None:
    """Why a rung of the ladder would give wrong results; `None` if it would not.

    Args:
        level: `fbank`, `encoder` or `adaptor`.
        args: of the run.
    """
    if level == "fbank":
        return None
    if args.spec_augment or args.tempo_perturb or args.dither:
        return "--spec_augment, --tempo_perturb and --dither change the features in every epoch"
    if not args.freeze_audio_encoder:
        return "the encoder is trained; give --freeze_audio_encoder"
    if level == "adaptor" and not args.freeze_audio_adaptor:
        return "the adaptor is trained; give --freeze_audio_adaptor"
    if args.feature_cache == "off" or args.streaming:
        return "it needs cached features: no --streaming, no --feature_cache off"
    return None


def choose_level(args: SpeechLLMTrainingArguments) -> str:
    """The rung for `--cache_level`; for `auto` the deepest that is right, where more than an epoch is trained.

    Raises:
        ValueError: if there is no such rung, or the one that was asked for would give wrong results.
    """
    if args.cache_level not in ("auto", *LEVELS):
        raise ValueError(f"--cache_level is {args.cache_level!r}; choose auto, {', '.join(LEVELS)}")
    if args.cache_level == "auto":
        if args.max_steps > 0 or args.num_train_epochs <= 1:  # stored for nothing, perhaps
            return "fbank"
        return next(level for level in LEVELS[::-1] if _refusal(level, args) is None)
    reason = _refusal(args.cache_level, args)
    if reason:
        raise ValueError(f"--cache_level {args.cache_level}: {reason}")
    return args.cache_level
