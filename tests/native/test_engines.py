"""Native speech LLMs under the engines of accelerate_configs, in two processes: the losses of one process."""

import json
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
# recipes/finetune.py; each rank also writes the class of the wrapped model.
SCRIPT = """
import json, os, runpy, sys

note, engine, recipe = sys.argv[1:4]
sys.argv = [recipe, *sys.argv[4:]]
if engine == "fsdp2":
    sys.path.append(os.path.join(os.path.dirname(recipe), "../tests"))
    import fsdp_on_cpu
from hf_speechllm.training.trainer import SpeechLLMTrainer

step = SpeechLLMTrainer.training_step

def training_step(self, model, *args):
    with open(f"{note}.{os.environ.get('RANK', 0)}", "w") as file:
        json.dump([self.args.world_size, type(model).__name__], file)
    return step(self, model, *args)

SpeechLLMTrainer.training_step = training_step
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.fixture(scope="module")
def losses(native_folders, tiny_corpus, tmp_path_factory, launch):
    """Trains in one or two processes; returns world size, class of the wrapped model, and the losses of all steps."""
    root = tmp_path_factory.mktemp("engines")
    (root / "train.py").write_text(SCRIPT)

    def run(engine, model_type, *options):
        folder = root / f"{engine}-{model_type}"
        config = yaml.safe_load((REPOSITORY / f"accelerate_configs/{engine}.yaml").read_text())
        config |= {"use_cpu": True, "num_processes": 1 if engine == "single_gpu" else 2}
        config.pop("gpu_ids", None)
        setup = folder.with_suffix(".yaml")
        setup.write_text(yaml.safe_dump(config))
        result = launch(
            root / "train.py", folder, engine, REPOSITORY / "recipes/finetune.py",
            "--model_name_or_path", native_folders[model_type], "--train_file", tiny_corpus.jsonl,
            "--output_dir", folder, "--max_steps", 3, "--learning_rate", "3e-3", "--warmup_steps", 0,
            "--per_device_train_batch_seconds", 4.1, "--logging_steps", 1, "--save_strategy", "no",
            "--gradient_accumulation_steps", 2 if engine == "single_gpu" else 1, "--adam_epsilon", "1e-3",
            "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_num_workers", 0,
            "--cache_dir", root / "cache", "--preprocessing_num_workers", 1, *options,
            config=setup,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-6000:]
        notes = [json.loads(path.read_text()) for path in sorted(root.glob(f"{folder.name}.[0-9]"))]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return notes, [entry["loss"] for entry in log if "loss" in entry]

    return run


@pytest.fixture(scope="module")
def one_process(losses):
    return losses("single_gpu", "qwen3_asr")[1]


@pytest.mark.parametrize(
    "engine, wrapper",
    [
        ("multi_gpu", "DistributedDataParallel"),
        pytest.param("deepspeed_zero3", "DeepSpeedEngine", marks=pytest.mark.slow),
        pytest.param("fsdp2", "FSDPQwen3ASRForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_losses_of_one(losses, one_process, engine, wrapper):
    notes, found = losses(engine, "qwen3_asr")
    assert notes == [[2, wrapper]] * 2
    # DeepSpeed's configuration computes in bfloat16.
    assert found == pytest.approx(one_process, rel=1e-4 if engine != "deepspeed_zero3" else 2e-2)
