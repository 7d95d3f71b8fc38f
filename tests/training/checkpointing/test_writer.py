"""Checkpoints are written atomically, verified and usable."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.formats.loading import read_checkpoint
from hf_speechllm.training.checkpointing import writer
from hf_speechllm.training.checkpointing.manifest import find_damage, last_complete
from hf_speechllm.training.checkpointing.verification import VerificationError
from hf_speechllm.training.checkpointing.writer import SaveError, remove_partial_checkpoints
from hf_speechllm.training.run import find_checkpoint

pytestmark = pytest.mark.core

SAVING = {"save_strategy": "steps", "save_steps": 1}
FROZEN = {"freeze_audio_encoder": True, "freeze_llm": True}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with two checkpoints and manifests."""
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 10):
        staging = folder / f".checkpoint-{step}.tmp"
        (staging / "global_step").mkdir(parents=True)
        (staging / "model.safetensors").write_bytes(bytes(1000))
        (staging / "global_step" / "shard.pt").write_bytes(b"x" * step)
        writer.finalize_checkpoint(staging, folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def run_folder(original, tmp_path):
    """A copy of `original`."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_manifest_lists_every_file_and_the_folder_is_renamed(run_folder):
    manifest = json.loads((run_folder / "checkpoint-10" / "manifest.json").read_text())["files"]
    assert {name: entry["size"] for name, entry in manifest.items()} == {
        "model.safetensors": 1000,
        "global_step/shard.pt": 10,
    }
    assert find_damage(run_folder / "checkpoint-10") is None
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def truncate(folder):
    (folder / "model.safetensors").write_bytes(bytes(999))


def flip(folder):
    (folder / "model.safetensors").write_bytes(bytes(500) + b"\1" + bytes(499))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors has 999 bytes instead of 1000"),
        (flip, "model.safetensors changed"),
        (lambda folder: (folder / "global_step" / "shard.pt").unlink(), "global_step/shard.pt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "writing was interrupted"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_damaged_checkpoint_is_skipped_for_the_previous_one(run_folder, damage, message, caplog):
    assert last_complete(run_folder) == run_folder / "checkpoint-10"
    damage(run_folder / "checkpoint-10")
    assert last_complete(run_folder) == run_folder / "checkpoint-2"
    assert message in caplog.text and "checkpoint-2 is the last complete" in caplog.text


def test_error_lists_all_checkpoints_if_none_is_complete(run_folder):
    for step in (2, 10):
        flip(run_folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="(?s)move these checkpoints away.*checkpoint-10: .*checkpoint-2: "):
        last_complete(run_folder)


def test_partial_checkpoints_of_a_killed_run_are_removed_or_restored(run_folder):
    (run_folder / ".checkpoint-12.tmp").mkdir()
    (run_folder / "checkpoint-10").rename(run_folder / ".checkpoint-10.old")  # killed between two renames
    shutil.copytree(run_folder / "checkpoint-2", run_folder / ".checkpoint-2.old")
    remove_partial_checkpoints(run_folder)
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert find_damage(run_folder / "checkpoint-10") is None


def test_run_resumes_from_the_last_complete_checkpoint_or_starts_fresh_with_auto(
    make_trainer, make_arguments, tmp_path
):
    assert find_checkpoint(make_arguments(**FROZEN, resume_from_checkpoint="auto")) is None
    make_trainer(**SAVING, **FROZEN, max_steps=2).train()
    folder = tmp_path / "run"
    for value in ("auto", "last", "true"):
        assert find_checkpoint(make_arguments(**FROZEN, resume_from_checkpoint=value)) == str(folder / "checkpoint-2")
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    for value in ("auto", "last"):
        assert find_checkpoint(make_arguments(**FROZEN, resume_from_checkpoint=value)) == str(folder / "checkpoint-1")
    with pytest.raises(ValueError, match="is damaged: optimizer.pt has 0 bytes"):
        find_checkpoint(make_arguments(**FROZEN, resume_from_checkpoint=str(folder / "checkpoint-2")))


class DiskFull(TrainerCallback):
    """Limits the size of files after a step."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [3_000, 300_000], ids=["small", "large"])
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(make_trainer, tmp_path, limit, background):
    resource = pytest.importorskip("resource", reason="Windows has no limit of file sizes")
    trainer = make_trainer([DiskFull(2, limit)], **SAVING, async_save=background, max_steps=4)
    try:
        with pytest.raises(SaveError, match="Earlier checkpoints are unchanged"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    folder = tmp_path / "run"
    assert last_complete(folder) == folder / "checkpoint-1"
    assert not list(folder.glob(".checkpoint*"))


def test_failed_save_deletes_nothing(make_trainer, tmp_path, monkeypatch):
    finalize, calls = writer.finalize_checkpoint, []

    def fail_later(staging, final):
        calls.append(final.name)
        if len(calls) == 3:
            raise OSError("No space left on device")
        finalize(staging, final)

    monkeypatch.setattr(writer, "finalize_checkpoint", fail_later)
    with pytest.raises(SaveError, match="No space left"):
        make_trainer(**SAVING, **FROZEN, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_limit_keeps_the_best_and_the_last(make_trainer, tiny_rows, tmp_path):
    trainer = make_trainer(
        **SAVING, **FROZEN, save_total_limit=2, eval_dataset=tiny_rows.select(range(4)), eval_strategy="steps",
        eval_steps=1, metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-2, max_steps=4,
        per_device_train_batch_seconds=3.0,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    assert 0 < best < 4  # otherwise the test could not fail
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}


def test_limit_holds_for_checkpoints_written_in_the_background_once_they_are_complete(make_trainer, tmp_path):
    make_trainer(**SAVING, **FROZEN, save_total_limit=1, async_save=True, max_steps=3).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_only_the_first_checkpoint_is_read_back(make_trainer, monkeypatch):
    trainer, read = make_trainer(**SAVING, **FROZEN, max_steps=3), []
    monkeypatch.setattr(trainer, "verify_checkpoint", lambda folder: read.append(folder.name))
    trainer.train()
    assert read == ["checkpoint-1"]


def test_background_checkpoint_is_not_changed_by_later_steps(make_trainer, tmp_path, monkeypatch):
    """A checkpoint is written while training continues."""
    step_done, write = threading.Event(), writer.CheckpointWriter._write_weights
    threads = []

    def write_slowly(self, *args):
        threads.append(threading.current_thread())
        if self.run.state.global_step == 2:
            assert step_done.wait(30)
        write(self, *args)

    class SetEvent(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                step_done.set()

    monkeypatch.setattr(writer.CheckpointWriter, "_write_weights", write_slowly)
    options = {**SAVING, "save_steps": 2, "max_steps": 4}
    make_trainer(
        [SetEvent()], **options, async_save=True, check_first_checkpoint=False, output_dir=str(tmp_path / "a")
    ).train()
    assert all(thread is not threading.main_thread() for thread in threads) and len(threads) == 2
    step_done.set()
    make_trainer(**options, output_dir=str(tmp_path / "b")).train()
    for step in (2, 4):
        first, second = (tmp_path / run / f"checkpoint-{step}" for run in "ab")
        assert find_damage(first) is None
        assert same(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
        states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(same(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_first_checkpoint_that_differs_from_the_model_ends_the_run(make_trainer, monkeypatch, lora):
    write = writer.CheckpointWriter._write_weights
    options = {**SAVING, "use_lora": lora, "max_steps": 2, "learning_rate": 0.05}
    make_trainer(**options).train()  # correct checkpoints pass

    def write_wrongly(self, staging, *args):
        write(self, staging, *args)
        file = staging / ("adapter_model.safetensors" if lora else "model.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "llm" in name and "norm" not in name and tensors[name].any())
        save_file({**tensors, name: tensors[name] * 2}, file, metadata={"format": "pt"})

    monkeypatch.setattr(writer.CheckpointWriter, "_write_weights", write_wrongly)
    with pytest.raises(VerificationError, match="logits differ by up to"):
        make_trainer(**options).train()
    make_trainer(**options, check_first_checkpoint=False).train()


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_checkpoint_of_a_bfloat16_run_is_verified_in_float32(use_lora, padding_free, make_trainer, caplog):
    options = {**SAVING, "use_lora": use_lora, "lora_dropout": 0.0, "padding_free": padding_free, "bf16": True}
    with caplog.at_level("INFO"):
        trainer = make_trainer(**options)
        trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16" and "is verified" in caplog.text


def test_verification_does_not_change_training(make_trainer, tmp_path):
    weights = []
    for check in (True, False):
        trainer = make_trainer(**SAVING, use_lora=True, lora_dropout=0.3, check_first_checkpoint=check, max_steps=3)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert same(*weights)


def test_save_only_trained_stores_only_trained_parts(make_trainer, make_arguments, tiny_model, tmp_path):
    options = {**SAVING, **FROZEN, "max_steps": 4}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    trainer = make_trainer(**options, save_only_trained=True)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == {"audio_adaptor"}
    assert json.loads((folder / "base_model.json").read_text())["base_model_name_or_path"] == str(tiny_model)

    loaded = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    expected = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-2")
    assert same(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    assert SpeechLLMProcessor.from_pretrained(folder).tokenizer.eos_token == "<|im_end|>"
    assert same(read_checkpoint(folder).tensors, read_checkpoint(tmp_path / "whole" / "checkpoint-2").tensors)

    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    assert find_checkpoint(make_arguments(**options, save_only_trained=True, resume_from_checkpoint="last")) == str(
        folder
    )
    resumed = make_trainer(**options, save_only_trained=True)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 4
    assert same(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))


def test_trained_parts_are_refused_with_another_base_model(make_trainer, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    options = {**SAVING, **FROZEN, "max_steps": 2, "save_only_trained": True, "model_name_or_path": str(base)}
    make_trainer(**options).train()
    folder = tmp_path / "run" / "checkpoint-1"
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.startswith("llm"))
    save_file({**tensors, name: tensors[name] + 1e-3}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="whose frozen parts have changed"):
        SpeechLLMForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="model.base .* does not fit another model"):
        make_trainer(**options).train(resume_from_checkpoint=str(folder))


def test_checkpoint_of_a_compiled_model_is_verified(make_trainer, caplog):
    options = {**SAVING, "torch_compile": True, "torch_compile_backend": "eager"}
    with caplog.at_level("INFO"):
        make_trainer(**options).train()
    assert "is verified" in caplog.text
