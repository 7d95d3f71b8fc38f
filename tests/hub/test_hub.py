"""Publishing to a local Hub server, with the real client."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.saving import save_funasr
from hf_speechllm.hub.code import requirements
from hf_speechllm.hub.publishing import publish
from hf_speechllm.hub.upload import reporting_unreachable
from hf_speechllm.training.lora import add_lora

REPOSITORY = Path(__file__).resolve().parents[2]
hub_server = sys.modules["hub_server"]  # loaded by tests/conftest.py


@pytest.fixture
def inputs(tiny_model, tone):
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    return processor.apply_transcription_request([tone(0.7)[:, 0], tone(1.1)[:, 0]])


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def files_of(hub, name):
    return hub.repositories[name].files()


def assert_nothing_private(files, *secrets):
    for path, file in files.items():
        for secret in (hub_server.TOKEN, str(REPOSITORY), str(Path.home()), *map(str, secrets)):
            assert secret.encode() not in file.content, f"{path} holds {secret}"


def test_model_and_processor_come_back_from_the_hub(hub, tiny_model, inputs):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    model.push_to_hub("user/tiny")
    SpeechLLMProcessor.from_pretrained(tiny_model).push_to_hub("user/tiny")
    repository, files = hub.repositories["user/tiny"], files_of(hub, "user/tiny")
    assert repository.private
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert files["model.safetensors"].oid in hub.uploads  # as a large file
    assert files["config.json"].oid is None
    assert_nothing_private(files, tiny_model)

    returned = SpeechLLMForConditionalGeneration.from_pretrained("user/tiny")
    assert torch.equal(logits_of(returned, inputs), logits_of(model, inputs))
    processor = SpeechLLMProcessor.from_pretrained("user/tiny")
    text = "one two 几点了？"
    assert processor.tokenizer(text) == SpeechLLMProcessor.from_pretrained(tiny_model).tokenizer(text)
    assert processor.to_dict() == SpeechLLMProcessor.from_pretrained(tiny_model).to_dict()


def in_a_process_of_its_own(hub, tmp_path, script, *arguments):
    """Runs a script that uses the server, outside the checkout."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]


STOCK = """
import sys, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
model, processor = (cls.from_pretrained("user/tiny") for cls in (AutoModelForMultimodalLM, AutoProcessor))
assert "hf_speechllm" not in sys.modules and type(processor).__name__ == "FunAsrNanoProcessor"
inputs = torch.load(sys.argv[1])
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[2])
"""


def test_models_with_equal_results_are_pushed_in_the_native_layout(hub, tiny_model, inputs, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    SpeechLLMProcessor.from_pretrained(tiny_model).push_to_hub("user/tiny")
    model.push_to_hub("user/tiny")
    files = files_of(hub, "user/tiny")
    assert json.loads(files["config.json"].content)["model_type"] == "fun_asr_nano"
    assert not any(name.startswith("code/") for name in files)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    in_a_process_of_its_own(hub, tmp_path, STOCK, tmp_path / "inputs.pt", tmp_path / "logits.pt")
    mask = inputs["attention_mask"].bool()
    found, expected = torch.load(tmp_path / "logits.pt"), logits_of(model, inputs)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)


OURS = """
import importlib, os, sys, torch
from huggingface_hub import snapshot_download
folder = snapshot_download("user/tiny", allow_patterns="code/*")
sys.path.insert(0, folder + "/code")
import hf_speechllm
assert hf_speechllm.__file__.startswith(folder), hf_speechllm.__file__
for root, _, names in os.walk(folder + "/code/hf_speechllm"):  # all imports of the published code work
    for name in names:
        importlib.import_module(os.path.relpath(os.path.join(root, name), folder + "/code")[:-3].replace("/", "."))
model, processor = (
    cls.from_pretrained("user/tiny")
    for cls in (hf_speechllm.SpeechLLMForConditionalGeneration, hf_speechllm.SpeechLLMProcessor)
)
inputs = torch.load(sys.argv[1])
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[2])
"""


