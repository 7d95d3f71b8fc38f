"""Completion scripts: generated from the parsers, and run by the shells that are installed."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("shtab")
# Command line before the cursor -> a word that completes it, and one that does not.
CASES = {
    ("dec",): ("decode", "demo"),
    ("decode", "--num_b"): ("--num_beams", "--num_workers"),
    ("decode", "--dtype", ""): ("bfloat16", "corpus.txt"),
    ("decode", "--scp_file", "cor"): ("corpus.txt", "bfloat16"),
    ("finetune", "few"): ("few_hours", "lora"),
    ("finetune", "cor"): ("corpus.txt", "lora"),
    ("finetune", "lora", "--learn"): ("--learning_rate", "--warmup_steps"),  # of transformers' TrainingArguments
    ("finetune", "lora", "--config_file", "fs"): ("fsdp2", "multi_gpu"),
    ("compose", "models/t"): ("models/tiny", "lora"),
    ("plan", "--cur"): ("--curve", "--compile_layers"),
}
COMPLETE = {
    "bash": 'source "$1"; COMP_WORDS=(hf-speechllm "${@:2}"); COMP_CWORD=$(( $# - 1 )); _shtab_hf_speechllm; '
    "printf '%s\\n' \"${COMPREPLY[@]}\"",
    "fish": "source $argv[1]; complete -C (string join -- ' ' hf-speechllm $argv[2..-1]) | string split -f 1 -- \\t",
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Writes the script of a shell and returns its path."""

    def write(shell):
        path = tmp_path_factory.mktemp("completion") / f"hf-speechllm.{shell}"
        command = [sys.executable, "-m", "hf_speechllm", "completion", shell]
        path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completes_verbs_options_values_configurations_and_files(shell, script, tmp_path):
    path = script(shell)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    subprocess.run([shell, "-n", path], check=True)
    (tmp_path / "corpus.txt").touch()
    if shell not in COMPLETE:  # the completion of zsh needs a terminal
        return
    environment = {**os.environ, "HOME": str(tmp_path)}
    for words, (expected, other) in CASES.items():
        command = [shell, "-c", COMPLETE[shell], *(["bash"] if shell == "bash" else []), path, *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        found = result.stdout.split()
        assert expected in found and other not in found, (words, found, result.stderr)
