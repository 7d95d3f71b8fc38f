"""Training from a stream: the requested number of steps, and the same result after an interruption."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.stream_loader import StreamLoader
from hf_speechllm.data.streaming import RowStream, open_stream

REPOSITORY = Path(__file__).resolve().parents[2]

OPTIONS = {"streaming": True, "shuffle_buffer": 7, "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}


@pytest.fixture
def train(make_trainer, split_options, tiny_corpus, monkeypatch):
    """Trains on the tiny corpus in the same way as the recipe with --streaming."""
    monkeypatch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", 1000)

    def run(checkpoint=None, **options):
        model, data, _, args = split_options(**OPTIONS, **options)
        processor = SpeechLLMProcessor.from_pretrained(model.model_name_or_path)
        collator = SpeechLLMCollator.augmenting(processor, data)
        seconds = args.per_device_train_batch_seconds
        stream = open_stream(data.train_file, collator, seconds, 2048, data, seed=args.seed)
        trainer = make_trainer(train_dataset=stream, **OPTIONS, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return run


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    train, compose_tiny, tiny_config, tmp_path, options
):
    config = tiny_config()
    config["llm_config"]["attention_dropout"] = 0.2  # makes the random state matter
    for part in compose_tiny(config):
        part.save_pretrained(tmp_path / "model")
    options = {**options, "model_name_or_path": str(tmp_path / "model"), "spec_augment": True, "speed_prob": 0.5}
    options |= {"noise_prob": 0.5, "noise_source": ["white"]}
    whole = train(**options)
    again = train(str(tmp_path / "run" / "checkpoint-3"), **options)
    assert again.state.global_step == whole.state.global_step == 6
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    history = [
        {entry["step"]: entry["loss"] for entry in t.state.log_history if "loss" in entry} for t in (whole, again)
    ]
    assert history[0] == history[1]
    assert [entry["epoch"] for entry in again.state.log_history if "loss" in entry] == pytest.approx(
        [step / 6 for step in range(1, 7)]
    )


def test_run_interrupted_after_the_last_step_does_no_further_step(train, tmp_path):
    expected = train().model.llm.model.norm.weight.detach().clone()
    again = train(str(tmp_path / "run" / "checkpoint-6"))
    assert again.state.global_step == 6
    assert torch.equal(again.model.llm.model.norm.weight, expected)


def test_card_says_that_rows_were_not_counted(train, tmp_path):
    train().create_model_card()
    assert "| training | `train.jsonl` | streamed | not counted |" in (tmp_path / "run" / "README.md").read_text()


def test_streaming_without_max_steps_is_refused(make_options):
    with pytest.raises(ValueError, match="--max_steps"):
        make_options(streaming=True, max_steps=-1)


def test_state_is_part_of_every_checkpoint(train, tmp_path):
    train(dataloader_num_workers=2)
    states = [json.loads((tmp_path / f"run/checkpoint-{n}/stream_rank0.json").read_text()) for n in (3, 6)]
    assert [state["batches"] for state in states] == [3, 6]
    assert len(states[0]["places"]) == 2


# Two processes

SCRIPT = """
# recipes/finetune.py, with a log of the rows of each step and rank, and a process that is killed in a step.
import json, os, runpy, signal, sys
note, stop, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = [recipe, *sys.argv[4:]]
import hf_speechllm.training.trainer as module
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.training.trainer import SpeechLLMTrainer

rank, collate = os.environ["RANK"], SpeechLLMCollator.__call__
SpeechLLMCollator.__call__ = lambda self, rows: {**collate(self, rows), "rows": [row["seed"] for row in rows]}

