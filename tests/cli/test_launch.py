"""`finetune --num_processes N`: options of accelerate are separated, and configurations are found by name."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_speechllm.cli.configurations import LAUNCHING, TRAINING, find_configuration
from hf_speechllm.cli.launch import launch, split_launch_options

REPOSITORY = Path(__file__).resolve().parents[2]


LAUNCHER = ["--config_file", "cpu", "--num_processes", 2, "--main_process_port", 0]


def test_options_of_the_launcher_are_separated_at_any_position():
    argv = ["lora", "--num_processes", "8", "--learning_rate", "1e-4", "--main_process_ip=host", "--train_file", "a"]
    options, rest = split_launch_options(argv)
    assert options == {"num_processes": 8, "main_process_ip": "host"}
    assert rest == ["lora", "--learning_rate", "1e-4", "--train_file", "a"]


@pytest.mark.parametrize("name", ["lora", "lora.yaml", "recipes/configs/lora.yaml"])
def test_configurations_are_found_by_name_and_path_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_configuration(name, TRAINING) == REPOSITORY / "recipes/configs/lora.yaml"
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("", encoding="utf-8")
    assert find_configuration(name, TRAINING) == Path(name)  # a file of the user has priority


def test_error_for_an_unknown_configuration_lists_available_ones():
    with pytest.raises(ValueError, match="multi_gpux: .*did you mean multi_gpu?"):
        find_configuration("multi_gpux", LAUNCHING)
    with pytest.raises(ValueError, match="available names: adaptor_only, .*lora, models/fun_asr_nano"):
        find_configuration("zzzz", TRAINING)


def run(*arguments):
    command = [sys.executable, "-m", "hf_speechllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_several_processes_train_and_errors_are_found_before_the_start(tiny_model, tiny_corpus, tmp_path):
    options = [
        "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir", tmp_path / "out",
        "--max_steps", 2, "--logging_steps", 1, "--report_to", "none", "--cache_dir", tmp_path / "cache",
        "--preprocessing_num_workers", 1, "--per_device_train_batch_seconds", 3,
    ]  # fmt: skip
    wrong = run("finetune", *LAUNCHER, *options, "--lerning_rate", 1)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "did you mean --learning_rate?" in wrong.stderr
    wrong = run("finetune", *LAUNCHER, *options, "--train_file", tmp_path / "none.jsonl")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "none.jsonl: no such file" in wrong.stderr
    # The first process reads the plan, and the other one receives it.
    plan = {"configuration": "lora", "options": {"use_lora": True, "lora_r": 3, "max_steps": 9}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    result = run("finetune", "--auto", *LAUNCHER, *options)
    assert result.returncode == 0, result.stderr
    assert "x 2 device(s)" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 3
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use_lora", "true", "--lora_target_modules", "nosuch"], "the LLM has no layers named nosuch"),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2 has been toggled on"),
        (["--optim", "adamw_bnb_8bit"], "You need to install `bitsandbytes`"),
        (["--eval_on_start", "true"], "--eval_on_start requires a validation set; add --validation_file"),
        (["--eval_strategy", "steps"], "--eval_strategy steps requires a validation set"),
        (["--load_best_model_at_end", "true"], "--load_best_model_at_end requires the save and eval strategy"),
        (["--report_to", "wandb"], "--report_to wandb: no such package"),
    ],
)
def test_unsupported_options_are_one_line_before_training(
    run_recipe, tiny_model, tiny_corpus, tmp_path, capsys, options, message
):
    if any(find_spec(name) for name in ("bitsandbytes", "flash_attn", "wandb") if name[:4] in message.lower()):
        pytest.skip("the package is installed")
    end = run_recipe(
        "finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir",
        tmp_path / "out", "--use_cpu", "true", "--max_steps", 2, "--report_to", "none", "--cache_dir",
        tmp_path / "cache", "--preprocessing_num_workers", 1, *options,
    )  # fmt: skip
    text = capsys.readouterr().err.splitlines()[-1] if end == 2 else str(end)
    assert message in text and "\n" not in text
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_several_processes_decode_one_list(tiny_model, tiny_corpus, tmp_path):
    options = ["--model_name_or_path", tiny_model, "--scp_file", tiny_corpus.scp, "--max_new_tokens", 2]
    wrong = run("decode", *LAUNCHER, *options, "--output_file", tmp_path / "hyp.txt", "--num_beams", 0)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--num_beams must be above 0" in wrong.stderr
    result = run("decode", *LAUNCHER, *options, "--output_file", tmp_path / "hyp.txt")
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()][0] == ["texts", "24,", "0", "failed"]
    assert result.stdout.count("written") == result.stdout.count("next") == 1  # only of the first process
    assert len((tmp_path / "hyp.txt").read_text(encoding="utf-8").splitlines()) == 24


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (SignalException("interrupted", signal.SIGINT), 130),  # the processes have reported it
        (ChildFailedError("main", {1: ProcessFailure(1, 7, 75, "")}), 75),
        (ChildFailedError("main", {1: ProcessFailure(1, 7, -9, "")}), "error: signal 9 ended the process of rank 1"),
    ],
)
def test_exit_status_is_that_of_the_first_failed_process(monkeypatch, failure, status):
    def fail(arguments):
        raise failure

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as end:
        launch("decode", *split_launch_options(["--num_processes", "2", "--config_file", "cpu"]))
    assert end.value.code == status or str(end.value.code).endswith(str(status))


def test_zero_processes_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        split_launch_options(["--num_processes", "0"])
    assert end.value.code == 2
    assert "--num_processes is 0; it must be at least 1" in capsys.readouterr().err