@pytest.mark.parametrize("adaptor", [{"use_low_frame_rate": True}, {"adaptor_type": "linear"}])
def test_other_models_are_pushed_in_the_own_layout_with_the_code(
    adaptor, hub, compose_tiny, tiny_config, tone, tmp_path
):
    model, processor = compose_tiny(tiny_config(**adaptor))
    for item in (model, processor):
        item.push_to_hub("user/tiny")
    files = files_of(hub, "user/tiny")
    assert json.loads(files["config.json"].content)["model_type"] == "speech_llm"
    project = tomllib.loads(files["code/pyproject.toml"].content.decode())["project"]
    declared = metadata.metadata("hf_speechllm")
    assert project["name"] == "hf_speechllm" and project["requires-python"] == declared["Requires-Python"]
    assert project["dependencies"] == requirements()
    assert project["optional-dependencies"] == {"vad": requirements("vad")} and "silero" in requirements("vad")[0]
    assert {f"code/hf_speechllm/cli/{verb}.py" for verb in ("decode", "align")} <= files.keys()
    assert "code/hf_speechllm_command.py" in files
    assert not any("/training/" in name or "/evaluation/" in name for name in files)
    assert any(re.match(r"transformers.*<", item) for item in project["dependencies"])
    assert "pip install ./speech_llm/code" in files["README.md"].content.decode()
    assert_nothing_private(files, tmp_path)
    inputs = processor.apply_transcription_request([tone(0.7)[:, 0], tone(1.1)[:, 0]])
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    if "adaptor_type" in adaptor:
        in_a_process_of_its_own(hub, tmp_path, OURS, tmp_path / "inputs.pt", tmp_path / "logits.pt")
        # Another process may use another number of threads.
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model, inputs), atol=1e-5, rtol=0)
    assert torch.equal(
        logits_of(SpeechLLMForConditionalGeneration.from_pretrained("user/tiny"), inputs), logits_of(model, inputs)
    )
    returned = SpeechLLMProcessor.from_pretrained("user/tiny")
    assert returned.use_low_frame_rate == adaptor.get("use_low_frame_rate", False)
    again = returned.apply_transcription_request([tone(0.7)[:, 0], tone(1.1)[:, 0]])
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)


@pytest.mark.parametrize("adaptor", [{}, {"adaptor_type": "linear"}, {"use_low_frame_rate": True}])
def test_processor_and_config_come_without_the_weights(adaptor, hub, compose_tiny, tiny_config, tmp_path):
    for item in compose_tiny(tiny_config(**adaptor)):
        item.push_to_hub("user/tiny")
    SpeechLLMProcessor.from_pretrained("user/tiny")
    SpeechLLMConfig.from_pretrained("user/tiny")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    SpeechLLMForConditionalGeneration.from_pretrained("user/tiny")
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_card_of_a_model_pushed_without_training(hub, tiny_model, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    model.push_to_hub("user/tiny")
    card = files_of(hub, "user/tiny")["README.md"].content.decode()
    assert "- speech_llm" in card and "| audio_encoder | fun_asr_nano_encoder |" in card
    assert 'from_pretrained("user/tiny")' in card and "base_model" not in card
    assert "automatically generated" not in card and "More Information Needed" not in card  # transformers' own
    again = SpeechLLMForConditionalGeneration.from_pretrained("user/tiny")
    again.push_to_hub("user/again")
    assert "base_model: user/tiny" in files_of(hub, "user/again")["README.md"].content.decode()
    # After training, the card of the training run is used.
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("---\ntags:\n- speech_llm\n---\n\n# Run\n3 hours", encoding="utf-8")
    SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "run").push_to_hub("user/run")
    assert "# Run\n3 hours\n\n## Layout" in files_of(hub, "user/run")["README.md"].content.decode()


def test_folders_and_secrets_of_a_funasr_run_are_not_published(hub, tiny_model, inputs):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    secrets = ["anna", "wandb-secret", "train.jsonl"]
    model.config.funasr_files = {
        "config.yaml": {
            "model": "FunASRNano",
            "audio_encoder_conf": {"freeze": False, "init_param": "/home/anna/encoder.pt"},
            "llm_conf": {
                "init_param_path": "/home/anna/Qwen3-0.6B",
                "lists": ["~/anna/a.jsonl", "kept", {"deep": "/home/anna", "too": ["FILE:///home/anna", "kept"]}],
                "share": "\\\\server\\anna",
                "drive": "d:/anna",
            },
            "tokenizer_conf": {"init_param_path": "${llm_conf.init_param_path}"},
            "dataset_conf": {"do_think": False, "data_split_num": 1, "hotwords": "/home/anna/words"},
            "train_data_set_list": "/home/anna/train.jsonl",
            "train_conf": {"wandb_token": "wandb-secret"},
            "output_dir": "C:\\Users\\anna",
        },
        "configuration.json": {"file_path_metas": {"init_param": "/home/anna/model.pt", "config": "config.yaml"}},
    }
    model.push_to_hub("user/tiny")
    files = files_of(hub, "user/tiny")
    assert_nothing_private(files, *secrets)
    assert json.loads(files["config.json"].content)["funasr_files"] == {
        "config.yaml": {
            "model": "FunASRNano",
            "audio_encoder_conf": {"freeze": False},
            "llm_conf": {"lists": ["kept", {"too": ["kept"]}]},
            "tokenizer_conf": {"init_param_path": "${llm_conf.init_param_path}"},
            "dataset_conf": {"do_think": False},
        },
        "configuration.json": {"file_path_metas": {"config": "config.yaml"}},
    }
    assert "output_dir" in model.config.funasr_files["config.yaml"]  # the model in memory is unchanged


