"""Resumed runs equal uninterrupted runs, after any interruption and with any number of processes."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_speechllm.data.sampler import BudgetBatchSampler, CompletedRun
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.training.checkpointing import position as position_module
from hf_speechllm.training.checkpointing.manifest import last_complete
from hf_speechllm.training.checkpointing.position import Position
from hf_speechllm.training.errors import Preempted
from hf_speechllm.training.preemption import EXIT_STATUS, SIGNALS

pytestmark = pytest.mark.core

REPOSITORY = Path(__file__).resolve().parents[3]
SECONDS = np.random.default_rng(0).uniform(0.5, 12, size=203)


def remaining_batches(completed, settings, epoch=3, seconds=SECONDS, weights=None):
    """Returns the remaining rows of an epoch by rank and batch, without fillers."""
    budget, ranks = settings
    rows, lengths = [], set()
    for rank in range(ranks):
        sampler = BudgetBatchSampler(seconds, budget, ranks, rank, seed=5, weights=weights)
        if completed:
            sampler.resume(epoch, completed)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        lengths.add(len(batches))
        assert sampler.num_left(epoch) == len(batches)
        rows.append([[key % len(seconds) for key in batch if key >= 0] for batch in batches])
    assert len(lengths) == 1, "ranks do different numbers of steps"
    return rows


def flat(ranks, batches=None):
    return [row for rank in ranks for batch in rank[:batches] for row in batch]


@pytest.mark.parametrize(
    "runs",
    [
        [(40, 1, 7), (40, 2, None)],
        [(40, 2, 5), (40, 1, None)],
        [(40, 1, 6), (40, 2, 4), (40, 1, None)],
        [(40, 4, 2), (40, 3, 3), (40, 8, 1), (40, 2, None)],
        [(40, 2, 5), (25, 2, 3), (60, 1, None)],
        [(12, 8, 10), (12, 7, None)],
    ],
)
def test_epoch_uses_every_row_once_after_changes_of_ranks_and_budget(runs):
    seen, completed = Counter(), []
    for budget, ranks, batches in runs:
        seen.update(flat(remaining_batches(completed, (budget, ranks)), batches))
        completed.append(CompletedRun(budget, ranks, batches))
    assert seen == Counter(range(len(SECONDS)))


@pytest.mark.parametrize("past", [[], [CompletedRun(40, 1, 6)]], ids=["first", "after-a-change"])
def test_same_ranks_continue_with_the_same_batches(past):
    whole = remaining_batches(past, (40, 2))
    rest = remaining_batches([*past, CompletedRun(40, 2, 5)], (40, 2))
    assert rest == [rank[5:] for rank in whole]
    other = remaining_batches([*past, CompletedRun(40, 2, 5)], (40, 2), epoch=3)
    assert other == rest


def test_epochs_after_the_resumed_epoch_do_not_change():
    sampler = BudgetBatchSampler(SECONDS, 40, seed=5)
    expected = [batch.tolist() for batch in sampler.batches(4)]
    sampler.resume(3, [CompletedRun(25, 2, 4)])
    assert [batch.tolist() for batch in sampler.batches(4)] == expected
    assert sampler.num_left(4) == len(sampler) == len(expected)


def test_rows_with_weights_keep_their_frequency():
    weights = np.where(np.arange(len(SECONDS)) % 3 == 0, 2.0, 1.0)
    seen = Counter(flat(remaining_batches([], (40, 2), weights=weights), 5))
    seen.update(flat(remaining_batches([CompletedRun(40, 2, 5)], (40, 3), weights=weights)))
    assert seen == {row: int(weight) for row, weight in enumerate(weights)}


class Stop(TrainerCallback):
    """Sends this process a signal before a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def options(compose_tiny, tiny_config, tmp_path):
    """Options of a run with two epochs of 7 batches and 4 steps, which uses random numbers in many places."""
    config = tiny_config()
    config["llm_config"]["attention_dropout"] = 0.2
    for part in compose_tiny(config):
        part.save_pretrained(tmp_path / "dropout")
    return {
        "model_name_or_path": str(tmp_path / "dropout"),
        "per_device_train_batch_seconds": 4.5,
        "gradient_accumulation_steps": 2,
        "spec_augment": True,
        "tempo_perturb": 0.1,
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }


def weights_and_log(trainer):
    """Returns weights, losses and learning rates."""
    keys = ("step", "loss", "learning_rate", "epoch")
    log = [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "loss" in entry]
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}, log


