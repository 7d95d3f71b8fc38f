"""Untrusted checkpoints cannot access files outside their folder, choose code, or exhaust memory or time."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats import untrusted
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.formats.loading import read_checkpoint
from hf_speechllm.formats.saving import write_checkpoint
from hf_speechllm.formats.untrusted import check_name, inside, read_json, read_yaml
from hf_speechllm.inference.transcriber import Transcriber

# Names that may refer to a file outside the folder; {out} is a folder beside it.
HOSTILE = [
    "../escaped", "../../escaped", "a/../../escaped", "{out}/escaped", "/escaped", "~/escaped", "..", ".", "", "a/..",
    "..\\escaped", "C:\\escaped", "c:escaped", "\\\\host\\share", "//host/share", "a\0b", "a\nb", "a" * 5000,
    "a/" * 2000,
    "./../escaped", "a//b", "con:", "a|b", "*", "\u202eescaped",
]  # fmt: skip


@pytest.mark.parametrize("name", [*HOSTILE, None, 3, ["a"]])
def test_only_plain_relative_names_are_accepted(name, tmp_path):
    name = name.format(out=tmp_path) if isinstance(name, str) and "{" in name else name
    for check in (check_name, lambda *args: inside(tmp_path, *args)):
        with pytest.raises(CheckpointError, match="^the source: ") as caught:
            check(name, "the source")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.json", "Qwen3-0.6B/tokenizer.json", "./a", "文件.txt", "a b.txt", "..a", "folder/"]
)
def test_usual_names_are_accepted(name, tmp_path):
    assert inside(tmp_path, name, "it") == tmp_path / name


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model" / "a.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="link to a target outside the checkpoint"):
        inside(tmp_path / "model", "a.json", "it")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja", "other.txt"])
def test_checkpoint_with_a_link_out_of_it_is_not_loaded(make_checkpoint, tmp_path, name):
    folder = make_checkpoint("speech_llm")
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    for reader in (SpeechLLMForConditionalGeneration, SpeechLLMProcessor):
        with pytest.raises(CheckpointError, match=f"{name}.* link"):
            reader.from_pretrained(folder)


def files_under(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", HOSTILE)
def test_files_of_a_ctc_branch_are_not_written_elsewhere(make_checkpoint, tmp_path, name):
    folder = make_checkpoint("speech_llm", "deep/in/model")
    if "{" in name:
        name = name.format(out=tmp_path)
    save_file({f"file:{name}": torch.tensor(list(b"hostile"), dtype=torch.uint8)}, folder / "ctc.safetensors")
    before = files_under(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint = read_checkpoint(folder)
        write_checkpoint(
            checkpoint, SpeechLLMProcessor.from_pretrained(folder), tmp_path / "out", "funasr", force=True
        )
    assert files_under(tmp_path) == before
    assert not Path("/escaped").exists() and not Path.home().joinpath("escaped").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"file:a.txt": torch.zeros(3, dtype=torch.uint8)},
        {"file:a.tiktoken": torch.zeros(3)},
        {"file:a.tiktoken": torch.zeros(3, 1, dtype=torch.uint8)},
        {"weight": torch.zeros(3)},
    ],
)
def test_ctc_branch_holds_its_tensors_and_its_vocabulary_alone(make_checkpoint, tensors):
    folder = make_checkpoint("speech_llm")
    save_file(tensors, folder / "ctc.safetensors")
    with pytest.raises(CheckpointError, match=f"ctc.safetensors: {next(iter(tensors))} .*; remove it"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("audio_encoder_conf", "dropout_rate", 1.5), ("audio_encoder_conf", "attention_heads", True),
        ("audio_encoder_conf", "output_size", 0), ("audio_encoder_conf", "num_blocks", 10_001),
        ("audio_encoder_conf", "linear_units", 2.0), ("audio_adaptor_conf", "downsample_rate", 10_001),
        ("audio_adaptor_conf", "use_low_frame_rate", 1), ("frontend_conf", "n_mels", 1001),
        ("frontend_conf", "lfr_m", 0), ("frontend_conf", "lfr_n", 1001), ("frontend_conf", "fs", 999),
        ("frontend_conf", "fs", 1_000_001), ("frontend_conf", "frame_length", 1001),
        ("frontend_conf", "frame_shift", 0), ("frontend_conf", "window", 3), ("dataset_conf", "do_think", "no"),
        ("hf_speechllm", "layer_norm_eps", -0.1), ("hf_speechllm", "audio_token_id", -1),
        ("hf_speechllm", "max_position_embeddings", "10"), ("llm_conf", "init_param_path", 3),
    ],
)  # fmt: skip
def test_values_of_a_funasr_config_that_are_beyond_all_measure_are_named(make_checkpoint, section, key, value):
    folder = make_checkpoint("funasr")
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    conf.setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    with pytest.raises(CheckpointError, match=rf"config\.yaml: {section}\.{key} is {value}"):
        SpeechLLMConfig.from_pretrained(folder)


def paths_of(value, path=()):
    """Returns the paths of all strings in nested settings."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(item, (*path, key))


