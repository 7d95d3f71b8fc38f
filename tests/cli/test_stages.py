"""Stages in one YAML: each starts from the previous result, and an interrupted command resumes in its stage."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.cli.stages import find_stages, run_stages
from hf_speechllm.training.trainer import SpeechLLMTrainer


@pytest.fixture
def write(tiny_model, tiny_corpus, tmp_path):
    """Writes a configuration with stages and returns its path."""

    def make(stages, name="run", **options):
        config = {
            "model_name_or_path": str(tiny_model), "train_file": str(tiny_corpus.jsonl),
            "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "use_cpu": True,
            "per_device_train_batch_seconds": 6, "learning_rate": 1.0e-3, "logging_steps": 1, "report_to": "none",
            "preprocessing_num_workers": 1, "save_steps": 2, "disable_tqdm": True, **options, "stages": stages,
        }  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file

    return make


STAGES = [
    {"name": "adaptor", "freeze_audio_encoder": True, "freeze_llm": True, "max_steps": 2},
    {"name": "encoder", "freeze_llm": True, "max_steps": 4, "learning_rate": 5.0e-4, "audio_token_dropout": 0.2},
    {"name": "lora", "freeze_audio_encoder": True, "freeze_audio_adaptor": True, "use_lora": True, "lora_r": 2,
     "max_steps": 2},
]  # fmt: skip


def part(model, name):
    return {key: value for key, value in model.state_dict().items() if key.startswith(name)}


def equal(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_stages_train_from_each_other_and_resume_where_they_ended(write, run, tmp_path, tiny_model, monkeypatch):
    code, output = run("finetune", write(STAGES))
    assert not code, output.err
    summary = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [(stage["stage"], stage["steps"]) for stage in summary] == [("adaptor", 2), ("encoder", 4), ("lora", 2)]
    assert all({"first_loss", "last_loss", "seconds"} <= stage.keys() for stage in summary)
    assert "stage 3 of 3 (lora) starts from" in output.err and "stage lora  steps 2" in output.err
    models = [
        SpeechLLMForConditionalGeneration.from_pretrained(folder)
        for folder in (tiny_model, *(stage["model"] for stage in summary))
    ]
    changed = [
        [not equal(part(before, name), part(after, name)) for name in ("audio_encoder", "audio_adaptor", "llm")]
        for before, after in zip(models, models[1:], strict=False)
    ]
    assert changed == [[False, True, False], [True, True, False], [False, False, True]]

    steps, original = [], SpeechLLMTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        steps.append(trainer.args.output_dir)
        if len(steps) == 6:  # after step 3 of the second stage
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SpeechLLMTrainer, "training_step", interrupted)
    again = write(STAGES, "again")
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        code, _ = run("finetune", again)
        assert not code
    code, output = run("finetune", again)
    assert not code and "stage 1 of 3 (adaptor) is finished" in output.err
    counts = [sum(folder.endswith(name) for folder in steps) for name in ("adaptor", "encoder", "lora")]
    assert counts == [2, 4 + 2, 2]  # the second stage resumes from step 2
    for name in ("encoder/model.safetensors", "lora/adapter_model.safetensors"):
        assert equal(*(load_file(tmp_path / folder / name) for folder in ("run", "again"))), name

    steps.clear()
    code, output = run("finetune", again)
    assert not code and not steps and "stage 3 of 3 (lora) is finished" in output.err


def test_a_later_stage_can_replay_a_share_of_earlier_data(write, tmp_path):
    stages = [
        {"train_file": ["a.jsonl", "b.jsonl"], "train_weight": [0.5, 2]},
        {"train_file": "c.jsonl", "replay": 0.2},
        {"train_file": ["d.jsonl", "a.jsonl"], "replay": "1e-1"},  # YAML reads 1e-1 as text
        {"train_file": "e.jsonl"},
    ]
    options = [stage.options for stage in find_stages([str(write(stages)), "--learning_rate", "1"])]
    assert "train_weight" in options[0] and options[0]["train_weight"] == [0.5, 2]
    assert options[1]["train_file"] == ["c.jsonl", "a.jsonl", "b.jsonl"]
    assert options[1]["train_weight"] == [1.0, 0.1, 0.2]
    assert options[2]["train_file"] == ["d.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"]
    assert options[2]["train_weight"] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert "train_weight" not in options[3]
    assert [item["model_name_or_path"] for item in options[1:]] == [
        str(tmp_path / "run" / f"stage{n}") for n in (1, 2, 3)
    ]


def test_models_from_an_earlier_result_of_a_changed_stage_are_not_kept(write, tmp_path):
    done = []

    def train(command):
        folder = tmp_path / "run" / command[0].rpartition("/")[2].removesuffix(".yaml")
        folder.mkdir(exist_ok=True)
        files = {"trainer_state": {"global_step": 1, "epoch": 1.0, "log_history": []}, "all_results": {}}
        for name, content in {**files, "finished": {}}.items():
            (folder / f"{name}.json").unlink(missing_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(content))
        done.append(folder.name)

    stages = [{"name": "a"}, {"name": "b"}, {"name": "c"}]
    run_stages(find_stages([str(write(stages))]), lambda *_: None, train)
    stages[1]["max_steps"] = 7
    with pytest.raises(ValueError, match="c was trained from an earlier result of stage b, which has changed; remove"):
        run_stages(find_stages([str(write(stages))]), lambda *_: None, train)
    assert done == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must be a list of"),
        ({"name": "a"}, "stages must be a list of"),
        ([{"name": "a"}, {"name": "a"}], "stage 2 (a): name must consist of"),
        ([{"name": "A"}, {"name": "a"}], "stage 2 (a): name must consist of"),
        ([{"name": "../a"}], "stage 1 (../a): name must consist of"),
        ([{"name": "a"}, {"name": "a.yaml"}], "stage 2 (a.yaml): name must consist of"),
        ([{"output_dir": "x"}], "stage 1 (stage1): output_dir is the same for all stages; write it above stages"),
        ([{"replay": 0.5}], "stage 1 (stage1): replay needs an earlier stage"),
        ([{}, {"replay": 2}], "stage 2 (stage2): replay is 2; it must be a share"),
        ([{}, {"replay": True}], "stage 2 (stage2): replay is True; it must be a share"),
        ([{}, {"replay": 0.5, "train_file": ["a", "b"], "train_weight": 2}], "train_weight is [2]; it must be"),
        ([{"train_file": "a", "train_weight": "x"}, {"replay": 1, "train_file": "b"}], "train_weight is ['x']; it"),
    ],
)
def test_invalid_stages_are_one_line(stages, message, write, run):
    code, output = run("finetune", write(stages))
    assert code == 2 and message in output.err and output.err.count("\n") == 1


def test_errors_of_all_stages_are_found_before_the_first_run(write, run, tmp_path):
    code, output = run("finetune", write([{"max_steps": 1}, {"lerning_rate": 1}]))
    assert code == 2 and "stage2.yaml: unknown key lerning_rate; did you mean learning_rate?" in output.err
    assert "finetune: stage 2 (stage2): " in output.err
    code, output = run("finetune", write([{"max_steps": 1}, {"ctc_weight": 0.5}]))  # without a CTC head
    assert code == 2 and "finetune: stage 2 (stage2): error: --ctc_weight" in output.err
    code, _ = run("finetune", write([{"max_steps": 1}, {"train_file": "gone.jsonl"}]))
    assert "error: stage 2 (stage2): " in code and "gone.jsonl" in code
    code, _ = run("finetune", write([{"max_steps": 1}, {"train_file": "missing.jsonl"}]))
    assert code.endswith("error: stage 2 (stage2): missing.jsonl: no such file")
    assert not (tmp_path / "run" / "stage1").exists()


def test_several_processes_need_the_launcher_of_the_command(write, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _ = run("finetune", write([{"max_steps": 1}]))
    assert "use `hf-speechllm finetune CONFIG --num_processes N`" in code


def test_stages_are_not_planned(write, run):
    code, output = run("finetune", write([{"max_steps": 1}]), "--auto")
    assert code == 2
    assert output.err.endswith("--auto plans a single run; leave it out for a configuration with stages\n")
