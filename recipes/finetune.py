"""Fine-tune a speech LLM.

# One GPU, only the LLM
accelerate launch recipes/finetune.py recipes/configs/llm_only.yaml \
    --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf \
    --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir exp/llm_only

# Eight GPUs, LoRA
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/finetune.py recipes/configs/lora.yaml \
    --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf --train_file data/train.jsonl --output_dir exp/lora

What the command line says goes before what the YAML says. All options: --help.
"""

import logging
import os
import sys

from hf_speechllm.training.arguments import parse_arguments

logger = logging.getLogger("finetune")


def main() -> None:
    # Every batch has a shape of its own: segments that can grow keep a GPU's memory from falling to pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    args = parse_arguments(description=__doc__)

    # After the arguments, so that a wrong one is told at once.
    import torch
    from transformers import set_seed

    from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from hf_speechllm.audio.downloads import UrlPolicy
    from hf_speechllm.data.augmentation import augmentations
    from hf_speechllm.data.bad_rows import BadDataError
    from hf_speechllm.data.collator import SpeechLLMCollator
    from hf_speechllm.data.dataset import prepare_rows
    from hf_speechllm.data.encoder_cache import add_encoded
    from hf_speechllm.data.hotword_lists import hotword_sampler
    from hf_speechllm.data.streaming import open_stream
    from hf_speechllm.formats.checkpoint import CheckpointError
    from hf_speechllm.training.cache_stage import choose_level
    from hf_speechllm.training.checkpointing.selection import RetentionError
    from hf_speechllm.training.checkpointing.verification import ReadbackError
    from hf_speechllm.training.checkpointing.writer import SaveError
    from hf_speechllm.training.faults import FaultError
    from hf_speechllm.training.freezing import count_parameters, freeze_parts
    from hf_speechllm.training.lora import add_lora
    from hf_speechllm.training.preemption import EXIT_STATUS, Preempted
    from hf_speechllm.training.run import describe_data, find_checkpoint, save_final, set_up_logging
    from hf_speechllm.training.trainer import SpeechLLMTrainer

    set_up_logging(args)
    set_seed(args.seed)

    # Data first: its errors are found before the model is loaded.
    try:
        UrlPolicy.change(args.url_max_megabytes, args.url_timeout_seconds, args.allow_private_redirects)
        checkpoint = find_checkpoint(args)
        processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
        limit = SpeechLLMConfig.from_pretrained(args.model_name_or_path).max_feature_frames
        stretched = int(limit / (1 + args.tempo_perturb))  # augmentation may lengthen a recording
        collator = SpeechLLMCollator(processor, augmentations(args.tempo_perturb, args.spec_augment), args.dither)
        with args.main_process_first(desc="preparing the data"):
            if args.streaming:
                train_rows, weights = open_stream(args.train_file, collator, stretched, args, args.train_weight), None
            else:
                train_rows, weights = prepare_rows(args.train_file, processor, stretched, args, args.train_weight)
            collator.hotwords = hotword_sampler(args, None if args.streaming else train_rows)
            validation_rows = {
                name: prepare_rows([file], processor, limit, args)[0] for name, file in args.validation_files.items()
            }
    except (BadDataError, OSError, ValueError) as error:
        sys.exit(f"finetune.py: error: {error}")
    describe_data(train_rows, validation_rows)

    # Master weights are float32 whatever the checkpoint holds: bfloat16 ones would lose most small updates.
    model = SpeechLLMForConditionalGeneration.from_pretrained(
        args.model_name_or_path, dtype=torch.float32, attn_implementation=args.attn_implementation
    )
    freeze_parts(model, args.freeze_audio_encoder, args.freeze_audio_adaptor, args.freeze_llm)
    if args.use_lora:
        model = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    if (level := choose_level(args)) != "fbank":
        train_rows = add_encoded(train_rows, model, processor, level, args)
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
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except Preempted as end:
        logger.warning("%s", end)
        trainer.accelerator.end_training()
        sys.exit(EXIT_STATUS)
    except (RetentionError, SaveError, ReadbackError) as error:  # of all ranks alike
        trainer.accelerator.end_training()
        sys.exit(f"finetune.py: {error}")
    except (BadDataError, FaultError, CheckpointError) as error:
        sys.exit(f"finetune.py: {error}")
    save_final(trainer, result)
    if args.push_to_hub:
        trainer.push_to_hub()
    # Gloo threads that outlive the interpreter abort the process.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
