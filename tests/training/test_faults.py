"""Faults during a run: skipped, counted and reported, or the run ends with a reason; never a silent error or hang."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.data import collator as collator_module
from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.locks import acquire_output_lock
from hf_speechllm.training.checkpointing.manifest import last_complete
from hf_speechllm.training.errors import FaultError
from hf_speechllm.training.loader_workers import explain_loader_faults
from hf_speechllm.training.run import find_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def own_corpus(tiny_corpus, tmp_path):
    """A copy of the corpus that tests may damage."""
    folder = Path(shutil.copytree(tiny_corpus.folder, tmp_path / "corpus"))
    text = (folder / "train.jsonl").read_text(encoding="utf-8").replace(str(tiny_corpus.folder), str(folder))
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def uncached(own_corpus, split_options, tmp_path):
    """Options and rows of a run that reads recordings in every epoch."""
    options = {
        "train_file": [str(own_corpus / "train.jsonl")],
        "feature_cache": "off",
        "cache_dir": str(tmp_path / "cache"),
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    model, data, *_ = split_options(**options)
    processor = SpeechLLMProcessor.from_pretrained(model.model_name_or_path)
    rows, _ = prepare_rows(data.train_file, processor, 2048, data)
    return {**options, "train_dataset": rows}


def log_of(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_recordings_are_skipped_named_and_counted(make_trainer, uncached, own_corpus, caplog, workers):
    trainer = make_trainer(**uncached, max_bad_fraction=0.1, dataloader_num_workers=workers)
    for index in (3, 11):
        (own_corpus / f"utt{index:02d}.wav").unlink()
    trainer.train()
    assert log_of(trainer, "bad_rows")[-1] == 2
    assert "train.jsonl:4: " in caplog.text and "train.jsonl:12: " in caplog.text and "utt03.wav" in caplog.text
    assert trainer.state.epoch == 1


def test_gradient_with_a_vanished_recording_is_that_of_the_other_rows(make_trainer, uncached, own_corpus):
    """No other recording replaces the vanished recording."""
    options = {**uncached, "per_device_train_batch_seconds": 60.0, "num_train_epochs": 1, "optim": "sgd"}
    rows = options.pop("train_dataset")
    weights = []
    for train_dataset in (rows.select([index for index in range(24) if index != 5]), rows):
        if train_dataset is rows:
            (own_corpus / "utt05.wav").unlink()
        trainer = make_trainer(**options, train_dataset=train_dataset, max_bad_fraction=0.1)
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(trainer.model.llm.model.norm.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_batch_of_vanished_recordings_has_no_gradient_and_counts_as_a_step(make_trainer, uncached, own_corpus):
    trainer = make_trainer(**uncached, max_bad_fraction=1.0, weight_decay=0.0)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    steps = len(trainer.get_train_dataloader())
    for path in own_corpus.glob("*.wav"):
        path.unlink()
    trainer.train()
    assert trainer.state.global_step == steps
    assert log_of(trainer, "bad_rows")[-1] == 24
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_too_many_vanished_recordings_end_the_run(make_trainer, uncached, own_corpus):
    trainer = make_trainer(**uncached)
    (own_corpus / "utt07.wav").unlink()
    with pytest.raises(BadDataError, match=r"(?s)1 of 24 rows.*train.jsonl:8: .*utt07.wav.*--max_bad_fraction"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_validation_recordings_are_left_out_named_and_counted(
    make_trainer, uncached, own_corpus, caplog, workers
):
    """By all that is scored: the numbers are those of the set without them."""
    rows = uncached["train_dataset"].select(range(5))
    options = {**uncached, "eval_cer": True, "eval_strategy": "no", "eval_max_new_tokens": 4}
    trainer = make_trainer(**options, eval_dataset=rows.select([0, 1, 2, 4]), dataloader_num_workers=workers)
    expected = trainer.evaluate()
    (own_corpus / "utt03.wav").unlink()
    scores = make_trainer(**options, eval_dataset=rows, dataloader_num_workers=workers).evaluate()
    assert scores.pop("eval_bad_rows") == 1
    assert (
        "skipped an unreadable row of eval: " in caplog.text
        and "train.jsonl:4: " in caplog.text
        and "utt03.wav" in caplog.text
    )
    for key in ("eval_loss", "eval_cer", "eval_reference_tokens"):
        assert scores[key] == pytest.approx(expected[key], rel=1e-5), key


def break_steps(trainer, steps, value=float("nan")):
    """Makes the loss of some steps non-finite."""
    compute = trainer.compute_loss

    def broken(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss * value if trainer.state.global_step + 1 in steps else loss
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = broken


class Weights(TrainerCallback):
    """Stores a parameter and the state of the optimizer after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        weight = model.llm.model.norm.weight
        states = optimizer.state.get(weight, {})
        self.steps.append([weight.detach().clone(), *(value.clone() for value in states.values())])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_step_is_skipped_counted_and_described(make_trainer, tmp_path, tiny_corpus, value, accumulation):
    weights = Weights()
    trainer = make_trainer([weights], gradient_accumulation_steps=accumulation, max_steps=4)
    break_steps(trainer, {2}, value)
    trainer.train()
    first, second, third, _ = weights.steps
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(second[0], third[0])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert log_of(trainer, "bad_steps") == [1, 1, 1]
    assert all(loss == loss and loss < 100 for loss in log_of(trainer, "loss"))
    description = json.loads((tmp_path / "run" / "bad_steps" / "step-2-rank-0.json").read_text())
    assert description["step"] == 2 and description["gradient_norm"] in ("nan", "inf")
    sampler = trainer.train_loader.batch_sampler
    expected = sampler.batches(0)[accumulation : 2 * accumulation]
    assert [[row["line"] - 1 for row in batch["rows"]] for batch in description["batches"]] == [
        batch.tolist() for batch in expected
    ]
    row = description["batches"][0]["rows"][0]
    assert row["file"] == str(tiny_corpus.jsonl) and row["input_features"]["not_finite"] == 0
    assert row["input_features"]["min"] < row["input_features"]["mean"] < row["input_features"]["max"]


