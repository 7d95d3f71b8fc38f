"""A run that goes back leaves the checkpoints of the abandoned course aside, and goes on by its own."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.training.checkpointing import course as course_module
from hf_speechllm.training.checkpointing.course import RunFinished, check_unfinished, set_aside, write_finished
from hf_speechllm.training.checkpointing.manifest import MANIFEST_FILE, find_damage
from hf_speechllm.training.run import find_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 1, "freeze_audio_encoder": True, "freeze_llm": True}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("checkpoint-*") if path.is_dir())


@pytest.fixture
def run(make_trainer, tmp_path):
    """Trains in the output folder up to a step, from a checkpoint of it if one is given; gives trainer and folder."""

    def train(steps, checkpoint=None, **options):
        trainer = make_trainer(**{**SAVING, **options}, max_steps=steps)
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(folder / checkpoint))
        return trainer, folder

    return train


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_later_checkpoints_are_set_aside_and_do_not_count(run, make_arguments, caplog, background):
    _, folder = run(4)
    before = load_file(folder / "checkpoint-4" / "model.safetensors")
    caplog.clear()
    trainer, _ = run(3, "checkpoint-2", save_total_limit=1, async_save=background, learning_rate=0.5)
    aside = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(aside) == 1 and "checkpoint-3, checkpoint-4 set aside in" in aside[0] and "abandoned-1" in aside[0]
    assert names(folder) == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "checkpoint-3"]
    assert find_damage(folder / "abandoned-1" / "checkpoint-4") is None
    after = load_file(folder / "abandoned-1" / "checkpoint-4" / "model.safetensors")
    assert all((after[name] == before[name]).all() for name in before)
    options = {**SAVING, "resume_from_checkpoint": "auto", "max_steps": 8}
    assert find_checkpoint(make_arguments(**options)) == str(folder / "checkpoint-3")


def test_an_abandoned_course_can_be_taken_up_again(run):
    _, folder = run(4)
    run(4, "checkpoint-2")
    assert names(folder)[:2] == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4"]
    run(5, "abandoned-1/checkpoint-3")
    # Checkpoints 1 and 2 led to it, 3 and 4 of the second course did not.
    assert names(folder) == [
        "abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "abandoned-2/checkpoint-3",
        "abandoned-2/checkpoint-4", "checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-5",
    ]  # fmt: skip


def test_checkpoints_of_another_run_are_set_aside_by_a_new_one(run):
    _, folder = run(2)
    run(1, save_total_limit=1)
    assert names(folder) == ["abandoned-1/checkpoint-1", "abandoned-1/checkpoint-2", "checkpoint-1"]


def test_without_identities_earlier_checkpoints_of_the_folder_count(run):
    _, folder = run(3)
    for path in folder.glob("checkpoint-*"):
        (path / course_module.COURSE_FILE).unlink()
    set_aside(folder, folder / "checkpoint-2", 2)
    assert names(folder) == ["abandoned-1/checkpoint-3", "checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("renamed", range(3))
def test_kill_while_checkpoints_are_set_aside_is_made_good_at_the_next_start(
    run, make_arguments, monkeypatch, renamed
):
    _, folder = run(4)
    rename, unlink, count = Path.rename, Path.unlink, 0

    def killed(self, target):
        nonlocal count
        if count == renamed:
            raise KeyboardInterrupt
        count += 1
        return rename(self, target)

    def killed_at_the_end(self, **options):
        if self.name == course_module.JOURNAL_FILE:
            raise KeyboardInterrupt
        unlink(self, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        patch.setattr(Path, "unlink", killed_at_the_end)
        set_aside(folder, folder / "checkpoint-2", 2)
    found = find_checkpoint(make_arguments(**SAVING, resume_from_checkpoint="auto", max_steps=8))
    assert found == str(folder / "checkpoint-2")
    assert names(folder) == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "checkpoint-1", "checkpoint-2"]
    assert not (folder / course_module.JOURNAL_FILE).exists()


def test_refused_start_leaves_all_checkpoints_in_place(run, make_trainer):
    _, folder = run(3)
    with pytest.raises(CheckpointError, match="--freeze_llm"):
        make_trainer(**{**SAVING, "freeze_llm": False}).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_damaged_last_checkpoint_takes_no_place_of_a_new_one(run, make_arguments):
    _, folder = run(3)
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    found = find_checkpoint(make_arguments(**SAVING, resume_from_checkpoint="last", max_steps=3))
    run(3, Path(found).name, save_total_limit=1)
    assert names(folder) == ["abandoned-1/checkpoint-3", "checkpoint-3"]
    assert find_damage(folder / "checkpoint-3") is None


def test_best_checkpoint_is_one_of_the_course(run, tiny_rows):
    options = {
        "eval_dataset": tiny_rows.select(range(4)), "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "keep_best_checkpoints": 4, "learning_rate": 0.02,
    }  # fmt: skip
    first, folder = run(4, **options)
    assert first.state.best_global_step > 2  # or it would not show
    second, _ = run(4, "checkpoint-2", **{**options, "save_steps": 2})
    steps = {entry["step"]: entry["eval_loss"] for entry in second.state.log_history if "eval_loss" in entry}
    best = int(second.state.best_global_step)
    assert second.state.best_metric == steps[best] == min(steps.values())
    assert Path(second.state.best_model_checkpoint) == folder / f"checkpoint-{best}"


def test_best_checkpoint_that_is_gone_gives_way_to_the_best_of_the_others(run, tiny_rows, caplog):
    options = {
        "eval_dataset": tiny_rows.select(range(4)), "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "keep_best_checkpoints": 4, "learning_rate": 0.02,
    }  # fmt: skip
    trainer, folder = run(3, **options)
    best = int(trainer.state.best_global_step)
    assert best > 1
    (folder / f"checkpoint-{best}").rename(folder / "elsewhere")
    resumed = max(step for step in (1, 2, 3) if step != best)
    again, _ = run(resumed, f"checkpoint-{resumed}", **options)
    if best < resumed:
        assert f"checkpoint-{best}, is gone" in caplog.text
    assert Path(again.state.best_model_checkpoint).is_dir()
    scores = {entry["step"]: entry["eval_loss"] for entry in again.state.log_history if "eval_loss" in entry}
    assert again.state.best_metric == scores[again.state.best_global_step]


def finished(make_arguments, **options):
    return make_arguments(**{**SAVING, "max_steps": -1, "num_train_epochs": 2, **options})


@pytest.mark.parametrize(
    ("options", "ended"),
    [
        ({}, True),
        ({"num_train_epochs": 1}, True),
        ({"num_train_epochs": 3}, False),
        ({"max_steps": 10}, True),
        ({"max_steps": 11}, False),
    ],
)
def test_finished_run_is_told_from_one_that_is_to_go_on(make_arguments, tmp_path, options, ended):
    (tmp_path / "run").mkdir()
    write_finished(finished(make_arguments), 10, 1.5)  # ended early, e.g. by --early_stopping_patience
    args = finished(make_arguments, **options)
    if not ended:
        check_unfinished(args, None, goes_back=False)
        return
    with pytest.raises(RunFinished, match="finished"):
        check_unfinished(args, None, goes_back=False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_steps": 3}, "past --max_steps 3"),
        ({"num_train_epochs": 1}, "past --num_train_epochs 1"),
        ({"max_steps": 4}, None),
        ({}, None),
    ],
)
def test_end_before_the_checkpoint_is_said(make_arguments, tmp_path, options, told):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 1.5}))
    args = finished(make_arguments, **options)
    for goes_back in (False, True):
        if told is None:
            check_unfinished(args, tmp_path, goes_back)
            continue
        with pytest.raises(RunFinished, match=told):
            check_unfinished(args, tmp_path, goes_back)


@pytest.fixture
def finetune(run_recipe, tiny_model, tiny_corpus, tmp_path, caplog):
    """Runs the recipe in tmp_path/out; gives its exit code or message."""

    def start(*arguments):
        caplog.set_level(logging.INFO)
        return run_recipe(
            "finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir",
            tmp_path / "out", "--per_device_train_batch_seconds", 4, "--learning_rate", "1e-3", "--warmup_steps", 0,
            "--logging_steps", 1, "--save_steps", 1, "--report_to", "none", "--use_cpu", "true", "--cache_dir",
            tmp_path / "cache", "--disable_tqdm", "true", "--preprocessing_num_workers", 1, "--freeze_llm", "true",
            "--freeze_audio_encoder", "true", *arguments,
        )  # fmt: skip

    return start


def test_finished_run_started_again_leaves_everything(finetune, tmp_path, caplog):
    options = ["--max_steps", 2, "--resume_from_checkpoint", "auto"]
    assert finetune(*options) is None
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert finetune(*options) is None
    assert "the run is finished (2 steps)" in caplog.text
    assert finetune("--max_steps", 1, "--resume_from_checkpoint", tmp_path / "out/checkpoint-2") is None
    changed = {path for path in before if path.read_bytes() != before[path]}
    assert changed <= {tmp_path / "out/.run.json", tmp_path / "out/.run.lock"}
    assert finetune("--max_steps", 3, "--resume_from_checkpoint", "auto") is None  # it can be made longer
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["train_loss"] > 0 and (tmp_path / "out/checkpoint-3").is_dir()


def test_results_of_training_stay_where_only_the_end_was_missing(finetune, tmp_path):
    options = ["--max_steps", 2, "--resume_from_checkpoint", "auto"]
    assert finetune(*options) is None
    loss = json.loads((tmp_path / "out/all_results.json").read_text())["train_loss"]
    for file in ("finished.json", "model.safetensors"):  # as after a kill while the model was saved
        (tmp_path / "out" / file).unlink()
    assert finetune(*options) is None
    assert (tmp_path / "out/model.safetensors").is_file()
    assert json.loads((tmp_path / "out/all_results.json").read_text())["train_loss"] == loss


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("lora", [False, True])
def test_files_have_the_permissions_of_new_files(run, lora):
    before = os.umask(0o027)
    try:
        trainer, folder = run(1, use_lora=lora)
        trainer.save_model(_internal_call=True)
    finally:
        os.umask(before)
    files = [*folder.glob("*.safetensors"), *(folder / "checkpoint-1").glob("*.safetensors")]
    assert len(files) == 2
    for path in (*files, folder / "checkpoint-1" / MANIFEST_FILE):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
