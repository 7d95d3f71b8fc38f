"""Training runs on a tiny model."""

import pytest
import torch
from transformers import TrainerCallback, set_seed

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.augmentation import augmentations
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora
from hf_speechllm.training.trainer import SpeechLLMTrainer


class Interruption(TrainerCallback):
    """Ends a run after a step as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt():
    """Makes a callback that ends a run after a step as Ctrl-C does."""
    return Interruption


@pytest.fixture
def make_arguments(tiny_model, tiny_corpus, tmp_path):
    """Options of a short run on the CPU."""

    def make(**options):
        defaults = {
            "model_name_or_path": str(tiny_model),
            "train_file": [str(tiny_corpus.jsonl)],
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_seconds": 4.0,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "preprocessing_num_workers": 1,
            "lora_r": 4,
        }
        return SpeechLLMTrainingArguments(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def tiny_rows(tiny_model, tiny_corpus, tmp_path_factory):
    """The rows of the corpus, with their features."""
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    args = SpeechLLMTrainingArguments(
        model_name_or_path=str(tiny_model),
        train_file=[str(tiny_corpus.jsonl)],
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        preprocessing_num_workers=1,
        use_cpu=True,
    )
    return prepare_rows(args.train_file, processor, 2048, args)[0]


@pytest.fixture
def make_trainer(make_arguments, tiny_rows):
    """A trainer as recipes/finetune.py builds it."""

    def make(callbacks=(), model=None, eval_dataset=None, train_dataset=None, **options):
        args = make_arguments(**options)
        set_seed(args.seed)
        processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
        if model is None:
            model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        freeze_parts(model, args.freeze_audio_encoder, args.freeze_audio_adaptor, args.freeze_llm)
        if args.use_lora:
            model = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        return SpeechLLMTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset or tiny_rows,
            eval_dataset=eval_dataset,
            data_collator=SpeechLLMCollator(
                processor, augmentations(args.tempo_perturb, args.spec_augment), args.dither
            ),
            eval_collator=SpeechLLMCollator(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )

    return make