def test_unfused_optimizer_skips_the_same_steps(make_trainer):
    results = []
    for optim in ("adamw_torch_fused", "adamw_torch"):
        weights = Weights()
        trainer = make_trainer([weights], optim=optim, max_steps=4)
        break_steps(trainer, {2})
        trainer.train()
        assert {bool(group["fused"]) for group in trainer.optimizer.param_groups} == {optim == "adamw_torch_fused"}
        assert log_of(trainer, "bad_steps") == [1, 1, 1]
        results.append(weights.steps)
    fused, (first, second, third, _) = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(second[0], third[0])
    torch.testing.assert_close(results[1], fused)


class KnownBadSteps(TrainerCallback):
    """Stores the number of known bad steps after every step."""

    def __init__(self):
        self.counts = []
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(self.trainer.guard.count)


@pytest.mark.parametrize(("accumulation", "resumed"), [(1, False), (2, False), (2, True)])
def test_last_step_of_an_epoch_is_described_with_its_rows_during_the_next_epoch(
    make_trainer, interrupt, tmp_path, accumulation, resumed
):
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
    options["logging_steps"] = 100  # a log line would report the step immediately
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            make_trainer([interrupt(3)], **options, save_strategy="steps", save_steps=2).train()
    known = KnownBadSteps()
    known.trainer = trainer = make_trainer([known], **options)
    batches = len(trainer.get_train_dataloader())
    last = -(-batches // accumulation)
    break_steps(trainer, {last})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resumed else None)
    before = last - 2 * resumed
    assert known.counts == [0] * before + [1] * last
    description = json.loads((tmp_path / "run" / "bad_steps" / f"step-{last}-rank-0.json").read_text())
    ends = [
        [batch.tolist() for batch in trainer.train_loader.batch_sampler.batches(epoch)[(last - 1) * accumulation :]]
        for epoch in (0, 1)
    ]
    assert [[row["line"] - 1 for row in batch["rows"]] for batch in description["batches"]] == ends[0] != ends[1]


def test_too_many_bad_steps_in_a_row_end_the_run(make_trainer):
    trainer = make_trainer(max_steps=20, max_bad_steps=2)
    break_steps(trainer, {1, 2, 4, 5, 6})
    with pytest.raises(FaultError, match="3 steps in a row .*--max_bad_steps 2"):
        trainer.train()
    assert trainer.state.global_step == 6  # reported by the log line of step 6, or at the start of step 7


class Kill(TrainerCallback):
    """Sends a signal to the loader processes before a step."""

    def __init__(self, number, step=2):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, self.number)


