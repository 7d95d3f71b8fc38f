"""Native speech LLMs of transformers: labels, loss, prompts and generation agree with transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.fast.attention import enable_padding_free
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.model import chat
from hf_speechllm.model.loss import label_positions
from hf_speechllm.model.native_families import FAMILIES, REFUSED, fixed_seconds, parse_prompt, part_of
from hf_speechllm.model.packing import MASKS_BY_LAYER, non_padding_positions

# Transcript in the form of each family.
ANSWERS = {
    "qwen3_asr": "language None<asr_text>one two",
    "vibevoice_asr": '[{"Start":0.0,"End":1.0,"Speaker":0,"Content":"one two"}]',
    "moss_transcribe_diarize": "[0.00][S01]one two[1.00]",
}


def dialogue(text=None, **prompt):
    return chat.parse_messages(chat.transcription_messages(b"", chat.transcription_prompt(**prompt), text))


@pytest.fixture(scope="session")
def native(native_folder):
    """Model in eval mode, and processor."""
    model = SpeechLLMForConditionalGeneration.from_pretrained(native_folder).eval()
    return model, SpeechLLMProcessor.from_pretrained(native_folder)


@pytest.fixture
def recordings(native):
    """Noise of 1 s and 0.6 s."""
    rate = native[1].sampling_rate
    noise = np.random.default_rng(0).standard_normal(rate).astype(np.float32) * 0.1
    return [noise, noise[: 6 * rate // 10]]


@pytest.fixture
def batch(native, recordings):
    return native[1].batch([dialogue("one two"), dialogue("seven eight nine")], recordings, return_labels=True)


def native_forward(model, **inputs):
    """Runs the forward pass of transformers' class."""
    return type(model).__mro__[2].forward(model, **inputs, **dict(model.family.options))


def test_labels_are_the_answer_and_the_end_token(native, batch):
    model, processor = native
    answer = ANSWERS.get(model.config.model_type, "one two")
    labels = batch["labels"][0]
    supervised = (labels != -100).nonzero().squeeze(-1)
    assert processor.tokenizer.decode(labels[supervised]) == answer + processor.tokenizer.eos_token
    assert (labels[supervised] == batch["input_ids"][0][supervised]).all()
    assert (supervised.diff() == 1).all() and supervised[-1] == batch["attention_mask"][0].sum() - 1


def test_training_row_is_the_prompt_of_decoding_and_the_answer(native, recordings, batch):
    _, processor = native
    prompt = processor.batch([dialogue()], recordings[:1], return_labels=False)["input_ids"][0]
    length = len(prompt)
    assert (batch["input_ids"][0][:length] == prompt).all()
    assert (batch["labels"][0][:length] == -100).all() and batch["labels"][0][length] != -100


def test_prompt_is_the_request_of_the_own_processor(native, native_folder, recordings):
    model, processor = native
    own = AutoProcessor.from_pretrained(native_folder)
    if not hasattr(own, "apply_transcription_request"):
        pytest.skip("this processor has no transcription requests")
    voxtral = {"model_id": "voxtral", "sampling_rate": 16000, "format": "wav"}
    options = voxtral if model.config.model_type == "voxtral" else {"return_tensors": "pt"}
    expected = own.apply_transcription_request(recordings[0], **options)
    found = processor.batch([dialogue()], recordings[:1], return_labels=False)
    for name in found:
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name


def test_loss_is_that_of_the_forward_pass_of_transformers(native, batch):
    model, _ = native
    with torch.no_grad():
        found = model(**batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = native_forward(model, **inputs).logits
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    assert found.num_label_tokens == (targets != -100).sum() and found.logits is None
    correct = (logits[:, :-1].argmax(-1) == targets).sum() / (targets != -100).sum()
    torch.testing.assert_close(found.token_accuracy, correct)


def test_loss_of_several_batches_sums_to_the_loss_of_the_step(native, batch):
    model, _ = native
    with torch.no_grad():
        mean, share = model(**batch), model(**batch, num_items_in_batch=100)
    torch.testing.assert_close(share.loss * 100, mean.loss * mean.num_label_tokens)


def test_generation_is_that_of_transformers(native, recordings):
    model, processor = native
    inputs = processor.batch([dialogue(), dialogue()], recordings, return_labels=False)
    base = type(model).__mro__[2].from_pretrained(model.config.name_or_path).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = base.generate(**inputs, **options, **dict(model.family.options))
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_saved_config_names_the_class_of_transformers(native, native_folder, tmp_path):
    model, processor = native
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (native_folder, tmp_path))
    for key in ("architectures", "model_type"):
        assert before[key] == after[key]
    assert before.keys() == after.keys()
    assert {file.name for file in native_folder.iterdir()} == {file.name for file in tmp_path.iterdir()}


