"""Measures data loading before and during training: time to the first batch, rows per second, memory.

    python benchmarks/data_scale.py manifest --model_name_or_path exp/init --rows 10000000 --folder exp/scale
    python benchmarks/data_scale.py memory --model_name_or_path exp/init --rows 2000 8000 32000 --folder exp/scale
    python benchmarks/data_scale.py sampler --rows 5000000

`manifest` writes a JSONL with `--rows` rows (3.1 GB for 10 million) that share 200 synthetic recordings, and streams
it. `memory` writes tar shards with recordings of noise (1 s, 16 bit), and streams two passes over them. `sampler`
builds `BudgetBatchSampler`. Each prints one JSON line with wall time, CPU time and the peak memory of the process.
"""

import argparse
import io
import json
import resource
import tarfile
import time
from pathlib import Path

import numpy as np
import soundfile


def clock() -> dict:
    """Returns wall time and CPU time in seconds, and peak memory in GB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_s": time.perf_counter(),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss / 1e6,
    }


def since(start: dict) -> dict:
    """Returns the times since `start`, and the peak memory so far."""
    now = clock()
    return {key: round(now[key] - (start[key] if key != "peak_gb" else 0), 3) for key in now}


def write_manifest(folder: Path, rows: int) -> Path:
    """Writes a JSONL with `rows` rows that share 200 recordings of 2 to 12 s."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 1200, size=200)
    for index, frames in enumerate(lengths):
        samples = 0.1 * rng.standard_normal(frames * 160 + 240)
        soundfile.write(folder / f"{index:03d}.wav", samples, 16000, subtype="PCM_16")
    content = "语音转写：<|startofspeech|>!{}<|endofspeech|>"
    lines = []
    for index, frames in enumerate(lengths):
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content.format(folder / f"{index:03d}.wav")},
            {"role": "assistant", "content": "three five " * int(frames // 200)},
        ]
        row = {"messages": messages, "speech_length": int(frames), "text_length": int(frames // 50)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    block = "".join(lines).encode()
    path = folder / "manifest.jsonl"
    with open(path, "wb") as file:
        for _ in range(rows // len(lines)):
            file.write(block)
    return path


def write_shards(folder: Path, rows: int) -> str:
    """Writes tar shards of 1,000 samples; returns their glob."""
    rng = np.random.default_rng(0)
    for shard in range(rows // 1000):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(1000):
                buffer = io.BytesIO()
                soundfile.write(buffer, 0.1 * rng.standard_normal(16000), 16000, subtype="PCM_16", format="WAV")
                for suffix, data in (("wav", buffer.getvalue()), ("txt", b"three five")):
                    info = tarfile.TarInfo(f"{shard:05d}-{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def stream(pattern: str, model: str, batches: int) -> dict:
    """Streams batches with features in this process, without workers."""
    from hf_speechllm import SpeechLLMProcessor
    from hf_speechllm.data.collator import SpeechLLMCollator
    from hf_speechllm.data.stream_loader import StreamLoader
    from hf_speechllm.data.streaming import RowStream

    collator = SpeechLLMCollator(SpeechLLMProcessor.from_pretrained(model))
    start = clock()
    loader = StreamLoader(RowStream([pattern], collator, 60.0, 2048))
    iterator = iter(loader)
    next(iterator)
    result = {"first_batch": since(start)}
    for _ in range(batches - 1):
        next(iterator)
    return {**result, "batches": batches, "passes": loader.states[0].epoch, "all": since(start)}


def sampler(rows: int, epochs: int = 5) -> dict:
    """Builds the sampler of a map-style run and iterates over `epochs` epochs."""
    from hf_speechllm.data.sampler import BudgetBatchSampler

    seconds = np.clip(np.random.default_rng(0).lognormal(np.log(7), 0.6, rows), 1.5, 30)
    before, start = clock()["peak_gb"], clock()
    made = BudgetBatchSampler(seconds, 60.0, num_replicas=8)
    result = {"batches": len(made) * 8, "peak_gb_before": round(before, 3), "build": since(start), "epochs": []}
    for epoch in range(epochs):
        start = clock()
        made.set_epoch(epoch)
        for _ in made:
            pass
        result["epochs"].append(since(start))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["manifest", "memory", "sampler"])
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--model_name_or_path", help="model folder; only its processor is used")
    parser.add_argument("--folder", type=Path, help="folder for the data; not deleted")
    parser.add_argument("--batches", type=int, default=200, help="batches to read with `manifest`")
    args = parser.parse_args()
    for rows in args.rows:
        if args.what == "sampler":
            result = sampler(rows)
        else:
            folder = args.folder / f"{args.what}-{rows}"
            folder.mkdir(parents=True, exist_ok=True)
            if args.what == "manifest":
                result = stream(str(write_manifest(folder, rows)), args.model_name_or_path, args.batches)
            else:
                result = stream(write_shards(folder, rows), args.model_name_or_path, 2 * rows // 60)
        print(json.dumps({"what": args.what, "rows": rows, **result}))


if __name__ == "__main__":
    main()
