"""Attention without host-device syncs computes the same."""

import pytest
import torch

from hf_speechllm.fast.attention import (
    PADDED,
    disable_host_syncs,
    without_cudnn_attention,
)
from hf_speechllm.model.loss import label_positions
from hf_speechllm.model.packing import causal_masks

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def restore_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def batch(compose_tiny, tone):
    """A tiny model and a padded batch."""
    model, processor = compose_tiny()
    dialogues = [
        [
            {
                "role": "user",
                "content": [{"type": "audio", "audio": tone(seconds)[:, 0]}, {"type": "text", "text": "a"}],
            },
            {"role": "assistant", "content": "几点了？"},
        ]
        for seconds in (0.5, 1.7)
    ]
    return model.eval(), processor.apply_chat_template(dialogues)


def test_audio_tokens_are_the_same(batch):
    model, inputs = batch
    features = inputs["input_features"], inputs["input_features_mask"]
    expected, lengths = model.get_audio_features(*features)
    disable_host_syncs(model)
    assert model.audio_encoder.config._attn_implementation == model.audio_adaptor.config._attn_implementation == PADDED
    tokens, _ = model.get_audio_features(*features)
    for row, reference, length in zip(tokens, expected, lengths, strict=True):
        torch.testing.assert_close(row[:length], reference[:length], rtol=1e-5, atol=1e-6)


def test_other_implementations_do_not_change(batch):
    model, _ = batch
    model.audio_encoder.set_attn_implementation("eager")
    disable_host_syncs(model)
    assert model.audio_encoder.config._attn_implementation == "eager"


def test_saved_config_does_not_name_the_implementation(batch, tmp_path):
    model, _ = batch
    disable_host_syncs(model)
    model.save_pretrained(tmp_path)
    assert PADDED not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_mask_alone_hides_padding_on_the_right(batch, implementation):
    model, inputs = batch
    model.llm.set_attn_implementation(implementation)
    assert inputs["attention_mask"].min() == 0
    masked = model(**inputs).loss
    causal = model(**inputs, positions={"labels": label_positions(inputs["labels"])}).loss
    torch.testing.assert_close(causal, masked, rtol=1e-6, atol=0)


def test_llm_with_a_sliding_window_gets_its_own_masks(batch):
    config = batch[0].llm.config
    assert causal_masks(config) == {"full_attention": None}
    config.layer_types = ["sliding_attention", "full_attention"]
    assert causal_masks(config) is None


def test_preparing_a_model_does_not_change_the_process(batch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    disable_host_syncs(batch[0])
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_restored_after_the_block(before):
    torch.backends.cuda.enable_cudnn_sdp(before)
    with pytest.raises(ZeroDivisionError), without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise ZeroDivisionError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
