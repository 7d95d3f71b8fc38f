"""Native speech LLMs of transformers are trained, decoded and published by the commands of this package."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_speechllm import (
    AugmentationOptions,
    SpeechLLMForConditionalGeneration,
    SpeechLLMProcessor,
    SpeechLLMTrainer,
    SpeechLLMTrainingArguments,
    Transcriber,
    prepare_dataset,
)
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.diagnosis.doctor import diagnose
from hf_speechllm.diagnosis.model_checks import ModelChecks
from hf_speechllm.diagnosis.rows import read_rows
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.model import chat
from hf_speechllm.model.native_families import part_of

# Loads every folder with transformers alone, and writes logits and generated ids.
STOCK = """
import sys
import torch
import transformers
from transformers import AutoProcessor

for folder, architecture in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    AutoProcessor.from_pretrained(folder)
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits[:, -1], folder + "/logits.pt")
assert "hf_speechllm" not in sys.modules
"""


@pytest.fixture
def train(run_recipe, tiny_corpus, tmp_path):
    """Trains a model by the recipe; returns the output folder."""

    def run(folder, *options, name="run"):
        output = tmp_path / name
        end = run_recipe(
            "finetune.py", "--model_name_or_path", folder, "--train_file", tiny_corpus.jsonl,
            "--output_dir", output, "--max_steps", 2, "--per_device_train_batch_seconds", 4, "--learning_rate", "1e-2",
            "--warmup_steps", 0, "--lr_scheduler_type", "constant", "--logging_steps", 1,
            "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
            "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1, "--dataloader_num_workers", 0,
            *options,
        )  # fmt: skip
        assert end is None, end
        return output

    return run


def changed_parts(before, after):
    tensors = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert tensors[0].keys() == tensors[1].keys()
    return {part_of(name) for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}


def test_trained_models_load_with_transformers_alone(native_folders, train):
    """Steps train the parts that are not frozen; transformers without this package computes the same logits."""
    arguments, expected = [], {}
    for model_type, folder in native_folders.items():
        output = train(folder, "--freeze_audio_encoder", "true", name=model_type)
        model = SpeechLLMForConditionalGeneration.from_pretrained(output).eval()
        assert changed_parts(folder, output) == {"audio_adaptor", "llm"}
        processor = SpeechLLMProcessor.from_pretrained(output)
        request = chat.parse_messages(chat.transcription_messages(b"", chat.transcription_prompt()))
        waveform = torch.sin(torch.arange(processor.sampling_rate) / 9).numpy()
        inputs = dict(processor.batch([request], [waveform], return_labels=False)) | dict(model.family.options)
        torch.save(inputs, output / "inputs.pt")
        with torch.no_grad():
            expected[output] = model(**inputs).logits[:, -1]
        arguments += [output, type(model).__name__]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, arguments)], check=True, cwd=output, timeout=300)
    for output, logits in expected.items():
        torch.testing.assert_close(torch.load(output / "logits.pt"), logits)


@pytest.mark.parametrize("native_folder", ["qwen3_asr", "granite_speech"], indirect=True)
def test_validation_decodes_and_logs_error_rates(native_folder, train, tiny_corpus):
    output = train(
        native_folder, "--validation_file", f"dev={tiny_corpus.jsonl}", "--eval_cer", "true", "--eval_cer_samples", 3,
        "--eval_max_new_tokens", 4,
    )  # fmt: skip
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_dev_reference_tokens"] > 0 and 0 < results["eval_dev_loss"] < 10
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert log[1]["audio_seconds_per_second"] > 0 and 0 <= log[1]["padding_share"] < 1


@pytest.mark.parametrize("native_folder", ["qwen3_asr", "vibevoice_asr"], indirect=True)
def test_lora_is_resumed_merged_and_decoded(native_folder, train, run_recipe, tiny_corpus, tmp_path):
    options = ["--use_lora", "true", "--save_strategy", "steps", "--save_steps", 1]
    whole = train(native_folder, *options, "--max_steps", 4, name="whole")
    part = train(native_folder, *options, "--max_steps", 2, name="part")
    train(native_folder, *options, "--max_steps", 4, "--resume_from_checkpoint", "last", name="part")
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (whole, part)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert any("lora_B" in name and tensor.any() for name, tensor in adapters[0].items())
    merged, output = tmp_path / "merged", tmp_path / "hyp.txt"
    assert run_recipe("merge_lora.py", "--input", whole, "--output", merged) is None
    for model in (whole, merged):
        end = run_recipe(
            "decode.py", "--model_name_or_path", model, "--scp_file", tiny_corpus.scp, "--output_file", output,
            "--device", "cpu", "--max_new_tokens", 4, "--overwrite",
        )  # fmt: skip
        assert end in (None, 0)
        assert len(output.read_text(encoding="utf-8").splitlines()) == 24
    assert json.loads((merged / "config.json").read_text())["model_type"] == native_folder.name.rstrip("0123456789")


@pytest.mark.parametrize("native_folder", ["glmasr"], indirect=True)
@pytest.mark.parametrize(
    "options, message",
    [
        (["--spec_augment", "true"], "--spec_augment does not support glmasr models"),
        (["--audio_token_dropout", "0.1"], "--audio_token_dropout does not support glmasr models"),
        (["--padding_free", "true"], "--padding_free requires an LLM of type qwen2 or qwen3"),
        (["--compile_layers", "true"], "--compile_layers does not support glmasr models"),
        (
            ["--cache_level", "encoder", "--freeze_audio_encoder", "true"],
            "--cache_level encoder does not support glmasr models",
        ),
    ],
)
def test_options_that_need_our_own_features_are_refused(native_folder, train, options, message):
    with pytest.raises(AssertionError, match=message):
        train(native_folder, *options)


@pytest.mark.parametrize("native_folder", ["granite_speech"], indirect=True)
def test_conversion_to_other_layouts_is_refused(native_folder, run_recipe, tmp_path):
    end = run_recipe(
        "convert_checkpoint.py", "--input", native_folder, "--output", tmp_path / "out", "--format", "funasr"
    )
    assert "granite_speech model stays in the layout of transformers" in end


@pytest.mark.parametrize("native_folder", ["granite_speech"], indirect=True)
def test_adapters_of_the_model_are_merged_when_it_is_loaded(native_folder, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(native_folder).eval()
    processor = SpeechLLMProcessor.from_pretrained(native_folder)
    model.save_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    request = chat.parse_messages(chat.transcription_messages(b"", chat.transcription_prompt()))
    inputs = processor.batch([request], [torch.sin(torch.arange(16000) / 9).numpy()], return_labels=False)
    with torch.no_grad():
        expected = adapted(**inputs).logits
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.has_lora_adapter is False


@pytest.mark.parametrize("native_folder", ["qwen3_asr"], indirect=True)
@pytest.mark.parametrize("layers, message", [(2000, "the files contain"), (10**9, "num_hidden_layers is 1000000000")])
def test_a_config_larger_than_the_weights_is_refused(native_folder, tmp_path, layers, message):
    shutil.copytree(native_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("native_folder", ["qwen3_asr"], indirect=True)
def test_a_missing_tensor_is_refused(native_folder, tmp_path):
    shutil.copytree(native_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors["other"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing: {name}; unexpected: other"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("native_folder", ["glmasr"], indirect=True)
@pytest.mark.parametrize("streaming", [[], ["--streaming", "true"]], ids=["", "streaming"])
def test_rows_that_the_model_cannot_represent_are_bad_rows(native_folder, train, tiny_corpus, tmp_path, streaming):
    rows = [json.loads(line) for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()]
    rows[1]["hotwords"] = ["foo"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(AssertionError, match="" if streaming else "glmasr has no context or hotwords"):
        train(native_folder, "--train_file", path, *streaming)
    train(native_folder, "--train_file", path, "--max_bad_fraction", "0.1", *streaming, name="allowed")


@pytest.mark.parametrize("native_folder", ["qwen3_asr"], indirect=True)
def test_python_interface(native_folder, tone, tmp_path):
    """Training rows from Python, training, and transcription of a waveform."""
    model = SpeechLLMForConditionalGeneration.from_pretrained(native_folder)
    processor = SpeechLLMProcessor.from_pretrained(native_folder)
    audio = [{"array": tone(seconds)[:, 0], "sampling_rate": 16000} for seconds in (0.5, 1.0)]
    dataset = Dataset.from_dict({"audio": audio, "text": ["one", "two"]})
    rows = prepare_dataset(dataset, processor)
    arguments = SpeechLLMTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", per_device_train_batch_seconds=5
    )
    trainer = SpeechLLMTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
    assert trainer.train().training_loss > 0
    assert isinstance(Transcriber(model, processor, max_new_tokens=4).transcribe(tone(1.0)[:, 0]), str)


@pytest.mark.parametrize("native_folder", ["qwen3_asr"], indirect=True)
def test_waveforms_are_augmented(native_folder, tone):
    """Also with the waveforms that `prepare_dataset` stores by default."""
    processor = SpeechLLMProcessor.from_pretrained(native_folder)
    audio = [{"array": tone(seconds)[:, 0], "sampling_rate": 16000} for seconds in (0.5, 1.0)]
    dataset = Dataset.from_dict({"audio": audio, "text": ["one", "two"]})
    collator = SpeechLLMCollator.augmenting(processor, AugmentationOptions(noise_prob=1.0))
    batches = []
    for feature_dtype in ("float16", "off"):
        rows = prepare_dataset(dataset, processor, feature_dtype=feature_dtype)
        collator.use_training_rows(rows)
        batch = [{**row, "seed": (0, index)} for index, row in enumerate(rows)]
        batches.append(collator(batch))
        assert not torch.equal(batches[-1]["input_features"], SpeechLLMCollator(processor)(batch)["input_features"])
    assert torch.equal(batches[0]["input_features"], batches[1]["input_features"])


@pytest.mark.parametrize("native_folder", ["qwen3_asr", "glmasr"], indirect=True)
def test_gradient_checkpointing_does_not_change_the_result(native_folder, train):
    options = ["--freeze_llm", "true", "--save_strategy", "no"]
    plain = train(native_folder, *options, name="plain")
    checkpointed = train(native_folder, *options, "--gradient_checkpointing", "true", name="checkpointed")
    tensors = [load_file(folder / "model.safetensors") for folder in (plain, checkpointed)]
    torch.testing.assert_close(*tensors)
    assert changed_parts(native_folder, checkpointed) == {"audio_encoder", "audio_adaptor"}


@pytest.mark.parametrize("native_folder", ["qwen3_asr", "qwen2_audio"], indirect=True)
def test_doctor_finds_high_losses(native_folder, tiny_corpus, monkeypatch):
    losses = {}
    monkeypatch.setattr(
        "hf_speechllm.diagnosis.model_checks.high_losses", lambda corpus, found, counts: losses.update(found) or ()
    )
    diagnose(read_rows([str(tiny_corpus.jsonl)]), vad=False, more_checks=[ModelChecks(str(native_folder))])
    assert len(losses) > 10 and all(1 < loss < 10 for loss in losses.values())
