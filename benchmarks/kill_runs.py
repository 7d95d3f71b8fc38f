"""Kills runs with kill -9 at random moments: each resumed run must give the weights and rows of an uninterrupted run.

python benchmarks/kill_runs.py --model_name_or_path exp/init --train_file exp/train.jsonl --output_dir exp/kills

Every run is killed twice in a row, then it finishes. With --processes 2 the whole process group is killed. The script
prints one JSON line with the moment of each kill and the last checkpoint at this moment. All runs use the CPU.
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "finetune.py"
KILLS_PER_RUN = 2

# Runs recipes/finetune.py and records the rows of each step.
WATCHED = """
import json, os, runpy, sys
note, recipe = sys.argv[1:3]
sys.argv = [recipe, *sys.argv[3:]]
import hf_speechllm.training.trainer as module

class Watched(module.SpeechLLMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs["input_ids"].tolist()
        with open(note + "." + os.environ.get("RANK", "0"), "a") as file:
            file.write(chr(10) + json.dumps([self.state.global_step, rows]))
        return super().training_step(model, inputs, num_items_in_batch)

module.SpeechLLMTrainer = Watched
runpy.run_path(recipe, run_name="__main__")
"""


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    """Returns the command of a run that resumes automatically."""
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
    return [
        *launch, str(args.output_dir / "watched.py"), str(folder.with_suffix(".rows")), str(RECIPE),
        "--model_name_or_path", args.model_name_or_path, "--train_file", args.train_file, "--output_dir", str(folder),
        "--resume_from_checkpoint", "auto", "--max_steps", str(args.max_steps), "--save_strategy", "steps",
        "--save_steps", "5", "--save_total_limit", "2", "--per_device_train_batch_seconds", "15",
        "--spec_augment", "true", "--tempo_perturb", "0.1", "--async_save", "true", "--logging_steps", "5",
        "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
    ]  # fmt: skip


def run(args: argparse.Namespace, folder: Path, seconds: float | None) -> bool:
    """Starts a run and kills it after `seconds`; returns whether it was killed."""
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command(args, folder), stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
    if code != 0:
        sys.exit(f"{folder}: exit status {code}; see {folder.with_suffix('.log')}")
    return False


def rows_of(folder: Path) -> dict[str, list]:
    """Reads the rows of each step and rank; for a repeated step, the rows of the last time."""
    seen: dict[str, list] = {}
    for path in sorted(folder.parent.glob(f"{folder.name}.rows.*")):
        steps = {}
        for line in path.read_text().splitlines():
            try:
                step, rows = json.loads(line)
            except ValueError:
                continue  # truncated by a kill
            steps[step] = rows
        seen[path.suffix] = sorted(steps.items())
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True)
    (args.output_dir / "watched.py").write_text(WATCHED)

    whole = args.output_dir / "whole"
    run(args, whole, None)  # prepares the data; later runs use the cache
    shutil.rmtree(whole)
    for path in args.output_dir.glob("whole.rows.*"):
        path.unlink()
    began = time.monotonic()
    run(args, whole, None)
    duration = time.monotonic() - began
    moments, same = [], True
    rng, killed, number = random.Random(args.seed), 0, 0
    while killed < args.kills:
        folder = args.output_dir / f"run-{number}"
        number += 1
        for _ in range(min(KILLS_PER_RUN, args.kills - killed)):
            moment = rng.uniform(0.05, 1) * duration
            if not run(args, folder, moment):
                break
            killed += 1
            steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
            moments.append({"seconds": round(moment, 1), "last_checkpoint": max(steps, default=0)})
        run(args, folder, None)
        equal = filecmp.cmp(folder / "model.safetensors", whole / "model.safetensors", shallow=False)
        same = same and equal and rows_of(folder) == rows_of(whole)
        if not same:
            sys.exit(f"{folder} differs from {whole}: weights {'equal' if equal else 'differ'}")
        shutil.rmtree(folder)
    result = {
        "processes": args.processes, "steps": args.max_steps, "seconds_of_a_run": round(duration, 1), "runs": number,
        "kills": killed, "same_weights_and_rows": same, "moments": moments,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