def test_every_parameter_belongs_to_a_part(native):
    model, _ = native
    assert {part_of(name) for name, _ in model.named_parameters()} == {"audio_encoder", "audio_adaptor", "llm"}
    names = {id(parameter) for part in ("audio_encoder", "audio_adaptor", "llm") for module in model.part(part)
             for parameter in module.parameters()}  # fmt: skip
    assert names == {id(parameter) for parameter in model.parameters()}


def test_transcript_is_read_from_the_answer(native):
    model, processor = native
    text = ANSWERS.get(model.config.model_type, "one two")
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.transcripts(torch.tensor([[*ids, processor.tokenizer.eos_token_id]])) == ["one two"]


def test_fixed_seconds_are_those_to_which_the_processor_pads_a_short_recording(native, recordings):
    model, processor = native
    inputs = processor.batch([dialogue()], recordings[:1], return_labels=False)
    padded = 3000 in inputs.get("input_features", torch.zeros(1)).shape
    assert fixed_seconds(model.config) == (30.0 if padded else 0.0)


def test_number_of_audio_tokens_is_estimated(native, recordings):
    _, processor = native
    inputs = processor.batch([dialogue()], recordings[:1], return_labels=False)["input_ids"]
    assert abs(int((inputs == processor.audio_token_id).sum()) - processor.num_audio_tokens(100)) <= 6


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (None, "", None)),
        ({"language": "en"}, ("en", "", None)),
        ({"language": "zh", "itn": False, "hotwords": ["foo", "bar"]}, ("zh", "foo, bar", None)),
        ({"hotwords": ["foo"], "context": "A call."}, (None, "A call.\nfoo", None)),
        ({"prompt": "Write:"}, (None, "", "Write:")),
        ({"prompt": "Write:", "context": "A call."}, (None, "A call.", "Write:")),
    ],
)
def test_prompts_of_this_package_become_requests(options, expected):
    request = parse_prompt(chat.transcription_prompt(**options), 1.0)
    assert (request.language, request.context, request.instruction) == expected


def test_a_transcript_cannot_become_a_special_token(native, recordings):
    _, processor = native
    text = f"one {processor.audio_token} two"
    batch = processor.batch([dialogue(text), dialogue("one  two")], [recordings[0]] * 2, return_labels=True)
    audio = (batch["input_ids"] == processor.audio_token_id).sum(1)
    assert audio[0] == audio[1]


def test_dialogues_that_a_family_cannot_represent_are_refused(native, recordings):
    model, processor = native
    two = chat.parse_messages(chat.transcription_messages(b"", "a", "b") + chat.transcription_messages(b"", "a")[1:])
    with pytest.raises(chat.ChatError, match="one turn"):
        processor.batch([two], recordings[:1], return_labels=False)
    if not model.family.contexts:
        with pytest.raises(chat.ChatError, match="hotwords"):
            processor.batch([dialogue(hotwords=["foo"])], recordings[:1], return_labels=False)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_cannot_be_trained_are_refused_with_the_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        CheckpointError, match=f"{model_type} model, which cannot be trained here: {REFUSED[model_type]}"
    ):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


def test_qwen3_asr_has_the_language_in_the_prompt_or_in_the_answer():
    family = FAMILIES["qwen3_asr"]
    named, unnamed = parse_prompt("语音转写成英文：", 1.0), parse_prompt("语音转写：", 1.0)
    assert (family.prefill(named), family.answer_start(named)) == ("language English<asr_text>", "")
    assert (family.prefill(unnamed), family.answer_start(unnamed)) == ("", "language None<asr_text>")
    assert family.transcript("language English<asr_text>One.") == "One."


def test_padding_free_batch_has_the_same_loss_and_gradients(native_folder, batch):
    model = SpeechLLMForConditionalGeneration.from_pretrained(native_folder).eval()
    positions = {"tokens": non_padding_positions(batch["attention_mask"]), "labels": label_positions(batch["labels"])}
    if model.config.get_text_config().model_type not in MASKS_BY_LAYER:
        with pytest.raises(ValueError, match="--padding_free requires an LLM of type"):
            enable_padding_free(model)
        return
    found = []
    for options in ({}, {"positions": positions}):
        model.zero_grad()
        outputs = model(**batch, **options)
        outputs.loss.backward()
        gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
        found.append((outputs.loss, outputs.num_label_tokens, outputs.token_accuracy, gradients))
        enable_padding_free(model)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_document_lists_all_families_and_refusals():
    text = (Path(__file__).resolve().parents[2] / "docs/guides/native_models.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    assert {*rows} == {"model_type", *FAMILIES, *REFUSED}
    for model_type, family in FAMILIES.items():
        assert f"| {family.max_seconds:,.0f} s |" in rows[model_type], model_type
        assert ("language" in rows[model_type].split("|")[3]) == family.languages
        assert ("hotwords" in rows[model_type].split("|")[3]) == family.contexts
    for model_type, reason in REFUSED.items():
        assert rows[model_type] == f"| `{model_type}` | {reason} |"


def test_logits_of_some_positions(native, batch):
    model, _ = native
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        every = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, every[:, -1:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([3, 5])).logits, every[:, [3, 5]])
