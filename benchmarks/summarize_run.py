"""Prints a JSON line for a training run: speed after the first log line, final loss, memory, hardware, versions.

python benchmarks/summarize_run.py exp/run --name llm_only
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of finetune.py")
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    history = json.loads((args.run / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in history if "audio_seconds_per_second" in entry]
    end = next(entry for entry in history if "train_runtime" in entry)
    speeds = sorted(entry["audio_seconds_per_second"] for entry in lines[1:])
    print(
        json.dumps(
            {
                "name": args.name,
                "steps": end["step"],
                "train_seconds": round(end["train_runtime"], 1),
                "loss": lines[-1]["loss"],
                "token_accuracy": lines[-1]["token_accuracy"],
                "audio_seconds_per_second": speeds[len(speeds) // 2] if speeds else None,
                "padding_share": lines[-1]["padding_share"],
                "peak_memory_gb": end.get("peak_memory_gb"),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "date": date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
