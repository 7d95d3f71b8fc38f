"""Changes between an interruption and a resume, in real runs: no change is silent.

Outcomes: `same` (bit-identical, without a warning), `reported` (in one line; the new value is used), `kept` (in one
line; the value of the checkpoint is used), `refused` (in one line, before the first step), `rows` (refused, but
reported if the epoch starts again).
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_speechllm import SpeechLLMTrainingArguments
from hf_speechllm.data.options import DataOptions
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.model.options import ModelOptions
from hf_speechllm.training.callbacks import TrainingCurve
from hf_speechllm.training.checkpointing.comparison import check_options, compare
from hf_speechllm.training.checkpointing.dependencies import HARMLESS, RECORD_FILE, describe_options
from hf_speechllm.training.inherited_options import EFFECTIVE, WITHOUT_EFFECT
from hf_speechllm.training.options import TrainedPartsOptions

REPOSITORY = Path(__file__).resolve().parents[3]
LORA = {"use_lora": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {"freeze_audio_encoder": True, **LORA},
    "partial": {"freeze_audio_encoder": True, "save_only_trained": True},
}
COMMON = {
    "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_seconds": 9.0,
    "metric_for_best_model": "loss", "greater_is_better": False, "check_first_checkpoint": False,
}  # fmt: skip


@dataclass
class Case:
    """A change.

    Args:
        outcome: see the docstring of the module.
        text: expected part of the message.
        options: changed options.
        edit: changes the trainer before resuming.
        record: changes of the checkpoint's record, for dependencies that a test cannot change (GPUs, processes, ...).
        run: name of the resumed run.
    """

    outcome: str
    text: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    edit: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    run: str = "lora"


def option(outcome, text="", run="lora", **options):
    return Case(outcome, text, options, run=run)


def edit(outcome, text, change, run="lora"):
    return Case(outcome, text, edit=change, run=run)


def record(outcome, text, **changes):
    return Case(outcome, text, record=changes)


def change_rows(change):
    def edit(trainer):
        rows = trainer.train_dataset
        trainer.train_dataset = rows.map(
            lambda row, index: change(dict(row), index) or row, with_indices=True, features=rows.features
        )

    return edit


def other_words(row, index):
    messages = json.loads(row["messages"])
    messages[-1]["content"] += " more"
    return {**row, "messages": json.dumps(messages, ensure_ascii=False)} if index == 7 else row


def moved(row, index):
    folder = os.path.dirname(row["recordings"][0])
    recordings = [name.replace(folder, "/elsewhere") for name in row["recordings"]]
    return {**row, "messages": row["messages"].replace(folder, "/elsewhere"), "recordings": recordings}


def touched(indices):
    return lambda row, index: {**row, "stamps": [f"{row['stamps'][0]}1"]} if index in indices else row


def select(indices):
    def edit(trainer):
        trainer.train_dataset = trainer.train_dataset.select(indices)

    return edit


def other_weights(part):
    def edit(trainer):
        with torch.no_grad():
            next(p for name, p in trainer.model.named_parameters() if part in name and "lora_" not in name).add_(1e-3)

    return edit


def set_on(path, value):
    def edit(trainer):
        *way, last = path.split(".")
        target = trainer
        for name in way:
            target = getattr(target, name)
        setattr(target, last, value)

    return edit


def validation(change):
    def edit(trainer):
        trainer.eval_dataset = change(dict(trainer.eval_dataset))

    return edit


def replace_recording(sets):
    rows = sets["near"]
    sets["near"] = rows.map(lambda row: {"stamps": [f"{row['stamps'][0]}1"]}, features=rows.features)
    return sets


def add_token(trainer):
    trainer.processing_class.tokenizer.add_tokens(["<new>"])


def use_tokenizer(trainer):
    trainer.processing_class.tokenizer(["a", "b b"], padding=True)


def write_words(trainer):
    Path(trainer.args.run_options["hotword_file"]).write_text("two\n", encoding="utf-8")


MATRIX = {
    # No effect on the result
    "nothing": option("same"),
    "nothing, all parameters trained": option("same", run="whole"),
    "output folder": option("same", output_dir="{other}"),
    "logging": option("same", log_level="info", run_name="b", logging_steps=2),
    "publishing": option("same", hub_model_id="user/model", hub_token="secret"),
    "folder of the caches": option("same", cache_dir="{other}"),
    "processes for features": option("same", preprocessing_num_workers=2),
    "limits of downloads": option("same", url_max_megabytes=5.0, allow_private_redirects=True),
    "folder of the recordings": edit("same", "", change_rows(moved)),
    "tokenizer used before": edit("same", "", use_tokenizer),
    "base model, all weights in the checkpoint": edit("same", "", other_weights("llm"), run="whole"),
    # Options in the state of the optimizer
    "learning rate": option("kept", "--learning_rate 0.005 (the checkpoint has 0.001)", learning_rate=5e-3),
    "learning rate of a part": option("kept", "--llm_learning_rate 0.005", llm_learning_rate=5e-3),
    "weight decay": option("kept", "--weight_decay 0.3 (the checkpoint has 0.0)", weight_decay=0.3),
    "beta 1": option("kept", "--adam_beta1 0.8", adam_beta1=0.8),
    "beta 2": option("kept", "--adam_beta2 0.8", adam_beta2=0.8),
    "epsilon": option("kept", "--adam_epsilon 1e-06", adam_epsilon=1e-6),
    # Schedule and batches
    "more steps": option("reported", "--max_steps 4 -> 6", max_steps=6),
    "epochs": option("reported", "--num_train_epochs 3.0 -> 5", num_train_epochs=5),
    "schedule": option("reported", "--lr_scheduler_type cosine -> linear", lr_scheduler_type="linear"),
    "warm-up": option("reported", "--warmup_steps 0 -> 3", warmup_steps=3),
    "clipping": option("reported", "--max_grad_norm 1.0 -> 3.0", max_grad_norm=3.0),
    "accumulation": option("reported", "--gradient_accumulation_steps 1 -> 2", gradient_accumulation_steps=2),
    "batch budget": option(
        "reported", "--per_device_train_batch_seconds 9.0 -> 7.0", per_device_train_batch_seconds=7.0
    ),
    "loader processes": option("reported", "--dataloader_num_workers 0 -> 1", dataloader_num_workers=1),
    "seed of the model": option("reported", "--seed 42 -> 7", seed=7, data_seed=42),
    "number of processes": record("reported", "processes 2 -> 1", processes=2),
    # Numbers
    "precision": option("reported", "--bf16 False -> True", bf16=True),
    "attention": option("reported", "--attn_implementation sdpa -> eager", attn_implementation="eager"),
    "fast paths": option("reported", "--fast auto -> off", fast="off"),
    "activation checkpointing": option("reported", "checkpointing False -> True", gradient_checkpointing=True),
    "fused optimizer": option("reported", "--optim adamw_torch", optim="adamw_torch"),
    "feature cache": option("reported", "--feature_cache float16 -> float32", feature_cache="float32"),
    "level of the cache": option("reported", "--cache_level auto -> fbank", cache_level="fbank"),
    "device": record("reported", "device NVIDIA H100 -> cpu", device="NVIDIA H100"),
    "engine": record("refused", "engine fsdp -> none", engine="fsdp"),
    "versions": record("reported", "versions.torch 1.0 -> ", versions={"torch": "1.0"}),
    # Augmentation and loss
    "SpecAugment": option("reported", "--spec_augment False -> True", spec_augment=True),
    "tempo": option("reported", "--tempo_perturb 0.0 -> 0.1", tempo_perturb=0.1),
    "augmentation of waveforms": record("reported", "--noise_prob 0.5 -> 0.0", options={"noise_prob": 0.5}),
    "folder of noises": record("reported", "augmentation.noises 00000000 -> none", augmentation={"noises": "0" * 64}),
    "noise on the embeddings": option("reported", "--neftune_noise_alpha none -> 5", neftune_noise_alpha=5),
    "hotword distractors": option("reported", "--hotword_distractors 0 -> 3", hotword_distractors=3),
    "hotword file": edit("reported", "hotword_file", write_words),
    "dropout of the model": edit(
        "reported", "attention_dropout 0.0 -> 0.1", set_on("model.config.llm_config.attention_dropout", 0.1)
    ),
    "dropout of audio tokens": option(
        "reported", "--audio_token_dropout 0.0 -> 0.3", audio_token_dropout=0.3
    ),
    "dropout of LoRA": option("reported", "--lora_dropout 0.05 -> 0.2", lora_dropout=0.2),
    # Validation, saving, faults
    "validation rows": edit(
        "reported", "validation.near", validation(lambda sets: {**sets, "near": sets["retention"]})
    ),
    "validation recording": edit("reported", "validation_recordings.near", validation(replace_recording)),
    "validation set left out": edit(
        "reported", "validation.near", validation(lambda sets: {"retention": sets["retention"]})
    ),
    "general speech": edit(
        "refused", "validation.retention", validation(lambda sets: {**sets, "retention": sets["near"]})
    ),
    "decoding in validation": edit(
        "reported", "generation.repetition_penalty", set_on("model.generation_config.repetition_penalty", 1.5)
    ),
    "longest transcript": option("reported", "--eval_max_new_tokens 200 -> 20", eval_max_new_tokens=20),
    "measure": option(
        "refused", "--metric_for_best_model loss -> token_accuracy", metric_for_best_model="token_accuracy"
    ),
    "saving": option("reported", "--save_steps 2 -> 1", save_steps=1),
    "number of checkpoints": option("reported", "--save_total_limit none -> 1", save_total_limit=1),
    "bad steps": option("reported", "--max_bad_steps 10 -> 3", max_bad_steps=3),
    # Another model
    "freezing": option("refused", "--freeze_audio_adaptor False -> True", freeze_audio_adaptor=True),
    "freezing by names": option(
        "refused", "--freeze_param [] -> ['audio_adaptor.linear1']", freeze_param=["audio_adaptor.linear1"]
    ),
    "no LoRA": option("refused", "--use_lora True -> False", use_lora=False),
    "rank": option("refused", "--lora_r 4 -> 8", lora_r=8),
    "scale": option("refused", "--lora_alpha 32 -> 64", lora_alpha=64),
    "layers with adapters": option("refused", "--lora_target_modules", lora_target_modules=["q_proj"]),
    "optimizer": option("refused", "--optim adamw_torch_fused -> sgd", optim="sgd"),
    "streaming": option("refused", "--streaming False -> True", streaming=True),
    "base model of adapters: LLM": edit("refused", "model.base", other_weights("llm")),
    "base model of adapters: encoder": edit("refused", "model.base", other_weights("audio_encoder")),
    "base model, only trained parts saved": edit("refused", "model.base", other_weights("audio_encoder"), "partial"),
    "config of the model": edit(
        "refused", "use_low_frame_rate", set_on("model.config.audio_adaptor_config.use_low_frame_rate", True)
    ),
    "tokenizer": edit("refused", "tokenizer.vocabulary", add_token),
    "special token": edit(
        "refused", "tokenizer.special_tokens.pad_token", set_on("processing_class.tokenizer.pad_token", "<|im_end|>")
    ),
    "chat template": edit(
        "refused", "tokenizer.chat_template", set_on("processing_class.tokenizer.chat_template", "{{ x }}")
    ),
    "thinking block": edit(
        "refused", "dialogues.think_block False -> True", set_on("processing_class.think_block", True)
    ),
    "system prompt": edit(
        "refused", "dialogues.system_prompt True -> False", set_on("processing_class.system_prompt", False)
    ),
    "front end": edit(
        "refused", "features.dither 0.0 -> 0.5", set_on("processing_class.feature_extractor.dither", 0.5)
    ),
    # Other rows
    "order of the rows": edit("rows", "data.ids", select([23, *range(23)])),
    "fewer rows": edit("rows", "data.rows 24 -> 23", select(range(23))),
    "a transcript": edit("rows", "data.texts", change_rows(other_words)),
    "hotwords of a row": edit(
        "rows", "data.texts", change_rows(lambda row, index: {**row, "hotwords": ["one"]} if index == 3 else row)
    ),
    "a replaced recording": edit("rows", "line 8", change_rows(touched([7]))),
    "copied recordings": edit("reported", "another modification time of 24 of 24", change_rows(touched(range(24)))),
    "other recordings": edit(
        "rows", "another size of 24 of 24",
        change_rows(lambda row, index: {**row, "stamps": [f"9{row['stamps'][0]}"]}),
    ),
    "other names": edit(
        "rows", "data.ids", change_rows(lambda row, index: {**row, "recordings": [f"{row['recordings'][0]}.flac"]})
    ),
    "name of the list": edit(
        "reported", "data.files.b.jsonl", change_rows(lambda row, index: {**row, "file": "b.jsonl"})
    ),
    "weights of the rows": edit("rows", "data.weights", set_on("train_weights", np.full(24, 2.0))),
    "seed of the order": option("rows", "data.order_seed 42 -> 9", data_seed=9),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finished runs of this module: folder and final weights by name; filled by `resume`."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def resume(make_trainer, tiny_rows, finished, tmp_path, caplog, monkeypatch):
    """Resumes a run with a change; returns trainer, final weights without the change, and warnings."""
    root, weights = finished
    (tmp_path / "words.txt").write_text("one\n", encoding="utf-8")
    words = root / "words.txt"

    def make(**options):
        words.write_text("one\n", encoding="utf-8")
        sets = {"near": tiny_rows.select(range(3)), "retention": tiny_rows.select(range(5, 9))}
        options = {**COMMON, "optim": "adamw_torch_fused", "hotword_file": str(words), **options}
        trainer = make_trainer(eval_dataset=sets, **options)
        trainer.remove_callback(TrainingCurve)  # drawing takes as long as the run
        return trainer

    def run(case, **more):
        if case.run not in weights:
            trainer = make(**RUNS[case.run], output_dir=str(root / case.run))
            trainer.train()
            weights[case.run] = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        checkpoint = root / case.run / "checkpoint-2"
        if case.record:
            checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-2"))
            saved = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))
            changed = {
                key: {**(saved[key] or {}), **value} if isinstance(value, dict) else value
                for key, value in case.record.items()
            }
            (checkpoint / RECORD_FILE).write_text(json.dumps({**saved, **changed}), encoding="utf-8")
        options = {
            name: str(tmp_path / "other") if value == "{other}" else value for name, value in case.options.items()
        }
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make(**{**RUNS[case.run], "output_dir": str(tmp_path / "run"), **options, **more})
            if case.edit is not None:
                case.edit(trainer)
            check_options(trainer.args, checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        warnings = [item.getMessage() for item in caplog.records if item.name.startswith("hf_speechllm")]
        return trainer, weights[case.run], warnings

    return run


@pytest.mark.parametrize("name", MATRIX)
def test_no_change_is_silent(resume, name):
    case = MATRIX[name]
    if case.outcome in ("refused", "rows"):
        with pytest.raises(CheckpointError) as error:
            resume(case)
        assert case.text in str(error.value) and "\n" not in str(error.value)
        if case.outcome == "refused":
            return
        trainer, _, warnings = resume(case, ignore_data_skip=True)
    else:
        trainer, weights, warnings = resume(case)
    assert trainer.initial_step == 2 and trainer.state.global_step == trainer.args.max_steps
    if case.outcome == "same":
        assert warnings == []
        for key, value in trainer.model.named_parameters():
            assert torch.equal(value, weights[key]), key
        return
    (line,) = [text for text in warnings if "checkpoint-2" in text]
    start = "ignored, because the optimizer state is from" if case.outcome == "kept" else "changed since"
    assert line.startswith(start) and case.text in line and "\n" not in line


def test_matrix_agrees_with_the_documentation():
    text = (REPOSITORY / "docs" / "explanation" / "reliability.md").read_text(encoding="utf-8")
    text = text.partition("### What may change")[2]
    rows = [re.findall(r"[^|]+", line)[1] for line in text.splitlines() if line.startswith("| ")][1:6]
    outcomes = dict(zip(("same", "kept", "reported", "refused", "rows"), rows, strict=True))
    assert len(MATRIX) >= 40 and {case.outcome for case in MATRIX.values()} == outcomes.keys()
    for outcome, names in outcomes.items():
        assert names.strip().split("; ") == [name for name, case in MATRIX.items() if case.outcome == outcome]


FIELDS = {
    item.name
    for kind in (ModelOptions, DataOptions, TrainedPartsOptions, SpeechLLMTrainingArguments)
    for item in dataclasses.fields(kind)
    if item.init
}


def test_every_option_is_recorded_or_harmless(make_arguments):
    """New options of this project and of transformers are compared, unless `HARMLESS` contains a reason."""
    options = describe_options(make_arguments(use_lora=True))
    harmless = [name for names in HARMLESS.values() for name in names]
    assert len(harmless) == len(set(harmless)) and set(harmless) <= FIELDS | EFFECTIVE | WITHOUT_EFFECT.keys()
    for name in FIELDS:
        assert (name in options) != (name in harmless), name
    assert not any(name.endswith("_token") for name in options)
    for name in options:
        changes = compare({"options": options}, {"options": {**options, name: "another"}})
        assert changes.refused or changes.reported or changes.kept, name


def test_record_of_an_earlier_release_may_have_fewer_entries(resume):
    """Missing options, settings and parts are not refused."""
    root_case = Case("reported", record={"versions": {"transformers": "5.0"}})
    trainer, _, _ = resume(root_case)
    now = trainer.dependencies
    saved = json.loads(json.dumps(now))
    del saved["dialogues"], saved["device"], saved["options"]["freeze_param"]
    del saved["model"]["config"]["llm_config"]["rms_norm_eps"]
    assert compare(saved, now).refused  # by the same release, another model
    saved["versions"]["transformers"] = "5.0"
    changes = compare(saved, now)
    assert changes.refused == {} and len(changes.reported) == 3
