"""Native speech LLMs of transformers on the Hub: no code of this package, private by default."""

import json

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor


@pytest.mark.parametrize("native_folder", ["qwen3_asr"], indirect=True)
def test_pushed_model_has_the_layout_of_transformers(native_folder, hub, run_recipe):
    end = run_recipe("push_to_hub.py", "--input", native_folder, "--hub_model_id", "user/tuned")
    assert end is None, end
    files = hub.repositories["user/tuned"].files()
    assert not any(path.startswith("code/") for path in files)
    assert json.loads(files["config.json"].content)["model_type"] == "qwen3_asr"
    card = files["README.md"].content.decode()
    assert "transformers' own `qwen3_asr`" in card and "fun_asr_nano" not in card.partition("## Layout")[2]
    assert "hf-speechllm convert" not in card
    assert hub.repositories["user/tuned"].private
    model = SpeechLLMForConditionalGeneration.from_pretrained("user/tuned")
    local = SpeechLLMForConditionalGeneration.from_pretrained(native_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
    assert SpeechLLMProcessor.from_pretrained("user/tuned").model_type == "qwen3_asr"


@pytest.mark.parametrize("native_folder", ["glmasr"], indirect=True)
def test_push_from_python_is_private(native_folder, hub):
    SpeechLLMForConditionalGeneration.from_pretrained(native_folder).push_to_hub("user/model")
    SpeechLLMProcessor.from_pretrained(native_folder).push_to_hub("user/model")
    assert hub.repositories["user/model"].private
    assert {"config.json", "model.safetensors", "processor_config.json"} <= {*hub.repositories["user/model"].files()}
