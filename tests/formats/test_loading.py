"""Every layout loads, every conversion is bit-exact, and damage is reported."""

import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import FunAsrNanoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from hf_speechllm import FbankFeatureExtractor, SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats import native
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.formats.loading import LAYOUTS, find_layout, read_checkpoint
from hf_speechllm.formats.quantization import only_whole_blocks
from hf_speechllm.formats.saving import save_funasr, save_native, write_checkpoint
from hf_speechllm.model import chat
from hf_speechllm.training.lora import add_lora

pytestmark = pytest.mark.core

load = SpeechLLMForConditionalGeneration.from_pretrained
MODEL_FILES = {"speech_llm": "model.safetensors", "native": "model.safetensors", "funasr": "model.pt"}


def edit_tensors(folder, layout, change):
    """Applies `change` to the stored tensors."""
    file = folder / MODEL_FILES[layout]
    if layout == "funasr":
        state = torch.load(file, weights_only=True)["state_dict"]
        change(state)
        torch.save({"state_dict": state}, file)
    else:
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})


def mixed_model(make_model, tied=True):
    """A bfloat16 LLM with a float32 encoder and adaptor, a CTC branch and its vocabulary."""
    model, processor = make_model(tied=tied)
    model.llm.to(torch.bfloat16)
    model.ctc_tensors = {
        "ctc_decoder.linear1.weight": torch.randn(4, 16),
        "ctc.ctc_lo.bias": torch.randn(7, dtype=torch.bfloat16),
        "file:multilingual.tiktoken": torch.tensor(list(b"IQ== 0\n"), dtype=torch.uint8),
    }
    return model, processor


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# Conversion


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_conversion_and_back_is_bit_exact(source, target, make_model, make_checkpoint, tmp_path, run_recipe):
    model, processor = mixed_model(make_model)
    folder = make_checkpoint(source, "source", model, processor)
    there, back = tmp_path / "there", tmp_path / "back"
    for origin, output, layout in ((folder, there, target), (there, back, source)):
        arguments = ["--input", origin, "--output", output, "--format", layout, "--force"]
        assert run_recipe("convert_checkpoint.py", *arguments) is None
    assert find_layout(there) == target
    start, middle, end = (read_checkpoint(item) for item in (folder, there, back))
    for checkpoint in (middle, end):
        assert same(start.tensors, checkpoint.tensors)
        assert same(start.ctc_tensors, checkpoint.ctc_tensors)
        assert checkpoint.generation_config.to_dict() == start.generation_config.to_dict()
        assert checkpoint.config.use_low_frame_rate
    if source != "funasr":
        assert same(load_file(folder / "model.safetensors"), load_file(back / "model.safetensors"))
    else:
        states = [torch.load(item / "model.pt", weights_only=True)["state_dict"] for item in (folder, back)]
        assert same(*states)
        for name in ("config.yaml", "configuration.json"):  # JSON is YAML
            assert yaml.safe_load((folder / name).read_text()) == yaml.safe_load((back / name).read_text())
    first, last = (SpeechLLMProcessor.from_pretrained(item) for item in (folder, back))
    assert first.feature_extractor.to_dict() == last.feature_extractor.to_dict()
    assert first.tokenizer.get_vocab() == last.tokenizer.get_vocab()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_all_layouts_give_the_same_logits(layout, tied, make_model, make_checkpoint, logits):
    model, processor = make_model(tied=tied)
    folder = make_checkpoint(layout, model=model, processor=processor)
    loaded, loaded_processor = load(folder), SpeechLLMProcessor.from_pretrained(folder)
    assert loaded.config.tie_word_embeddings == loaded.config.llm_config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(loaded, loaded_processor), logits(model, processor), atol=0, rtol=0)
    assert not loaded.training


