"""The model: loss, gradients and transcripts do not depend on batching; saved models load with the same logits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    WhisperFeatureExtractor,
)

from hf_speechllm import FbankFeatureExtractor, SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.front_ends import pad_features
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.model.audio_lengths import num_audio_tokens
from hf_speechllm.model.chat import IGNORE_INDEX, parse_messages, transcription_messages, transcription_prompt
from hf_speechllm.model.loss import label_positions
from hf_speechllm.model.modeling import PARTS

pytestmark = pytest.mark.core

ADAPTORS = [
    {"adaptor_type": kind, "downsample_rate": rate, "use_low_frame_rate": low}
    for kind in ("transformer", "linear")
    for rate in (1, 2, 3)
    for low in (False, True)
]
SECONDS = (0.31, 0.8, 1.25)
TEXTS = ("one", "two two 五", "three 六 four four")
WHISPER = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "vocab_size": 64,
    "max_source_positions": 1500,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def name_of(adaptor):
    low = "low" if adaptor["use_low_frame_rate"] else "full"
    return f"{adaptor['adaptor_type']}-{adaptor['downsample_rate']}-{low}"


@pytest.fixture(scope="module")
def waveforms():
    rng = np.random.default_rng(1)
    return [(0.1 * rng.standard_normal(int(seconds * 16000))).astype(np.float32) for seconds in SECONDS]


@pytest.fixture(scope="module")
def dialogues(waveforms):
    """Dialogues with one recording and one transcript each, of different lengths."""
    pairs = zip(waveforms, TEXTS, strict=True)
    return [transcription_messages(waveform, "语音转写：", text) for waveform, text in pairs]


@pytest.fixture(scope="module")
def whisper_parts(compose_tiny, tiny_config):
    """A tiny random model with Whisper's encoder."""
    config = {**tiny_config(downsample_rate=4), "audio_encoder_config": WHISPER}
    extractor = WhisperFeatureExtractor()
    with pytest.MonkeyPatch.context() as patch:  # pretrained weights would need the network
        patch.setattr(AutoFeatureExtractor, "from_pretrained", lambda *_, **__: extractor)
        return compose_tiny(config)


@pytest.fixture(scope="module")
def low_frame_rate_model(compose_tiny, tiny_config):
    return compose_tiny(tiny_config(use_low_frame_rate=True))


def gradients(model, batch):
    """Returns loss, supervised tokens, and the gradient of the summed loss for each parameter."""
    model.zero_grad()
    output = model(**batch)
    count = int(output.num_label_tokens)
    (output.loss * count).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item() * count, count, grads


def assert_batch_equals_singles(model, processor, dialogues, padding_side):
    batch = processor.apply_chat_template(dialogues, padding_side=padding_side)
    assert batch["attention_mask"].min() == 0 and batch["input_features_mask"].min() == 0  # there is padding
    loss, count, grads = gradients(model, batch)
    singles = [gradients(model, processor.apply_chat_template(dialogue)) for dialogue in dialogues]
    assert count == sum(single[1] for single in singles) > 0
    assert loss == pytest.approx(sum(single[0] for single in singles), rel=1e-5)
    assert {name.split(".")[0] for name in grads} == set(PARTS)
    for name, grad in grads.items():
        expected = sum(single[2][name] for single in singles)
        # Relative to the largest gradient of the tensor: single entries may be a small difference of large numbers.
        # Gradients of the key biases are rounding errors only: a softmax ignores an offset common to all keys.
        scale = 0.02 if name.endswith("k_proj.bias") else expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=0, atol=5e-5 * scale, msg=lambda text, name=name: name + text)


def naive_loss(logits, labels):
    """Computes mean cross-entropy and accuracy over all labelled positions from full logits."""
    losses, hits = [], []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        for position in range(1, len(row_labels)):
            if row_labels[position] != IGNORE_INDEX:
                predicted = row_logits[position - 1].double().log_softmax(-1)
                losses.append(-predicted[row_labels[position]].item())
                hits.append(predicted.argmax().item() == row_labels[position].item())
    return np.mean(losses), np.mean(hits)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("adaptor", ADAPTORS, ids=name_of)
