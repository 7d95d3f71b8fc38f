"""Options that contradict each other, found before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer_utils import IntervalStrategy

from .cache_stage import choose_level

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments

MEASURES = ("loss", "token_accuracy", "cer")  # what a validation set gives, and what checkpoints can be chosen by


def check_arguments(args: SpeechLLMTrainingArguments) -> None:
    """Finds contradictions between options; runs before anything is loaded.

    Raises:
        ValueError: the message names the options.
    """
    if not args.model_name_or_path:
        raise ValueError("--model_name_or_path is missing")
    if not args.train_file:
        raise ValueError("--train_file is missing")
    if args.train_weight and len(args.train_weight) != len(args.train_file):
        raise ValueError(
            f"--train_weight has {len(args.train_weight)} numbers for {len(args.train_file)} files of --train_file"
        )
    if len(set(args.train_file)) < len(args.train_file):
        raise ValueError("--train_file names a file twice; give it once, with a higher --train_weight")
    if any(weight <= 0 for weight in args.train_weight):
        raise ValueError("--train_weight must be above 0; leave the file out instead")
    if args.freeze_audio_encoder and args.freeze_audio_adaptor and args.freeze_llm and not args.use_lora:
        raise ValueError(
            "nothing is left to train: --freeze_audio_encoder, --freeze_audio_adaptor and --freeze_llm are all "
            "set without --use_lora"
        )
    if args.streaming and args.max_steps <= 0:
        raise ValueError(
            "--streaming has no epochs, since nobody has counted the rows; say with --max_steps how long to train"
        )
    if args.shuffle_buffer < 1:
        raise ValueError(f"--shuffle_buffer is {args.shuffle_buffer}; it must be at least 1")
    if args.feature_cache not in ("float16", "float32", "off"):
        raise ValueError(f"--feature_cache is {args.feature_cache!r}; choose float16, float32 or off")
    choose_level(args)
    if args.dither < 0:
        raise ValueError(f"--dither is {args.dither}; it must be at least 0")
    if args.dither and args.feature_cache != "off" and not args.streaming:
        raise ValueError(
            f"--dither {args.dither:g} with --feature_cache {args.feature_cache} would add the same noise in "
            "every epoch; set --feature_cache off"
        )
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max_bad_fraction is {args.max_bad_fraction}; it must be between 0 and 1")
    if not 0 <= args.tempo_perturb < 1:
        raise ValueError(f"--tempo_perturb is {args.tempo_perturb}; it must be at least 0 and below 1")
    if args.fp16:
        raise ValueError(
            "--fp16: the adaptor's outputs overflow float16 (over 1,000 in the released model); use --bf16"
        )
    _check_hotwords(args)
    if args.hub_strategy != "end":
        raise ValueError(
            f"--hub_strategy {args.hub_strategy} would publish optimizer states and pickled options with the "
            "token and paths of this machine; only `end` is offered"
        )
    if args.per_device_train_batch_seconds < 0:
        raise ValueError("--per_device_train_batch_seconds must be above 0, or auto")
    if args.per_device_train_batch_seconds == 0 and args.streaming:
        raise ValueError("--per_device_train_batch_seconds auto must know the rows; with --streaming give a number")
    if args.max_bad_steps < 0:
        raise ValueError(f"--max_bad_steps is {args.max_bad_steps}; it must be at least 0")
    if args.dataloader_timeout_seconds < 0:
        raise ValueError(f"--dataloader_timeout_seconds is {args.dataloader_timeout_seconds:g}; it must be at least 0")
    _check_validation(args)


def _check_hotwords(args: SpeechLLMTrainingArguments) -> None:
    if args.hotword_distractors < 0:
        raise ValueError(f"--hotword_distractors is {args.hotword_distractors}; it must be at least 0")
    for option in ("hotword_dropout", "hotwords_from_text"):
        value = getattr(args, option)
        if not 0 <= value <= 1:
            raise ValueError(f"--{option} is {value:g}; it must be between 0 and 1")
    if args.hotword_distractors and args.streaming and args.hotword_file is None:
        raise ValueError(
            "--hotword_distractors are drawn from all training rows, which --streaming does not know; give "
            "--hotword_file"
        )


def _check_validation(args: SpeechLLMTrainingArguments) -> None:
    for option in ("eval_cer_samples", "eval_max_new_tokens", "early_stopping_patience", "keep_best_checkpoints"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} is {value}; it must be at least 1")
    if args.eval_cer and not args.validation_file:
        raise ValueError("--eval_cer decodes validation sets, but --validation_file is missing")
    if args.eval_cer_samples is not None and not args.eval_cer:
        raise ValueError("--eval_cer_samples is without effect; add --eval_cer")
    if args.retention_file is not None and not args.eval_cer:
        raise ValueError("--retention_file is watched by decoding it; add --eval_cer")
    if args.retention_action not in ("warn", "stop"):
        raise ValueError(f"--retention_action is {args.retention_action!r}; choose warn or stop")
    if args.max_retention_loss < 0:
        raise ValueError(f"--max_retention_loss is {args.max_retention_loss}; it must be at least 0")
    if args.average_best and (args.keep_best_checkpoints or 0) < 2:
        raise ValueError("--average_best needs --keep_best_checkpoints with at least 2 of them")
    if args.stops_at_retention_loss and args.save_total_limit == 1 and not args.keep_best_checkpoints:
        raise ValueError(
            "--save_total_limit 1 leaves no room for the last good checkpoint that --retention_action stop goes "
            "back to; at least 2"
        )
    for option in ("early_stopping_patience", "retention_file", "keep_best_checkpoints"):
        if getattr(args, option) is not None and IntervalStrategy(args.eval_strategy) == IntervalStrategy.NO:
            raise ValueError(f"--{option} needs evaluations; add --eval_strategy steps (or epoch)")
    metric = args.metric_for_best_model
    if metric is None or not args.validation_file:
        return
    measures = MEASURES if args.eval_cer else MEASURES[:-1]
    known = [*measures, *(f"{name}_{measure}" for name in args.validation_files for measure in measures)]
    if metric.removeprefix("eval_") not in known:
        hint = "" if args.eval_cer else " (and those with cer after --eval_cer)"
        raise ValueError(f"--metric_for_best_model is {metric!r}; choose one of {', '.join(known)}{hint}")
