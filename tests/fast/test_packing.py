"""Padding-free batches have the same losses and gradients as padded batches."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.fast.attention import PADDING_FREE, enable_padding_free
from hf_speechllm.fast.fsmn import FSMN, fsmn_conv_torch, kernel_works, use_fsmn
from hf_speechllm.model.packing import PaddingFreeBatch, non_padding_positions
from hf_speechllm.training.checkpointing import verification
from hf_speechllm.training.lora import add_lora

pytestmark = pytest.mark.core


@pytest.fixture
def parts(tiny_model):
    return (
        SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval(),
        SpeechLLMProcessor.from_pretrained(tiny_model),
    )


def loss_and_gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    return output.loss.detach(), output.token_accuracy, gradients


@pytest.mark.parametrize(
    "kind", ["fbank", "encoder", "adaptor", "lora", "lora_encoder", "lora_adaptor", "checkpointing"]
)
def test_losses_and_gradients_equal_those_of_padded_batches(kind, parts, tiny_rows, tmp_path):
    model, processor = parts
    rows = tiny_rows
    if kind in ("encoder", "adaptor"):
        rows = add_encoded(rows, model, processor, kind, str(tmp_path))
    if kind.startswith("lora"):
        model.requires_grad_(False)
        model.audio_encoder.requires_grad_(kind == "lora_encoder")
        model.audio_adaptor.requires_grad_(kind == "lora_adaptor")
        model = add_lora(model, 2, 4, 0.0).eval()
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            for name in ("p", "hidden_dropout", "attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    rows = [rows[index] for index in (3, 11, 20, 8, 5)]
    padded = SpeechLLMCollator(processor)(rows)
    assert padded["attention_mask"].min() == 0 and padded["input_features_mask"].min() == 0
    expected = loss_and_gradients(model, padded)
    enable_padding_free(model)
    seen = []
    model.llm.get_decoder().layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    packed = SpeechLLMCollator(processor, padding_free=True)(rows)
    assert ("frames" in packed["positions"]) is (kind != "adaptor")
    found = loss_and_gradients(model, packed)
    assert {tuple(shape[:2]) for shape in seen} == {(1, int(padded["attention_mask"].sum()))}
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2].keys() == expected[2].keys()
    for name in found[2]:
        torch.testing.assert_close(found[2][name], expected[2][name], rtol=1e-4, atol=1e-6)


def test_padded_batches_and_decoding_still_work(parts, tiny_rows):
    model, processor = parts
    batch = SpeechLLMCollator(processor)([tiny_rows[index] for index in (3, 11)])
    prompt = {name: value for name, value in batch.items() if name not in ("labels", "positions")}
    expected = model(**batch).loss, model.generate(**prompt, max_new_tokens=4, do_sample=False)
    enable_padding_free(model)
    torch.testing.assert_close(model(**batch).loss, expected[0])
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), expected[1])


def test_unprepared_model_refuses_packed_rows(parts, tiny_rows):
    model, processor = parts
    batch = SpeechLLMCollator(processor, padding_free=True)([tiny_rows[3], tiny_rows[11]])
    for name in ("tokens", "frames"):
        positions = {key: batch["positions"][key] for key in ("labels", name)}
        with pytest.raises(ValueError, match="attention.enable_padding_free"):
            model(**{**batch, "positions": positions})


def test_saved_config_does_not_name_the_attention(parts, tmp_path):
    enable_padding_free(parts[0])
    parts[0].save_pretrained(tmp_path)
    assert PADDING_FREE not in (tmp_path / "config.json").read_text()


def test_llms_that_cannot_separate_rows_are_refused(compose_tiny, tiny_config):
    config = tiny_config()
    size = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config["llm_config"] = {"model_type": "mistral", **size}
    with pytest.raises(ValueError, match="this LLM is mistral with sdpa"):
        enable_padding_free(compose_tiny(config)[0])
    model, _ = compose_tiny()
    model.llm.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="qwen3 with eager"):
        enable_padding_free(model)


def test_gpus_without_the_kernel_are_refused(parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(ValueError, match="compute capability 8.0"):
        enable_padding_free(parts[0])


def test_rows_are_packed_and_unpacked():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    packing = PaddingFreeBatch(mask, non_padding_positions(mask))
    states = torch.arange(18.0).view(3, 3, 2)
    assert packing.unpad(states)[0, :, 0].tolist() == [0, 2, 6, 12, 14, 16]
    assert torch.equal(packing.pad(packing.unpad(states)), states * mask.unsqueeze(-1))
    assert packing.position_ids.tolist() == [[0, 1, 0, 0, 1, 2]] and packing.segment_ids.tolist() == [
        [1, 1, 2, 3, 3, 3]
    ]
    assert packing.attention["cu_seq_lens_q"].tolist() == [0, 2, 3, 6] and packing.attention["max_length_k"] == 3


@pytest.mark.parametrize("size", [11, 4])
def test_fsmn_does_not_mix_recordings(size):
    lengths, left = [30, 1, 7], (size - 1) // 2
    values, weight = torch.randn(1, sum(lengths), 6), torch.randn(6, size)
    numbers = torch.cat([torch.full((1, n), number + 1) for number, n in enumerate(lengths)], 1).int()
    result = fsmn_conv_torch(values, weight, numbers, left)
    for part, expected in zip(values.split(lengths, 1), result.split(lengths, 1), strict=True):
        padded = nn.functional.pad(part.transpose(1, 2), (left, size - 1 - left))
        alone = part + nn.functional.conv1d(padded, weight.unsqueeze(1), groups=6).transpose(1, 2)
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_computes_the_same():
    """Runs in a new process: Triton's interpreter must be enabled before Triton is imported."""
    pytest.importorskip("triton")
    code = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from hf_speechllm.fast.fsmn import fsmn_conv_torch
