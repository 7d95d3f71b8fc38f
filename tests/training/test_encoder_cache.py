"""Cached outputs of frozen parts: the same losses, and refused if results would be wrong."""

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data import encoder_cache
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.training.cache_stage import choose_cache_level

FROZEN = {"freeze_audio_encoder": True, "freeze_audio_adaptor": True}


@pytest.fixture
def parts(tiny_model):
    return (
        SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32),
        SpeechLLMProcessor.from_pretrained(tiny_model),
    )


@pytest.mark.parametrize("level", ["encoder", "adaptor"])
def test_cached_rows_have_the_same_loss_and_gradients(level, parts, tiny_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_cache, "ROWS_PER_FILE", 7)  # several files
    model, processor = parts
    cached = add_encoded(tiny_rows, model, processor, level, str(tmp_path))
    assert len(cached) == len(tiny_rows) and "features" not in cached.column_names
    collator = SpeechLLMCollator(processor)
    results = []
    for rows in (tiny_rows, cached):
        batch = collator([rows[index] for index in (3, 20, 8)])
        assert ("input_features" in batch) == (rows is tiny_rows)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        results.append((output.loss, *(parameter.grad for parameter in model.llm.parameters())))
        assert batch["input_features_mask"].sum() == results_frames(collator, tiny_rows)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def results_frames(collator, rows):
    return sum(len(item) for index in (3, 20, 8) for item in collator.row_inputs(rows[index]))


def test_states_are_computed_again_only_when_weights_or_rows_change(parts, tiny_rows, tmp_path, monkeypatch):
    model, processor = parts
    computed = []
    encode = encoder_cache._encode
    monkeypatch.setattr(encoder_cache, "_encode", lambda *a: computed.append(len(a[0])) or encode(*a))
    for _ in range(2):
        add_encoded(tiny_rows, model, processor, "encoder", str(tmp_path))
    assert computed == [24]
    add_encoded(tiny_rows.select(range(5)), model, processor, "encoder", str(tmp_path))
    assert computed == [24, 5]
    with torch.no_grad():
        next(model.llm.parameters()).add_(1)
        next(model.audio_adaptor.parameters()).add_(1)
    add_encoded(tiny_rows, model, processor, "encoder", str(tmp_path))
    assert computed == [24, 5]
    with torch.no_grad():
        next(model.audio_encoder.parameters()).add_(1)
    add_encoded(tiny_rows, model, processor, "encoder", str(tmp_path))
    assert computed == [24, 5, 24]


@pytest.mark.parametrize("training", [True, False])
def test_states_are_computed_without_dropout_and_the_model_is_left_as_it_was(
    parts, tiny_rows, tmp_path, monkeypatch, training
):
    modes, encode = [], encoder_cache._encode
    monkeypatch.setattr(encoder_cache, "_encode", lambda *args: modes.append(args[1].training) or encode(*args))
    parts[0].train(training)
    add_encoded(tiny_rows.select(range(2)), *parts, "encoder", str(tmp_path))
    assert modes == [False] and parts[0].training is training


def test_level_precision_and_weights_of_each_part_have_files_of_their_own(parts, tiny_rows, tmp_path):
    model, processor = parts

    def folders_after(level, bf16=False):
        add_encoded(tiny_rows.select(range(3)), model, processor, level, str(tmp_path), bf16=bf16)
        return len(list((tmp_path / "encoded").iterdir()))

    assert [folders_after("encoder"), folders_after("adaptor"), folders_after("adaptor")] == [1, 2, 2]
    assert [folders_after("encoder", bf16=True), folders_after("adaptor", bf16=True)] == [3, 4]
    with torch.no_grad():
        next(model.audio_adaptor.parameters()).add_(1)
    assert [folders_after("encoder"), folders_after("adaptor")] == [4, 5]


@pytest.mark.parametrize(
    ("options", "level"),
    [
        (FROZEN, "adaptor"),
        ({"freeze_audio_encoder": True}, "encoder"),
        ({"freeze_audio_adaptor": True}, "fbank"),
        ({**FROZEN, "spec_augment": True}, "fbank"),
        ({**FROZEN, "tempo_perturb": 0.1}, "fbank"),
        ({**FROZEN, "feature_cache": "off"}, "fbank"),
        ({**FROZEN, "feature_cache": "off", "noise_prob": 0.5}, "fbank"),
        ({**FROZEN, "num_train_epochs": 1}, "fbank"),
        ({**FROZEN, "max_steps": 10}, "fbank"),
        ({**FROZEN, "max_steps": 10, "cache_level": "encoder"}, "encoder"),
        ({**FROZEN, "cache_level": "fbank"}, "fbank"),
    ],
)
def test_auto_chooses_the_last_correct_level(options, level, split_options):
    _, *found = split_options(**{"max_steps": -1, "num_train_epochs": 3, **options})
    assert choose_cache_level(*found) == level


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_level": "encoder"}, "--freeze_audio_encoder"),
        ({"cache_level": "adaptor", "freeze_audio_encoder": True}, "--freeze_audio_adaptor"),
        ({"cache_level": "encoder", **FROZEN, "spec_augment": True}, "change the features in every epoch"),
        (
            {"cache_level": "adaptor", **FROZEN, "codec_prob": 0.5, "feature_cache": "off"},
            "--codec_prob 0.5: augmentation must change the features in every epoch",
        ),
        ({"cache_level": "deep"}, "choose auto, fbank, encoder, adaptor"),
    ],
)
def test_wrong_level_is_refused_with_the_reason(options, reason, make_options):
    with pytest.raises(ValueError, match=reason):
        make_options(**options)


def test_training_from_cached_tokens_has_the_same_losses(make_trainer, parts, tiny_rows, tmp_path):
    model, processor = parts
    cached = add_encoded(tiny_rows, model, processor, "adaptor", str(tmp_path))
    logs = []
    for rows in (tiny_rows, cached):
        trainer = make_trainer(train_dataset=rows, **FROZEN)
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    for key in ("loss", "grad_norm", "token_accuracy", "padding_share"):
        values = [[line[key] for line in log] for log in logs]
        assert values[1] == pytest.approx(values[0], rel=1e-4), key