def test_loader_process_that_dies_ends_the_run_with_the_reason(make_trainer):
    with pytest.raises(FaultError, match="a loader process died.*--dataloader_num_workers"):
        make_trainer([Kill(signal.SIGKILL)], dataloader_num_workers=1, max_steps=20).train()


def send_tensor(queue):
    queue.put(torch.ones(3))
    time.sleep(60)


def test_error_for_a_batch_in_transit_from_a_dead_process_is_explained():
    queue = torch.multiprocessing.Queue()
    child = torch.multiprocessing.Process(target=send_tensor, args=(queue,), daemon=True)
    child.start()
    while queue.empty():
        time.sleep(0.01)
    child.kill()
    child.join()
    with pytest.raises(FaultError, match="a loader process died"), explain_loader_faults(1):
        queue.get(timeout=10)
    with pytest.raises(FileNotFoundError), explain_loader_faults(1):
        Path("/no/such/file").read_text()


@pytest.mark.timeout(300)
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches a forked process")
def test_loader_process_that_hangs_ends_the_run(make_trainer, uncached, own_corpus, monkeypatch):
    join = BaseProcess.join
    # Gives torch time to notice the kill, which must not be reported as the fault.
    monkeypatch.setattr(BaseProcess, "join", lambda process, timeout=None: time.sleep(0.1) or join(process, timeout))
    trainer = make_trainer(**uncached, dataloader_num_workers=1, dataloader_timeout_seconds=3)
    load = collator_module.load_audio

    def hang(source, *args):
        if str(source).endswith("utt09.wav"):
            time.sleep(600)
        return load(source, *args)

    monkeypatch.setattr(collator_module, "load_audio", hang)  # the loader's process is forked
    with pytest.raises(FaultError, match="no batch .* for 3 s.*--dataloader_timeout_seconds"):
        trainer.train()
    assert not torch.multiprocessing.active_children()