def check_weights_and_log(trainer, expected):
    weights, log = weights_and_log(trainer)
    assert log == expected[1]
    for name, weight in expected[0].items():
        assert torch.equal(weights[name], weight), name


def test_run_interrupted_twice_is_bit_identical(make_trainer, options, tmp_path, interrupt):
    whole = make_trainer(**options)
    whole.train()
    expected = weights_and_log(whole)
    assert [line[0] for line in expected[1]] == list(range(1, 9))
    for first, second in ((1, 2), (3, 4), (4, 7)):
        folder = tmp_path / f"run-{first}-{second}"
        checkpoint = None
        for step in (first, second, None):
            callbacks = [] if step is None else [interrupt(step + 1)]
            trainer = make_trainer(callbacks, **options, output_dir=str(folder))
            if step is None:
                trainer.train(resume_from_checkpoint=checkpoint)
            else:
                with pytest.raises(KeyboardInterrupt):
                    trainer.train(resume_from_checkpoint=checkpoint)
                checkpoint = str(last_complete(folder))
                assert checkpoint.endswith(f"-{step}")
        check_weights_and_log(trainer, expected)


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
def test_run_interrupted_after_the_last_step_does_no_further_step(make_trainer, length, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", **length}
    trainer = make_trainer(**options, per_device_train_batch_seconds=12.0)
    trainer.train()
    expected, steps = weights_and_log(trainer), trainer.state.global_step
    again = make_trainer(**options, per_device_train_batch_seconds=12.0)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps}"))
    assert again.state.global_step == steps
    check_weights_and_log(again, expected)


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process on Windows, whatever the signal")
@pytest.mark.parametrize("number", SIGNALS)
def test_run_resumed_after_a_signal_is_the_same(make_trainer, options, number):
    options["save_steps"] = 100
    whole = make_trainer(**options)
    whole.train()
    expected, before = weights_and_log(whole), signal.getsignal(number)
    trainer = make_trainer([Stop(3, number)], **options)
    folder = Path(trainer.args.output_dir)
    with pytest.raises(Preempted, match="after step 3"):
        trainer.train()
    assert signal.getsignal(number) is before
    assert not (folder / "model.safetensors").exists()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    check_weights_and_log(resumed, expected)


def test_learning_rate_stays_continuous_after_a_change_of_accumulation(make_trainer, options, tmp_path, interrupt):
    options.update(lr_scheduler_type="linear", gradient_accumulation_steps=1)
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(5)], **options).train()  # checkpoint-4: 4 of 14 batches
    options["gradient_accumulation_steps"] = 2
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    lines = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert resumed.state.global_step == 4 + 2 + 4  # 3 batches are left of the first epoch, 7 of the second
    assert [entry["epoch"] for entry in lines[4:]] == pytest.approx([6 / 7, 1, 9 / 7, 11 / 7, 13 / 7, 2])
    assert [entry["learning_rate"] for entry in lines] == pytest.approx(
        [1e-3 * (1 - done / 14) for done in range(4)] + [1e-3 * (1 - done / 8) for done in range(2, 8)]
    )
    assert resumed._get_learning_rate() == 0


def test_other_rows_are_refused_unless_the_epoch_starts_again(make_trainer, tiny_rows, tmp_path, interrupt):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 2}
    options["per_device_train_batch_seconds"] = 12.0
    steps = len(make_trainer(**options).get_train_dataloader())
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(steps + 2)], **options).train()
    folder = str(tmp_path / "run" / f"checkpoint-{steps + 1}")
    other = tiny_rows.select([23, *range(23)])
    with pytest.raises(CheckpointError, match="--ignore_data_skip"):
        make_trainer(**options, train_dataset=other).train(resume_from_checkpoint=folder)
    trainer = make_trainer(**options, train_dataset=other, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=folder)
    assert trainer.state.global_step == steps + 1 + steps
    assert trainer.state.epoch == 2


def test_position_holds_for_the_same_lengths_weights_and_seed_alone(make_arguments, tmp_path):
    def position(seconds=SECONDS, seed=5, weights=None):
        return Position(BudgetBatchSampler(seconds, 40, 2, 0, seed=seed, weights=weights), make_arguments())

    weights = np.where(np.arange(len(SECONDS)) % 3 == 0, 2.0, 1.0)
    saved = position(weights=weights)
    saved.consumed = 3
    saved.save(tmp_path)
    same = position(weights=weights)
    same.load(tmp_path)
    assert (same.epoch, same.consumed) == (0, 3)
    for change in (
        {}, {"weights": weights[::-1].copy()}, {"weights": weights, "seconds": SECONDS[::-1].copy()},
        {"weights": weights, "seed": 6},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="--ignore_data_skip"):
            position(**change).load(tmp_path)


