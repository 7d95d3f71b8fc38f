"""Compares plans with real runs: expected and measured time and memory, for two sizes.

    python benchmarks/plan_accuracy.py cpu --folder exp/plan       (about ten minutes on two cores)
    python benchmarks/plan_accuracy.py gpu --folder exp/plan_gpu   (about ten minutes on an H100)

For each size: creates a model with random weights and synthetic recordings, runs `hf-speechllm plan`, then
`hf-speechllm finetune` with the same options, and prints a JSON line. The feature cache is empty before the run. Each
run validates and writes checkpoints. The measured time is that of the whole command, from start to exit. Other work on
the machine changes times, but hardly CPU times. On a CPU the memory is the peak of the process, on a GPU that of its
allocator.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from workload import WORDS, make_durations, make_model

from hf_speechllm.model.chat import transcription_messages, transcription_prompt

# Size: model, rows, options. Answers of random models have no end, so that decoding has its full length. A small
# learning rate keeps it.
SIZES = {
    "cpu": {
        "tiny, small batches": (
            "tiny", 300, "quickstart --num_train_epochs 4 --per_device_train_batch_seconds 40 --eval_steps 0.25 "
            "--save_strategy steps --save_steps 0.25",
        ),
        "tiny, LoRA, large batches": (
            "tiny", 150, "lora --use_cpu --num_train_epochs 20 --per_device_train_batch_seconds 120 --eval_cer "
            "--eval_max_new_tokens 20 --eval_strategy steps --eval_steps 0.5 --save_steps 0.5 "
            "--dataloader_num_workers 0 --eval_cer_samples 16",
        ),
    },
    "gpu": {
        "fun_asr_nano, LoRA": (
            "fun_asr_nano", 2000, "lora --num_train_epochs 2 --eval_cer --eval_cer_samples 100 "
            "--eval_max_new_tokens 20 --eval_strategy steps --eval_steps 0.25 --save_steps 0.25 "
            "--llm_learning_rate 1e-9 --audio_adaptor_learning_rate 1e-9",
        ),
        "fun_asr_nano, all parameters": (
            "fun_asr_nano", 1500, "all --num_train_epochs 1 --eval_strategy steps --eval_steps 0.5 --save_steps 0.5",
        ),
    },
}  # fmt: skip


def write_data(folder: Path, rows: int, seed: int) -> Path:
    """Writes recordings of noise with random transcripts, and returns the JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index, seconds in enumerate(make_durations(rows, seed)):
        path = folder / f"{index:05d}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(int(16000 * seconds)), 16000, subtype="PCM_16")
        transcript = " ".join(rng.choice(WORDS, size=max(1, int(2 * seconds))))
        messages = transcription_messages(path.name, transcription_prompt(), transcript)
        frames = int(100 * seconds) - 2
        lines.append(json.dumps({"messages": messages, "speech_length": frames}, ensure_ascii=False) + "\n")
    file = folder / "data.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def run(verb: str, *arguments: str) -> tuple[float, float, int]:
    """Runs a verb; returns seconds, CPU seconds, and the peak memory of the process in bytes."""
    command = [sys.executable, "-m", "hf_speechllm", verb, *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{verb} failed with status {status}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of the sizes, from 0 (default: all)")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for models, recordings and runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    for number, (name, (size, rows, options)) in enumerate(SIZES[args.machine].items()):
        if args.sizes is not None and number not in args.sizes:
            continue
        folder = args.folder / str(number)
        for part in make_model(size, "cpu"):
            part.save_pretrained(folder / "init")
        train, validation = write_data(folder / "train", rows, 1), write_data(folder / "dev", rows // 10, 2)
        config, *others = options.split()
        command = [
            config, "--model_name_or_path", str(folder / "init"), "--train_file", str(train), "--validation_file",
            str(validation), "--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "run"), "--report_to",
            "none", *others,
        ]  # fmt: skip
        planning, *_ = run("plan", *command, "--json", str(folder / "plan.json"))
        plan = json.loads((folder / "plan.json").read_text())
        expected = plan["candidates"][0]["measurement"]
        measured, cpu, memory = run("finetune", *command)
        state = json.loads((folder / "run/trainer_state.json").read_text())
        end = next(entry for entry in state["log_history"] if "train_runtime" in entry)
        if torch.cuda.is_available():
            memory = int(1e9 * end["peak_memory_gb"])
        total = sum(expected["seconds"].values())
        line = {
            "name": name,
            "hours": round(plan["data"]["hours"], 3),
            "steps": end["step"],
            "expected_steps": expected["steps"],
            "expected_seconds": round(total, 1),
            "measured_seconds": round(measured, 1),
            "time_difference": round(total / measured - 1, 3),
            "expected_cpu_seconds": round(expected["cpu_seconds"], 1),
            "measured_cpu_seconds": round(cpu, 1),
            "cpu_time_difference": round(expected["cpu_seconds"] / cpu - 1, 3),
            "expected_stages": {stage: round(seconds, 1) for stage, seconds in expected["seconds"].items()},
            "measured_training_seconds": round(end["train_runtime"], 1),
            "expected_memory_gb": round(expected["memory_bytes"] / 1e9, 2),
            "measured_memory_gb": round(memory / 1e9, 2),
            "planning_seconds": round(planning, 1),
            "device": expected["device"],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": date.today().isoformat(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
