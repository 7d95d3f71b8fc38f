"""LLMs without attention, with buffers and infinite settings, and LLMs that cannot be combined with an encoder."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.composition import compose, train_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LLMS = {
    "mamba": {**SIZES, "state_size": 4},
    "falcon_h1": {
        **SIZES, **HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 4, "mamba_chunk_size": 8,
    },
}  # fmt: skip


@pytest.fixture
def compose_with(tiny_config, tmp_path):
    def make(name, **sizes):
        tokenizer = train_tokenizer(["one two three"], 280)
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **ids, **sizes)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
        parts = {key: value for key, value in tiny_config().items() if key != "llm_config"}
        return compose(parts, tokenizer, llm=str(tmp_path / "llm"))

    return make


@pytest.mark.parametrize("name", LLMS)
def test_state_space_models_decode_batches_and_are_loaded_again(name, compose_with, waveforms, tmp_path):
    model, processor = compose_with(name, **LLMS[name])
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    again = SpeechLLMProcessor.from_pretrained(tmp_path / "model")
    options = {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    together = model.eval().generate(**processor.apply_transcription_request(waveforms[:3]), **options).logits
    for row, wave in enumerate(waveforms[:3]):
        alone = loaded.generate(**again.apply_transcription_request([wave]), **options).logits
        for step, other in zip(together, alone, strict=True):
            torch.testing.assert_close(step[row], other[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("granite", {**SIZES, **HEADS, "logits_scaling": 4.0}),
        ("cohere2", {**SIZES, **HEADS, "logit_scale": 0.25}),
        ("gemma2", {**SIZES, **HEADS, "final_logit_softcapping": 0.5}),
        ("falcon_h1", {**LLMS["falcon_h1"], "lm_head_multiplier": 0.5}),
    ],
)
def test_scaled_and_capped_logits_are_those_of_the_llm_and_enter_the_loss(name, sizes, compose_with, waveforms):
    model, processor = compose_with(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs = processor.apply_transcription_request(waveforms[:1])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    states, mask = model.eval().encode_audio(inputs["input_features"], inputs["input_features_mask"])
    expected = model.llm(inputs_embeds=model.embed(inputs["input_ids"], states, mask), labels=labels)
    torch.testing.assert_close(model(**inputs).logits, expected.logits)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected.loss)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gemma4_text", {**SIZES, **HEADS}, "an LLM of type gemma4_text cannot be combined with an encoder"),
        ("opt", {**SIZES, "ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 8}, "type opt cannot be"),
        ("bert", {**SIZES, "num_attention_heads": 2, "is_decoder": True}, "its logits are not those of its head"),
        (
            "trocr",
            {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24},
            "padding changes its logits",
        ),
    ],
)
def test_llms_that_fail_with_audio_tokens_are_refused(name, sizes, message, compose_with):
    with pytest.raises(ValueError, match=message):
        compose_with(name, **sizes)
