"""Options: the command line overrides the YAML; errors name the option and are found before loading."""

import subprocess
import sys
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_speechllm import SpeechLLMTrainingArguments
from hf_speechllm.cli.arguments import check_command_line, parse_arguments
from hf_speechllm.training.inherited_options import WITHOUT_EFFECT

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = ["--model_name_or_path", "model", "--train_file", "train.jsonl", "--use_cpu", "true"]


def values_of(argv):
    """Returns the values of all options of a command line."""
    options = parse_arguments(argv)
    return SimpleNamespace(**ChainMap(*(vars(part) for part in vars(options).values())))


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def error_of(capsys):
    """Returns the error message of a command line."""

    def parse(*argv):
        with pytest.raises(SystemExit) as end:
            parse_arguments([*argv])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert "usage:" not in message  # it would list 150 options
        return message

    return parse


def test_command_line_overrides_the_yaml_and_the_yaml_the_defaults(yaml_file):
    path = yaml_file("learning_rate: 2.0e-4\nnum_train_epochs: 7\nfreeze_llm: true\nwarmup_steps: 12\n")
    args = values_of([path, *REQUIRED, "--learning_rate", "0.5", "--freeze_llm", "false"])
    assert (args.learning_rate, args.freeze_llm) == (0.5, False)
    assert (args.num_train_epochs, args.warmup_steps) == (7, 12)
    assert (args.lr_scheduler_type, args.feature_cache) == ("cosine", "float16")


def test_yaml_is_optional():
    args = values_of([*REQUIRED, "--freeze_audio_encoder", "--llm_learning_rate", "1e-5"])
    assert args.freeze_audio_encoder and not args.freeze_llm
    assert args.llm_learning_rate == 1e-5
    assert args.audio_encoder_learning_rate is None


def test_yaml_may_contain_lists_dicts_and_null(yaml_file):
    path = yaml_file(
        "train_file: [a.jsonl, b.jsonl]\ntrain_weight: [2, 0.5]\nlora_target_modules: [q_proj]\n"
        "gradient_checkpointing_kwargs: {use_reentrant: true}\ncache_dir:\n"
    )
    args = values_of([path, "--model_name_or_path", "model", "--use_cpu", "true"])
    assert args.train_file == ["a.jsonl", "b.jsonl"]
    assert args.train_weight == [2.0, 0.5]
    assert args.lora_target_modules == ["q_proj"]
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert args.cache_dir is None


def test_list_of_the_command_line_replaces_the_list_of_the_yaml(yaml_file):
    path = yaml_file("train_file: [a.jsonl, b.jsonl]\n")
    args = values_of([path, "--model_name_or_path", "model", "--use_cpu", "true", "--train_file", "c.jsonl"])
    assert args.train_file == ["c.jsonl"]


def test_several_trackers_are_accepted(yaml_file, error_of, monkeypatch):
    trackers = "hf_speechllm.training.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(trackers, lambda: ["tensorboard", "trackio"])
    assert values_of([*REQUIRED, "--report_to", "tensorboard", "trackio"]).report_to == ["tensorboard", "trackio"]
    path = yaml_file("report_to: [tensorboard, trackio]")
    assert values_of([path, *REQUIRED]).report_to == ["tensorboard", "trackio"]
    assert values_of([path, *REQUIRED, "--report_to", "none"]).report_to == []
    assert "none and all are not combined" in error_of(*REQUIRED, "--report_to", "none", "trackio")


