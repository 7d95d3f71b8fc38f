"""A matrix of what may change between an interruption and a resume: nothing changes silently."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.cli.arguments import GROUPS
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.training.checkpointing.comparison import check_dependencies, compare
from hf_speechllm.training.checkpointing.dependencies import (
    RECORD_FILE,
    describe_options,
    describe_run,
    read_record,
    write_record,
)
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora

BASE = {"lora_r": 4, "use_lora": True, "freeze_audio_encoder": True, "freeze_audio_adaptor": True}


@dataclasses.dataclass
class Run:
    """What a record is made of."""

    options: dict
    model: object
    processor: object
    rows: object
    weights: object = None
    validation: object = None
    engine: str = "none"
    record_changes: dict = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return (
        SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32),
        SpeechLLMProcessor.from_pretrained(tiny_model),
    )


@pytest.fixture
def describe(split_options, loaded, tiny_rows, tmp_path):
    """Makes the record of a run, with a change if one is given."""

    def make(change=None):
        run = Run(dict(BASE), copy.deepcopy(loaded[0]), copy.deepcopy(loaded[1]), tiny_rows)
        run.validation = {"near": tiny_rows.select(range(3)), "retention": tiny_rows.select(range(5, 9))}
        run.weights = np.ones(len(tiny_rows))
        words = tmp_path / "words.txt"
        words.write_text("one\n", encoding="utf-8")
        run.options["hotword_file"] = str(words)
        if change is not None:
            change(run)
        _, _, tuned, args = split_options(**run.options)
        freeze_parts(run.model, tuned.freeze_audio_encoder, tuned.freeze_audio_adaptor, tuned.freeze_llm)
        if tuned.use_lora:
            run.model = add_lora(
                run.model, tuned.lora_r, tuned.lora_alpha, tuned.lora_dropout, tuned.lora_target_modules
            )
        record = describe_run(args, run.model, run.processor, run.rows, run.weights, run.validation, run.engine)
        return {**record, **run.record_changes}

    return make


def option(**options):
    return lambda run: run.options.update(options)


def rows(edit):
    """Changes the rows one by one: `edit(row, index)`."""

    def change(run):
        features = run.rows.features
        run.rows = run.rows.map(lambda row, index: edit(dict(row), index) or row, with_indices=True, features=features)

    return change


def edit_text(row, index):
    return {**row, "messages": row["messages"].replace('"role"', '"role" ')} if index == 5 else row


def other_words(row, index):
    messages = json.loads(row["messages"])
    messages[-1]["content"] += " more"
    return {**row, "messages": json.dumps(messages, ensure_ascii=False)} if index == 7 else row


def moved(row, index):
    folder = os.path.dirname(row["recordings"][0])
    return {
        **row,
        "messages": row["messages"].replace(folder, "/elsewhere"),
        "recordings": [name.replace(folder, "/elsewhere") for name in row["recordings"]],
    }


def touched(indices):
    return lambda row, index: {**row, "stamps": [f"{row['stamps'][0]}1"]} if index in indices else row


def other_weights(part):
    def change(run):
        with torch.no_grad():
            next(getattr(run.model, part).parameters()).add_(1e-3)

    return change


def set_on(path, value):
    def change(run):
        *way, last = path.split(".")
        target = run
        for name in way:
            target = getattr(target, name)
        setattr(target, last, value)

    return change


def add_token(run):
    run.processor.tokenizer.add_tokens(["<new>"])


def hotword_file(run):
    Path(run.options["hotword_file"]).write_text("two\n", encoding="utf-8")


def select(name, indices):
    def change(run):
        if name == "rows":
            run.rows = run.rows.select(indices)
            run.weights = np.ones(len(run.rows))
        else:
            run.validation[name] = run.rows.select(indices)

    return change


def drop_set(name):
    return lambda run: run.validation.pop(name)


CHANGES = {
    # Nothing, or nothing that matters
    "nothing": (lambda run: None, "same", ""),
    "output folder": (option(output_dir="elsewhere"), "same", ""),
    "logging": (option(disable_tqdm=False, log_level="info", run_name="b"), "same", ""),
    "hub": (option(hub_model_id="user/model", hub_token="secret"), "same", ""),
    "folder of the recordings": (rows(moved), "same", ""),
    "state of the tokenizer": (lambda run: run.processor.tokenizer(["a", "b b"], padding=True), "same", ""),
    # The optimizer's
    "learning rate": (option(learning_rate=5e-3), "kept", "learning_rate"),
    "learning rate of a part": (option(llm_learning_rate=5e-3), "kept", "llm_learning_rate"),
    "weight decay": (option(weight_decay=0.3), "kept", "weight_decay"),
    "beta 1": (option(adam_beta1=0.8), "kept", "adam_beta1"),
    "beta 2": (option(adam_beta2=0.8), "kept", "adam_beta2"),
    "epsilon": (option(adam_epsilon=1e-6), "kept", "adam_epsilon"),
    # Options that hold from then on
    "steps": (option(max_steps=9), "reported", "--max_steps 4 -> 9"),
    "schedule": (option(lr_scheduler_type="linear"), "reported", "--lr_scheduler_type cosine -> linear"),
    "warm-up": (option(warmup_steps=3), "reported", "--warmup_steps 0 -> 3"),
    "clipping": (option(max_grad_norm=3.0), "reported", "--max_grad_norm 1.0 -> 3.0"),
    "accumulation": (option(gradient_accumulation_steps=2), "reported", "--gradient_accumulation_steps 1 -> 2"),
    "batch": (option(per_device_train_batch_seconds=5.0), "reported", "--per_device_train_batch_seconds 4.0 -> 5.0"),
    "checkpointing of activations": (option(gradient_checkpointing=True), "reported", "--gradient_checkpointing"),
    "augmentation": (option(spec_augment=True), "reported", "--spec_augment False -> True"),
    "tempo": (option(tempo_perturb=0.1), "reported", "--tempo_perturb 0.0 -> 0.1"),
    "hotwords": (option(hotword_distractors=3), "reported", "--hotword_distractors 0 -> 3"),
    "hotword file": (hotword_file, "reported", "hotword_file"),
    "precision": (option(bf16=True), "reported", "--bf16 False -> True"),
    "attention": (option(attn_implementation="eager"), "reported", "--attn_implementation sdpa -> eager"),
    "feature cache": (option(feature_cache="float32"), "reported", "--feature_cache float16 -> float32"),
    "loader processes": (option(dataloader_num_workers=2), "reported", "--dataloader_num_workers 0 -> 2"),
    "dropout of LoRA": (option(lora_dropout=0.2), "reported", "--lora_dropout 0.05 -> 0.2"),
    "name of the base model": (option(model_name_or_path="other"), "reported", "--model_name_or_path"),
    "name of the file": (rows(lambda row, index: {**row, "file": "b.jsonl"}), "reported", "data.files.b.jsonl"),
    "validation rows": (select("near", range(4)), "reported", "validation.near"),
    "validation set left out": (drop_set("near"), "reported", "validation.near"),
    "retention left out": (drop_set("retention"), "reported", "validation.retention"),
    "seed of the model": (option(seed=7, data_seed=42), "reported", "--seed 42 -> 7"),
    "processes": (set_on("record_changes", {"processes": 2}), "reported", "processes 1 -> 2"),
    "versions": (set_on("record_changes", {"versions": {"torch": "1.0"}}), "reported", "versions.torch"),
    "copied recordings": (rows(touched(range(24))), "reported", "another time of modification of 24 of 24"),
    "fused optimizer": (option(optim="adamw_torch"), "reported", "--optim adamw_torch_fused -> adamw_torch"),
    # What the checkpoint does not fit
    "freezing": (option(freeze_audio_adaptor=False), "refused", "--freeze_audio_adaptor True -> False"),
    "no LoRA": (option(use_lora=False), "refused", "--use_lora True -> False"),
    "rank": (option(lora_r=8), "refused", "--lora_r 4 -> 8"),
    "scale": (option(lora_alpha=64), "refused", "--lora_alpha 32 -> 64"),
    "layers with adapters": (option(lora_target_modules=["q_proj"]), "refused", "--lora_target_modules"),
    "optimizer": (option(optim="sgd"), "refused", "--optim adamw_torch_fused -> sgd"),
    "streaming": (option(streaming=True), "refused", "--streaming False -> True"),
    "engine": (set_on("engine", "fsdp"), "refused", "engine none -> fsdp"),
    "base model: LLM": (other_weights("llm"), "refused", "model.base"),
    "base model: encoder": (other_weights("audio_encoder"), "refused", "model.base"),
    "base model: config": (
        set_on("model.config.audio_adaptor_config.use_low_frame_rate", None), "refused", "use_low_frame_rate",
    ),
    "tokenizer": (add_token, "refused", "tokenizer.vocabulary"),
    "chat template": (set_on("processor.tokenizer.chat_template", "{{ x }}"), "refused", "tokenizer.chat_template"),
    "front end": (set_on("processor.feature_extractor.dither", 0.5), "refused", "features.dither 0.0 -> 0.5"),
    "measure": (option(metric_for_best_model="token_accuracy"), "refused", "--metric_for_best_model"),
    "rows of general speech": (select("retention", range(4)), "refused", "validation.retention"),
    # What it is not known how much of was seen
    "order of the rows": (select("rows", [23, *range(23)]), "rows", "data.ids"),
    "fewer rows": (select("rows", range(23)), "rows", "data.rows 24 -> 23"),
    "a transcript": (rows(other_words), "rows", "data.texts"),
    "hotwords of a row": (
        rows(lambda row, index: {**row, "hotwords": ["one"]} if index == 3 else row), "rows", "data.texts",
    ),
    "a replaced recording": (rows(touched([7])), "rows", "line 8"),
    "other recordings": (
        rows(lambda row, index: {**row, "stamps": [f"9{row['stamps'][0]}"]}), "rows", "another size of 24 of 24",
    ),
    "other names": (
        rows(lambda row, index: {**row, "recordings": [f"{row['recordings'][0]}.flac"]}), "rows", "data.ids",
    ),
    "weights": (set_on("weights", np.full(24, 2.0)), "rows", "data.weights"),
    "seed of the order": (option(data_seed=9), "rows", "data.order_seed 42 -> 9"),
}  # fmt: skip


@pytest.fixture
def saved(describe):
    return describe(option(optim="adamw_torch_fused", metric_for_best_model="loss", greater_is_better=False))


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_refused_kept_back_or_reported(saved, describe, name, tiny_rows):
    change, outcome, text = CHANGES[name]
    fixed = {"optim": "adamw_torch_fused", "metric_for_best_model": "loss", "greater_is_better": False}

    def both(run):
        run.options.update(fixed)
        change(run)

    now = describe(both)
    changes = compare(saved, now, rows=tiny_rows)
    refused = [text for texts in changes.refused.values() for text in texts]
    if outcome == "same":
        assert changes.reported == [] and changes.kept == {} and refused == []
    elif outcome == "kept":
        assert list(changes.kept) == [text] and refused == []
        assert changes.kept[text][1] == now["options"][text]
    elif outcome == "reported":
        assert any(text in line for line in changes.reported) and refused == [], changes
    else:
        assert any(text in line for line in refused), changes
    # Other rows are allowed where the epoch begins again; another model is not.
    again = compare(saved, now, begins_epoch=True, rows=tiny_rows)
    assert bool(again.refused) == (outcome == "refused")
    if outcome == "rows":
        assert any(text in line for line in again.reported)


def test_every_option_is_compared_or_says_where_things_are(make_arguments):
    args = make_arguments(use_lora=True)
    options = describe_options(args)
    left_out = {item.name for item in dataclasses.fields(args) if item.init} - options.keys()
    left_out |= args.run_options.keys() - options.keys()
    own = {item.name for kind in GROUPS for item in dataclasses.fields(kind)}
    assert left_out & own <= {
        "cache_dir", "preprocessing_num_workers", "url_max_megabytes", "url_timeout_seconds", "resume_from_checkpoint",
        "logging_steps", "logging_nan_inf_filter", "hub_private_repo", "hub_strategy", "hub_model_id", "push_to_hub",
        "allow_private_redirects",
    }  # fmt: skip
    assert not any(name.endswith("_token") for name in options)
    for name in options:
        changes = compare({"options": options}, {"options": {**options, name: "another"}})
        assert changes.refused or changes.reported or changes.kept, name


def test_without_an_optimizer_in_the_checkpoint_its_options_hold_from_then_on(describe):
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


# Real runs

SAVING = {"save_strategy": "steps", "save_steps": 1, "freeze_audio_encoder": True}


def test_options_of_the_optimizer_are_those_of_the_checkpoint(make_trainer, tmp_path, caplog):
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


def test_saving_more_often_takes_effect_after_a_resumption(make_trainer, tmp_path):
    make_trainer(**{**SAVING, "save_steps": 2}, max_steps=2).train()
    make_trainer(**SAVING, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_wrong_options_end_the_recipe_in_one_line(run_recipe, make_trainer, tiny_model, tiny_corpus, tmp_path):
    make_trainer(**SAVING, max_steps=1).train()
    message = run_recipe(
        "finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir",
        tmp_path / "run", "--use_cpu", "true", "--max_steps", 4, "--resume_from_checkpoint", "auto", "--freeze_llm",
        "true", "--report_to", "none",
    )  # fmt: skip
    assert "--freeze_llm False -> True" in message and "--freeze_audio_encoder True -> False" in message
    assert "\n" not in message
