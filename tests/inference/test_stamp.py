"""Fingerprint of a model: independent of the path, and different after any change that can change a text."""

import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.inference.stamp import model_fingerprint


def fingerprint_of(folder):
    return model_fingerprint(
        SpeechLLMForConditionalGeneration.from_pretrained(folder), SpeechLLMProcessor.from_pretrained(folder)
    )


def changed(first, second):
    return {name for name in first | second if first.get(name) != second.get(name)}


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_one_weight(folder):
    """Changes a weight, but not size and times of the file."""
    file = folder / "model.safetensors"
    status, tensors = file.stat(), load_file(file)
    tensors["llm.model.embed_tokens.weight"][11, 3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size


def edit(name, old, new):
    def change(folder):
        (file,) = folder.rglob(name)
        content = file.read_text(encoding="utf-8")
        assert content.count(old) >= 1, content
        file.write_text(content.replace(old, new, 1), encoding="utf-8")

    return change


def edit_tokenizer(folder):
    processor = SpeechLLMProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["new"])
    processor.save_pretrained(folder)


def edit_template(folder):
    processor = SpeechLLMProcessor.from_pretrained(folder)
    processor.chat_template = "{{ messages }}"
    processor.save_pretrained(folder)


def edit_processor(folder):
    processor = SpeechLLMProcessor.from_pretrained(folder)
    processor.think_block = True
    processor.save_pretrained(folder)


def edit_features(folder):
    processor = SpeechLLMProcessor.from_pretrained(folder)
    processor.feature_extractor.stride_lfr += 1
    processor.save_pretrained(folder)


def edit_generation(folder):
    model = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    model.generation_config.repetition_penalty = 1.1
    model.generation_config.save_pretrained(folder)


def test_fingerprint_does_not_depend_on_the_path(tiny_model, folder):
    assert fingerprint_of(tiny_model) == fingerprint_of(tiny_model) == fingerprint_of(folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (edit_one_weight, "weights"),
        (edit("config.json", '"use_low_frame_rate": false', '"use_low_frame_rate": true'), "configuration"),
        (edit_generation, "generation configuration"),
        (edit_tokenizer, "processor"),
        (edit_template, "processor"),
        (edit_processor, "processor"),
        (edit_features, "processor"),
    ],
)
def test_each_change_is_found_and_named(tiny_model, folder, change, name):
    change(folder)
    assert changed(fingerprint_of(tiny_model), fingerprint_of(folder)) == {name}


def test_fingerprint_depends_on_adapter_and_base(tiny_model, folder, tmp_path):
    adapter = tmp_path / "adapter"
    torch.manual_seed(0)
    base = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(adapter)
    before = fingerprint_of(adapter)
    assert changed(before, fingerprint_of(folder)) == {"weights"}
    assert fingerprint_of(adapter) == before
    edit_one_weight(folder)
    assert changed(before, fingerprint_of(adapter)) == {"weights"}


def test_fingerprint_contains_versions_of_packages(tiny_model, monkeypatch):
    before = fingerprint_of(tiny_model)
    monkeypatch.setattr("hf_speechllm.version.__version__", "99.0")
    assert changed(before, fingerprint_of(tiny_model)) == {"hf_speechllm"}
    assert "transformers" in before