@pytest.mark.parametrize("low_frame_rate", [True, False], ids=["ours", "native"])
def test_a_funasr_folder_is_published_without_its_paths(hub, compose_tiny, tiny_config, low_frame_rate, tmp_path):
    model, processor = compose_tiny(tiny_config(use_low_frame_rate=low_frame_rate))
    save_funasr(model, processor, tmp_path / "anna")
    for name, section, values in (
        ("config.yaml", "llm_conf", {"init_param_path": f"{tmp_path}/anna/Qwen3-0.6B", "other": "~/anna"}),
        ("config.yaml", "train_conf", {"tensorboard_dir": "/home/anna"}),
        ("configuration.json", "file_path_metas", {"init_param": "model.pt", "other": f"{tmp_path}/anna/model.pt"}),
    ):
        content = yaml.safe_load((tmp_path / "anna" / name).read_text())
        content.setdefault(section, {}).update(values)
        dump = yaml.safe_dump if name.endswith(".yaml") else json.dumps
        (tmp_path / "anna" / name).write_text(dump(content))
    publish(tmp_path / "anna", "user/tiny")
    files = files_of(hub, "user/tiny")
    kind = "speech_llm" if low_frame_rate else "fun_asr_nano"
    assert json.loads(files["config.json"].content)["model_type"] == kind
    assert_nothing_private(files, tmp_path, "anna")
    kept = json.loads(files["config.json"].content)["funasr_files"]
    assert kept["configuration.json"]["file_path_metas"]["init_param"] == "model.pt"
    assert "train_conf" not in kept["config.yaml"]


def test_uploaded_large_files_are_not_sent_again(hub, tiny_model, inputs):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    hub.refused_uploads = 1
    with pytest.raises(RuntimeError, match="Error while uploading"):
        model.push_to_hub("user/tiny", max_shard_size="40KB")
    assert set(files_of(hub, "user/tiny")) == set()
    model.push_to_hub("user/tiny", max_shard_size="40KB")
    shards = [name for name in files_of(hub, "user/tiny") if name.startswith("model-")]
    assert len(shards) == len(hub.uploads) == len(set(hub.uploads)) > 3
    returned = SpeechLLMForConditionalGeneration.from_pretrained("user/tiny")
    assert torch.equal(logits_of(returned, inputs), logits_of(model, inputs))


def test_a_repository_is_public_only_on_request(hub, tiny_model):
    SpeechLLMProcessor.from_pretrained(tiny_model).push_to_hub("user/open", private=False)
    assert not hub.repositories["user/open"].private


def test_an_interrupted_push_can_be_repeated(hub, tiny_model, inputs):
    hub.refused_uploads = 1
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'"):
        publish(tiny_model, "user/tiny")
    assert "model.safetensors" not in files_of(hub, "user/tiny")  # no incomplete model is visible
    publish(tiny_model, "user/tiny")
    uploads = len(hub.uploads)
    publish(tiny_model, "user/tiny")  # a third time: nothing is sent again
    assert len(hub.uploads) == uploads == 1
    expected = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    returned = SpeechLLMForConditionalGeneration.from_pretrained("user/tiny")
    assert torch.equal(logits_of(returned, inputs), logits_of(expected, inputs))


