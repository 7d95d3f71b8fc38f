"""Which checkpoints are the best, which remain, and which is found again when a run is resumed."""

from types import SimpleNamespace

import pytest

from hf_speechllm.training.checkpointing.manifest import MANIFEST_FILE
from hf_speechllm.training.checkpointing.retention import RETENTION_METRIC, RetentionGuard
from hf_speechllm.training.checkpointing.selection import (
    best_steps,
    complete_checkpoints,
    delete_checkpoints,
    last_good_checkpoint,
    metric_key,
    restore_best,
    scores_at,
)


@pytest.fixture
def folders(tmp_path):
    """Makes checkpoints in the output folder; negative steps are of those that are not complete."""

    def make(*steps, name="run"):
        for step in steps:
            folder = tmp_path / name / f"checkpoint-{abs(step)}"
            folder.mkdir(parents=True)
            if step > 0:
                (folder / MANIFEST_FILE).touch()
        return tmp_path / name

    return make


def options(folder, **values):
    defaults = {
        "output_dir": str(folder), "metric_for_best_model": "cer", "greater_is_better": False,
        "keep_best_checkpoints": None, "save_total_limit": None, "load_best_model_at_end": True,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **values})


def log_of(key="eval_cer", **scores):
    return [{"step": int(step[1:]), key: score} for step, score in scores.items()]


def state(log=(), best=0, **values):
    return SimpleNamespace(
        log_history=list(log), best_global_step=best, best_metric=None, best_model_checkpoint="elsewhere", **values
    )


def steps_in(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def test_name_of_the_measure_has_its_prefix_once():
    for name in ("cer", "eval_cer"):
        assert metric_key(options("x", metric_for_best_model=name)) == "eval_cer"
        assert metric_key(options("x", metric_for_best_model=name), "averaged") == "averaged_cer"


def test_scores_of_a_step_are_its_first_evaluation():
    log = [{"step": 1, "loss": 2}, {"step": 1, "eval_cer": 0.5}, {"step": 1, "eval_cer": 0.1}, {"step": 2, "loss": 1}]
    assert scores_at(log, 1) == {"eval_cer": 0.5}
    assert scores_at(log, 2) is scores_at(log, 3) is None


def test_best_steps_come_first_and_the_earlier_of_two_alike(folders):
    log = log_of(s1=0.5, s2=0.1, s3=0.3, s4=0.1)
    assert best_steps(options("x"), log, [1, 2, 3, 4, 5]) == [2, 4, 3, 1]
    assert best_steps(options("x", keep_best_checkpoints=2), log, [1, 3, 4]) == [4, 3]
    assert best_steps(options("x", greater_is_better=True), log, [4, 3, 2, 1]) == [1, 3, 2, 4]


def test_only_complete_checkpoints_count_in_the_order_of_their_steps(folders):
    assert list(complete_checkpoints(folders(10, 9, -11, 2))) == [2, 9, 10]


@pytest.mark.parametrize(
    ("values", "best", "kept"),
    [
        ({"save_total_limit": 1}, None, [-7, 6]),
        ({"save_total_limit": 3}, None, [-7, 4, 5, 6]),
        ({"save_total_limit": 3}, 2, [-7, 2, 5, 6]),
        ({"save_total_limit": 1}, 2, [-7, 2, 6]),
        ({"keep_best_checkpoints": 2}, 1, [-7, 1, 3, 4, 6]),
        ({"keep_best_checkpoints": 1, "save_total_limit": 5}, None, [-7, 3, 6]),
        ({}, None, [-7, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_latest_best_and_those_within_the_limit_remain(folders, values, best, kept):
    folder = folders(1, 2, 3, 4, 5, 6, -7)
    run = state(log_of(s1=0.9, s2=0.8, s3=0.1, s4=0.2))
    run.best_model_checkpoint = None if best is None else f"/moved/checkpoint-{best}"
    delete_checkpoints(options(folder, **values), run, None)
    assert steps_in(folder) == sorted(map(abs, kept))


def test_last_good_checkpoint_is_not_younger_than_the_last_good_evaluation(folders):
    folder = folders(2, 4, 6, 8)
    run = state(log_of(RETENTION_METRIC, s0=0.1, s3=0.11, s5=0.12, s7=0.13))
    guard = RetentionGuard(2.0, stop=True)
    assert last_good_checkpoint(options(folder), run, guard) == 4
    assert last_good_checkpoint(options(folder), run, RetentionGuard(2.0, stop=False)) is None
    assert last_good_checkpoint(options(folder), run, None) is None
    assert last_good_checkpoint(options(folder), state(log_of(RETENTION_METRIC, s0=0.1, s1=0.5)), guard) is None
    run.best_model_checkpoint = None
    delete_checkpoints(options(folder, save_total_limit=1), run, guard)
    assert steps_in(folder) == [4, 8]


def test_best_checkpoint_is_found_in_the_output_folder_or_beside_the_one_resumed_from(folders):
    folder, other = folders(1, 2), folders(2, 3, name="other")
    run = state(best=2)
    restore_best(options(folder), run, other / "checkpoint-3")
    assert run.best_model_checkpoint == str(folder / "checkpoint-2")
    run = state(best=3)
    restore_best(options(folder), run, other / "checkpoint-2")
    assert run.best_model_checkpoint == str(other / "checkpoint-3") and run.best_global_step == 3
    run = state(best=None)
    restore_best(options(folder), run, other / "checkpoint-3")
    assert run.best_model_checkpoint == "elsewhere"  # nothing was best yet


def test_best_of_the_others_replaces_one_that_is_gone(folders, caplog):
    folder = folders(1, 2, -3)
    run = state(log_of(s1=0.2, s2=0.3, s3=0.1), best=3)
    restore_best(options(folder), run, folder / "checkpoint-2")
    assert (run.best_global_step, run.best_metric) == (1, 0.2)
    assert run.best_model_checkpoint == str(folder / "checkpoint-1")
    assert "checkpoint-3" in caplog.text and "checkpoint-1" in caplog.text
    run = state(best=3)
    restore_best(options(folder), run, folder / "checkpoint-2")
    assert (run.best_global_step, run.best_metric, run.best_model_checkpoint) == (0, None, None)
    run = state(log_of(s1=0.2, s3=0.1), best=3)
    restore_best(options(folder, load_best_model_at_end=False), run, folder / "checkpoint-2")
    assert (run.best_global_step, run.best_model_checkpoint) == (3, None)
