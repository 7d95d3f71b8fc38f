"""Lineage of checkpoints: a run moves checkpoints that are not its ancestors, and a finished run stays unchanged."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.training.checkpointing import lineage
from hf_speechllm.training.checkpointing.lineage import (
    RunFinished,
    abandon_checkpoints,
    check_unfinished,
    write_finished,
)
from hf_speechllm.training.checkpointing.manifest import MANIFEST_FILE, find_damage
from hf_speechllm.training.run import find_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 1, "freeze_audio_encoder": True, "freeze_llm": True}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("checkpoint-*") if path.is_dir())


@pytest.fixture
def run(make_trainer, tmp_path):
    """Trains up to a step, optionally from a checkpoint in the output folder; returns trainer and output folder."""

    def train(steps, checkpoint=None, **options):
        trainer = make_trainer(**{**SAVING, **options}, max_steps=steps)
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(folder / checkpoint))
        return trainer, folder

    return train


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_later_checkpoints_are_moved_and_do_not_count(run, make_arguments, caplog, background):
    _, folder = run(4)
    before = load_file(folder / "checkpoint-4" / "model.safetensors")
    caplog.clear()
    trainer, _ = run(3, "checkpoint-2", save_total_limit=1, async_save=background, learning_rate=0.5)
    moved = [record.getMessage() for record in caplog.records if "moved" in record.getMessage()]
    assert len(moved) == 1 and "moved checkpoint-3, checkpoint-4 to" in moved[0] and "abandoned-1" in moved[0]
    assert names(folder) == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "checkpoint-3"]
    assert find_damage(folder / "abandoned-1" / "checkpoint-4") is None
    after = load_file(folder / "abandoned-1" / "checkpoint-4" / "model.safetensors")
    assert all((after[name] == before[name]).all() for name in before)
    options = {**SAVING, "resume_from_checkpoint": "auto", "max_steps": 8}
    assert find_checkpoint(make_arguments(**options)) == str(folder / "checkpoint-3")


def test_run_can_resume_from_an_abandoned_checkpoint(run):
    _, folder = run(4)
    run(4, "checkpoint-2")
    assert names(folder)[:2] == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4"]
    run(5, "abandoned-1/checkpoint-3")
    # Checkpoints 1 and 2 are ancestors; checkpoints 3 and 4 of the second run are not.
    assert names(folder) == [
        "abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "abandoned-2/checkpoint-3",
        "abandoned-2/checkpoint-4", "checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-5",
    ]  # fmt: skip


def test_new_run_moves_checkpoints_of_another_run(run):
    _, folder = run(2)
    run(1, save_total_limit=1)
    assert names(folder) == ["abandoned-1/checkpoint-1", "abandoned-1/checkpoint-2", "checkpoint-1"]


def test_earlier_checkpoints_without_ids_count_as_ancestors(run):
    _, folder = run(3)
    for path in folder.glob("checkpoint-*"):
        (path / lineage.LINEAGE_FILE).unlink()
    abandon_checkpoints(folder, folder / "checkpoint-2", 2)
    assert names(folder) == ["abandoned-1/checkpoint-3", "checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("renamed", range(3))
def test_next_start_completes_a_move_that_a_kill_interrupted(run, make_arguments, monkeypatch, renamed):
    _, folder = run(4)
    rename, unlink, count = Path.rename, Path.unlink, 0

    def killed(self, target):
        nonlocal count
        if count == renamed:
            raise KeyboardInterrupt
        count += 1
        return rename(self, target)

    def killed_at_the_end(self, **options):
        if self.name == lineage.JOURNAL_FILE:
            raise KeyboardInterrupt
        unlink(self, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        patch.setattr(Path, "unlink", killed_at_the_end)
        abandon_checkpoints(folder, folder / "checkpoint-2", 2)
    found = find_checkpoint(make_arguments(**SAVING, resume_from_checkpoint="auto", max_steps=8))
    assert found == str(folder / "checkpoint-2")
    assert names(folder) == ["abandoned-1/checkpoint-3", "abandoned-1/checkpoint-4", "checkpoint-1", "checkpoint-2"]
    assert not (folder / lineage.JOURNAL_FILE).exists()


def test_refused_start_leaves_all_checkpoints_in_place(run, make_trainer):
    _, folder = run(3)
    with pytest.raises(CheckpointError, match="--freeze_llm"):
        make_trainer(**{**SAVING, "freeze_llm": False}).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_damaged_last_checkpoint_is_moved_before_a_new_one_is_written(run, make_arguments):
    _, folder = run(3)
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    found = find_checkpoint(make_arguments(**SAVING, resume_from_checkpoint="last", max_steps=3))
    run(3, Path(found).name, save_total_limit=1)
    assert names(folder) == ["abandoned-1/checkpoint-3", "checkpoint-3"]
    assert find_damage(folder / "checkpoint-3") is None


def test_best_checkpoint_belongs_to_the_lineage(run, tiny_rows):
    options = {
        "eval_dataset": tiny_rows.select(range(4)), "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "keep_best_checkpoints": 4, "learning_rate": 0.02,
    }  # fmt: skip
    first, folder = run(4, **options)
    assert first.state.best_global_step > 2  # otherwise the test could not fail
    second, _ = run(4, "checkpoint-2", **{**options, "save_steps": 2})
    steps = {entry["step"]: entry["eval_loss"] for entry in second.state.log_history if "eval_loss" in entry}
    best = int(second.state.best_global_step)
    assert second.state.best_metric == steps[best] == min(steps.values())
    assert Path(second.state.best_model_checkpoint) == folder / f"checkpoint-{best}"


def test_missing_best_checkpoint_is_replaced_by_the_next_best(run, tiny_rows, caplog):
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
        assert f"checkpoint-{best}, is missing" in caplog.text
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
@pytest.mark.parametrize("unlimited", [-1, 0])
def test_finished_run_resumes_only_for_more_steps(make_arguments, tmp_path, options, ended, unlimited):
    (tmp_path / "run").mkdir()
    args = finished(make_arguments, max_steps=unlimited)
    write_finished(args, 10, 1.5)  # ended early, e.g. by --early_stopping_patience
    args = finished(make_arguments, **options)
    if not ended:
        check_unfinished(args, None, is_named=False)
        return
    with pytest.raises(RunFinished, match="finished"):
        check_unfinished(args, None, is_named=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3}, "past --max_steps 3"),
        ({"num_train_epochs": 1}, "past --num_train_epochs 1"),
        ({"max_steps": 4}, None),
        ({}, None),
    ],
)
def test_checkpoint_past_the_end_is_reported(make_arguments, tmp_path, options, message):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 1.5}))
    args = finished(make_arguments, **options)
    for is_named in (False, True):
        if message is None:
            check_unfinished(args, tmp_path, is_named)
            continue
        with pytest.raises(RunFinished, match=message):
            check_unfinished(args, tmp_path, is_named)


@pytest.fixture
def finetune(run_recipe, tiny_model, tiny_corpus, tmp_path, caplog):
    """Runs the recipe in tmp_path/out; returns the exit code or message."""

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


def test_restart_of_a_finished_run_changes_nothing(finetune, tmp_path, caplog):
    options = ["--max_steps", 2, "--resume_from_checkpoint", "auto"]
    assert finetune(*options) is None
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert finetune(*options) is None
    assert "the run is finished (2 steps)" in caplog.text
    assert finetune("--max_steps", 1, "--resume_from_checkpoint", tmp_path / "out/checkpoint-2") is None
    changed = {path for path in before if path.read_bytes() != before[path]}
    assert changed <= {tmp_path / "out/.run.json", tmp_path / "out/.run.lock"}
    assert finetune("--max_steps", 3, "--resume_from_checkpoint", "auto") is None  # more steps are possible
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["train_loss"] > 0 and (tmp_path / "out/checkpoint-3").is_dir()


def test_results_of_training_stay_if_only_the_final_save_is_repeated(finetune, tmp_path):
    options = ["--max_steps", 2, "--resume_from_checkpoint", "auto"]
    assert finetune(*options) is None
    loss = json.loads((tmp_path / "out/all_results.json").read_text())["train_loss"]
    for file in ("finished.json", "model.safetensors"):  # as after a kill during the final save
        (tmp_path / "out" / file).unlink()
    assert finetune(*options) is None
    assert (tmp_path / "out/model.safetensors").is_file()
    assert json.loads((tmp_path / "out/all_results.json").read_text())["train_loss"] == loss


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("lora", [False, True])
def test_files_have_default_permissions(run, lora):
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