def test_position_is_written_with_every_checkpoint(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=4).train()
    states = [
        json.loads((tmp_path / "run" / f"checkpoint-{step}" / position_module.POSITION_FILE).read_text())
        for step in (2, 4)
    ]
    assert [state["stretches"] for state in states] == [[[4.0, 1, 2]], [[4.0, 1, 4]]]


# Several processes

SCRIPT = """
import json, os, runpy, signal, sys
note, stop, number, victim, recipe = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
sys.argv = [recipe, *sys.argv[6:]]
from hf_speechllm.data.sampler import KeyedRows
from hf_speechllm.training.trainer import SpeechLLMTrainer
import hf_speechllm.training.trainer as module

rank, attempt = os.environ.get("RANK", "0"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
fetched, fetch = [], Rows.__getitems__
def watched(self, keys):
    fetched.append([key for key in keys if key >= 0])
    return fetch(self, keys)
Rows.__getitems__ = watched

class Watched(SpeechLLMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        with open(f"{note}.{rank}", "a") as file:
            file.write(json.dumps([self.state.global_step, self.args.world_size, fetched.pop(0)]) + chr(10))
        if self.state.global_step + 1 == stop and attempt == 0 and victim in (rank, "all"):
            os.kill(os.getpid(), number)
        return loss
module.SpeechLLMTrainer = Watched
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.fixture
def launch(tmp_path, tiny_model, tiny_corpus):
    """Runs the recipe in several processes; one or all processes get a signal in a step."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def run(folder, processes, *arguments, stop=0, number=signal.SIGKILL, victim="0", elastic=()):
        command = [sys.executable]
        if processes > 1 or elastic:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *elastic]
        command += [
            script, folder / "note", stop, int(number), victim, REPOSITORY / "recipes/finetune.py",
            "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir", folder,
            "--per_device_train_batch_seconds", 3, "--num_train_epochs", 2, "--learning_rate", "1e-3",
            "--warmup_steps", 0, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1,
            "--report_to", "none", "--use_cpu", "true", "--cache_dir", tmp_path / "cache", "--disable_tqdm", "true",
            "--preprocessing_num_workers", 1, "--resume_from_checkpoint", "auto", "--seed", 1, *arguments,
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, timeout=500,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see CONTRIBUTING.md, workarounds
            },
        )  # fmt: skip

    return run


def rows_by_epoch(folder):
    """Counts how often each epoch used each row; of a repeated step, only the last rows count."""
    seen = {}
    for path in folder.glob("note.*"):
        last = {step: keys for step, _, keys in map(json.loads, path.read_text().splitlines())}
        for key in (key for keys in last.values() for key in keys):
            seen.setdefault(key // 24, Counter())[key % 24] += 1
    return seen


@pytest.mark.slow
def test_epoch_uses_every_row_once_with_one_two_and_one_processes(launch, tmp_path):
    folder = tmp_path / "run"
    for processes, stop in ((1, 4), (2, 6), (1, 0)):
        result = launch(folder, processes, stop=stop, number=signal.SIGTERM, victim="all" if stop else "none")
        assert result.returncode == (0 if not stop else EXIT_STATUS if processes == 1 else 1), result.stderr[-4000:]
    seen = rows_by_epoch(folder)
    assert seen == {epoch: Counter(range(24)) for epoch in (0, 1)}
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(launch, tmp_path):
    whole = launch(tmp_path / "whole", 2)
    assert whole.returncode == 0, whole.stderr[-4000:]
    folder = tmp_path / "run"
    result = launch(folder, 2, "--save_steps", 100, stop=2, number=signal.SIGUSR1, victim="1")
    assert "ended by a signal after step 3" in result.stderr
    assert (folder / "checkpoint-3").is_dir() and not (folder / "model.safetensors").exists()
    result = launch(folder, 2, "--save_steps", 100)
    assert result.returncode == 0, result.stderr[-4000:]
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
def test_elastic_launch_restarts_after_the_loss_of_a_process(launch, tmp_path):
    whole = launch(tmp_path / "whole", 2)
    assert whole.returncode == 0, whole.stderr[-4000:]
    folder = tmp_path / "run"
    result = launch(folder, 2, stop=4, victim="1", elastic=["--max_restarts", 2])
    assert result.returncode == 0, result.stderr[-9000:]
    assert "training resumes from" in result.stderr
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert rows_by_epoch(folder) == {epoch: Counter(range(24)) for epoch in (0, 1)}