@pytest.mark.parametrize("layout", ["speech_llm", "native"])
def test_sharded_safetensors(layout, make_model, tmp_path, make_checkpoint, run_recipe):
    folder = make_checkpoint("funasr")
    output = tmp_path / "sharded"
    arguments = ["--input", folder, "--output", output, "--format", layout, "--force", "--max_shard_size", "20KB"]
    assert run_recipe("convert_checkpoint.py", *arguments) is None
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert same(read_checkpoint(output).tensors, read_checkpoint(folder).tensors)
    assert same(dict(load(output).state_dict()), dict(load(folder).state_dict()))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    wrong = {**index, "weight_map": {**index["weight_map"], "gone": shard}}
    (output / "model.safetensors.index.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match="index.* gone"):
        read_checkpoint(output)
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    next(output.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_checkpoint(output)


def test_existing_output_is_refused_and_unchanged(make_checkpoint, tmp_path, run_recipe):
    folder, output = make_checkpoint("funasr"), tmp_path / "taken"
    output.mkdir()
    arguments = ["--input", folder, "--output", output, "--format", "speech_llm"]
    assert run_recipe("convert_checkpoint.py", *arguments) == 1
    with pytest.raises(FileExistsError, match="taken exists"):
        write_checkpoint(read_checkpoint(folder), SpeechLLMProcessor.from_pretrained(folder), output, "speech_llm")
    assert list(output.iterdir()) == []


# Loading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_is_the_stored_or_the_requested_one(layout, make_model, make_checkpoint, logits):
    folder = make_checkpoint(layout, None, *mixed_model(make_model))
    if layout == "speech_llm":
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # the widest
    model = load(folder)
    assert {parameter.dtype for parameter in model.llm.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.audio_encoder.parameters()} == {torch.float32}
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(logits(model, SpeechLLMProcessor.from_pretrained(folder))).all()
    for dtype in (torch.float32, "float32"):
        assert {parameter.dtype for parameter in load(folder, dtype=dtype).parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_of_transformers_work(layout, make_checkpoint):
    folder = make_checkpoint(layout)
    model = load(folder, attn_implementation="eager", device_map="cpu")
    parts = (model, model.audio_encoder, model.audio_adaptor, model.llm)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    model, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert {part.config._attn_implementation for part in (model, model.audio_adaptor, model.llm)} == {"sdpa"}
    config, unused = SpeechLLMConfig.from_pretrained(folder, audio_token_id=1, other=2, return_unused_kwargs=True)
    assert (config.audio_token_id, unused) == (1, {"other": 2})
    assert load(folder, audio_token_id=1).config.audio_token_id == 1
    assert load(str(folder)).name_or_path == str(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hub_id(layout, make_checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    make_checkpoint(layout).rename(repository / "snapshots" / ("a" * 40))
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = load("org/tiny", **options)
    processor = SpeechLLMProcessor.from_pretrained("org/tiny", **options)
    assert model.config.audio_token_id == processor.audio_token_id
    assert model.config.use_low_frame_rate and processor.use_low_frame_rate


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_settings_are_kept_in_every_layout(layout, make_checkpoint):
    for flag in (True, False):
        folder = make_checkpoint(layout, f"{layout}{flag}", adaptor={"use_low_frame_rate": flag})
        assert SpeechLLMConfig.from_pretrained(folder).use_low_frame_rate == flag
        assert load(folder).config.use_low_frame_rate == flag
        assert SpeechLLMProcessor.from_pretrained(folder).use_low_frame_rate == flag


@pytest.fixture
def unlike_all_defaults(make_model):
    """Makes a model and a processor whose every setting differs from the default of every layout's reader."""

    def make(layout):
        adaptor = {
            "hidden_dropout": 0.13,
            "attention_dropout": 0.14,
            "layer_norm_eps": 1e-7,
            "projector_hidden_size": 28,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "use_low_frame_rate": layout != "native",  # whose class can't have it, and where it is the default
        }
        if layout != "native":
            adaptor["downsample_rate"] = 3
        if layout != "funasr":
            adaptor |= {"hidden_act": "gelu", "projector_hidden_act": "silu"}
        model, processor = make_model(adaptor=adaptor, attention_dropout=0.17, rms_norm_eps=1e-4)
        config = model.config.to_dict()
        config["audio_encoder_config"] |= {
            "hidden_dropout": 0.15,
            "attention_dropout": 0.16,
            "fsmn_kernel_size": 7,
            "max_position_embeddings": 777,
            "num_mel_bins": 20,
            "num_stacked_frames": 5,
            "num_hidden_layers": 6,
            "num_attention_heads": 1,
        }
        config["audio_token_id"] = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        if layout != "funasr":
            config["initializer_range"] = 0.03
        model = SpeechLLMForConditionalGeneration(SpeechLLMConfig.from_dict(config))
        model.generation_config.update(max_new_tokens=77, repetition_penalty=1.3)
        features = FbankFeatureExtractor(
            feature_size=20, sampling_rate=8000, frame_length=30, frame_shift=15, window_type="povey",
            num_frames_lfr=5, stride_lfr=4, waveform_scale=1.0, dither=0.5,
        )  # fmt: skip
        return model, SpeechLLMProcessor(
            features, processor.tokenizer, audio_token="<|im_start|>", think_block=True, system_prompt=False,
            downsample_rate=model.config.downsample_rate, use_low_frame_rate=model.config.use_low_frame_rate,
        )  # fmt: skip

    return make


def settings(config):
    """A config without what tells of its origin and the libraries."""
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype", "funasr_files", "model_type"}
    return {
        key: settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ignored
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_setting_is_lost_in_any_layout(layout, unlike_all_defaults, make_checkpoint):
    model, processor = unlike_all_defaults(layout)
    folder = make_checkpoint(layout, model=model, processor=processor)
    loaded, again = load(folder), SpeechLLMProcessor.from_pretrained(folder)
    assert settings(loaded.config.to_dict()) == settings(model.config.to_dict())
    assert again.feature_extractor.to_dict() == {
        **processor.feature_extractor.to_dict(),
        # FunASR's readers leave dither off, which would make decoding random.
        "dither": 0.0 if layout == "funasr" else 0.5,
    }
    for name in ("audio_token", "audio_token_id", "downsample_rate", "use_low_frame_rate", "think_block"):
        assert getattr(again, name) == getattr(processor, name), name
    assert again.system_prompt is False
    if layout == "funasr":  # FunASR asks for what the other parts tell us
        conf = yaml.safe_load((folder / "config.yaml").read_text())["audio_adaptor_conf"]
        assert (conf["encoder_dim"], conf["llm_dim"]) == (16, 16)
    found, expected = (settings(item.generation_config.to_diff_dict()) for item in (loaded, model))
    assert found == expected and expected["max_new_tokens"] == 77


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dialogue_settings_are_kept_in_every_layout(layout, make_model, make_checkpoint):
    model, processor = make_model(adaptor={"use_low_frame_rate": False})
    for think_block, system_prompt in ((True, True), (False, False), (True, False)):
        processor.think_block, processor.system_prompt = think_block, system_prompt
        folder = make_checkpoint(layout, f"{layout}{think_block}{system_prompt}", model, processor)
        loaded = SpeechLLMProcessor.from_pretrained(folder)
        assert (loaded.think_block, loaded.system_prompt) == (think_block, system_prompt)
        expected = processor.apply_transcription_request(torch.zeros(1600).numpy())["input_ids"]
        assert torch.equal(loaded.apply_transcription_request(torch.zeros(1600).numpy())["input_ids"], expected)
        if layout == "native":
            stock = FunAsrNanoProcessor.from_pretrained(folder)
            assert torch.equal(stock.apply_transcription_request(torch.zeros(1600).numpy())["input_ids"], expected)


def test_dialogue_settings_are_read_from_a_funasr_config(make_checkpoint):
    folder = make_checkpoint("funasr")
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    assert "dataset_conf" not in conf and conf["frontend_conf"]["dither"] == 0
    conf["dataset_conf"] = {"do_think": False, "sys_prompt": False, "batch_size": 6000}
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    processor = SpeechLLMProcessor.from_pretrained(folder)
    assert processor.think_block and not processor.system_prompt
    save_funasr(load(folder), processor, folder.parent / "again")
    again = yaml.safe_load((folder.parent / "again" / "config.yaml").read_text())
    assert again["dataset_conf"] == conf["dataset_conf"]


def test_settings_that_a_funasr_config_lacks_have_the_defaults_of_its_classes(make_checkpoint):
    folder = make_checkpoint("funasr")
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    short = {key: value for key, value in conf.items() if not key.endswith("_conf") and key != "hf_speechllm"}
    short["audio_encoder_conf"] = {"tp_blocks": 20}
    short["llm_conf"] = {"init_param_path": "Qwen3-0.6B"}
    (folder / "config.yaml").write_text(yaml.safe_dump(short))
    config = SpeechLLMConfig.from_pretrained(folder)
    encoder, adaptor = config.audio_encoder_config, config.audio_adaptor_config
    # SenseVoiceEncoderSmall, Transformer, WavFrontend; tables and tokens as of Fun-ASR-Nano.
    sizes = encoder.hidden_size, encoder.num_attention_heads, encoder.intermediate_size, encoder.fsmn_kernel_size
    assert sizes == (256, 4, 2048, 11)
    assert (encoder.num_hidden_layers, encoder.num_timestamp_prediction_layers) == (26, 20)
    assert (encoder.hidden_dropout, encoder.attention_dropout) == (0.1, 0.0)
    assert (encoder.num_mel_bins, encoder.num_stacked_frames, encoder.max_position_embeddings) == (80, 1, 10001)
    sizes = adaptor.projector_hidden_size, adaptor.num_hidden_layers, adaptor.num_attention_heads
    assert sizes == (2048, 2, 8)
    assert (adaptor.downsample_rate, adaptor.use_low_frame_rate, adaptor.layer_norm_eps) == (2, False, 1e-12)
    assert (adaptor.hidden_dropout, adaptor.attention_dropout) == (0.0, 0.0)
    assert config.audio_token_id == 151646
    short["hf_speechllm"] = {"audio_token_id": conf["hf_speechllm"]["audio_token_id"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(short))
    processor = SpeechLLMProcessor.from_pretrained(folder)
    features = FbankFeatureExtractor(num_frames_lfr=1, stride_lfr=1)
    assert processor.feature_extractor.to_dict() == features.to_dict()
    assert (processor.think_block, processor.system_prompt) == (False, True)


def test_a_native_release_gets_the_original_numerics(make_checkpoint):
    folder = make_checkpoint("native", adaptor={"use_low_frame_rate": False, "layer_norm_eps": 1e-5})
    adaptor = load(folder).config.audio_adaptor_config
    assert (adaptor.use_low_frame_rate, adaptor.layer_norm_eps) == (False, 1e-5)  # according to the marker
    config = json.loads((folder / "config.json").read_text())
    del config["use_low_frame_rate"]
    (folder / "config.json").write_text(json.dumps(config))
    adaptor = load(folder).config.audio_adaptor_config
    assert (adaptor.use_low_frame_rate, adaptor.layer_norm_eps) == (True, 1e-12)
    assert SpeechLLMProcessor.from_pretrained(folder).use_low_frame_rate


# FunASR's model.pt


def test_weights_of_a_training_of_funasr_are_named_by_their_file(make_checkpoint, tmp_path, logits):
    """`++init_param=exp/model.pt.best`, as its trainer writes it, with what a model needs beside it."""
    folder, other = make_checkpoint("funasr"), make_checkpoint("funasr", "other", seed=1)
    state = torch.load(other / "model.pt", weights_only=True)
    file = folder / "model.pt.best"
    torch.save({"state_dict": state, "optimizer": {"state": {}}, "epoch": 3, "val_acc_step_or_eopch": {}}, file)
    model, processor = (kind.from_pretrained(file) for kind in (SpeechLLMForConditionalGeneration, SpeechLLMProcessor))
    expected = SpeechLLMForConditionalGeneration.from_pretrained(other)
    assert torch.equal(logits(model, processor), logits(expected, processor))
    assert SpeechLLMConfig.from_pretrained(file).to_dict().keys() == expected.config.to_dict().keys()
    assert model.name_or_path == str(file)  # what adapters name as their base model
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="config.yaml is missing; copy it and the LLM's folder there from"):
        SpeechLLMForConditionalGeneration.from_pretrained(file)


@pytest.mark.parametrize("wrap", ["state_dict", None, "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_pt_with_or_without_wrapper_in_any_dtype(wrap, dtype, make_checkpoint):
    folder = make_checkpoint("funasr")
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    state = {f"module.{name}": tensor.to(dtype) for name, tensor in state.items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, folder / "model.pt")
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.audio_adaptor.linear1.bias, state["module.audio_adaptor.linear1.bias"])


def test_tied_untied_or_missing_head(make_checkpoint):
    folder = make_checkpoint("funasr")
    edit_tensors(folder, "funasr", lambda state: state.pop("llm.lm_head.weight"))
    model = load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    head = torch.randn_like(model.get_input_embeddings().weight)
    edit_tensors(folder, "funasr", lambda state: state.update({"llm.lm_head.weight": head}))
    model = load(folder)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)


def test_ctc_branch_is_kept_outside_the_model(make_model, make_checkpoint, tmp_path):
    model, processor = mixed_model(make_model)
    folder = make_checkpoint("funasr", None, model, processor)
    assert (folder / "multilingual.tiktoken").read_bytes() == b"IQ== 0\n"
    loaded = load(folder)
    assert not any("ctc" in name for name in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "ctc.safetensors").is_file()
    again = load(tmp_path / "own")
    assert same(again.ctc_tensors, model.ctc_tensors)
    save_native(again, processor, tmp_path / "native", force=True)
    assert not any("ctc" in name for name in load_file(tmp_path / "native" / "model.safetensors"))
    save_funasr(load(tmp_path / "native"), processor, tmp_path / "back")
    state = torch.load(tmp_path / "back" / "model.pt", weights_only=True)["state_dict"]
    assert torch.equal(state["ctc.ctc_lo.bias"], model.ctc_tensors["ctc.ctc_lo.bias"])
    assert (tmp_path / "back" / "multilingual.tiktoken").read_bytes() == b"IQ== 0\n"


def add_funasr_lora(folder, r, lora_conf):
    updates = {}

    def change(state):
        for name in [name for name in state if name.endswith(("q_proj.weight", "v_proj.weight")) and "llm" in name]:
            layer = name.removesuffix(".weight")
            state[f"{layer}.lora_A"] = torch.randn(r, state[name].shape[1])
            state[f"{layer}.lora_B"] = torch.randn(state[name].shape[0], r)
            updates[name] = state[name].clone(), state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"]

    edit_tensors(folder, "funasr", change)
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    conf["llm_conf"].update(use_lora=True, lora_conf=lora_conf)
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    return updates


def test_lora_of_funasr_is_merged(make_checkpoint, tmp_path):
    folder = make_checkpoint("funasr")
    updates = add_funasr_lora(folder, 4, {"r": 4, "lora_alpha": 12})
    model = load(folder)
    for name, (weight, update) in updates.items():
        torch.testing.assert_close(model.state_dict()[name], weight + 3 * update)
    save_funasr(model, SpeechLLMProcessor.from_pretrained(folder), tmp_path / "merged")
    assert not any("lora" in name for name in torch.load(tmp_path / "merged" / "model.pt")["state_dict"])
    llm_conf = yaml.safe_load((tmp_path / "merged" / "config.yaml").read_text())["llm_conf"]
    assert llm_conf["use_lora"] is False and "lora_conf" not in llm_conf


def test_lora_of_funasr_with_a_wrong_rank_or_a_missing_matrix(make_checkpoint):
    folder = make_checkpoint("funasr")
    add_funasr_lora(folder, 4, {"r": 8})
    with pytest.raises(CheckpointError, match="has rank 4, but llm_conf.lora_conf.r"):
        load(folder)
    edit_tensors(folder, "funasr", lambda state: state.pop("llm.model.layers.0.self_attn.q_proj.lora_B"))
    with pytest.raises(CheckpointError, match="without llm.model.layers.0.self_attn.q_proj.lora_B"):
        load(folder)


# Damage


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", [load, read_checkpoint])
def test_missing_unexpected_and_misshapen_tensors_are_listed(layout, reader, make_checkpoint):
    folder = make_checkpoint(layout)
    names = {
        "speech_llm": ("audio_encoder.layers.1.self_attn.q_proj.bias", "llm.model.norm.weight"),
        "native": ("model.audio_tower.layers.1.self_attn.q_proj.bias", "model.language_model.norm.weight"),
        "funasr": ("audio_encoder.encoders.0.self_attn.linear_q_k_v.bias", "llm.model.norm.weight"),
    }[layout]

    def change(state):
        for name in names:
            del state[name]
        state["audio_adaptor.strange"] = torch.zeros(1)

    edit_tensors(folder, layout, change)
    with pytest.raises(CheckpointError) as error:
        reader(folder)
    for name in (*names, "audio_adaptor.strange"):
        assert name in str(error.value)


@pytest.mark.parametrize("layout", ["native", "funasr"])
def test_wrong_shapes_are_refused(layout, make_checkpoint):
    folder = make_checkpoint(layout)
    name = "model.language_model.norm.weight" if layout == "native" else "llm.model.norm.weight"
    edit_tensors(folder, layout, lambda state: state.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=rf"{name} is \(3,\), not \(16,\)"):
        load(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 7, 0.5])
def test_truncated_weights(layout, length, make_checkpoint):
    folder = make_checkpoint(layout)
    file = folder / MODEL_FILES[layout]
    content = file.read_bytes()
    file.write_bytes(content[: int(length * len(content)) if length < 1 else length])
    with pytest.raises(CheckpointError, match=f"{file.name} .*damaged"):
        load(folder)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code_is_not_loaded(save, make_checkpoint):
    folder = make_checkpoint("funasr")
    save({"state_dict": {"weight": Payload()}}, folder / "model.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("audio_encoder", "ConformerEncoder", "audio_encoder is 'ConformerEncoder'"),
        ("audio_adaptor", "QFormer", "audio_adaptor is 'QFormer'"),
        ("model", None, "model is None"),
        ("frontend_conf", {"cmvn_file": "am.mvn"}, "cmvn_file must be null"),
        ("audio_encoder_conf", {"tp_blocks": 0}, "tp_blocks must be at least 1"),
    ],
)
def test_a_config_yaml_with_unknown_parts(key, value, message, make_checkpoint):
    folder = make_checkpoint("funasr")
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    conf[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    for reader in (load, SpeechLLMConfig.from_pretrained, SpeechLLMProcessor.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            reader(folder)


def test_folders_without_a_speech_llm_are_refused(tmp_path, make_checkpoint):
    with pytest.raises(CheckpointError, match="contains no model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match="is a qwen3 model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        load(tmp_path)
    folder = make_checkpoint("funasr")
    (folder / "Qwen3-0.6B").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="the LLM's folder"):
        load(folder)


def test_the_folder_of_a_run_without_a_saved_model_names_its_checkpoint(tmp_path):
    for step in (4, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(CheckpointError, match="contains no model.*name its checkpoint .*checkpoint-12, or save"):
        load(tmp_path)


def test_a_tokenizer_without_the_special_tokens(make_checkpoint):
    folder = make_checkpoint("funasr")
    file = folder / "Qwen3-0.6B" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|im_start\|>"):
        SpeechLLMProcessor.from_pretrained(folder)
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    conf["hf_speechllm"]["audio_token_id"] = 5000
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    with pytest.raises(CheckpointError, match="has no token 5000"):
        SpeechLLMProcessor.from_pretrained(folder)


# Refusals


def test_native_export_of_a_low_frame_rate_model_is_refused(make_checkpoint, tmp_path, run_recipe):
    folder = make_checkpoint("speech_llm")
    arguments = ["--input", folder, "--output", tmp_path / "out", "--format", "native"]
    assert "use_low_frame_rate" in run_recipe("convert_checkpoint.py", *arguments)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["speech_llm"]
    assert run_recipe("convert_checkpoint.py", *arguments, "--force") is None


@pytest.mark.parametrize(
    ("layout", "adaptor", "force", "message"),
    [
        ("native", {"adaptor_type": "linear"}, True, "this one is linear"),
        ("native", {"downsample_rate": 2}, True, "stacks 2"),
        ("native", {"intermediate_size": 8}, True, "quarter of the LLM's width"),
        ("funasr", {"adaptor_type": "linear"}, True, "this one is linear"),
        ("funasr", {"downsample_rate": 2}, False, "ignores downsample_rate"),
        ("funasr", {"layer_norm_eps": 1e-5}, False, "LayerNorm epsilon"),
    ],
)
def test_exports_with_different_results_are_refused(layout, adaptor, force, message, make_model, tmp_path):
    model, processor = make_model(adaptor={"use_low_frame_rate": False, **adaptor})
    save = save_native if layout == "native" else save_funasr
    with pytest.raises(CheckpointError, match=message):
        save(model, processor, tmp_path / "out", force=force)
    assert list(tmp_path.iterdir()) == []


def test_native_export_of_another_window_is_refused(make_model, tmp_path):
    model, processor = make_model(adaptor={"use_low_frame_rate": False})
    processor.feature_extractor.window_type = "povey"
    with pytest.raises(CheckpointError, match="uses a Hamming window, this model a povey window"):
        save_native(model, processor, tmp_path / "out")
    save_native(model, processor, tmp_path / "out", force=True)


# Readers of the exports

STOCK = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, FunAsrNanoForConditionalGeneration
inputs = torch.load(sys.argv[2])
model = FunAsrNanoForConditionalGeneration.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
waveforms = [item.numpy() for item in inputs.pop("waveforms")]
request = processor.apply_transcription_request(waveforms, language="zh", keywords=["hello", "world"])
with torch.no_grad():
    outputs = {"logits": model(**inputs).logits, "input_ids": request["input_ids"]}
assert "hf_speechllm" not in sys.modules
torch.save(outputs, sys.argv[3])
"""


def test_native_export_in_transformers_without_this_package(make_model, make_checkpoint, tmp_path):
    model, processor = make_model(adaptor={"use_low_frame_rate": False})
    folder = make_checkpoint("native", None, model, processor)
    waveforms = [torch.randn(samples) * 0.1 for samples in (9000, 16000)]
    inputs = processor.apply_transcription_request([item.numpy() for item in waveforms])
    torch.save({**inputs, "waveforms": waveforms}, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", STOCK, folder, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs["logits"][mask], expected[mask], atol=1e-5, rtol=0)
    ours = processor.apply_transcription_request(
        [item.numpy() for item in waveforms], language="zh", hotwords=["hello", "world"]
    )
    assert torch.equal(outputs["input_ids"], ours["input_ids"])


@pytest.mark.parametrize(
    "messages",
    [
        chat.transcription_messages("a.wav", chat.transcription_prompt()),
        chat.transcription_messages("a.wav", chat.transcription_prompt("en", itn=False, hotwords=["a", "b"])),
        [{"role": "user", "content": [{"type": "text", "text": "Speech: "}, {"type": "audio", "audio": "a.wav"}]}],
        [
            *chat.transcription_messages("a.wav", "语音转写：", "hello"),
            {"role": "user", "content": "<|startofspeech|>!b.wav<|endofspeech|> again"},
        ],
        [*chat.transcription_messages("a.wav", "语音转写：", "hello")],
    ],
)
def test_native_chat_template_renders_the_same_prompts(messages, make_checkpoint):
    folder = make_checkpoint("native", adaptor={"use_low_frame_rate": False})
    ours = SpeechLLMProcessor.from_pretrained(folder)
    stock = FunAsrNanoProcessor.from_pretrained(folder)
    dialogue = chat.parse_messages(messages)
    counts = [1] * len(dialogue.recordings)
    expected = chat.tokenize(dialogue, ours.tokenizer, counts, ours.audio_token_id).input_ids
    text = stock.tokenizer.apply_chat_template(
        messages, chat_template=stock.chat_template, tokenize=False,
        add_generation_prompt=dialogue.turns[-1].answer is None,
    )  # fmt: skip
    assert stock.tokenizer.encode(text, add_special_tokens=False) == expected


def test_native_chat_template_accepts_context():
    content = [{"type": "audio"}, {"type": "text", "text": "About trains."}, {"type": "keywords", "keywords": ["ICE"]}]
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": content}]],
        chat_template=native.chat_template(),
        add_generation_prompt=True,
    )
    header = chat.hotword_context(["ICE"]).replace("热词列表", "About trains.\n热词列表")
    assert rendered[0].endswith(f"{header}语音转写：<|object_ref_start|><|im_end|>\n<|im_start|>assistant\n")


def test_funasr_export_in_funasr(make_model, make_wav, tmp_path):
    funasr = pytest.importorskip("funasr")
    model, processor = make_model()
    save_funasr(model, processor, tmp_path / "out")
    reader = funasr.AutoModel(model=str(tmp_path / "out"), device="cpu", disable_update=True)
    state = reader.model.state_dict()
    expected = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["state_dict"]
    assert same(dict(state), expected)
    result = reader.generate(input=[str(make_wav(seconds=1.0))], batch_size=1, max_length=5)
    assert isinstance(result[0]["text"], str)


# Adapters


@pytest.fixture
def adapter(make_model, make_checkpoint, tmp_path):
    """An adapter folder from LoRA training with a fully trained adaptor, and the trained model."""
    model, processor = make_model()
    base = load(make_checkpoint("funasr", "base", model, processor))
    base.audio_encoder.requires_grad_(False)
    trained = add_lora(base, r=2, alpha=6)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
            assert "lora_" in name or "audio_adaptor" in name
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", trained.eval(), processor


def test_adapter_is_merged_into_its_base_model(adapter, logits, tmp_path, run_recipe):
    folder, trained, processor = adapter
    assert find_layout(folder) == "adapter"
    merged = load(folder)
    assert all(parameter.requires_grad for parameter in merged.parameters()) and not merged.training
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert torch.equal(merged.audio_adaptor.linear1.weight, trained.audio_adaptor.linear1.weight)
    torch.testing.assert_close(logits(merged, processor), logits(trained, processor), atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert same(dict(load(tmp_path / "merged").state_dict()), dict(merged.state_dict()))
    arguments = ["--input", folder, "--output", tmp_path / "funasr", "--format", "funasr"]
    assert run_recipe("convert_checkpoint.py", *arguments) is None
    assert same(dict(load(tmp_path / "funasr").state_dict()), dict(merged.state_dict()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"r": rank}, "r and rank_pattern must be whole numbers from 1") for rank in (0, -1, 2.5, "2", 10**6)],
        ({"rank_pattern": {"q_proj": 0}}, "r and rank_pattern must be whole numbers from 1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
        ({"modules_to_save": ["audio_adaptor", "a b"]}, "modules_to_save: 'a b' "),
        ({"modules_to_save": [3]}, "modules_to_save: '3' "),
        ({"layers_pattern": "(a|b)"}, "layers_pattern: '(a|b)' "),
        ({"init_lora_weights": "/etc/x"}, "init_lora_weights is '/etc/x'; set it to true"),
        ({"init_lora_weights": 3}, "init_lora_weights is '3'; set it to true"),
        ({"target_modules": "q_proj("}, "target_modules"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    ],
)
def test_adapter_settings_that_are_not_for_a_stranger_to_choose(adapter, settings, message):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{re.escape(message)}"):
        load(adapter[0])


def test_adapter_with_ranks_and_scales_of_its_own_for_some_layers_is_merged(make_model, logits, tmp_path):
    model, processor = make_model()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    targets = r"llm\..*\.(q_proj|v_proj|down_proj)"
    patterns = {
        "rank_pattern": {r"layers\.1\..*q_proj": 3},
        "alpha_pattern": {"v_proj": 40, r"layers.0.*down_proj": 9},
    }
    trained = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **patterns))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trained.save_pretrained(tmp_path / "adapter")
    expected = logits(trained.eval(), processor)
    torch.testing.assert_close(logits(load(tmp_path / "adapter"), processor), expected, atol=1e-4, rtol=1e-4)


def test_processor_and_config_of_an_adapter(adapter, tmp_path):
    folder, _, processor = adapter
    assert SpeechLLMProcessor.from_pretrained(folder).feature_extractor.dither == 0  # of the base model
    assert SpeechLLMConfig.from_pretrained(folder).use_low_frame_rate
    processor.feature_extractor.dither = 0.5
    processor.save_pretrained(folder)
    assert find_layout(folder) == "adapter"
    assert SpeechLLMProcessor.from_pretrained(folder).feature_extractor.dither == 0.5  # its own


def test_fully_trained_parts_keep_their_dtype(adapter):
    folder, trained, _ = adapter
    base = folder.parent / "base"
    edit_tensors(base, "funasr", lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    merged = load(folder)
    assert torch.equal(merged.audio_adaptor.linear1.weight, trained.audio_adaptor.linear1.weight)
    assert {parameter.dtype for parameter in merged.llm.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load(folder, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_adapter_of_the_embeddings(make_model, logits, tmp_path, tied):
    model, processor = make_model()
    model.config.tie_word_embeddings = model.config.llm_config.tie_word_embeddings = tied
    if not tied:
        model.llm.lm_head.weight = torch.nn.Parameter(model.llm.lm_head.weight.detach() * 0.5)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    trained = get_peft_model(load(tmp_path / "base"), settings).eval()
    trained.save_pretrained(tmp_path / "adapter")
    if tied:
        with pytest.raises(CheckpointError, match="share their weights"):
            load(tmp_path / "adapter")
    else:
        merged = load(tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(merged, processor), logits(trained, processor), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"), [(["wq"], "no layers named wq"), (["embed_tokens"], "share their weights")]
)
def test_modules_without_adapter_support_are_refused(make_model, names, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make_model()[0], target_modules=names)


def test_an_incomplete_adapter(adapter):
    folder, _, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    del tensors[name]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(folder)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def test_adapter_finds_its_base_model_from_any_folder(
    make_model, make_checkpoint, logits, tmp_path, monkeypatch, caplog
):
    model, processor = make_model()
    make_checkpoint("speech_llm", "base", model, processor)
    monkeypatch.chdir(tmp_path)
    add_lora(load("base"), r=2).save_pretrained("run/adapter")
    folder = tmp_path / "run" / "adapter"
    assert config_of(folder)["base_model_name_or_path"] == str(tmp_path / "base")
    expected = logits(load(folder), processor)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(load(folder), processor), expected, rtol=0, atol=0)
    # Manual edits: relative to the adapter. Older adapters: relative to the working directory, with a warning.
    for name, place, warned in (("../../base", "elsewhere", False), ("base", ".", True)):
        (folder / "adapter_config.json").write_text(
            json.dumps({**config_of(folder), "base_model_name_or_path": name}), encoding="utf-8"
        )
        monkeypatch.chdir(tmp_path / place)
        caplog.clear()
        torch.testing.assert_close(logits(load(folder), processor), expected, rtol=0, atol=0)
        assert ("from the working directory" in caplog.text) == warned


@pytest.mark.parametrize("name", ["{}/gone", "../gone", "gone", "."])
def test_missing_base_model_is_reported_with_the_adapter(adapter, name, tmp_path):
    folder, _, _ = adapter
    (folder / "adapter_config.json").write_text(
        json.dumps({**config_of(folder), "base_model_name_or_path": name.format(tmp_path)}), encoding="utf-8"
    )
    for read in (load, SpeechLLMConfig.from_pretrained):
        with pytest.raises(CheckpointError, match=str(folder)):
            read(folder)


def test_adapters_of_adapters_contain_both_updates(adapter, logits, tmp_path):
    folder, trained, processor = adapter
    second = add_lora(load(folder, dtype=torch.float32), r=2)
    second.save_pretrained(tmp_path / "second")
    assert config_of(tmp_path / "second")["base_model_name_or_path"] == str(folder)
    expected = logits(trained, processor)
    torch.testing.assert_close(logits(load(tmp_path / "second"), processor), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_written_models_have_the_permissions_of_new_files(make_model, make_checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        model, processor = make_model()
        model.save_pretrained(tmp_path / "saved")
        folder = Path(make_checkpoint("native", "converted", model, processor))
    finally:
        os.umask(before)
    for path in (*(tmp_path / "saved").iterdir(), *folder.glob("*.safetensors")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_unreachable_hub_is_reported_after_one_request(monkeypatch):
    asked = []

    def unreachable(name, file, **options):
        asked.append(bool(options.get("local_files_only")))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("hf_speechllm.formats.hub_files.hf_hub_download", unreachable)
    for kind in (SpeechLLMProcessor, SpeechLLMConfig):
        with pytest.raises(CheckpointError, match="no/such: no such folder, and not in the cache of the Hub"):
            kind.from_pretrained("no/such")
    assert asked == [False, True, False]  # then only the cache
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"^\.\./no/such: no such folder$"):
        SpeechLLMProcessor.from_pretrained("../no/such")


def test_4_bit_quantization_excludes_layers_with_partial_blocks():
    shapes = {"a.weight": (32, 560), "b.weight": (32, 128), "c.bias": (32,)}
    config = SimpleNamespace(load_in_4bit=True, llm_int8_skip_modules=None)
    assert only_whole_blocks(config, shapes).llm_int8_skip_modules == ["lm_head", "a"]
    assert config.llm_int8_skip_modules is None  # the caller's
    config.llm_int8_skip_modules = ["b"]
    assert only_whole_blocks(config, shapes).llm_int8_skip_modules == ["b", "a"]
    config.load_in_4bit = False
    assert only_whole_blocks(config, shapes) is config
