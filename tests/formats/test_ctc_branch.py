"""The CTC head in the layouts of FunASR and transformers."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.formats.funasr_tensors import to_our_name
from hf_speechllm.formats.loading import read_checkpoint
from hf_speechllm.formats.saving import save_funasr, save_native
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig

GOLDEN = load_file(Path(__file__).with_name("ctc_golden.safetensors"))  # computed by FunASR 1.4.16
TOKENS = torch.tensor(list(b"IQ== 0\n"), dtype=torch.uint8)


def funasr_head(**options):
    return CTCHeadConfig(
        head_type="transformer", vocabulary="tiktoken", vocab_size=30, blank_id=29, hidden_size=16, hidden_dropout=0.0,
        attention_dropout=0.0, projector_hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        layer_norm_eps=1e-12, **options,
    )  # fmt: skip


@pytest.fixture
def with_branch(make_model):
    """A model with the head of the golden values, and the token file."""
    model, processor = make_model()
    add_ctc_head(model, funasr_head())
    tensors = {
        to_our_name(name, model.config).removeprefix("ctc_head."): tensor
        for name, tensor in GOLDEN.items()
        if name.startswith("ctc")
    }
    model.ctc_head.load_state_dict(tensors)
    model.ctc_tensors = {"file:multilingual.tiktoken": TOKENS}
    return model.eval(), processor


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_probabilities_equal_those_of_funasr(with_branch):
    mask = torch.arange(12) < GOLDEN["lengths"].unsqueeze(-1)
    found, lengths = with_branch[0].ctc_head(GOLDEN["states"], mask.long())
    assert lengths.tolist() == GOLDEN["lengths"].tolist()
    torch.testing.assert_close(found[mask].exp(), GOLDEN["log_probabilities"][mask].exp(), atol=1e-6, rtol=0)


def test_branch_keeps_its_names_in_funasr(with_branch, tmp_path):
    model, processor = with_branch
    save_funasr(model, processor, tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["state_dict"]
    expected = {name: tensor for name, tensor in GOLDEN.items() if name.startswith("ctc")}
    assert {name for name in state if name.startswith("ctc")} == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    conf = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert conf["ctc_decoder"] == "Transformer" and conf["ctc_vocab_size"] == 30
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same_weights(loaded, model)
    found = loaded.config.ctc_head_config
    assert {**found.to_dict(), "dtype": None} == model.config.ctc_head_config.to_dict()
    assert torch.equal(loaded.ctc_tensors["file:multilingual.tiktoken"], TOKENS)


def test_branch_survives_the_native_layout(with_branch, tmp_path):
    model, processor = with_branch
    save_native(model, processor, tmp_path / "native", force=True)
    assert not any("ctc" in name for name in load_file(tmp_path / "native" / "model.safetensors"))
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert same_weights(loaded, model) and loaded.ctc_tensors.keys() == model.ctc_tensors.keys()


@pytest.mark.parametrize("save", [save_native, save_funasr])
def test_other_heads_are_kept(make_model, save, tmp_path):
    model, processor = make_model()
    config = CTCHeadConfig(characters=["", " ", "a"], vocab_size=3, hidden_size=16, num_attention_heads=2)
    add_ctc_head(model, config)
    save(model, processor, tmp_path / "out", force=True)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same_weights(loaded, model)
    assert loaded.config.ctc_head_config.characters == config.characters


def test_incomplete_branch_is_not_used(with_branch, tmp_path, caplog):
    model, processor = with_branch
    save_funasr(model, processor, tmp_path / "out")
    file = tmp_path / "out" / "model.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    del state["ctc.ctc_lo.bias"]
    torch.save({"state_dict": state}, file)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.config.ctc_head_config is None
    assert "ctc.ctc_lo.weight" in checkpoint.ctc_tensors
    assert "for example ctc_head.output.bias" in caplog.text
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.ctc_head is None