def replaced(content, path, value):
    content = json.loads(json.dumps(content))
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return content


OPENED: list[str] = []  # paths that this process opens; recorded while the list is not empty


@pytest.fixture(scope="session")
def opened():
    """Records opened paths. An audit hook cannot be removed, so there is only one."""
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" and OPENED else None)
    return OPENED


@pytest.mark.parametrize("layout", ["speech_llm", "native", "funasr"])
def test_every_string_of_a_checkpoint_may_name_another_file(make_checkpoint, layout, tmp_path, opened):
    """The model loads or raises a one-line error, and no file outside is opened."""
    folder = make_checkpoint(layout)
    secret = tmp_path / "secret" / "secret.json"
    secret.parent.mkdir()
    secret.write_text(json.dumps({"secret": True}))
    rng = random.Random(0)
    cases = []
    for file in (*folder.glob("*.json"), *folder.glob("*.yaml")):
        if file.name == "tokenizer.json" or "index" in file.name:
            continue
        content = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
        cases += [(file, content, path) for path in paths_of(content)]
    assert len(cases) >= 10
    for file, content, path in rng.sample(cases, min(len(cases), 40)):
        original = file.read_text()
        value = rng.choice([str(secret), "../secret/secret.json", str(secret.parent), "org/kernel", "x" * 100])
        changed = replaced(content, path, value)
        file.write_text(yaml.safe_dump(changed) if file.suffix == ".yaml" else json.dumps(changed))
        opened.append("start")
        try:
            SpeechLLMForConditionalGeneration.from_pretrained(folder)
            SpeechLLMProcessor.from_pretrained(folder)
        except (CheckpointError, OSError, ValueError) as error:
            assert "Traceback" not in str(error), (file, path)
        finally:
            file.write_text(original)
            assert any(str(folder) in name for name in opened)  # the hook works
            assert not any("secret" in Path(name).name for name in opened), (file.name, path, value)
            opened.clear()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("audio_encoder_config", "num_hidden_layers"), 1_000_000_000),
        (("llm_config", "vocab_size"), 10**12),
        (("llm_config", "hidden_size"), -1),
        (("llm_config", "num_attention_heads"), 0),
        (("audio_token_id",), "a"),
        (("audio_adaptor_config",), "a"),
        (("llm_config",), 3),
        (("llm_config", "_attn_implementation"), "org/kernel"),
        (("_attn_implementation",), "org/kernel"),
        (("auto_map",), {"AutoConfig": "evil.Config"}),
    ],
)
def test_invalid_settings_raise_a_one_line_error_quickly(make_checkpoint, field, value):
    folder = make_checkpoint("speech_llm")
    file = folder / "config.json"
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), field, value)))
    began = time.monotonic()
    try:
        SpeechLLMForConditionalGeneration.from_pretrained(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and "config.json" in str(error) or str(folder) in str(error)
    else:
        assert field == ("auto_map",)  # no code of the folder is run
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("reader", "limit"), [(read_json, "MAX_JSON"), (read_yaml, "MAX_YAML")])
def test_settings_may_have_the_largest_size_and_no_more(tmp_path, monkeypatch, reader, limit):
    (tmp_path / "a").write_text('{"a": "b"}')
    monkeypatch.setattr(untrusted, limit, 10)
    assert reader(tmp_path / "a") == {"a": "b"}
    monkeypatch.setattr(untrusted, limit, 9)
    with pytest.raises(CheckpointError, match="has 10 bytes.* 9"):
        reader(tmp_path / "a")


