"""Warm-up, evaluations and checkpoints as shares of the run: with epochs, resuming and early stopping."""

import json
import math

import pytest

from hf_speechllm.training.checkpointing.manifest import checkpoint_folders

SHARES = {
    "max_steps": -1,
    "num_train_epochs": 3,
    "per_device_train_batch_seconds": 5.0,
    "warmup_steps": 0.2,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_strategy": "steps",
    "save_steps": 0.25,
    "check_first_checkpoint": False,
}


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def test_shares_become_steps_of_the_run_and_a_resumed_run_keeps_them(make_trainer, tiny_rows, tmp_path, interrupt):
    rows = tiny_rows.select(range(4))
    whole = make_trainer(eval_dataset=rows, output_dir=str(tmp_path / "whole"), **SHARES)
    whole.train()
    steps = whole.state.max_steps
    assert steps == 3 * len(whole.get_train_dataloader())
    every = math.ceil(0.25 * steps)
    expected = sorted({*range(every, steps + 1, every), steps})
    assert [*checkpoint_folders(tmp_path / "whole")] == expected
    assert [*logged(whole, "eval_loss")] == expected
    rates = logged(whole, "learning_rate")
    warm_up = math.ceil(0.2 * steps)
    assert max(rates, key=rates.get) == warm_up + 1 and rates[1] == 0  # the log has the rate of the step

    options = {**SHARES, "output_dir": str(tmp_path / "resumed")}
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(every + 1)], eval_dataset=rows, **options).train()
    resumed = make_trainer(eval_dataset=rows, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [*checkpoint_folders(tmp_path / "resumed")] == expected
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert logged(resumed, "learning_rate") == rates


def test_early_stopping_counts_evaluations_at_shares(make_trainer, tiny_rows, tmp_path):
    options = {**SHARES, "save_steps": 0.1, "eval_steps": 0.1, "learning_rate": 1e-9, "load_best_model_at_end": True}
    trainer = make_trainer(
        eval_dataset=tiny_rows.select(range(4)), early_stopping_patience=2, greater_is_better=True,
        metric_for_best_model="token_accuracy", **options,
    )  # fmt: skip
    trainer.train()  # too slow to change a token: no evaluation is better than the first
    every = math.ceil(0.1 * trainer.state.max_steps)
    assert trainer.state.global_step == 3 * every < trainer.state.max_steps
    state = json.loads((tmp_path / "run" / f"checkpoint-{3 * every}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == every