@pytest.mark.parametrize("config", sorted((REPOSITORY / "recipes/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(config):
    parse_arguments([str(config), *REQUIRED, "--validation_file", "dev.jsonl"])


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("freeze_audio_encodr", "freeze_audio_encoder"), ("lerning_rate", "learning_rate"), ("zzz", None)],
)
def test_unknown_key_of_the_yaml_is_named_with_the_file_and_a_suggestion(yaml_file, error_of, key, suggestion):
    path = yaml_file(f"learning_rate: 1.0e-3\n{key}: 1\n")
    message = error_of(path, *REQUIRED)
    assert path in message and f" {key}" in message
    assert ("did you mean" in message) == (suggestion is not None)
    assert suggestion is None or f"did you mean {suggestion}?" in message


def test_dither_needs_features_that_are_computed_in_every_epoch(error_of):
    assert values_of([*REQUIRED, "--dither", "1.0", "--feature_cache", "off"]).dither == 1.0
    assert "--feature_cache off" in error_of(*REQUIRED, "--dither", "1.0")
    assert "--dither is -1" in error_of(*REQUIRED, "--dither", "-1", "--feature_cache", "off")


def test_unknown_option_of_the_command_line_is_named(error_of):
    assert "--freeze_audio_encodr" in error_of(*REQUIRED, "--freeze_audio_encodr", "true")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_epochs", "many"),
        ("freeze_llm", "perhaps"),
        ("lora_r", "[1, 2]"),
        ("lora_r", "1.5"),
        ("train_weight", "[1, heavy]"),
        ("learning_rate", "{a: 1}"),
        ("per_device_train_batch_seconds", "long"),
    ],
)
def test_wrong_type_is_reported_with_file_and_key(yaml_file, error_of, key, value):
    path = yaml_file(f"{key}: {value}\n")
    message = error_of(path, *REQUIRED)
    assert path in message and f"--{key}" in message


def test_wrong_type_on_the_command_line_is_reported_with_the_option(error_of):
    assert "--num_train_epochs" in error_of(*REQUIRED, "--num_train_epochs", "many")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: b: c\n", "just words\n"])
def test_yaml_without_keys_is_an_error(yaml_file, error_of, text):
    path = yaml_file(text)
    assert path in error_of(path, *REQUIRED)


def test_missing_yaml_is_an_error(error_of):
    assert "no/such.yaml" in error_of("no/such.yaml", *REQUIRED)


FROZEN = ["--freeze_audio_encoder", "true", "--freeze_audio_adaptor", "true", "--freeze_llm", "true"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (FROZEN, ["freeze all parts", "--freeze_llm", "--use_lora"]),
        (["--fp16", "true"], ["--fp16", "--bf16"]),
        (["--train_weight", "1", "2"], ["--train_weight", "has 2 numbers, but --train_file has 1 files"]),
        (["--train_file", "a.jsonl", "a.jsonl"], ["--train_file", "twice"]),
        (["--train_weight", "0"], ["--train_weight", "above 0"]),
        (["--feature_cache", "int8"], ["--feature_cache", "float16, float32 or off"]),
        (["--max_bad_fraction", "1.5"], ["--max_bad_fraction", "between 0 and 1"]),
        (["--per_device_train_batch_seconds", "-1"], ["--per_device_train_batch_seconds"]),
    ],
)
def test_contradictions_are_reported_with_the_options(error_of, argv, expected):
    message = error_of(*REQUIRED, *argv)
    assert all(part in message for part in expected)


@pytest.mark.parametrize("missing", ["model_name_or_path", "train_file"])
def test_missing_model_or_data_is_named(error_of, missing):
    position = REQUIRED.index(f"--{missing}")
    assert f"--{missing}" in error_of(*REQUIRED[:position], *REQUIRED[position + 2 :])


def test_all_parts_may_be_frozen_with_lora():
    assert parse_arguments([*REQUIRED, *FROZEN, "--use_lora"]).parts.use_lora


def test_validation_files_have_names(error_of):
    argv = [*REQUIRED, "--validation_file", "data/dev.jsonl", "far=other/dev.jsonl", "odd=a=b.jsonl"]
    files = parse_arguments(argv).validation_files
    assert files == {"dev": "data/dev.jsonl", "far": "other/dev.jsonl", "odd": "a=b.jsonl"}
    message = error_of(*REQUIRED, "--validation_file", "a/dev.jsonl", "b/dev.jsonl")
    assert "'dev'" in message and "NAME=FILE" in message


