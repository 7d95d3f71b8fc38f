"""Training from a stream: as long as it was asked to, and the same after an interruption."""

import json

import pytest
import torch

from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.data.augment import augmentations
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.stream import open_stream
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments

OPTIONS = {"streaming": True, "shuffle_buffer": 7, "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}


@pytest.fixture
def train(make_trainer, make_arguments, tiny_corpus, monkeypatch):
    """Trains on the tiny corpus as the recipe does with --streaming."""
    monkeypatch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", 1000)

    def run(checkpoint=None, **options):
        args = make_arguments(**OPTIONS, **options)
        processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
        collator = SpeechLLMCollator(processor, augmentations(args.tempo_perturb, args.spec_augment))
        stream = open_stream(args.train_file, collator, 2048, args, args.train_weight)
        trainer = make_trainer(train_dataset=stream, **OPTIONS, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return run


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    train, compose_tiny, tiny_config, tmp_path, options
):
    config = tiny_config()
    config["llm_config"]["attention_dropout"] = 0.2  # so that the state of the random numbers matters, too
    for part in compose_tiny(config):
        part.save_pretrained(tmp_path / "model")
    options = {**options, "model_name_or_path": str(tmp_path / "model"), "spec_augment": True}
    whole = train(**options)
    again = train(str(tmp_path / "run" / "checkpoint-3"), **options)
    assert again.state.global_step == whole.state.global_step == 6
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    history = [
        {entry["step"]: entry["loss"] for entry in t.state.log_history if "loss" in entry} for t in (whole, again)
    ]
    assert history[0] == history[1]
    assert [entry["epoch"] for entry in again.state.log_history if "loss" in entry] == pytest.approx(
        [step / 6 for step in range(1, 7)]
    )


def test_run_that_was_interrupted_after_its_last_step_does_no_further_one(train, tmp_path):
    expected = train().model.llm.model.norm.weight.detach().clone()
    again = train(str(tmp_path / "run" / "checkpoint-6"))
    assert again.state.global_step == 6
    assert torch.equal(again.model.llm.model.norm.weight, expected)


def test_card_says_that_rows_were_not_counted(train, tmp_path):
    train().create_model_card()
    assert "| training | `train.jsonl` | streamed | not counted |" in (tmp_path / "run" / "README.md").read_text()


def test_streaming_without_an_end_is_refused():
    with pytest.raises(ValueError, match="--max_steps"):
        SpeechLLMTrainingArguments(model_name_or_path="m", train_file=["a.jsonl"], streaming=True, use_cpu=True)


def test_state_is_part_of_every_checkpoint(train, tmp_path):
    train(dataloader_num_workers=2)
    states = [json.loads((tmp_path / f"run/checkpoint-{n}/stream_rank0.json").read_text()) for n in (3, 6)]
    assert [state["batches"] for state in states] == [3, 6]
    assert len(states[0]["places"]) == 2
