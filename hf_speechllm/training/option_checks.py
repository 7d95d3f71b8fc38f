"""Checks for contradictory options, before data and model are loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .cache_stage import choose_cache_level

if TYPE_CHECKING:
    from .arguments import SpeechLLMTrainingArguments
    from .options import FinetuningOptions

MEASURES = ("loss", "token_accuracy", "cer")  # metrics of a validation set, which can select checkpoints


def check_options(options: FinetuningOptions) -> None:
    """Checks the options of a run for contradictions and missing options.

    Raises:
        ValueError: the message names the options.
    """
    data, parts, args = options.data, options.parts, options.training
    if not options.model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing; name a model folder or Hub id")
    if not data.train_file:
        raise ValueError("--train_file is missing; name a training JSONL")
    frozen = parts.freeze_audio_encoder and parts.freeze_audio_adaptor and parts.freeze_llm
    if frozen and not parts.use_lora and parts.ctc_head is None:
        raise ValueError(
            "--freeze_audio_encoder, --freeze_audio_adaptor and --freeze_llm freeze all parts; train a part, or add "
            "--use_lora or --ctc_head"
        )
    if not 0 <= parts.audio_token_dropout < 1:
        raise ValueError(f"--audio_token_dropout is {parts.audio_token_dropout:g}; it must be at least 0 and below 1")
    _check_ctc_head(options)
    if data.streaming and args.max_steps <= 0:
        raise ValueError(
            "--streaming has no epochs, because the number of rows is unknown; set a number of steps with --max_steps"
        )
    if data.streaming and args.per_device_train_batch_seconds == 0:
        raise ValueError(
            "--per_device_train_batch_seconds auto is not supported with --streaming; set a number of seconds"
        )
    choose_cache_level(data, parts, args)
    names = options.validation_files
    if args.eval_cer and not data.validation_file:
        raise ValueError("--eval_cer requires validation sets; add --validation_file")
    if _evaluates(args) and not names:
        raise ValueError(
            f"--eval_strategy {_value(args.eval_strategy)} requires a validation set; add --validation_file"
        )
    if args.eval_on_start and not names:
        raise ValueError("--eval_on_start requires a validation set; add --validation_file")
    metric = args.metric_for_best_model
    if metric is None or not data.validation_file:
        return
    measures = MEASURES if args.eval_cer else MEASURES[:1] if options.parts.only_ctc_head else MEASURES[:-1]
    known = [*measures, *(f"{name}_{measure}" for name in names for measure in measures)]
    if metric.removeprefix("eval_") not in known:
        hint = "" if args.eval_cer else " (metrics with cer require --eval_cer)"
        raise ValueError(f"--metric_for_best_model is {metric!r}; choose one of {', '.join(known)}{hint}")


def _check_ctc_head(options: FinetuningOptions) -> None:
    parts = options.parts
    if parts.ctc_head not in (None, "auto", "sanm", "linear"):
        raise ValueError(f"--ctc_head is {parts.ctc_head!r}; choose auto, sanm or linear")
    if parts.ctc_vocabulary not in ("auto", "characters", "llm"):
        raise ValueError(f"--ctc_vocabulary is {parts.ctc_vocabulary!r}; choose auto, characters or llm")
    if not 0 < parts.ctc_weight < math.inf:
        raise ValueError(f"--ctc_weight is {parts.ctc_weight:g}; it must be above 0")
    detail = {
        "--ctc_vocabulary": parts.ctc_vocabulary != "auto",
        "--ctc_weight": parts.ctc_weight != type(parts).ctc_weight,
        "--ctc_head_learning_rate": options.training.ctc_head_learning_rate is not None,
    }
    if parts.ctc_head is None and any(detail.values()):
        raise ValueError(
            f"{', '.join(name for name, given in detail.items() if given)} without --ctc_head has no effect; leave it "
            "out, or add --ctc_head auto"
        )
    if parts.ctc_head is not None and parts.use_lora:
        raise ValueError(
            "--ctc_head is not supported with --use_lora, because an adapter cannot add a part to its base model; "
            "train the head of the base model, or of the merged model, with the other parts frozen"
        )
    if parts.only_ctc_head and options.training.eval_cer:
        raise ValueError("--eval_cer has no effect if only the CTC head is trained, because the LLM does not change")


def check_training(args: SpeechLLMTrainingArguments) -> None:
    """Checks the options of the trainer for contradictions.

    Raises:
        ValueError: the message names the options.
    """
    if args.fast not in ("auto", "off"):
        raise ValueError(f"--fast is {args.fast!r}; choose auto or off")
    if args.fp16:
        raise ValueError(
            "--fp16 is not supported, because outputs of the adaptor overflow float16 (over 1,000 in the released "
            "model); use --bf16"
        )
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max_bad_fraction is {args.max_bad_fraction}; it must be between 0 and 1")
    if not 0 <= args.per_device_train_batch_seconds < math.inf:
        raise ValueError(
            f"--per_device_train_batch_seconds is {args.per_device_train_batch_seconds:g}; it must be above 0, or auto"
        )
    if args.gradient_accumulation_steps < 1:
        raise ValueError(f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}; it must be at least 1")
    if not 0 <= args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs is {args.num_train_epochs:g}; it must be a number of epochs from 0")
    if args.max_bad_steps < 0:
        raise ValueError(f"--max_bad_steps is {args.max_bad_steps}; it must be at least 0")
    if args.dataloader_timeout_seconds < 0:
        raise ValueError(f"--dataloader_timeout_seconds is {args.dataloader_timeout_seconds:g}; it must be at least 0")
    _check_validation(args)


def _check_validation(args: SpeechLLMTrainingArguments) -> None:
    for option in ("eval_cer_samples", "eval_max_new_tokens", "early_stopping_patience", "keep_best_checkpoints"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} is {value}; it must be at least 1")
    if args.eval_cer_samples is not None and not args.eval_cer:
        raise ValueError("--eval_cer_samples has no effect without --eval_cer; add --eval_cer")
    if args.retention_file is not None and not args.eval_cer:
        raise ValueError("--retention_file requires decoding; add --eval_cer")
    if args.retention_action not in ("warn", "stop"):
        raise ValueError(f"--retention_action is {args.retention_action!r}; choose warn or stop")
    if args.max_retention_loss < 0:
        raise ValueError(f"--max_retention_loss is {args.max_retention_loss}; it must be at least 0")
    if args.average_best and (args.keep_best_checkpoints or 0) < 2:
        raise ValueError("--average_best requires --keep_best_checkpoints with at least 2 checkpoints")
    if args.stops_at_retention_loss and args.save_total_limit == 1 and not args.keep_best_checkpoints:
        raise ValueError(
            "--save_total_limit 1 does not keep the last good checkpoint, which --retention_action stop requires; set "
            "at least 2"
        )
    for option in ("early_stopping_patience", "retention_file", "keep_best_checkpoints"):
        if getattr(args, option) is not None and not _evaluates(args):
            raise ValueError(f"--{option} requires evaluations; add --eval_strategy steps (or epoch)")


def _value(strategy) -> str:
    return getattr(strategy, "value", strategy)


def _evaluates(args: SpeechLLMTrainingArguments) -> bool:
    return _value(args.eval_strategy) != "no"
