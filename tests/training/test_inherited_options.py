"""Options of `TrainingArguments`: each has an effect, or is refused with an alternative."""

import dataclasses
import math

import pytest
from transformers import TrainingArguments

from hf_speechllm import SpeechLLMTrainingArguments
from hf_speechllm.training.inherited_options import EFFECTIVE, WITHOUT_EFFECT, check_inherited_options


def test_every_option_of_the_installed_release_is_known():
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert not names - EFFECTIVE - WITHOUT_EFFECT.keys(), "add these options to inherited_options.py"
    assert not EFFECTIVE & WITHOUT_EFFECT.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 4}, "--per_device_train_batch_size .* use --per_device_train_batch_seconds"),
        ({"do_eval": True}, "--do_eval .* use --validation_file and --eval_strategy"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last"),
        ({"remove_unused_columns": True}, "--remove_unused_columns"),
        ({"include_for_metrics": ["loss"]}, "--include_for_metrics"),
    ],
)
def test_option_without_effect_is_refused_in_python(options, message):
    with pytest.raises(ValueError, match=message):
        SpeechLLMTrainingArguments(output_dir="x", **options)


def test_output_folder_is_the_only_required_argument_in_python():
    args = SpeechLLMTrainingArguments(output_dir="x")
    assert (args.output_dir, args.lr_scheduler_type, args.hub_private_repo) == ("x", "cosine", True)


def test_option_of_a_newer_release_is_a_warning(caplog):
    check_inherited_options(["learning_rate", "shiny", "own_option"], own={"own_option"})
    assert caplog.messages == ["--shiny is newer than this release of hf_speechllm and not tested"]


def test_several_processes_without_a_gpu_train_on_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = SpeechLLMTrainingArguments.__new__(SpeechLLMTrainingArguments)
    args.use_cpu = False
    args._set_device()
    assert args.use_cpu and "all processes train on the CPU" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "1")
    args.use_cpu = False
    args._set_device()
    assert not args.use_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args._set_device()
    assert args.use_cpu


def test_missing_tracker_is_reported_in_one_line():
    with pytest.raises(ValueError, match="--report_to nosuch: no such package is installed; pip install nosuch"):
        SpeechLLMTrainingArguments(output_dir="x", report_to="nosuch")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("per_device_train_batch_seconds", math.nan), ("per_device_train_batch_seconds", math.inf),
        ("gradient_accumulation_steps", 0), ("num_train_epochs", math.inf), ("num_train_epochs", -1.0),
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"--{option} is {value:g}; it must be"):
        SpeechLLMTrainingArguments(str(tmp_path), use_cpu=True, **{option: value})
