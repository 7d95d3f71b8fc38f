"""Fine-tune a speech LLM.

# One GPU, only the LLM
hf-speechllm finetune llm_only --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf \\
    --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir exp/llm_only

# Eight GPUs, LoRA; --config_file names a configuration of accelerate
hf-speechllm finetune lora --num_processes 8 --config_file multi_gpu \\
    --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf --train_file data/train.jsonl --output_dir exp/lora

CONFIG is a YAML file, or the name of a file of the package: lora, llm_only, adaptor_only, encoder_adaptor, all.
Options of the command line override the file. The same command from a checkout is
`accelerate launch [--config_file FILE] recipes/finetune.py [CONFIG] ...`.
"""

import logging
import os
import sys
from typing import Any

from .arguments import check_command_line, parse_arguments
from .exiting import skip_teardown
from .launch import launch, split_launch_options
from .parser import command_line, prog, report

logger = logging.getLogger(__name__)


def main() -> None:
    # Shapes differ between batches: expandable segments avoid fragmentation of the GPU memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    launch_options, argv = split_launch_options(command_line()[1])
    if launch_options and not {"-h", "--help", "--help_all"} & {*argv}:
        from ..data.file_lists import expand_paths

        given = check_command_line(argv)
        try:
            for files in (given.data.train_file, *([file] for file in given.validation_files.values())):
                expand_paths(files)  # an error if a file is missing
            launch("finetune", launch_options, argv)
        except (OSError, ValueError) as error:
            sys.exit(f"{prog()}: error: {error}")
        return
    options = parse_arguments(argv, description=__doc__)
    data, parts, args = options.data, options.parts, options.training
    name = str(options.model.model_name_or_path)

    # Imported after parsing, so that errors of the command line appear immediately.
    import torch
    from transformers import set_seed

    from .. import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from ..audio.downloads import UrlPolicy
    from ..data.augmentation import augmentations
    from ..data.bad_rows import BadDataError
    from ..data.collator import SpeechLLMCollator
    from ..data.dataset import prepare_rows
    from ..data.encoder_cache import add_encoded
    from ..data.hotword_lists import hotword_sampler
    from ..data.streaming import open_stream
    from ..formats.checkpoint import CheckpointError
    from ..formats.loading import load_config
    from ..model.native_families import max_feature_frames
    from ..model.native_processing import NativeProcessor
    from ..training.cache_stage import choose_cache_level
    from ..training.checkpointing.lineage import RunFinished
    from ..training.checkpointing.selection import RetentionError
    from ..training.checkpointing.verification import VerificationError
    from ..training.checkpointing.writer import SaveError
    from ..training.errors import FaultError, Preempted
    from ..training.freezing import count_parameters, freeze_parameters, freeze_parts
    from ..training.lora import add_lora
    from ..training.preemption import EXIT_STATUS, interruptible
    from ..training.run import describe_data, find_checkpoint, save_final, set_up_logging
    from ..training.trainer import SpeechLLMTrainer

    set_up_logging(args)
    set_seed(args.seed)

    # Data first: errors in the data are found before the model is loaded.
    try:
        UrlPolicy.change(data.url_max_megabytes, data.url_timeout_seconds, data.allow_private_redirects)
        checkpoint = find_checkpoint(args)
        processor = SpeechLLMProcessor.from_pretrained(name)
        limit = max_feature_frames(load_config(name))
        if isinstance(processor, NativeProcessor):
            data.compute_features_per_epoch(processor.model_type)
        stretched = int(limit / (1 + data.tempo_perturb))  # augmentation may lengthen a recording
        collator = SpeechLLMCollator(processor, augmentations(data.tempo_perturb, data.spec_augment), data.dither)
        bad = {"max_bad_fraction": args.max_bad_fraction}
        limits: dict[str, Any] = {"batch_seconds": args.per_device_train_batch_seconds, **bad}
        weights = None
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
    except (BadDataError, OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    except RunFinished as end:
        logger.info("%s", end)
        args.distributed_state.destroy_process_group()
        return
    describe_data(train_rows, validation_rows)

    try:
        # Master weights are float32 for every checkpoint: bfloat16 weights would lose most small updates.
        model = SpeechLLMForConditionalGeneration.from_pretrained(
            name, dtype=torch.float32, attn_implementation=options.model.attn_implementation
        )
        freeze_parts(model, parts.freeze_audio_encoder, parts.freeze_audio_adaptor, parts.freeze_llm)
        if parts.use_lora:
            model = add_lora(model, parts.lora_r, parts.lora_alpha, parts.lora_dropout, parts.lora_target_modules)
        freeze_parameters(model, parts.freeze_param)
        if (level := choose_cache_level(data, parts, args)) != "fbank":
            train_rows = add_encoded(
                train_rows, model, processor, level, data.cache_dir, device=args.device, bf16=bool(args.bf16),
                batch_seconds=args.per_device_train_batch_seconds or 240.0, show_progress=args.should_log,
            )  # fmt: skip
        for part, (trained, total) in count_parameters(model).items():
            logger.info("%s: %.2f M of %.2f M parameters are trained", part, trained / 1e6, total / 1e6)

        trainer = SpeechLLMTrainer(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=validation_rows or None,
            data_collator=collator,
            eval_collator=SpeechLLMCollator(processor),
            processing_class=processor,
            train_weights=weights,
        )
        trainer.get_optimizer_cls_and_kwargs(args, model)  # --optim may need a package
    except ModuleNotFoundError:
        raise  # `main` reports this error
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {' '.join(str(error).split())}")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except Preempted as end:
        report(f"{prog()}: {end}")
        _end_training(trainer, EXIT_STATUS)
        sys.exit(EXIT_STATUS)
    except (RetentionError, SaveError, VerificationError) as error:  # raised on all ranks
        trainer.accelerator.end_training()
        sys.exit(f"{prog()}: {error}")
    except (BadDataError, FaultError, CheckpointError) as error:
        sys.exit(f"{prog()}: {error}")
    save_final(trainer, result)
    if args.push_to_hub:
        try:
            trainer.push_to_hub()
        except (OSError, ValueError, RuntimeError) as error:
            again = f"hf-speechllm push --input {args.output_dir} --hub_model_id {trainer.hub_model_id}"
            sys.exit(
                f"{prog()}: error: {error}; the model is saved in {args.output_dir}; to publish the model: {again}"
            )
    _end_training(trainer)


def _end_training(trainer: Any, status: int = 0) -> None:
    """Leaves the process group; otherwise its threads can abort the process at the end of the interpreter."""
    trainer.accelerator.end_training()
    if trainer.args.world_size > 1:
        skip_teardown(status)
