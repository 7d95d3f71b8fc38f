"""Batch budgets that fit into memory, and splitting of batches that do not fit."""

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.fast.attention import enable_padding_free
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.training.batch_budget import largest_budget
from hf_speechllm.training.out_of_memory import run_in_halves, split_batch


@pytest.mark.parametrize(
    ("fixed", "per_second", "available"), [(10, 0.5, 400), (0, 1, 61), (300, 0.01, 400), (5, 3, 190)]
)
def test_largest_budget_fits_and_uses_most_of_the_memory(fixed, per_second, available):
    probes = []

    def probe(seconds):
        probes.append(seconds)
        used = fixed + per_second * seconds
        if used > 1.1 * available:
            raise torch.OutOfMemoryError
        return used

    budget = largest_budget(probe, available, longest=20, limit=100_000)
    ideal = (available - fixed) / per_second
    assert 0.85 * ideal <= budget <= ideal
    assert len(probes) <= 12


def test_budget_does_not_exceed_the_limit():
    assert largest_budget(lambda seconds: seconds, available=1e9, longest=20, limit=500) == 500
    assert largest_budget(lambda seconds: seconds, available=1e9, longest=20, limit=30) == 30


def test_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"longest row \(25.0 s\) does not fit"):
        largest_budget(lambda seconds: seconds, available=10, longest=25, limit=500)


def test_auto_is_an_option_and_refused_on_a_cpu(make_trainer, make_options, tmp_path):
    options = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    args = parse_arguments([*options, "--per_device_train_batch_seconds", "auto"]).training
    assert args.per_device_train_batch_seconds == 0
    trainer = make_trainer(per_device_train_batch_seconds="auto")
    with pytest.raises(ValueError, match="set a number of seconds on a CPU"):
        trainer.train()
    with pytest.raises(ValueError, match="auto is not supported with --streaming"):
        make_options(per_device_train_batch_seconds="auto", streaming=True, max_steps=3)


@pytest.fixture
def parts(tiny_model):
    return (
        SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32),
        SpeechLLMProcessor.from_pretrained(tiny_model),
    )


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("level", ["fbank", "encoder", "adaptor"])
def test_halves_of_a_batch_sum_to_the_batch(level, padding_free, parts, tiny_rows, tmp_path):
    model, processor = parts
    rows = tiny_rows
    if level != "fbank":
        rows = add_encoded(rows, model, processor, level, str(tmp_path))
    if padding_free:
        enable_padding_free(model)
    batch = SpeechLLMCollator(processor, padding_free=padding_free)([rows[index] for index in (3, 11, 20, 8, 5)])
    count = len(batch["positions"]["labels"])
    whole = model(**batch, num_items_in_batch=count)
    halves = split_batch(batch, processor)
    assert [len(half["input_ids"]) for half in halves] == [2, 3]
    outputs = [model(**half, num_items_in_batch=count) for half in halves]
    torch.testing.assert_close(sum(output.loss for output in outputs), whole.loss)
    assert sum(output.num_label_tokens for output in outputs) == count


def test_rows_of_several_recordings_stay_together(parts, tiny_rows):
    model, processor = parts
    path = tiny_rows[0]["recordings"][0]
    turn = transcription_messages(path, transcription_prompt(), "one")
    batch = processor.apply_chat_template([[*turn, *turn[1:]], turn, turn])
    first, second = split_batch(batch, processor)
    assert len(first["input_features"]) == 2 and len(second["input_features"]) == 2


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_training_continues_if_memory_is_insufficient(limit, make_trainer, monkeypatch):
    losses = []
    for most_rows in (100, limit):
        trainer = make_trainer(max_steps=3)
        forward = trainer.model.forward

        def tight(input_ids, forward=forward, most_rows=most_rows, **inputs):
            output = forward(input_ids=input_ids, **inputs)
            if len(input_ids) > most_rows:
                output.loss.backward()  # as if the error came late, after gradients were computed
                raise torch.OutOfMemoryError
            return output

        monkeypatch.setattr(trainer.model, "forward", tight)
        trainer.train()
        losses.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line])
    for (loss, norm), (expected_loss, expected_norm) in zip(*losses, strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-4)


@pytest.mark.parametrize("indices, may_split", [([0, 1], False), ([0], True)])
def test_out_of_memory_error_says_what_to_do(parts, tiny_rows, indices, may_split):
    processor = parts[1]
    batch = SpeechLLMCollator(processor)([tiny_rows[index] for index in indices])

    def step(part):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError, match="lower --per_device_train_batch_seconds"):
        run_in_halves(step, batch, processor, lambda: None, may_split)
