"""Comparison of the model with reference values computed by FunASR's classes, in float32 on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.model import chat
from hf_speechllm.model.modeling import PARTS

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "funasr_tiny"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden vectors are not here")

ROWS = [json.loads(line) for line in (GOLDEN / "data.jsonl").read_text().splitlines()] if GOLDEN.is_dir() else []
SETTINGS = json.loads((GOLDEN / "inference.json").read_text()) if GOLDEN.is_dir() else []


def row_id(row: dict) -> str:
    recordings = chat.parse_messages(row["messages"]).recordings
    return Path(recordings[0]).stem if len(recordings) == 1 else "multiturn"


SINGLE = [row for row in ROWS if row_id(row) != "multiturn"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return SpeechLLMForConditionalGeneration.from_pretrained(GOLDEN / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return SpeechLLMProcessor.from_pretrained(GOLDEN / "model")


@pytest.fixture(autouse=True)
def relative_paths(monkeypatch):
    monkeypatch.chdir(GOLDEN)


def without_placeholders(ids: list[int], processor) -> list[int]:
    return [0 if token == processor.audio_token_id else token for token in ids]


def loss_of(model, inputs) -> float:
    with torch.no_grad():
        return model(**inputs).loss.item()


@pytest.mark.parametrize("row", SINGLE, ids=row_id)
def test_features_encoder_and_adaptor(row, model, processor, golden):
    inputs = processor.apply_chat_template(row["messages"])
    torch.testing.assert_close(inputs["input_features"][0], golden[f"{row_id(row)}.lfr"], atol=1e-3, rtol=0)
    features = {
        "input_features": golden[f"{row_id(row)}.lfr"][None],
        "input_features_mask": inputs["input_features_mask"],
    }
    with torch.no_grad():
        encoded = model.audio_encoder(**features).last_hidden_state
        adapted, _ = model.audio_adaptor(encoded, features["input_features_mask"])
    torch.testing.assert_close(encoded[0], golden[f"{row_id(row)}.encoder_out"], atol=1e-4, rtol=0)
    torch.testing.assert_close(adapted[0], golden[f"{row_id(row)}.adaptor_out"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("row", SINGLE, ids=row_id)
def test_outputs_from_computed_features(row, model, processor, golden):
    inputs = processor.apply_chat_template(row["messages"])
    with torch.no_grad():
        adapted, lengths = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    assert lengths.tolist() == golden[f"{row_id(row)}.fake_token_len"].tolist()
    expected = golden[f"{row_id(row)}.adaptor_out"][: int(lengths)]
    torch.testing.assert_close(adapted[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_ids_labels_and_loss(row, model, processor, golden):
    inputs = processor.apply_chat_template(row["messages"])
    assert (
        without_placeholders(inputs["input_ids"][0].tolist(), processor) == golden[f"{row_id(row)}.input_ids"].tolist()
    )
    assert inputs["labels"][0].tolist() == golden[f"{row_id(row)}.labels"].tolist()
    assert loss_of(model, inputs) == pytest.approx(golden[f"{row_id(row)}.loss"].item(), abs=1e-4)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padded_batch_loss(padding_side, model, processor, golden):
    inputs = processor.apply_chat_template([row["messages"] for row in ROWS], padding_side=padding_side)
    assert loss_of(model, inputs) == pytest.approx(golden["batch.loss"].item(), abs=1e-4)


def test_gradient_norms(model, processor, golden):
    model(**processor.apply_chat_template([row["messages"] for row in ROWS])).loss.backward()
    try:
        for part in PARTS:
            gradients = [parameter.grad.norm() for parameter in getattr(model, part).parameters()]
            norm = torch.stack(gradients).norm().item()
            assert norm == pytest.approx(golden[f"batch.grad_norm.{part}"].item(), rel=1e-3), part
    finally:
        model.zero_grad()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["id"])
def test_prompt_and_greedy_decoding(setting, model, processor):
    options = {"language": setting["language"], "itn": setting["itn"], "hotwords": setting["hotwords"]}
    assert chat.transcription_prompt(**options) == setting["prompt"]
    inputs = processor.apply_transcription_request(f"audio/{setting['id']}.wav", **options)
    prompt = inputs["input_ids"][0].tolist()
    assert without_placeholders(prompt, processor) == setting["source_ids"]
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    if generated[: len(prompt)] == prompt:
        generated = generated[len(prompt) :]
    assert generated == setting["generated_ids"]