def test_errors_are_reported_before_heavy_imports(yaml_file):
    """The recipe exits with status 2 and one line without a traceback, and does not import data code."""
    path = yaml_file("freeze_audio_encodr: true\n")
    script = (
        "import atexit, runpy, sys\n"
        "heavy = ('hf_speechllm.data.dataset', 'hf_speechllm.training.trainer', 'datasets', 'pyarrow')\n"
        "atexit.register(lambda: print('loaded:', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    recipe = str(REPOSITORY / "recipes/finetune.py")
    result = subprocess.run([sys.executable, "-c", script, recipe, path, *REQUIRED], capture_output=True, text=True)
    assert result.returncode == 2
    assert "freeze_audio_encodr" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == "loaded: []\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--do_train", "false"], "--do_train has no effect here: finetune always trains"),
        (["--per-device-train-batch-size=8"], "use --per_device_train_batch_seconds"),
        (["--liger_kernel_config", "no JSON"], "--liger_kernel_config has no effect here: "),
        (["--eval_strategy", "steps"], "--eval_strategy steps requires a validation set; add --validation_file"),
    ],
)
def test_option_without_effect_is_refused_even_with_its_default(error_of, argv, expected):
    assert expected in error_of(*REQUIRED, *argv)


def test_option_without_effect_is_refused_with_the_name_of_the_file(yaml_file, error_of):
    path = yaml_file("liger_kernel_config: 1\n")
    assert f"{path}: --liger_kernel_config has no effect here" in error_of(path, *REQUIRED)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (REQUIRED[:2], "--train_file is missing"),
        ([*REQUIRED, *FROZEN], "freeze all parts"),
        ([*REQUIRED, "--hub_strategy", "checkpoint"], "--hub_strategy checkpoint"),
        ([*REQUIRED, "--report_to", "nosuch"], "pip install nosuch"),
    ],
)
def test_command_line_is_checked_before_processes_start(monkeypatch, capsys, argv, expected):
    monkeypatch.setattr(SpeechLLMTrainingArguments, "__post_init__", lambda self: pytest.fail("a device is taken"))
    check_command_line(REQUIRED)
    with pytest.raises(SystemExit):
        check_command_line(argv)
    assert expected in capsys.readouterr().err


def test_common_error_is_printed_by_the_first_process(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            parse_arguments([*REQUIRED, "--lora_r", "many"])
        assert capsys.readouterr().err.count("\n") == lines


def test_yaml_is_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["lora", *REQUIRED]).parts.use_lora


def test_a_configuration_of_the_package_starts_no_more_loader_processes_than_cores(yaml_file, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert values_of(["lora", *REQUIRED]).dataloader_num_workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes on this machine, which share the cores
    with monkeypatch.context() as context:
        context.setattr("os.sched_getaffinity", lambda process: {*range(8)}, raising=False)
        assert check_command_line(["lora", *REQUIRED]).training.dataloader_num_workers == 2
    assert check_command_line(["lora", *REQUIRED]).training.dataloader_num_workers == 1
    assert (
        check_command_line(["lora", *REQUIRED, "--dataloader_num_workers", "6"]).training.dataloader_num_workers == 6
    )
    own = check_command_line([yaml_file("dataloader_num_workers: 4"), *REQUIRED])
    assert own.training.dataloader_num_workers == 4


def test_help_lists_own_options_in_groups_and_inherited_ones_with_help_all(capsys):
    for argument, inherited in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            parse_arguments([argument], description="Example:\n  one \\\n    two\n")
        text = capsys.readouterr().out
        assert "Example:\n  one \\\n    two\n" in text
        assert text.index("Model:") < text.index("--train_file") < text.index("Publishing:")
        assert text.index("Publishing:") < text.index("--num_processes N")
        assert "(default: float16)" in text and "(default: q_proj k_proj v_proj" in " ".join(text.split())
        assert not any(f"--{name} " in text for name in WITHOUT_EFFECT)
        assert ("--adam_beta1" in text) == inherited


def test_gradient_checkpointing_has_one_name_in_all_releases(recwarn):
    for value in ("true", "false"):
        args = values_of([*REQUIRED, "--gradient_checkpointing", value])
        names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
        assert {getattr(args, name) for name in names} == {value == "true"}
        assert value == "false" or args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not [str(item.message) for item in recwarn if "deprecated" in str(item.message)]
