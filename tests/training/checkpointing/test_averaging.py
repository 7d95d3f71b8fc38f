"""Means of checkpoints: exact values, complete folders, and errors for checkpoints that do not match."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.formats.loading import CTC_FILE
from hf_speechllm.training.checkpointing.averaging import average_checkpoints
from hf_speechllm.training.lora import add_lora

pytestmark = pytest.mark.core

SCALE = 2.0  # alpha / r


@pytest.fixture
def make_checkpoints(compose_tiny, tmp_path):
    """Writes checkpoints of full models, with other files of a run."""

    def make(seeds=(1, 2, 3), dtype=torch.float32, **save_options):
        folders = []
        for seed in seeds:
            model, processor = compose_tiny(seed=seed)
            folders.append(tmp_path / f"checkpoint-{seed}")
            model.to(dtype).save_pretrained(folders[-1], **save_options)
            processor.save_pretrained(folders[-1])
            for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", "README.md"):
                (folders[-1] / name).write_text("of the run")
        return folders

    return make


@pytest.fixture
def make_adapters(compose_tiny, tmp_path):
    """Writes adapters of one base model with random matrices and a fully trained adaptor."""

    def make(number=3, names=("q_proj", "down_proj"), **options):
        folders = []
        for index in range(number):
            model, _ = compose_tiny()
            model.audio_encoder.requires_grad_(False)
            wrapped = add_lora(model, r=4, alpha=8, target_modules=names)
            generator = torch.Generator().manual_seed(index)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            for key, value in options.items():
                setattr(wrapped.peft_config["default"], key, value)
            folders.append(tmp_path / f"adapter-{index}")
            wrapped.save_pretrained(folders[-1])
        return folders

    return make


def tensors_of(folder):
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def updates_of(folder, scale=SCALE):
    """Returns the update of each weight by the low-rank matrices, in float64."""
    tensors = tensors_of(folder)
    return {
        name: scale * tensors[name.replace(".lora_A.", ".lora_B.")].double() @ tensor.double()
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_mean_of_full_models_averages_every_tensor(make_checkpoints, tmp_path, dtype, shards):
    folders = make_checkpoints(dtype=dtype, **({"max_shard_size": "100KB"} if shards else {}))
    assert (len(list(folders[0].glob("*.safetensors"))) > 1) == shards
    average_checkpoints(folders, tmp_path / "mean")
    inputs, mean = [tensors_of(folder) for folder in folders], tensors_of(tmp_path / "mean")
    assert mean.keys() == inputs[0].keys()
    for name, tensor in mean.items():
        exact = sum(item[name].double() for item in inputs) / 3
        assert tensor.dtype == dtype and torch.equal(tensor, exact.to(dtype)), name
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {path.name for path in folders[0].iterdir()} - {
        "optimizer.pt",
        "trainer_state.json",
        "training_args.bin",
        "rng_state.pth",
        "README.md",
    }
    model = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "mean")
    assert all(torch.equal(mean[name], tensor) for name, tensor in model.state_dict().items() if name in mean)
    assert SpeechLLMProcessor.from_pretrained(tmp_path / "mean").tokenizer.eos_token == "<|im_end|>"


def test_mean_of_shards_and_a_single_file(make_checkpoints, tmp_path):
    (first,) = make_checkpoints(seeds=[1], max_shard_size="100KB")
    (second,) = make_checkpoints(seeds=[2])
    for name, inputs in (("a", [first, second]), ("b", [second, first])):
        average_checkpoints(inputs, tmp_path / name)
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / name)
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_mean_of_a_checkpoint_with_itself_is_the_checkpoint(make_checkpoints, tmp_path):
    (folder,) = make_checkpoints(seeds=[1], dtype=torch.bfloat16)
    average_checkpoints([folder] * 3, tmp_path / "mean")
    assert (tmp_path / "mean/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_integers_must_be_equal_and_side_tensors_are_copied(make_checkpoints, tmp_path):
    folders = make_checkpoints(seeds=(1, 2))
    for folder, number in zip(folders, (7, 7), strict=True):
        save_file(
            {**load_file(folder / "model.safetensors"), "steps": torch.tensor(number)}, folder / "model.safetensors"
        )
        save_file({"ctc": torch.ones(2)}, folder / CTC_FILE)
    average_checkpoints(folders, tmp_path / "mean")
    assert load_file(tmp_path / "mean/model.safetensors")["steps"].item() == 7
    assert torch.equal(load_file(tmp_path / "mean" / CTC_FILE)["ctc"], torch.ones(2))
    save_file(
        {**load_file(folders[0] / "model.safetensors"), "steps": torch.tensor(8)}, folders[0] / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="steps contains different integers"):
        average_checkpoints(folders, tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*.tmp"))


def test_mean_of_adapters_averages_their_matrices(make_adapters, tmp_path):
    folders = make_adapters()
    average_checkpoints(folders, tmp_path / "mean")
    inputs, mean = [tensors_of(folder) for folder in folders], tensors_of(tmp_path / "mean")
    assert any("audio_adaptor" in name for name in mean)
    for name, tensor in mean.items():
        assert torch.equal(tensor, (sum(item[name].double() for item in inputs) / 3).float()), name
    assert json.loads((tmp_path / "mean/adapter_config.json").read_text())["r"] == 4
    # The difference from the mean update is the covariance of the matrices.
    every = [updates_of(folder) for folder in folders]
    for name, update in updates_of(tmp_path / "mean").items():
        down, up = ([item[key].double() for item in inputs] for key in (name, name.replace(".lora_A.", ".lora_B.")))
        covariance = sum((b - sum(up) / 3) @ (a - sum(down) / 3) for a, b in zip(down, up, strict=True)) / 3
        exact = sum(updates[name] for updates in every) / 3
        assert covariance.abs().max() > 1e-3
        torch.testing.assert_close(update, exact - SCALE * covariance, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_exact_mean_of_adapters_is_the_mean_update(make_adapters, compose_tiny, tmp_path, rslora):
    from peft import PeftModel

    folders = make_adapters(use_rslora=rslora)
    average_checkpoints(folders, tmp_path / "mean", exact_lora=True)
    scale = 8 / 4**0.5 if rslora else SCALE
    every = [updates_of(folder, scale) for folder in folders]
    base, _ = compose_tiny()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, tmp_path / "mean").merge_and_unload().state_dict()  # stock peft
    for name in every[0]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        exact = sum(updates[name] for updates in every) / 3
        torch.testing.assert_close((merged[weight] - before[weight]).double(), exact, rtol=0, atol=2e-6)
    config = json.loads((tmp_path / "mean/adapter_config.json").read_text())
    assert config["r"] == 12


def test_mismatched_checkpoints_are_refused(make_checkpoints, make_adapters, tiny_config, compose_tiny, tmp_path):
    full, second = make_checkpoints(seeds=(1, 2))
    adapter = shutil.copytree(make_adapters(1)[0], tmp_path / "adapter")
    (other_layers,) = make_adapters(1, names=("q_proj",))
    narrow = tmp_path / "narrow"
    compose_tiny(tiny_config(projector_hidden_size=24))[0].save_pretrained(narrow)
    damaged = shutil.copytree(second, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes()[:1000])
    renamed = shutil.copytree(second, tmp_path / "renamed")
    tensors = load_file(second / "model.safetensors")
    tensors["llm.other"] = tensors.pop("llm.model.norm.weight")
    save_file(tensors, renamed / "model.safetensors")
    reshaped = shutil.copytree(second, tmp_path / "reshaped")
    tensors["llm.model.norm.weight"] = tensors.pop("llm.other")[:-1].contiguous()
    save_file(tensors, reshaped / "model.safetensors")
    for inputs, message in (
        ([full], "at least two"),
        ([full, tmp_path / "none"], "no such folder"),
        ([full, tmp_path], "model.safetensors is missing.*hf-speechllm convert"),
        ([full, adapter], "one is a LoRA adapter, the other a full model"),
        ([adapter, other_layers], "differ in their configs: target_modules"),
        ([full, narrow], "differ in their configs: audio_adaptor_config"),
        ([full, damaged], "is damaged"),
        ([full, renamed], "only one of them has llm.model.norm.weight, llm.other"),
        ([full, reshaped], "differ in the shapes of llm.model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            average_checkpoints(inputs, tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
    with pytest.raises(CheckpointError, match="leave the option out for full models"):
        average_checkpoints([full, second], tmp_path / "mean", exact_lora=True)