from hf_speechllm.fast.fsmn_kernel import fsmn_conv

torch.manual_seed(0)
padded = torch.arange(70) < torch.tensor([[70], [33]])
packed = torch.tensor([[1] * 40 + [2] + [3] * 50 + [0] * 9]).int()
for channels, size, mask in ((130, 11, padded), (7, 4, packed)):
    values = torch.randn(*mask.shape, channels, requires_grad=True)
    weight, gradient = torch.randn(channels, size, requires_grad=True), torch.randn(*mask.shape, channels)
    arguments = values, weight, mask, (size - 1) // 2
    found, expected = fsmn_conv(*arguments), fsmn_conv_torch(*arguments)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(result, [values, weight], gradient) for result in (found, expected))
    for ours, theirs in zip(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(fsmn_conv, arguments)
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "done\n", result.stderr


def test_kernels_are_not_specialized_for_numbers_of_frames():
    pytest.importorskip("triton")
    from hf_speechllm.fast.fsmn_kernel import _convolve, _correlate

    for kernel in (_convolve, _correlate):
        assert {"count", "row"} == {item.name for item in kernel.params if item.do_not_specialize}


def test_torch_computes_fsmn_if_the_kernel_cannot_be_built(parts, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel_works.cache_clear()
    with caplog.at_level("WARNING"):
        use_fsmn(parts[0])
    kernel_works.cache_clear()
    assert "torch computes the FSMN blocks of the encoder, which is slower: Triton fails" in caplog.text
    blocks = [module for module in parts[0].modules() if isinstance(module, FSMN)]
    assert blocks and not any(block.kernel for block in blocks)


@pytest.mark.parametrize("use_lora", [False, True])
def test_checkpoints_of_padding_free_runs_are_verified(use_lora, make_trainer, tiny_rows, caplog, monkeypatch):
    compared, logits = [], verification._logits

    def record(model, batch):
        compared.append(getattr(model, "args", [model])[0])  # the model, or a partial whose argument is the model
        return logits(model, batch)

    monkeypatch.setattr(verification, "_logits", record)
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options = {
        **saving,
        "max_steps": 2,
        "per_device_train_batch_seconds": 12,
        "use_lora": use_lora,
        "lora_dropout": 0.0,
        "eval_dataset": tiny_rows,
    }
    losses = []
    for padding_free in (True, False):
        with caplog.at_level("INFO"):
            trainer = make_trainer(**options, padding_free=padding_free)
            trainer.train()
        assert "is verified" in caplog.text
        blocks = [any(isinstance(module, FSMN) for module in model.modules()) for model in compared]
        assert blocks == [padding_free, padding_free]
        compared.clear()
        caplog.clear()
        losses.append([line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_free_run_has_the_same_losses(make_trainer):
    runs = [
        make_trainer(max_steps=3, per_device_train_batch_seconds=12, padding_free=padding_free)
        for padding_free in (True, None)
    ]
    for trainer in runs:
        trainer.train()
    packed, padded = ([line for line in run.state.log_history if "loss" in line] for run in runs)
    assert [line["loss"] for line in packed] == pytest.approx([line["loss"] for line in padded], rel=1e-5)
    assert {line["padding_share"] for line in packed} == {0.0} and padded[0]["padding_share"] > 0