@pytest.mark.parametrize("reader", [read_json, read_yaml])
def test_sizes_that_no_model_has_are_refused_in_any_file(tmp_path, reader):
    file = tmp_path / "config.json"
    for content in ({"num_hidden_layers": 10**9}, {"a": {"vocab_size": 10**12}}, {"hidden_size": 0}):
        file.write_text(json.dumps(content))  # JSON is YAML
        with pytest.raises(CheckpointError, match=r"config\.json.* it must be"):
            reader(file)


def test_values_of_settings_are_counted_with_their_aliases(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a: &x [1, 2]\nb: *x\n")  # the mapping, two keys, two lists, four numbers
    monkeypatch.setattr(untrusted, "MAX_VALUES", 9)
    assert read_yaml(tmp_path / "a") == {"a": [1, 2], "b": [1, 2]}
    monkeypatch.setattr(untrusted, "MAX_VALUES", 8)
    with pytest.raises(CheckpointError, match="more than 8 values"):
        read_yaml(tmp_path / "a")


def test_bombs_and_damaged_settings_are_refused(tmp_path):
    yaml_file, json_file = tmp_path / "config.yaml", tmp_path / "config.json"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    for text in (
        "\n".join(lines),
        "a: &a [*a]",
        "[" * 5000,
        "a: 1\na: 2",
        "!!python/object/apply:os.system ['true']",
        "3",
    ):
        yaml_file.write_text(text)
        with pytest.raises(CheckpointError):
            read_yaml(yaml_file)
    for text in ("[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', "[]", "{", '{"a": ' * 200 + "1" + "}" * 200):
        json_file.write_text(text)
        with pytest.raises(CheckpointError):
            read_json(json_file)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_index_with_a_shard_outside_is_refused(make_checkpoint, tmp_path, name):
    folder = make_checkpoint("speech_llm")
    weights = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (SpeechLLMForConditionalGeneration.from_pretrained, read_checkpoint):
        with pytest.raises(CheckpointError, match="weight_map"):
            load(folder)


def transcribe(folder):
    model = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    processor = SpeechLLMProcessor.from_pretrained(folder)
    transcriber = Transcriber(model, processor, max_new_tokens=2)
    transcriber.rehearse(folder)
    return transcriber.transcribe(np.zeros(8000, np.float32))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("processor_config.json", ("feature_extractor", "frame_length"), "a"),
        ("processor_config.json", ("feature_extractor", "frame_shift"), 0),
        ("processor_config.json", ("feature_extractor", "feature_size"), 10**9),
        ("processor_config.json", ("feature_extractor", "sampling_rate"), 2**31 - 1),
        ("processor_config.json", ("feature_extractor", "stride_lfr"), [6]),
        ("processor_config.json", ("feature_extractor", "window_type"), "nonsense"),
        ("processor_config.json", ("feature_extractor", "feature_size"), 40),
        ("processor_config.json", ("downsample_rate",), "1"),
        ("processor_config.json", ("downsample_rate",), 0),
        ("processor_config.json", ("use_low_frame_rate",), 3),
        ("processor_config.json", ("audio_token",), "<|im_end|>"),
        ("tokenizer_config.json", ("model_max_length",), [1]),
        ("tokenizer_config.json", ("model_max_length",), "a"),
        ("config.json", ("audio_encoder_config", "max_position_embeddings"), [3]),
        ("config.json", ("audio_encoder_config", "max_position_embeddings"), 1),
        ("config.json", ("audio_token_id",), 5),
    ],
)
def test_bad_settings_of_later_steps_are_refused_in_one_line(make_checkpoint, name, path, value):
    folder = make_checkpoint("speech_llm")
    assert transcribe(folder) is not None
    file = folder / name
    content = json.loads(file.read_text())
    target = content
    for key in path[:-1]:
        target = target[key]
    assert path[-1] in target or name == "tokenizer_config.json"
    target[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        transcribe(folder)
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)


def test_circular_links_are_refused(make_checkpoint):
    folder = make_checkpoint("speech_llm")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    for load in (SpeechLLMForConditionalGeneration.from_pretrained, SpeechLLMProcessor.from_pretrained):
        with pytest.raises(CheckpointError, match="broken or circular link"):
            load(folder)


def test_damaged_vocabulary_is_refused_in_one_line(make_checkpoint):
    folder = make_checkpoint("speech_llm")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:-200] + "}{")
    with pytest.raises(CheckpointError) as caught:
        SpeechLLMProcessor.from_pretrained(folder)
    assert str(caught.value).isprintable()
