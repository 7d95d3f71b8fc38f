"""Console command: help without heavy imports, suggestions for typing errors, one line for a missing package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_speechllm.cli.main import VERBS

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "datasets", "numpy", "av", "soundfile", "accelerate", "peft"]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_loads_nothing_heavy_and_takes_less_than_a_second(verb):
    words = [] if verb is None else [verb]
    script = (
        "import sys, time, hf_speechllm_command\n"
        f"sys.argv = ['hf-speechllm', *{words!r}, '--help']\n"
        "try:\n    hf_speechllm_command.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules], time.process_time() < 1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded: [] True"
    assert result.stdout.startswith(f"usage: hf-speechllm {verb or 'VERB'}")


def test_help_is_one_screen(run):
    code, output = run("--help")
    lines = output.out.splitlines()
    assert not code and len(lines) <= 24 and max(map(len, lines)) < 80
    assert all(any(f" {verb} " in line for line in lines) for verb in VERBS)


def test_module_is_the_same_command_and_its_help_is_light():
    command = [sys.executable, "-X", "importtime", "-m", "hf_speechllm", "decode", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: hf-speechllm decode")
    assert not any(f"| {name}" in result.stderr for name in ("torch", "transformers", "rich"))


def test_unknown_verb_is_reported_with_the_closest(run):
    code, output = run("decod")
    assert code == 2
    assert output.err == (
        "hf-speechllm: error: unknown verb decod; did you mean decode?; hf-speechllm --help lists all verbs\n"
    )


def test_verbs_of_other_tools_lead_to_the_verb(run):
    assert "unknown verb train; did you mean finetune?" in run("train")[1].err


def test_unknown_option_is_reported_with_the_closest(run):
    code, output = run("score", "a", "b", "--output_dir", "c", "--utt2langs", "d")
    assert code == 2
    assert output.err == (
        "hf-speechllm score: error: unknown option --utt2langs; did you mean --utt2lang?; --help lists all options\n"
    )


def test_options_may_have_dashes(run, tmp_path):
    code, output = run("prepare", tmp_path / "none.csv", "--output-dir", tmp_path, "--max-bad-fraction=0.5")
    assert str(code).endswith("none.csv: no such file or folder")
    code, output = run("decode", "--model-nme", "m", "--output-file", "o", "a.wav")
    assert "unknown option --model-nme; did you mean --model_name_or_path?" in output.err


def test_training_requires_an_output_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--num_processes", "2", "--config_file", "cpu"]):
        code, output = run("finetune", "--model_name_or_path", "m", "--train_file", "rows.jsonl", *words)
        assert code == 2 and "--output_dir is missing" in output.err
    assert not any(tmp_path.iterdir())


def test_names_of_other_trainers_lead_to_options_with_an_effect(run):
    for name, option in (("--batch_size", "--per_device_train_batch_seconds"), ("--epochs", "--num_train_epochs")):
        output = run("finetune", name, "8")[1]
        assert f"unknown option {name}; did you mean {option}?" in output.err


def test_typing_error_is_reported_before_missing_options(run):
    code, output = run("decode", "--modle", "m", "--output_file", "o", "a.wav")
    assert code == 2
    assert output.err == (
        "hf-speechllm decode: error: unknown option --modle; did you mean --model_name_or_path?; "
        "--help lists all options\n"
    )
    code, output = run("decode", "--model", "m", "--context", "--an odd one", "a.wav")  # an abbreviation, a value
    assert output.err == "hf-speechllm decode: error: the following arguments are required: --output_file\n"


def test_import_error_of_a_library_is_reported_in_one_line(run, monkeypatch):
    def fail():
        raise ImportError("FlashAttention2 can't be used")

    monkeypatch.setattr("hf_speechllm.cli.env.main", fail)
    assert run("env")[0] == "hf-speechllm env: error: FlashAttention2 can't be used"


def test_interrupted_decoding_says_how_to_resume(run, monkeypatch, tiny_model, make_wav, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_speechllm.inference.decoding.decode_requests", interrupted)
    arguments = ["--model_name_or_path", tiny_model, "--output_file", tmp_path / "hyp.txt", make_wav()]
    code, output = run("decode", *arguments)
    assert code == 130
    expected = "hf-speechllm decode: interrupted; results are kept; run the same command again to resume"
    assert output.err.splitlines()[-1] == expected
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "interrupted" not in run("decode", *arguments)[1].err  # the first process of a launch says it


def test_missing_package_is_reported_with_its_extra(tmp_path):
    for name in ("reference", "hypothesis"):
        (tmp_path / name).write_text("a one\n", encoding="utf-8")
    script = (
        "import sys, hf_speechllm_command\n"
        "sys.modules['rapidfuzz'] = None\n"
        "sys.argv = ['hf-speechllm', 'score', 'reference', 'hypothesis', '--output_dir', 'out']\n"
        "hf_speechllm_command.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1 and result.stderr == (
        "hf-speechllm score: error: the package rapidfuzz is missing; pip install 'hf_speechllm[eval]'\n"
    )


WRONG_USAGE = [
    "nosuch", "env x", "completion nosuch", "decode", "decode --model_name_or_path m --output_file o",
    "decode --nosuch 1", "decode --num_processes 0", "decode --config_file nosuch", "finetune --num_processes 0",
    "finetune nosuch.yaml", "finetune --config_file nosuch", "finetune --model_name_or_path m --train_file t --seed x",
    "compose nosuch --tokenizer t --output_dir new", "plan nosuch --model_name_or_path m --train_file none",
    "score none none --output_dir s --num_worst -1", "doctor", "prepare s --output_dir p --num_workers 0",
    "scp2jsonl --scp_file none --transcript_file none --jsonl_file o --num_workers 0",
    "inspect --jsonl_file none --model_name_or_path m --inference --loss",
]  # fmt: skip
MISSING_FILES = [
    "finetune --model_name_or_path {model} --train_file none.jsonl --output_dir o",
    "finetune --model_name_or_path none --train_file none.jsonl --output_dir o",
    "finetune --model_name_or_path none --train_file none.jsonl --output_dir o --num_processes 2 --config_file cpu",
    "plan --model_name_or_path {model} --train_file none.jsonl", "convert --input none --output c --format native",
    "decode --model_name_or_path none --output_file o --scp_file none", "push --input none --hub_model_id a/b",
    "decode --model_name_or_path none --output_file o none.wav", "score none none --output_dir s",
    "decode --model_name_or_path none --output_file {model}/config.json a.wav", "normalize none out",
    "align none --model_name_or_path {model} --output_file o", "synthesize --texts none --output_dir y",
    "inspect --model_name_or_path {model} --jsonl_file none", "prepare none --output_dir p",
    "scp2jsonl --scp_file none --transcript_file none --jsonl_file o.jsonl", "demo --model_name_or_path none",
    "average --inputs none other --output a", "merge --input none --output m",
    "convert --input {model} --output {model} --format native",
    "compose models/tiny --transcripts none --output_dir new",
]  # fmt: skip


@pytest.mark.parametrize(("lines", "status"), [(WRONG_USAGE, 2), (MISSING_FILES, 1)])
def test_exit_status_tells_wrong_usage_from_missing_files(lines, status, run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for line in lines:
        code, output = run(*line.format(model=tiny_model).split())
        message = output.err.splitlines()[-1] if isinstance(code, int) else code
        assert "error: " in message and "Traceback" not in output.err, line
        found[line] = code if isinstance(code, int) else 1  # of a message
        assert status == 2 or "none" in message or "exists" in message, message
    assert found == dict.fromkeys(lines, status)


def test_doctor_separates_files_that_are_missing_from_faults_of_the_data(run, tmp_path):
    assert run("doctor", tmp_path / "none.jsonl")[0] == 2


def test_env_prints_versions(run):
    code, output = run("env")
    assert not code
    assert "hf_speechllm: 0." in output.out and "torch: " in output.out and "GPUs: " in output.out
    assert "system: " in output.out and "driver: " in output.out and "\nextras: decode" in output.out
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() in output.out


def test_reader_of_the_output_may_end_early(tiny_model, make_wav, tmp_path):
    rows = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": f"<|startofspeech|>!{make_wav()}<|endofspeech|>"}
    rows.write_text(json.dumps({"messages": [user, {"role": "assistant", "content": "b"}]}) + "\n")
    options = ["--json", "--jsonl_file", rows, "--model_name_or_path", tiny_model]
    for words in (["inspect", *options], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "hf_speechllm", *words]
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert result.returncode == 1 and not result.stderr


def test_name_without_its_folder_is_suggested_with_it(run, tmp_path):
    code, output = run("compose", "tiny", "--tokenizer", "a", "--output_dir", tmp_path / "new")
    assert code == 2
    assert output.err.endswith("tiny: no such file or configuration; did you mean models/tiny?\n")


def test_json_in_place_of_a_kaldi_list_is_told_before_the_model_is_loaded(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    code, output = run("decode", "--model_name_or_path", "a", "--scp_file", rows, "--output_file", tmp_path / "out")
    assert code == 1
    assert output.err.endswith("rows.jsonl: JSON instead of lines `ID PATH_OR_URL`; use --jsonl_file\n")


def test_merging_a_model_without_adapters_is_refused(run, tiny_model, tmp_path):
    code, _ = run("merge", "--input", tiny_model, "--output", tmp_path / "new")
    assert "no LoRA adapters to merge" in code
    assert not (tmp_path / "new").exists()


def test_conversion_prints_result_and_next_command(tiny_model, tmp_path):
    command = [sys.executable, "-m", "hf_speechllm", "convert", "--format", "speech_llm"]
    result = subprocess.run(
        [*command, "--input", tiny_model, "--output", tmp_path / "new"], capture_output=True, text=True, check=True
    )
    written, following = result.stdout.splitlines()
    assert written.startswith(f"written  {tmp_path / 'new'}: ") and written.endswith(" tensors, format speech_llm")
    assert following == (
        f"next     hf-speechllm decode RECORDING --model_name_or_path {tmp_path / 'new'} --output_file texts.txt"
    )
    assert result.stderr == ""  # without lines and bars of libraries


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU")
def test_training_without_a_gpu_is_reported(run, caplog, tmp_path):
    options = ["--model_name_or_path", "m", "--train_file", tmp_path / "rows.jsonl", "--output_dir", tmp_path]
    assert "m: no such folder" in run("finetune", *options)[0]
    assert "no GPU was found: training uses the CPU" in caplog.text
    caplog.clear()
    run("finetune", *options, "--use_cpu")
    assert "no GPU was found" not in caplog.text
