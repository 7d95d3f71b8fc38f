"""The installed wheel, in an empty directory: command, configurations by name, decoding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("hf_speechllm", "recipes/configs", "accelerate_configs", "tools", "setup.py", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Builds the wheel from a source distribution, installs it into a folder, and returns the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, "MANIFEST.in", "hf_speechllm_command.py"):
        source, target = REPOSITORY / name, folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=folder / "source", stdout=subprocess.DEVNULL)
    (source,) = folder.glob("*.tar.gz")
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Runs the installed command in an empty directory."""
    empty = tmp_path / "empty"
    empty.mkdir()

    def start(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, installed / "bin" / "hf-speechllm", *arguments]
        return subprocess.run(
            list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True, timeout=300
        )

    return start


def test_command_composes_decodes_and_finds_configurations_by_name(run, tiny_corpus, tmp_path):
    assert run("--version").stdout.startswith("hf_speechllm 0.")
    result = run("compose", "models/tiny", "--transcripts", tiny_corpus.text, "--output_dir", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    options = ["--model_name_or_path", tmp_path / "model", "--scp_file", tiny_corpus.scp, "--max_new_tokens", 2]
    result = run("decode", *options, "--output_file", tmp_path / "hyp.txt")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "hyp.txt").read_text(encoding="utf-8").splitlines()) == 24
    result = run("finetune", "lora", "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2, "hf-speechllm finetune: error: --train_file is missing; name a training JSONL",
    )  # fmt: skip


def test_package_holds_all_of_the_checkout(installed):
    files = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "hf_speechllm").rglob("*.*")}
    files = {path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"}
    assert not {path for path in files if not (installed / path).is_file()}
    assert (installed / "hf_speechllm_command.py").is_file()
    for name in ("recipes/configs", "accelerate_configs"):
        files = {path.relative_to(REPOSITORY / name) for path in (REPOSITORY / name).rglob("*.yaml")}
        assert files == {path.relative_to(installed / "hf_speechllm" / name) for path in
                         (installed / "hf_speechllm" / name).rglob("*.yaml")}  # fmt: skip
