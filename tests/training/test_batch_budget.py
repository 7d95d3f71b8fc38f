"""Batch budgets that fit into memory, and splitting of batches that do not fit."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.data.augmentation_options import AugmentationOptions
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import row_seconds
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.data.sampler import ROW_COST, BudgetBatchSampler
from hf_speechllm.fast.attention import enable_padding_free
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.training import batch_budget
from hf_speechllm.training.batch_budget import find_batch_seconds, largest_budget
from hf_speechllm.training.dataloaders import train_sampler
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


class Gpu:
    """Stands for a GPU: of a batch, it takes 10 bytes and one for each frame with its padding."""

    def __init__(self, memory):
        self.total_memory, self.used, self.batches = memory, 0, []

    def backward(self, batch):
        self.batches.append(batch)
        if self.used_by(batch) > self.total_memory:
            raise torch.OutOfMemoryError
        self.used = max(self.used, self.used_by(batch))

    def used_by(self, batch):
        return 10 + batch["input_features_mask"].numel()

    def reset(self, device):
        self.used = 0


def memory_file(rows):
    return Path(rows.cache_files[0]["filename"]).with_name(batch_budget.MEMORY_FILE)


@pytest.fixture
def measure(monkeypatch, make_arguments, parts, tiny_rows, tmp_path):
    """Runs `find_batch_seconds` on such a GPU; gives the budget and the GPU."""

    def run(memory=10_000, rows=tiny_rows, sharded=False, name="a GPU", trained=None, **options):
        gpu = Gpu(memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.used)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "state")
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        model, processor = parts
        for parameter in model.parameters():
            parameter.requires_grad = parameter is trained
        args = make_arguments(**{"output_dir": str(tmp_path / "run"), **options})
        assert args.device.type == "cpu"  # which also sets up what `world_size` asks
        with monkeypatch.context() as patch:
            patch.setattr(type(args), "device", torch.device("cuda", 0))
            budget = find_batch_seconds(args, model, rows, SpeechLLMCollator(processor), gpu.backward, sharded)
        return budget, gpu

    memory_file(tiny_rows).unlink(missing_ok=True)  # of other tests with these rows
    monkeypatch.setattr(batch_budget, "STEPS_PER_EPOCH", 0.1)  # the corpus lasts 20 s
    monkeypatch.setattr(batch_budget, "FIRST_PROBE", 2.0)
    return run


def test_batches_of_the_measured_budget_fill_the_memory_and_fit(measure, tiny_rows, parts):
    budget, gpu = measure(memory=200)
    sizes = [len(batch["input_ids"]) for batch in gpu.batches]
    assert min(sizes) < max(sizes) // 2  # of the longest rows, and of the shortest
    collator = SpeechLLMCollator(parts[1])
    sampler = BudgetBatchSampler(row_seconds(tiny_rows), budget, row_cost=ROW_COST)
    used = [gpu.used_by(collator([tiny_rows[int(index)] for index in batch])) for batch in sampler.batches(0)]
    assert 0.75 * 176 < max(used) <= 176  # 88 % of the memory


def test_budget_leaves_an_epoch_its_steps(measure, tiny_rows, monkeypatch):
    total = row_seconds(tiny_rows).sum()
    assert measure()[0] == pytest.approx(10 * total)
    monkeypatch.setattr(batch_budget, "STEPS_PER_EPOCH", 5)
    assert measure(seed=2, bf16=True)[0] == pytest.approx(total / 5)
    assert measure(gradient_accumulation_steps=2, gradient_checkpointing=True)[0] == pytest.approx(total / 10)
    assert measure(memory=9_999, gradient_accumulation_steps=1000)[0] == row_seconds(tiny_rows).max()


def test_budget_is_measured_once_for_a_setting(measure, tiny_rows):
    budget, gpu = measure(memory=200)
    again, idle = measure(memory=200)
    assert (again, idle.batches) == (budget, []) and gpu.batches
    assert budget in json.loads(memory_file(tiny_rows).read_text()).values()
    for change in (
        {"memory": 201}, {"name": "another GPU"}, {"gradient_checkpointing": True}, {"bf16": True},
        {"rows": tiny_rows.select(range(20))},
    ):  # fmt: skip
        assert measure(**{"memory": 200, **change})[1].batches, change


def test_moments_of_the_optimizer_have_their_room(measure, parts, monkeypatch):
    bias = parts[0].audio_adaptor.linear1.bias
    monkeypatch.setattr(batch_budget, "OPTIMIZER_BYTES", 100 / bias.numel())
    without, _ = measure(memory=400)
    assert measure(memory=400, trained=bias)[0] < without - 50 * 0.06


def test_model_that_will_be_sharded_is_refused(measure):
    with pytest.raises(ValueError, match="DeepSpeed or FSDP"):
        measure(sharded=True)


def test_gradients_and_random_numbers_are_left_as_they_were(monkeypatch, parts):
    model, _ = parts
    states = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.append(state))

    def backward(batch):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if batch == "too large":
            raise torch.OutOfMemoryError

    assert batch_budget._peak_memory(model, ["small"], backward, torch.device("cuda")) == 7
    with pytest.raises(torch.OutOfMemoryError):
        batch_budget._peak_memory(model, ["small", "too large"], backward, torch.device("cuda"))
    assert states == ["before"] * 2
    assert all(parameter.grad is None for parameter in model.parameters())


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


def test_batches_of_an_encoder_with_fixed_length_have_at_most_twice_the_rows(tiny_rows, make_arguments, tiny_model):
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    rows = tiny_rows.map(lambda row, index: {"num_frames": [3000 if index < 8 else 100]}, with_indices=True)
    rows = datasets.concatenate_datasets([rows] * 10)
    args = make_arguments(per_device_train_batch_seconds=240.0)

    def sizes(collator, rows):
        batches = train_sampler(args, rows, collator).batches(0)
        longest = row_seconds(rows)
        return [max(len(batch) for batch in batches if longest[batch].max() == limit) for limit in (30.0, 1.0)]

    fixed = SpeechLLMCollator.augmenting(processor, AugmentationOptions(), fixed_seconds=30.0)
    assert sizes(fixed, rows) == [8, 15]
    assert sizes(SpeechLLMCollator(processor), rows) == [8, 100]
    encoded = rows.add_column("encoder_states", [b""] * len(rows))  # the encoder does not run
    assert sizes(fixed, encoded) == [8, 100]