def test_loader_processes_ignore_a_signal_to_the_process_group(make_trainer):
    trainer = make_trainer([Kill(signal.SIGTERM)], dataloader_num_workers=1, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6


LEFT_PROCESSES = """
import gc, multiprocessing, runpy, sys
from torch.utils.data import DataLoader
if sys.argv[1] == "hold":
    held, iterate = [], DataLoader.__iter__
    DataLoader.__iter__ = lambda loader: held.append(iterate(loader)) or held[-1]
else:
    gc.disable()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("left:", len(multiprocessing.active_children()))
"""


@pytest.mark.parametrize(("how", "left"), [("without garbage collection", 0), ("hold", 1)])
def test_loader_processes_end_with_the_epoch_or_with_the_run(tiny_model, tiny_corpus, tmp_path, how, left):
    options = {
        "model_name_or_path": tiny_model, "train_file": tiny_corpus.jsonl, "validation_file": tiny_corpus.jsonl,
        "output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "max_steps": 2, "eval_strategy": "steps",
        "eval_steps": 1, "save_strategy": "no", "dataloader_num_workers": 1, "preprocessing_num_workers": 1,
        "per_device_train_batch_seconds": 4, "report_to": "none", "use_cpu": "true",
    }  # fmt: skip
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", LEFT_PROCESSES, how, str(REPOSITORY / "recipes/finetune.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"left: {left}" in result.stdout
    assert not re.search("Traceback|Exception ignored", result.stderr), result.stderr[-2000:]


HOLD = """
import sys, time
from hf_speechllm.locks import acquire_output_lock
acquire_output_lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_second_run_in_an_output_folder_is_refused_until_the_first_ends(make_arguments, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by another run, process {first.pid} on .*--output_dir"):
            find_checkpoint(make_arguments())
        first.kill()
    acquire_output_lock(folder)  # even after a kill
    assert json.loads((folder / ".run.json").read_text())["pid"] == os.getpid()


PREPARE = """
import sys
from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
model, train, cache = sys.argv[1:]
options = DataOptions(cache_dir=cache, preprocessing_num_workers=1)
rows = prepare_rows([train], SpeechLLMProcessor.from_pretrained(model), 2048, options)[0]
print("rows", [[row["line"], hash(row["features"][0])] for row in rows])
"""


@pytest.mark.slow
def test_two_runs_share_a_cache(tiny_model, tiny_corpus, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tiny_model), str(tiny_corpus.jsonl), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
        )
        for _ in range(3)
    ]
    results = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], results
    description = {out.partition("rows")[2] for out, _ in results}
    assert len(description) == 1 and description.pop().count("[") == 25


NAN_SCRIPT = """
import os, runpy, sys
recipe = sys.argv[1]
sys.argv = [recipe, *sys.argv[2:]]
if os.environ.get("ACCELERATE_USE_FSDP"):
    sys.path.append(os.path.join(os.path.dirname(recipe), "../tests"))
    import fsdp_on_cpu
from hf_speechllm.training.trainer import SpeechLLMTrainer
import hf_speechllm.training.trainer as module

class Broken(SpeechLLMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.process_index == 1 and self.state.global_step in (1, 2):
            inputs["input_features"] = inputs["input_features"] * float("nan")
        return super().training_step(model, inputs, num_items_in_batch)
module.SpeechLLMTrainer = Broken
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 1])
def test_non_finite_loss_on_one_rank_skips_the_step_on_all_ranks(tiny_model, tiny_corpus, tmp_path, limit):
    script = tmp_path / "run.py"
    script.write_text(NAN_SCRIPT, encoding="utf-8")
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
        REPOSITORY / "recipes/finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl,
        "--output_dir", folder, "--per_device_train_batch_seconds", 3, "--max_steps", 5, "--use_cpu", "true",
        "--logging_steps", 1, "--report_to", "none", "--cache_dir", tmp_path / "cache", "--max_bad_steps", limit,
        "--save_strategy", "no",
    ]  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    dumps = sorted(path.name for path in (folder / "bad_steps").iterdir())
    assert dumps == [f"step-{step}-rank-{rank}.json" for step in (2, 3) for rank in (0, 1)]
    losses = [
        [batch["loss"] for batch in json.loads((folder / "bad_steps" / name).read_text())["batches"]] for name in dumps
    ]
    assert [loss == ["nan"] for loss in losses] == [False, True, False, True]
    if limit == 1:
        assert result.returncode != 0 and "2 steps in a row" in result.stderr
        return
    assert result.returncode == 0, result.stderr[-4000:]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("bad_steps", 0) for entry in log if "loss" in entry] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "engine",
    [
        "deepspeed_zero1",
        *[pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed_zero2", "deepspeed_zero3", "fsdp2")],
    ],
)
def test_engine_skips_steps_with_a_non_finite_loss_on_one_rank(launch, tiny_model, tiny_corpus, tmp_path, engine):
    script, config, folder = tmp_path / "run.py", tmp_path / "two.yaml", tmp_path / "run"
    good = 0 if engine == "deepspeed_zero3" else 1  # good steps first: ZeRO-3 has no norm if it skips the first step
    script.write_text(NAN_SCRIPT.replace("(1, 2)", f"({good}, {good + 1})"), encoding="utf-8")
    setup = yaml.safe_load((REPOSITORY / f"accelerate_configs/{engine}.yaml").read_text())
    config.write_text(yaml.safe_dump({**setup, "use_cpu": True, "num_processes": 2}))
    command = [
        script, REPOSITORY / "recipes/finetune.py", "--model_name_or_path", tiny_model,
        "--train_file", tiny_corpus.jsonl, "--output_dir", folder, "--per_device_train_batch_seconds", 3,
        "--max_steps", 5, "--use_cpu", "true", "--report_to", "none", "--cache_dir", tmp_path / "cache",
        "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1,
    ]  # fmt: skip
    result = launch(*command, config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    dumps = sorted(path.name for path in (folder / "bad_steps").iterdir())
    assert dumps == [f"step-{good + step}-rank-{rank}.json" for step in (1, 2) for rank in (0, 1)]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    counts = [min(2, max(0, step - good)) for step in range(1, 6)]
    assert [entry.get("bad_steps", 0) for entry in log if "loss" in entry] == counts
    weights = [load_file(folder / f"checkpoint-{step}/model.safetensors") for step in (1, good + 2, 5)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert all(torch.isfinite(tensor).all() for tensor in weights[2].values())
    assert any(not torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    if engine == "deepspeed_zero1":
        shutil.rmtree(folder)
        result = launch(*command, "--max_bad_steps", 1, config=config)
        assert result.returncode != 0 and "2 steps in a row" in result.stderr
        assert last_complete(folder) == folder / "checkpoint-2"
