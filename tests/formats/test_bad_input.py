"""Checkpoints that cannot be read or written: a one-line error from every entry point, and no partial output."""

import json
import pickle
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.formats.loading import LAYOUTS

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_FILES = {"speech_llm": "model.safetensors", "native": "model.safetensors", "funasr": "model.pt"}
NORM = {"speech_llm": "llm.model.norm.weight", "native": "model.language_model.norm.weight"}
NORM["funasr"] = NORM["speech_llm"]
TOKENIZERS = {"speech_llm": "tokenizer.json", "native": "tokenizer.json", "funasr": "Qwen3-0.6B/tokenizer.json"}


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def truncate(folder, layout):
    file = folder / MODEL_FILES[layout]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put_code_into_it(folder, layout):
    torch.save({"state_dict": {"weight": Payload()}}, folder / "model.pt")


def put_code_into_a_plain_pickle(folder, layout):
    (folder / "model.pt").write_bytes(pickle.dumps({"weight": Payload()}))


def bend_a_tensor(folder, layout):
    file = folder / MODEL_FILES[layout]
    state = torch.load(file, weights_only=True)["state_dict"] if layout == "funasr" else load_file(file)
    state[NORM[layout]] = torch.zeros(3)
    if layout == "funasr":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file, metadata={"format": "pt"})


def rename_a_part(part):
    def edit(folder, layout):
        if layout == "funasr":
            conf = yaml.safe_load((folder / "config.yaml").read_text())
            conf[part] = "Conformer"
            (folder / "config.yaml").write_text(yaml.safe_dump(conf))
            return
        config = json.loads((folder / "config.json").read_text())
        if layout == "native":
            config["audio_config"]["model_type"] = "conformer"
        elif part == "audio_encoder":
            config["audio_encoder_config"]["model_type"] = "conformer"
        else:
            config["audio_adaptor_config"]["adaptor_type"] = "conformer"
        (folder / "config.json").write_text(json.dumps(config))

    edit.__name__ = f"rename the {part}"
    return edit


def drop_a_special_token(folder, layout):
    file = folder / TOKENIZERS[layout]
    file.write_text(file.read_text().replace("<|im_start|>", "<|other|>"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / name).is_file():
            text = (file.parent / name).read_text().replace("<|im_start|>", "<|other|>")
            (file.parent / name).write_text(text)


DAMAGE = [
    *[(layout, truncate, "damaged") for layout in LAYOUTS],
    ("funasr", put_code_into_it, "could run code"),
    ("funasr", put_code_into_a_plain_pickle, "could run code"),
    *[(layout, bend_a_tensor, rf"{NORM[layout]} is \(3,\), not \(16,\)") for layout in LAYOUTS],
    *[(layout, rename_a_part("audio_encoder"), "(?i)conformer") for layout in LAYOUTS],
    *[(layout, rename_a_part("audio_adaptor"), "(?i)conformer") for layout in ("speech_llm", "funasr")],
    *[(layout, drop_a_special_token, r"the tokenizer lacks <\|im_start\|>") for layout in LAYOUTS],
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projector_hidden_size", "wide"),
        ("hidden_dropout", "high"),
        ("layer_norm_eps", "small"),
        ("num_hidden_layers", 2.5),
        ("use_low_frame_rate", "yes"),
        ("adaptor_type", "conformer"),
    ],
)
def test_invalid_config_is_reported_with_file_and_field(make_checkpoint, field, value):
    folder = make_checkpoint("speech_llm")
    config = json.loads((folder / "config.json").read_text())
    config["audio_adaptor_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    for reader in (SpeechLLMConfig, SpeechLLMForConditionalGeneration):
        with pytest.raises(CheckpointError, match=rf"config\.json.*{field}") as info:
            reader.from_pretrained(folder)
        assert "None" not in str(info.value)


@pytest.mark.parametrize(("layout", "damage", "message"), DAMAGE)
def test_damage_is_a_one_line_error_from_all_readers(layout, damage, message, make_checkpoint, tmp_path, run_recipe):
    folder = make_checkpoint(layout)
    damage(folder, layout)
    reader = SpeechLLMProcessor if damage is drop_a_special_token else SpeechLLMForConditionalGeneration
    with pytest.raises(ValueError, match=message):
        reader.from_pretrained(folder)
    for target in LAYOUTS:
        error = run_recipe(
            "convert_checkpoint.py", "--input", folder, "--output", tmp_path / "out", "--format", target
        )
        assert isinstance(error, str) and error.startswith("convert_checkpoint.py: error: ")
        assert re.search(message, error), error
        assert "\n" not in error
    assert sorted(item.name for item in tmp_path.iterdir()) == [layout]


def test_command_line_prints_one_line_on_damage(make_checkpoint, tmp_path):
    folder = make_checkpoint("funasr")
    truncate(folder, "funasr")
    command = [sys.executable, "recipes/convert_checkpoint.py", "--input", folder, "--output", tmp_path / "out"]
    result = subprocess.run(
        [*map(str, command), "--format", "speech_llm"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert not (tmp_path / "out").exists()


# Outputs


@pytest.mark.parametrize("target", LAYOUTS)
def test_output_folder_that_cannot_be_created(target, make_checkpoint, tmp_path, run_recipe):
    folder = make_checkpoint("speech_llm", adaptor={"use_low_frame_rate": False})
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"  # fails also for root
    error = run_recipe("convert_checkpoint.py", "--input", folder, "--output", output, "--format", target)
    assert error.startswith("convert_checkpoint.py: error: ") and str(tmp_path / "file") in error
    assert "\n" not in error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "speech_llm"]


@pytest.mark.parametrize("target", LAYOUTS)
def test_existing_output_folder_is_refused_and_unchanged(target, make_checkpoint, tmp_path, run_recipe, capsys):
    folder, output = make_checkpoint("speech_llm"), tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert run_recipe("convert_checkpoint.py", "--input", folder, "--output", output, "--format", target) == 1
    assert "exists; remove it or choose another --output" in capsys.readouterr().err
    assert [item.name for item in output.iterdir()] == ["notes.txt"]
    assert (output / "notes.txt").read_text() == "mine"


@contextmanager
def files_no_larger_than(size):
    """Simulates a full disk: limits the size of written files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("size", [200, 30_000])  # too small for the config, too small for the weights
def test_full_disk_is_an_error_without_partial_output(target, size, make_checkpoint, tmp_path, run_recipe):
    folder = make_checkpoint("speech_llm", adaptor={"use_low_frame_rate": False})
    arguments = ["--input", folder, "--output", tmp_path / "out", "--format", target]
    with files_no_larger_than(size):
        error = run_recipe("convert_checkpoint.py", *arguments)
    assert isinstance(error, str) and error.startswith("convert_checkpoint.py: error: ")
    assert "\n" not in error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["speech_llm"]
    assert run_recipe("convert_checkpoint.py", *arguments) is None  # succeeds with enough space