@pytest.mark.parametrize("base_is_public", [True, False], ids=["adapters", "merged"])
def test_a_lora_run_is_published_as_adapters_if_the_base_model_is_on_the_hub(
    base_is_public, hub, tiny_model, inputs, tmp_path
):
    publish(tiny_model, "user/base")
    base = "user/base" if base_is_public else str(tiny_model)
    model = add_lora(SpeechLLMForConditionalGeneration.from_pretrained(base), r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    SpeechLLMProcessor.from_pretrained(tiny_model).save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n", encoding="utf-8")
    publish(folder, "user/lora")

    files = files_of(hub, "user/lora")
    assert ("adapter_model.safetensors" in files) is base_is_public
    assert ("model.safetensors" in files) is not base_is_public
    assert_nothing_private(files, tiny_model, tmp_path)
    returned = SpeechLLMForConditionalGeneration.from_pretrained("user/lora")
    torch.testing.assert_close(logits_of(returned, inputs), logits_of(model, inputs), atol=1e-5, rtol=0)
    assert SpeechLLMProcessor.from_pretrained("user/lora").audio_token_id == model.config.audio_token_id


def test_training_publishes_model_card_and_curve(hub, tiny_model, tiny_corpus, tmp_path, run_recipe):
    run = tmp_path / "run"
    command = [
        sys.executable, "recipes/finetune.py", "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl,
        "--validation_file", f"dev={tiny_corpus.jsonl}", "--output_dir", run, "--cache_dir", tmp_path / "datasets",
        "--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_seconds", 6, "--preprocessing_num_workers", 1,
        "--freeze_audio_encoder", "true", "--llm_learning_rate", "3e-4", "--logging_steps", 1, "--report_to", "none",
        "--use_cpu", "true", "--push_to_hub", "--hub_model_id", "user/tuned", "--hub_token", hub_server.TOKEN,
    ]  # fmt: skip
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert re.search(r"uploading 9 files, \d+\.\d MB, to user/tuned\n\S+ uploaded in 0:00:\d\d\n", result.stderr)
    assert "\r" not in result.stderr  # a log has no progress bars

    repository, files = hub.repositories["user/tuned"], files_of(hub, "user/tuned")
    assert repository.private
    assert len(repository.commits) == 2  # the empty first one, and the finished model with its card
    assert set(files) == {
        "README.md", "training_curve.png", "config.json", "generation_config.json", "model.safetensors",
        "processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert_nothing_private(files, tmp_path, tiny_corpus.folder, tiny_model)

    card = files["README.md"].content.decode()
    assert card.startswith((run / "README.md").read_text(encoding="utf-8"))
    assert "## Layout" in card and "transformers' own `fun_asr_nano`" in card
    front_matter, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert "library_name: transformers" in front_matter
    assert "- automatic-speech-recognition" in front_matter and "- speech_llm" in front_matter
    assert "base_model" not in front_matter and "license" not in front_matter  # both are unknown
    assert f"the local model `{tiny_model.name}`" in body
    assert "| training | `train.jsonl` | 24 |" in body and "| validation | `dev` | 24 |" in body
    assert "| learning rate, llm | 0.0003 |" in body and "| learning rate, audio_adaptor | 5e-05 |" in body
    assert "learning rate, audio_encoder" not in body  # it was frozen
    assert "| steps | 2 |" in body and "| seed | 42 |" in body and "transformers 5" in body
    loss = json.loads((run / "eval_results.json").read_text())["eval_dev_loss"]
    assert f"| {loss:.4f} |" in body
    assert 'from_pretrained("user/tuned")' in body and "hf-speechllm convert" in body

    trained = SpeechLLMForConditionalGeneration.from_pretrained(run)
    returned = SpeechLLMForConditionalGeneration.from_pretrained("user/tuned")
    for (name, expected), found in zip(trained.named_parameters(), returned.parameters(), strict=True):
        assert torch.equal(found, expected), name

    assert not run_recipe("push_to_hub.py", "--input", run, "--hub_model_id", "user/again", "--public")
    assert not hub.repositories["user/again"].private
    assert set(files_of(hub, "user/again")) == set(files)


def test_checkpoints_are_not_published():
    from hf_speechllm.training.arguments import SpeechLLMTrainingArguments

    with pytest.raises(ValueError, match="only `end` is supported"):
        SpeechLLMTrainingArguments(output_dir="x", hub_strategy="every_save")


def test_unreachable_hub_is_reported_in_one_line():
    class ClientError(Exception):
        """An exception of a library that `huggingface_hub` uses."""

    expected = pytest.raises(ConnectionError, match="user/model: the Hub cannot be reached: no route")
    with expected, reporting_unreachable("user/model"):
        raise ClientError("no route")
    with pytest.raises(ValueError, match="as it is"), reporting_unreachable("user/model"):
        raise ValueError("as it is")