class Watched(SpeechLLMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop("rows")
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        with open(f"{note}.{rank}", "a") as file:
            file.write(json.dumps([step, self.args.world_size, type(model).__name__, rows]) + chr(10))
        if step == stop and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

module.SpeechLLMTrainer = Watched
runpy.run_path(recipe, run_name="__main__")
"""
STEPS = 12


class Names(SpeechLLMCollator):
    """Returns names of the rows instead of inputs: (seed, pass, shard, copy, row of the shard)."""

    def __call__(self, rows):
        return [list(row["seed"]) for row in rows]


@pytest.fixture
def train_in_two(launch, tmp_path, tiny_model):
    """Trains on a stream in two processes, and may kill the second in a step; returns the result of the launcher."""
    script, config = tmp_path / "run.py", tmp_path / "two.yaml"
    script.write_text(SCRIPT, encoding="utf-8")
    setup = yaml.safe_load((REPOSITORY / "accelerate_configs/multi_gpu.yaml").read_text())
    del setup["gpu_ids"]
    config.write_text(yaml.safe_dump({**setup, "use_cpu": True, "num_processes": 2}))

    def run(folder, files, workers=0, kill_in_step=0):
        folder.mkdir(exist_ok=True)
        return launch(
            script, folder / "note", kill_in_step, REPOSITORY / "recipes/finetune.py",
            "--model_name_or_path", tiny_model, "--train_file", *files, "--output_dir", folder, "--streaming", "true",
            "--shuffle_buffer", 7, "--per_device_train_batch_seconds", 3, "--max_steps", STEPS, "--seed", 5,
            "--save_strategy", "steps", "--save_steps", 5, "--resume_from_checkpoint", "auto", "--logging_steps", 1,
            "--learning_rate", "1e-3", "--warmup_steps", 0, "--report_to", "none", "--use_cpu", "true",
            "--dataloader_num_workers", workers, "--disable_tqdm", "true", config=config,
        )  # fmt: skip

    return run


def check_rows(folder, files, sizes, collator, workers=0):
    """Compares the rows of the ranks with two uninterrupted streams, and these streams with the files."""
    passes = {}
    for rank in (0, 1):
        stream = RowStream(files, collator, 3.0, 2048, window_rows=7, seed=5, rank=rank, num_ranks=2)
        expected = list(itertools.islice(StreamLoader(stream, num_workers=workers), STEPS))
        notes = [json.loads(line) for line in (folder / f"note.{rank}").read_text().splitlines()]
        # The kill in step 8 repeats steps 6 and 7.
        assert [step for step, *_ in notes] == [*range(1, 9), *range(6, STEPS + 1)]
        assert {(world, wrapper) for _, world, wrapper, _ in notes} == {(2, "DistributedDataParallel")}
        assert all(rows == expected[step - 1] for step, _, _, rows in notes)
        for _, number, shard, _, key in itertools.chain.from_iterable(expected):
            passes.setdefault(number, Counter())[shard, key] += 1
    every = {(shard, key) for shard, size in enumerate(sizes) for key in range(size)}
    assert passes[0] == Counter(every)
    assert 1 in passes and all(set(seen) <= every and set(seen.values()) == {1} for seen in passes.values())


def test_two_ranks_share_the_rows_and_repeat_steps_after_a_kill(train_in_two, tmp_path, tiny_corpus, tiny_model):
    lines = tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines(keepends=True)
    sizes, files = [3, 9, 7, 5], []
    for size in sizes:  # two for each rank, of different sizes
        files.append(str(tmp_path / f"{len(files)}.jsonl"))
        Path(files[-1]).write_text("".join(lines[:size]), encoding="utf-8")
        del lines[:size]
    folder = tmp_path / "run"
    killed = train_in_two(folder, files, kill_in_step=8)
    assert killed.returncode != 0 and not (folder / "model.safetensors").exists()
    resumed = train_in_two(folder, files)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    check_rows(folder, files, sizes, Names(SpeechLLMProcessor.from_pretrained(tiny_model)))


@pytest.mark.slow
def test_two_ranks_with_two_workers_share_one_file_and_resume(train_in_two, tmp_path, tiny_corpus, tiny_model):
    files, folder = [str(tiny_corpus.jsonl)], tmp_path / "run"
    whole = train_in_two(tmp_path / "whole", files, workers=2)
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert train_in_two(folder, files, workers=2, kill_in_step=8).returncode != 0
    resumed = train_in_two(folder, files, workers=2)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    check_rows(folder, files, [24], Names(SpeechLLMProcessor.from_pretrained(tiny_model)), workers=2)
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
