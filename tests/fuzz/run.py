"""Reads thousands of damaged inputs, each with its own seed, within limits of memory and time.

python tests/fuzz/run.py --cases 1000 [--families recordings urls] [--seed 0] [--folder DIR] [--report FILE.jsonl]

A case has the seed "FAMILY-SEED-NUMBER". The inputs of failed cases are kept in DIR. Prints one line per family. Exit
status: 1 if a case failed. test_seeds.py runs a few cases of each family in the test suite.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib.metadata
import json
import logging
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MAX_BYTES = 4 * 10**9  # memory in addition to that of the process before the first case
MAX_SECONDS = 60  # per case; a case that hangs ends the process with a traceback
PACKAGES = ("torch", "transformers", "datasets", "soundfile", "av", "pyarrow", "safetensors")


def make_world(folder: Path):
    """Builds a tiny random model; the tokenizer also has added tokens that are not special."""
    import torch
    from readers import World

    from hf_speechllm.formats.composition import compose, train_tokenizer

    tokenizer = train_tokenizer(["one two three", "几点了？"], vocab_size=300)
    tokenizer.add_tokens(["<think>", "</think>"])
    attention = {"num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    model, processor = compose(
        {
            "audio_encoder_config": {**attention, "intermediate_size": 24, "num_hidden_layers": 3,
                                     "num_timestamp_prediction_layers": 1},
            "audio_adaptor_config": {"projector_hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1},
            "llm_config": {**attention, "model_type": "qwen3", "intermediate_size": 24, "num_hidden_layers": 2,
                           "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048},
        },
        tokenizer,
    )  # fmt: skip
    return World(model.eval(), processor, folder)


def run_family(name: str, cases: range, seed: int, folder: Path, world) -> dict:
    """Runs cases of a family; returns the report of the family."""
    from readers import FAMILIES

    failures, slowest, began = [], 0.0, time.monotonic()
    for number in cases:
        case = folder / f"{name}-{seed}-{number}"
        case.mkdir()
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        started = time.monotonic()
        try:
            FAMILIES[name](world, random.Random(case.name), case)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
            (case / "traceback.txt").write_text(traceback.format_exc())
        else:
            shutil.rmtree(case)
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - started)
    return {
        "family": name, "seed": seed, "cases": len(cases), "failures": failures,
        "seconds": round(time.monotonic() - began), "slowest_seconds": round(slowest, 1),
        "max_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip


def limit_memory() -> None:
    """Limits the memory of the process to the current use and `MAX_BYTES`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Runs each family in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="cases per family")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary folder")
    parser.add_argument("--report", type=Path, help="file to append one line of JSON per family")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from readers import FAMILIES

    folder = args.folder or Path(tempfile.mkdtemp())
    (folder / "world").mkdir(parents=True, exist_ok=True)
    world = make_world(folder / "world")
    assert world.checkpoints
    failed = False
    for name in args.families or FAMILIES:
        process = os.fork()
        if not process:
            limit_memory()
            line = run_family(name, range(args.first, args.first + args.cases), args.seed, folder, world)
            line |= {"versions": {package: importlib.metadata.version(package) for package in PACKAGES}}
            line |= {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
            print(json.dumps(line), flush=True)
            if args.report:
                with args.report.open("a") as report:
                    report.write(json.dumps(line) + "\n")
            os._exit(bool(line["failures"]))
        status = os.waitpid(process, 0)[1]
        if status not in (0, 256):
            print(f"{name}: a case ended the process (status {status}); see the last folder in {folder}")
        failed |= status != 0
    sys.exit(f"failed cases are in {folder}" if failed else 0)


if __name__ == "__main__":
    main()
