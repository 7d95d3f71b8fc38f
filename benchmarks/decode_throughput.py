"""Measures the decoding throughput, from WAV files to texts; prints a JSON line for each batch size.

python benchmarks/decode_throughput.py --size fun_asr_nano --batch_seconds 1024 4096 8192
python benchmarks/decode_throughput.py --size tiny --batch_seconds 64 --clips 40 --new_tokens 8   # on a CPU

Clips are 8 s of noise (WAV, 16 bit). Every transcript has exactly `--new_tokens` tokens; decoding is greedy. Further
measurements: fbank on the device, of waveforms in memory; with `--naive CLIPS`, clips that are decoded one by one, as
the original does; with several batch sizes, the number of texts that differ.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from workload import environment, make_model

from hf_speechllm.inference.transcriber import Transcriber

SECONDS = 8
RATE = 16000  # Hz


def write_clips(folder: Path, number: int) -> list[str]:
    """Writes `number` clips of different noise; returns their paths."""
    noise = (np.random.default_rng(0).standard_normal(2 * SECONDS * RATE) * 3000).astype(np.int16)
    paths = []
    for index in range(number):
        start = index * 97 % (SECONDS * RATE)
        paths.append(str(folder / f"{index}.wav"))
        soundfile.write(paths[-1], noise[start : start + SECONDS * RATE], RATE)
    return paths


def measure_fbank(processor, device: str, seconds: int = 2400) -> float:
    """Returns the throughput of fbank in audio seconds per second; the best of five runs."""
    waveforms = list(np.random.default_rng(0).standard_normal((seconds // SECONDS, SECONDS * RATE)).astype(np.float32))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        features = processor.extract_features(waveforms, device)
        features[-1].sum().item()  # waits for the device
        best = max(best, seconds / (time.perf_counter() - started))
    return best


def measure_naive(model, processor, paths: list[str], new_tokens: int) -> float:
    """Returns the throughput in audio seconds per second if each clip is loaded and decoded separately."""
    transcriber = Transcriber(model, processor, max_new_tokens=new_tokens, num_workers=1)
    transcriber.transcribe(paths[:1])  # warm-up
    started = time.perf_counter()
    for path in paths:
        transcriber.transcribe([path])
    return len(paths) * SECONDS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="fun_asr_nano", help="a model of recipes/configs/models")
    parser.add_argument("--batch_seconds", type=float, nargs="+", default=[1024.0], help="padded seconds in a batch")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--new_tokens", type=int, default=30)
    parser.add_argument("--naive", type=int, default=0, help="clips to decode one by one")
    parser.add_argument("--num_workers", type=int, default=min(16, os.cpu_count() or 1))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = make_model(args.size, device)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config.min_new_tokens = args.new_tokens
    facts = {"size": args.size, "clips": args.clips, "new_tokens": args.new_tokens, **environment()}
    print(json.dumps({"what": "fbank", "audio_seconds_per_second": measure_fbank(processor, device), **facts}))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_clips(Path(folder), args.clips)
        naive = measure_naive(model, processor, paths[: args.naive], args.new_tokens) if args.naive else None
        texts = None
        for batch_seconds in args.batch_seconds:
            transcriber = Transcriber(
                model, processor, batch_seconds, args.new_tokens, num_workers=args.num_workers
            )  # fmt: skip
            transcriber.transcribe(paths[: int(batch_seconds / SECONDS)])  # warm-up
            started = time.perf_counter()
            result = transcriber.transcribe(paths)
            speed = len(paths) * SECONDS / (time.perf_counter() - started)
            line = {"what": "decoding", "batch_seconds": batch_seconds}
            line |= {"audio_seconds_per_second": speed, "naive": naive, "ratio": naive and speed / naive}
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
            line["other_texts"] = sum(a != b for a, b in zip(result, texts or result, strict=True))
            texts = texts or result
            print(json.dumps({**line, **facts}), flush=True)


if __name__ == "__main__":
    main()
