"""Measures the speed of `hf-speechllm doctor` on one core, compared with decoding alone.

    OMP_NUM_THREADS=1 python benchmarks/doctor_speed.py DATA [DATA ...]

Prints one JSON line: seconds of audio per second of CPU time (of this process, so other work does not count) for
decoding alone, and for the whole examination without and with VAD. The best of three rounds counts.
"""

import argparse
import json
import time

import torch

from hf_speechllm.audio.waveform import read_audio
from hf_speechllm.diagnosis.doctor import diagnose
from hf_speechllm.diagnosis.rows import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(args.data)
    recordings = [source for row in rows for source in row.recordings]
    works = {
        "decoding": lambda: [read_audio(source) for source in recordings],
        "without_vad": lambda: diagnose(read_rows(args.data), vad=False),
        "with_vad": lambda: diagnose(read_rows(args.data)),
    }
    seconds = diagnose(rows, vad=False).seconds
    result = {"data": args.data, "rows": len(rows), "hours": round(seconds / 3600, 2)}
    for name, work in works.items():
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        result[name] = round(seconds / min(times))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
