"""The rows and the model of a run, from its options. Training and the probes of a plan use the same parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.collator import SpeechLLMCollator
from ..data.dataset import prepare_rows
from ..data.encoder_cache import add_encoded
from ..data.hotword_lists import hotword_sampler
from ..data.streaming import open_stream
from ..formats.loading import load_config
from ..model.ctc_vocabulary import CTCVocabulary
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import fixed_seconds, max_feature_frames
from ..model.native_processing import NativeProcessor
from ..model.processing import SpeechLLMProcessor
from .cache_stage import choose_cache_level
from .ctc_stage import prepare_ctc_head
from .freezing import freeze_parameters, freeze_parts
from .lora import add_lora
from .options import FinetuningOptions
from .preemption import interruptible
from .speed import attention_context


@dataclass
class RunData:
    """The data of a run.

    Args:
        processor: of the model.
        collator: builds training batches, with augmentation.
        train_rows: a `datasets.Dataset` or a `RowStream`.
        weights: times per epoch of each row, shape = (rows,), or `None`.
        validation_rows: rows by name of the set.
        max_feature_frames: limit of the model, see `SpeechLLMConfig`.
        ctc_vocabulary: of the CTC head that is trained; `None` without one.
    """

    processor: SpeechLLMProcessor
    collator: SpeechLLMCollator
    train_rows: Any
    weights: np.ndarray | None
    validation_rows: dict[str, Any]
    max_feature_frames: int
    ctc_vocabulary: CTCVocabulary | None = None

    def for_trainer(self) -> dict[str, Any]:
        """Returns the arguments of the trainer that come from the data."""
        self.collator.ctc_vocabulary = self.ctc_vocabulary
        return {
            "train_dataset": self.train_rows,
            "eval_dataset": self.validation_rows or None,
            "data_collator": self.collator,
            "eval_collator": SpeechLLMCollator(self.processor, ctc_vocabulary=self.ctc_vocabulary),
            "processing_class": self.processor,
            "train_weights": self.weights,
        }


def load_data(options: FinetuningOptions, feature_cache: str | None = None) -> RunData:
    """Reads and prepares the rows of a run; the first process of a host works, the others read its caches.

    Args:
        options: of the run.
        feature_cache: replaces the option; `off` reads only the lengths of recordings.

    Raises:
        BadDataError, OSError, ValueError: if rows, files or options are not usable.
    """
    args, data = options.training, options.data
    name = str(options.model.model_name_or_path)
    processor = SpeechLLMProcessor.from_pretrained(name)
    config = load_config(name)
    limit = max_feature_frames(config)
    if isinstance(processor, NativeProcessor):
        data.compute_features_per_epoch(processor.model_type)
        if options.parts.audio_token_dropout:
            raise ValueError(f"--audio_token_dropout does not support {processor.model_type} models; leave it out")
    if feature_cache is not None:
        data = dataclasses.replace(data, feature_cache=feature_cache)
    stretched = int(limit / (1 + data.tempo_perturb))  # augmentation may lengthen a recording
    collator = SpeechLLMCollator.augmenting(processor, data, limit, fixed_seconds(config))
    bad = {"max_bad_fraction": args.max_bad_fraction}
    limits: dict[str, Any] = {"batch_seconds": args.per_device_train_batch_seconds, **bad}
    weights = None
    train_rows: Any
    with interruptible(), args.main_process_first(desc="preparing the data"):
        if data.streaming:
            seed = args.seed if args.data_seed is None else args.data_seed
            place = {"rank": args.process_index, "num_ranks": args.world_size}
            train_rows = open_stream(
                data.train_file, collator, args.per_device_train_batch_seconds, stretched, data,
                weights=data.train_weight, seed=seed, **place, **bad,
            )  # fmt: skip
        else:
            train_rows, weights = prepare_rows(
                data.train_file, processor, stretched, data, data.train_weight, **limits
            )
        collator.hotwords = hotword_sampler(data, None if data.streaming else train_rows, args.seed)
        validation_rows = {
            name: prepare_rows([file], processor, limit, data, **limits, split="dev")[0]
            for name, file in options.validation_files.items()
        }
    return RunData(processor, collator, train_rows, weights, validation_rows, limit)


def load_model(options: FinetuningOptions, data: RunData) -> Any:
    """Loads the model with frozen parts and adapters, and with a CTC head if wanted; `data` gets its vocabulary.

    Raises:
        ImportError, OSError, ValueError: if the model or an option is not usable.
    """
    parts = options.parts
    # Master weights are float32 for every checkpoint: bfloat16 weights would lose most small updates.
    model = SpeechLLMForConditionalGeneration.from_pretrained(
        str(options.model.model_name_or_path),
        dtype=torch.float32,
        attn_implementation=options.model.attn_implementation,
    )
    model.audio_token_dropout = parts.audio_token_dropout
    freeze_parts(model, parts.freeze_audio_encoder, parts.freeze_audio_adaptor, parts.freeze_llm)
    if parts.use_lora:
        model = add_lora(model, parts.lora_r, parts.lora_alpha, parts.lora_dropout, parts.lora_target_modules)
    freeze_parameters(model, parts.freeze_param)
    data.ctc_vocabulary = prepare_ctc_head(model, data.processor, data.train_rows, parts)
    return model


def encode_rows(rows: Any, model: Any, processor: SpeechLLMProcessor, options: FinetuningOptions) -> Any:
    """Returns the rows with cached outputs of frozen parts, as `--cache_level` says; otherwise unchanged."""
    data, args = options.data, options.training
    if (level := choose_cache_level(data, options.parts, args)) == "fbank":
        return rows
    with attention_context(args):
        return add_encoded(
            rows, model, processor, level, data.cache_dir, device=args.device, bf16=bool(args.bf16),
            batch_seconds=args.per_device_train_batch_seconds or 240.0, show_progress=args.should_log,
        )  # fmt: skip
