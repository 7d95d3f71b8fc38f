"""Training runs on a tiny model."""

import dataclasses

import pytest
import torch
from transformers import TrainerCallback, set_seed

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.augmentation import augmentations
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.model.options import ModelOptions
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora
from hf_speechllm.training.options import FinetuningOptions, TrainedPartsOptions
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
def split_options(tiny_model, tiny_corpus, tmp_path):
    """Options of a short run on the CPU, by their dataclasses."""

    def split(**options):
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
        options = {**defaults, **options}
        kinds = (ModelOptions, DataOptions, TrainedPartsOptions)
        names = [{item.name for item in dataclasses.fields(kind)} & {*options} for kind in kinds]
        found = [kind(**{name: options.pop(name) for name in own}) for kind, own in zip(kinds, names, strict=True)]
        return *found, SpeechLLMTrainingArguments(**options)

    return split


@pytest.fixture
def make_options(split_options):
    """Options of a short run on the CPU, as the command line combines them."""
    return lambda **options: FinetuningOptions(*split_options(**options))


@pytest.fixture
def make_arguments(split_options):
    """Options of the trainer for a short run on the CPU."""
    return lambda **options: split_options(**options)[-1]


@pytest.fixture(scope="session")
def tiny_rows(tiny_model, tiny_corpus, tmp_path_factory):
    """The rows of the corpus, with their features."""
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    options = DataOptions(cache_dir=str(tmp_path_factory.mktemp("cache")), preprocessing_num_workers=1)
    return prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)[0]


@pytest.fixture
def make_trainer(split_options, tiny_rows):
    """A trainer as recipes/finetune.py builds it."""

    def make(callbacks=(), model=None, eval_dataset=None, train_dataset=None, **options):
        loaded, data, parts, args = split_options(**options)
        set_seed(args.seed)
        processor = SpeechLLMProcessor.from_pretrained(loaded.model_name_or_path)
        if model is None:
            model = SpeechLLMForConditionalGeneration.from_pretrained(loaded.model_name_or_path, dtype=torch.float32)
        freeze_parts(model, parts.freeze_audio_encoder, parts.freeze_audio_adaptor, parts.freeze_llm)
        if parts.use_lora:
            model = add_lora(model, parts.lora_r, parts.lora_alpha, parts.lora_dropout, parts.lora_target_modules)
        return SpeechLLMTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset or tiny_rows,
            eval_dataset=eval_dataset,
            data_collator=SpeechLLMCollator(
                processor, augmentations(data.tempo_perturb, data.spec_augment), data.dither
            ),
            eval_collator=SpeechLLMCollator(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )

    return make