def test_padded_batch_equals_single_examples(compose_tiny, tiny_config, dialogues, adaptor, padding_side):
    model, processor = compose_tiny(tiny_config(**adaptor))
    assert_batch_equals_singles(model, processor, dialogues, padding_side)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padded_batch_equals_single_examples_with_a_whisper_encoder(whisper_parts, dialogues, padding_side):
    assert_batch_equals_singles(*whisper_parts, dialogues, padding_side)


def test_whisper_encoder_input_equals_the_padding_of_whispers_feature_extractor(whisper_parts, waveforms):
    model, processor = whisper_parts
    waveform = waveforms[1].copy()
    waveform[-400:] = 0  # otherwise a window of the padding, which is not stored, would overlap the recording
    stored = pad_features(processor.extract_features([waveform]))
    full = processor.feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        tokens, lengths = model.get_audio_features(**stored)
        states = model.audio_encoder(full).last_hidden_state[:, : -(-len(waveform) // 320)]
        expected, _ = model.audio_adaptor(states, torch.ones(states.shape[:2]))
    assert int(lengths) == tokens.shape[1] == expected.shape[1]
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.integers(1, 30_000), min_size=2, max_size=5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 9),
)
def test_batch_of_any_lengths_equals_one_by_one(low_frame_rate_model, samples, side, seed):
    model, processor = low_frame_rate_model
    rng = np.random.default_rng(seed)
    waveforms = [(0.1 * rng.standard_normal(max(count, 160))).astype(np.float32) for count in samples]
    dialogues = [
        transcription_messages(waveform, "语音转写：", TEXTS[index % 3]) for index, waveform in enumerate(waveforms)
    ]
    batch = processor.apply_chat_template(dialogues, padding_side=side)
    with torch.no_grad():
        together = model(**batch)
        encoded = model.audio_encoder(batch["input_features"], batch["input_features_mask"]).last_hidden_state
        total = 0.0
        for row, dialogue in enumerate(dialogues):
            single = processor.apply_chat_template(dialogue)
            output = model(**single)
            total += output.loss.item() * int(output.num_label_tokens)
            alone = model.audio_encoder(single["input_features"], single["input_features_mask"]).last_hidden_state[0]
            torch.testing.assert_close(encoded[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
            frames = int(single["input_features_mask"].sum())
            tokens, counts = model.get_audio_features(single["input_features"], single["input_features_mask"])
            placeholders = int((single["input_ids"] == model.config.audio_token_id).sum())
            assert placeholders == int(counts) == tokens.shape[1] == processor.num_audio_tokens(frames)
    assert total == pytest.approx(together.loss.item() * int(together.num_label_tokens), rel=1e-5)


def test_padding_features_do_not_matter(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    loss = model(**batch).loss
    batch["input_features"][batch["input_features_mask"] == 0] = 7.0
    torch.testing.assert_close(model(**batch).loss, loss)


@pytest.mark.parametrize("adaptor", [ADAPTORS[0], ADAPTORS[3], ADAPTORS[8]], ids=name_of)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_with_the_same_logits(compose_tiny, tiny_config, dialogues, tmp_path, adaptor, tied):
    config = tiny_config(**adaptor)
    config["llm_config"]["tie_word_embeddings"] = tied
    model, processor = compose_tiny(config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    loaded_processor = SpeechLLMProcessor.from_pretrained(tmp_path)
    batch = loaded_processor.apply_chat_template(dialogues)
    for key, value in processor.apply_chat_template(dialogues).items():
        assert torch.equal(batch[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(**batch, return_logits=True).logits, model(**batch, return_logits=True).logits)
    assert loaded.config.use_low_frame_rate == loaded_processor.use_low_frame_rate == adaptor["use_low_frame_rate"]
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_decoding_batches_count_the_seconds_that_a_whisper_encoder_computes(whisper_parts, waveforms, monkeypatch):
    model, processor = whisper_parts
    fixed, batch, sizes = model.config.fixed_seconds, processor.batch, []
    assert fixed > max(SECONDS)

    def watched(dialogues, *args, **options):
        sizes.append(len(dialogues))
        return batch(dialogues, *args, **options)

    monkeypatch.setattr(processor, "batch", watched)
    Transcriber(model, processor, max_new_tokens=1, batch_seconds=2 * fixed).transcribe(waveforms[:3])
    assert sorted(sizes) == [1, 2]


def test_saved_whisper_model_loads_with_the_same_logits(whisper_parts, dialogues, tmp_path):
    model, processor = whisper_parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = SpeechLLMProcessor.from_pretrained(tmp_path).apply_chat_template(dialogues)
    with torch.no_grad():
        assert torch.equal(loaded(**batch, return_logits=True).logits, model(**batch, return_logits=True).logits)


def test_auto_classes_load_a_saved_model(tiny_model):
    assert type(AutoConfig.from_pretrained(tiny_model)) is SpeechLLMConfig
    assert type(AutoModel.from_pretrained(tiny_model)) is SpeechLLMForConditionalGeneration
    assert type(AutoModelForMultimodalLM.from_pretrained(tiny_model)) is SpeechLLMForConditionalGeneration
    assert type(AutoFeatureExtractor.from_pretrained(tiny_model)) is FbankFeatureExtractor
    assert type(AutoProcessor.from_pretrained(tiny_model)) is SpeechLLMProcessor


def test_with_labels_logits_are_computed_only_where_labels_are(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1]))
    output = model(**batch)
    hook.remove()
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert output.logits is None
    assert rows == [(supervised,)]
    assert int(output.num_label_tokens) == supervised < batch["labels"].numel() / 2


def test_without_labels_there_are_full_logits_and_with_them_on_request(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    labels = batch.pop("labels")
    with torch.no_grad():
        full = model(**batch).logits
        asked = model(**batch, labels=labels, return_logits=True)
        last = model(**batch, logits_to_keep=2).logits
    assert full.shape == (*labels.shape, len(processor.tokenizer))
    assert torch.equal(asked.logits, full)
    assert asked.loss is not None
    torch.testing.assert_close(last, full[:, -2:])


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_loss_and_accuracy_equal_those_of_full_logits(compose_tiny, dialogues, padding_side):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues, padding_side=padding_side)
    labels = batch["labels"]
    with torch.no_grad():
        logits = model(**batch, return_logits=True).logits
        # Make some predictions correct: an untrained model predicts none correctly.
        labels[0] = torch.where(labels[0] != IGNORE_INDEX, logits[0].argmax(-1).roll(1), labels[0])
        output = model(**batch)
    loss, accuracy = naive_loss(logits, labels)
    assert 0 < accuracy < 1
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert output.token_accuracy.item() == pytest.approx(accuracy)


def test_label_at_the_first_position_is_not_supervised(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    expected = model(**batch)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    output = model(**batch)
    assert output.num_label_tokens == expected.num_label_tokens
    assert torch.equal(output.loss, expected.loss)


def test_loss_is_the_share_of_the_items_of_the_whole_step(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    mean = model(**batch)
    for items in (1000, torch.tensor(1000)):
        share = model(**batch, num_items_in_batch=items).loss
        assert share.item() == pytest.approx(mean.loss.item() * int(mean.num_label_tokens) / 1000, rel=1e-6)


def test_batch_without_labels_has_no_loss_and_no_nan(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    batch["labels"].fill_(IGNORE_INDEX)
    loss, count, grads = gradients(model, batch)
    assert (loss, count) == (0, 0)
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("adaptor", ADAPTORS, ids=name_of)
def test_number_of_audio_tokens_equals_the_inserted_embeddings(compose_tiny, tiny_config, adaptor):
    model, processor = compose_tiny(tiny_config(**adaptor))
    config = model.config
    lengths = torch.tensor([1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 25, 40])
    features = torch.randn(len(lengths), int(lengths.max()), 560)
    mask = (torch.arange(features.shape[1]) < lengths.unsqueeze(-1)).long()
    with torch.no_grad():
        tokens, counts = model.get_audio_features(features, mask)
    expected = [num_audio_tokens(int(n), config.downsample_rate, config.use_low_frame_rate) for n in lengths]
    assert counts.tolist() == expected == [processor.num_audio_tokens(int(n)) for n in lengths]
    assert tokens.shape[1] == max(expected)


def test_audio_tokens_replace_their_placeholders_in_order(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    with torch.no_grad():
        tokens, counts = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
        embeddings = model._insert_audio(
            batch["input_ids"],
            model.get_input_embeddings()(batch["input_ids"]),
            tokens,
            counts,
        )
    for row, ids in enumerate(batch["input_ids"]):
        placeholders = ids == model.config.audio_token_id
        assert torch.equal(embeddings[row][placeholders], tokens[row, : counts[row]])
        assert torch.equal(embeddings[row][~placeholders], model.get_input_embeddings()(ids[~placeholders]))


def test_cached_outputs_of_frozen_parts_give_the_same_loss(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    features = {key: batch.pop(key) for key in ("input_features", "input_features_mask")}
    with torch.no_grad():
        expected = model(**batch, **features)
        states, mask = model.encode_audio(**features)
        tokens, counts = model.get_audio_features(**features)
        audio_tokens = torch.cat([row[:count] for row, count in zip(tokens, counts, strict=True)])
        from_states = model(**batch, encoder_states=states, input_features_mask=mask)
        from_tokens = model(**batch, audio_tokens=audio_tokens)
    assert torch.equal(from_states.loss, expected.loss)
    assert torch.equal(from_tokens.loss, expected.loss)


def test_logits_in_chunks_give_the_same_loss_and_gradients(compose_tiny, dialogues, monkeypatch):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    results = []
    for size in (10_000, 3):
        monkeypatch.setattr("hf_speechllm.model.loss.POSITIONS_PER_CHUNK", size)
        model.zero_grad()
        output = model(**batch, positions={"labels": label_positions(batch["labels"])})
        assert output.num_label_tokens == (batch["labels"] != IGNORE_INDEX).sum() > 2 * 3
        output.loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([output.loss, output.token_accuracy, *gradients])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_placeholders_and_audio_tokens_that_differ_in_number_are_an_error(compose_tiny, dialogues, surplus):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues[0])
    ids = batch["input_ids"][0]
    if surplus < 0:
        ids[int((ids == model.config.audio_token_id).nonzero()[0])] = 5
    else:
        ids[0] = model.config.audio_token_id
    with pytest.raises(ValueError, match="audio placeholders .* same processor"):
        model(**batch)


def test_two_recordings_in_two_turns_equal_two_turns_with_their_own_features(compose_tiny, dialogues):
    """Recordings are assigned in order of appearance, over turns and rows."""
    model, processor = compose_tiny()
    two_turns = [*dialogues[0], *dialogues[1][1:]]
    assert_batch_equals_singles(model, processor, [dialogues[2], two_turns, dialogues[1]], "right")


@pytest.mark.parametrize("adaptor", [ADAPTORS[0], ADAPTORS[1], ADAPTORS[8]], ids=name_of)
def test_decoding_in_a_batch_equals_decoding_one_by_one(compose_tiny, tiny_config, waveforms, adaptor):
    config = tiny_config(**adaptor)
    config["llm_config"]["tie_word_embeddings"] = False  # with tied weights, an untrained model repeats its last token
    model, processor = compose_tiny(config)
    assert_decodes_alike(model, processor, waveforms)


def test_decoding_in_a_batch_equals_decoding_one_by_one_after_a_whisper_encoder(whisper_parts, waveforms):
    assert_decodes_alike(*whisper_parts, waveforms)


def assert_decodes_alike(model, processor, waveforms):
    batch = processor.apply_transcription_request(waveforms)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()  # padded on the left
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, waveform in enumerate(waveforms):
        single = processor.apply_transcription_request(waveform)
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()
    assert len({tuple(row.tolist()) for row in together}) > 1  # the recordings do matter


def test_decoding_step_by_step_equals_full_logits(compose_tiny, waveforms):
    """The key-value cache contains the prompt with its audio."""
    model, processor = compose_tiny()
    inputs = processor.apply_transcription_request(waveforms[0])
    tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    full = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**full).logits[0, prompt - 1 : -1]
    logits[:, model.generation_config.eos_token_id] = -torch.inf
    assert logits.argmax(-1).tolist() == tokens[0, prompt:].tolist()


@pytest.mark.parametrize("frozen", [(), ("audio_encoder",), ("audio_adaptor", "llm"), ("audio_encoder", "llm")])
def test_frozen_parts_stay_in_eval_mode(compose_tiny, frozen):
    model, _ = compose_tiny()
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    model.train()
    for part in PARTS:
        modes = {module.training for module in getattr(model, part).modules()}
        assert modes == {part not in frozen}
    model.eval()
    assert not any(module.training for module in model.modules())


def test_frozen_part_has_no_dropout_in_training(compose_tiny, tiny_config, dialogues):
    config = tiny_config()
    config["audio_encoder_config"]["hidden_dropout"] = 0.5
    model, processor = compose_tiny(config)
    batch = processor.apply_chat_template(dialogues)
    model.train()
    assert model(**batch).loss != model(**batch).loss
    model.audio_encoder.requires_grad_(False)
    model.train()
    assert model(**batch).loss == model(**batch).loss


def test_half_precision_model_has_a_loss_near_that_of_full_precision(compose_tiny, dialogues):
    model, processor = compose_tiny()
    batch = processor.apply_chat_template(dialogues)
    with torch.no_grad():
        full = model(**batch).loss.item()
        half = model.to(torch.bfloat16)(**batch).loss
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full, rel=0.03)


def test_import_loads_neither_training_nor_optional_libraries():
    script = (
        "import sys\n"
        "from transformers import PreTrainedModel, ProcessorMixin\n"
        "before = set(sys.modules)\n"
        "import hf_speechllm\n"
        "print(*set(sys.modules) - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {".".join(name.split(".")[:depth]) for name in result.stdout.split() for depth in (1, 2)}
    assert {"hf_speechllm.model", "transformers"} <= loaded
    own = ("cli", "training", "inference", "evaluation", "data", "hub")
    others = ("torchaudio", "datasets", "accelerate", "peft", "deepspeed", "evaluate", "av", "soundfile", "matplotlib")
    assert not loaded & {*(f"hf_speechllm.{name}" for name in own), *others}


def test_dropout_of_audio_tokens_replaces_whole_tokens_in_training_alone(compose_tiny, waveforms):
    model, processor = compose_tiny(seed=3)
    dialogue = parse_messages(transcription_messages(b"", transcription_prompt(), "one"))
    batch = processor.batch([dialogue] * 3, waveforms[:3], True)
    seen = []
    model.llm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    audio = batch["input_ids"] == processor.audio_token_id
    model.audio_token_dropout = 0.5
    torch.manual_seed(0)
    for mode in (False, True):
        model.train(mode)
        model(**batch)
    kept, dropped = seen
    zero = (dropped == 0).all(-1)
    assert not (kept == 0).all(-1).any()
    assert not zero[~audio].any() and 0.3 < zero[audio].float().mean() < 0.7
    assert torch.equal(dropped[~zero], kept[~zero])
