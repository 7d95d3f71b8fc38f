"""Record of the dependencies of a run; `test_resume_matrix.py` tests changes of the dependencies."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.training.checkpointing.comparison import check_dependencies, compare
from hf_speechllm.training.checkpointing.dependencies import (
    RECORD_FILE,
    describe_engine,
    describe_run,
    read_record,
    write_record,
)
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora

BASE = {"lora_r": 4, "use_lora": True, "freeze_audio_encoder": True, "freeze_audio_adaptor": True}


@dataclasses.dataclass
class Run:
    """Arguments of `describe_run`."""

    options: dict
    model: object
    processor: object
    rows: object


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return (
        SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32),
        SpeechLLMProcessor.from_pretrained(tiny_model),
    )


@pytest.fixture
def describe(split_options, loaded, tiny_rows, tmp_path):
    """Creates the record of a run, with an optional change."""

    def make(change=None):
        run = Run(dict(BASE), copy.deepcopy(loaded[0]), copy.deepcopy(loaded[1]), tiny_rows)
        if change is not None:
            change(run)
        _, _, tuned, args = split_options(**run.options)
        freeze_parts(run.model, tuned.freeze_audio_encoder, tuned.freeze_audio_adaptor, tuned.freeze_llm)
        if tuned.use_lora:
            run.model = add_lora(
                run.model, tuned.lora_r, tuned.lora_alpha, tuned.lora_dropout, tuned.lora_target_modules
            )
        return describe_run(args, run.model, run.processor, run.rows, None, None, ("none", {}))

    return make


def option(**options):
    return lambda run: run.options.update(options)


def rows(edit):
    """Changes the rows one by one: `edit(row, index)`."""

    def change(run):
        features = run.rows.features
        run.rows = run.rows.map(lambda row, index: edit(dict(row), index) or row, with_indices=True, features=features)

    return change


def other_words(row, index):
    messages = json.loads(row["messages"])
    messages[-1]["content"] += " more"
    return {**row, "messages": json.dumps(messages, ensure_ascii=False)} if index == 7 else row


def test_new_options_are_used_if_the_checkpoint_has_no_optimizer(describe):
    saved = describe(option(save_only_model=True))
    changes = compare(saved, describe(option(save_only_model=True, learning_rate=5e-3)))
    assert changes.kept == {} and changes.reported == ["--learning_rate 0.001 -> 0.005"]


def test_no_secret_is_written(describe, make_arguments, tmp_path):
    args = make_arguments(hub_token="hf_secret", push_to_hub=False)
    write_record(describe(), args, tmp_path)
    assert "secret" not in (tmp_path / RECORD_FILE).read_text(encoding="utf-8")
    assert read_record(tmp_path)["options"]["learning_rate"] == args.learning_rate


def test_refusal_is_one_line_with_old_and_new_value(describe, make_arguments, tmp_path):
    args = make_arguments(**BASE)
    write_record(describe(), args, tmp_path)
    now = describe(lambda run: (option(lora_r=8)(run), rows(other_words)(run)))
    with pytest.raises(CheckpointError) as error:
        check_dependencies(args, now, tmp_path)
    text = str(error.value)
    assert "\n" not in text and "--lora_r 4 -> 8" in text and "data.texts" in text
    assert "--model_name_or_path" in text and "--ignore_data_skip" in text


def test_engine_is_described_with_its_settings():
    """Another engine or stage is refused, another setting is reported."""
    deepspeed = pytest.importorskip("deepspeed") and [
        DeepSpeedPlugin(zero_stage=stage, offload_optimizer_device=device)
        for stage, device in ((2, "none"), (2, "cpu"))
    ]
    fsdp = [FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=value) for value in (True, False)]
    states = [
        *(SimpleNamespace(deepspeed_plugin=plugin) for plugin in deepspeed),
        *(SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin) for plugin in fsdp),
        SimpleNamespace(deepspeed_plugin=None),
    ]
    records = []
    for state in states:
        engine, settings = describe_engine(SimpleNamespace(state=state))
        records.append({"options": {}, "engine": engine, "engine_settings": settings})
    names = ["deepspeed, stage 2", "deepspeed, stage 2", "fsdp", "fsdp", "none"]
    assert [record["engine"] for record in records] == names
    for first, second, setting in ((0, 1, "zero_optimization.offload_optimizer"), (2, 3, "reshard_after_forward")):
        changes = compare(records[first], records[second])
        assert changes.refused == {} and any(f"engine_settings.{setting}" in text for text in changes.reported)
    assert "engine deepspeed, stage 2 -> fsdp" in str(compare(records[0], records[2]).refused)
    assert "engine none -> fsdp" in str(compare(records[4], records[2]).refused)


# Real runs

SAVING = {"save_strategy": "steps", "save_steps": 1, "freeze_audio_encoder": True}


def test_options_of_the_optimizer_come_from_the_checkpoint(make_trainer, tmp_path, caplog):
    make_trainer(**SAVING, max_steps=2, lr_scheduler_type="constant").train()
    trainer = make_trainer(**SAVING, max_steps=3, lr_scheduler_type="constant", learning_rate=0.5, weight_decay=0.2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "--learning_rate 0.5 (the checkpoint has 0.001)" in caplog.text
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {0.001}
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| learning rate, llm | 0.001 |" in card and "| weight decay | 0 |" in card
    assert read_record(tmp_path / "run" / "checkpoint-3")["options"]["learning_rate"] == 0.001


def test_adapters_are_not_continued_on_another_base_model(make_trainer, compose_tiny, tmp_path):
    options = {**SAVING, **BASE}
    make_trainer(**options, max_steps=1).train()
    for part in compose_tiny(seed=1):
        part.save_pretrained(tmp_path / "other")
    trainer = make_trainer(**options, max_steps=2, model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="model.base"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_resumed_run_uses_new_save_steps(make_trainer, tmp_path):
    make_trainer(**{**SAVING, "save_steps": 2}, max_steps=2).train()
    make_trainer(**SAVING, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_recipe_reports_wrong_options_in_one_line(run_recipe, make_trainer, tiny_model, tiny_corpus, tmp_path):
    make_trainer(**SAVING, max_steps=1).train()
    message = run_recipe(
        "finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir",
        tmp_path / "run", "--use_cpu", "true", "--max_steps", 4, "--resume_from_checkpoint", "auto", "--freeze_llm",
        "true", "--report_to", "none",
    )  # fmt: skip
    assert "--freeze_llm False -> True" in message and "--freeze_audio_encoder True -> False" in message
    assert "\n" not in message


def test_no_file_of_a_run_contains_the_hub_token(make_trainer, tmp_path):
    trainer = make_trainer(hub_token="hf_abcdefgh", save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_abcdefgh"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json"} <= {path.name for path in files}
    assert not [path for path in files if b"hf_abcdefgh" in path.read_bytes()]
