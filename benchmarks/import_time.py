"""Measures the time that `import hf_speechllm` adds to the import of its transformers base classes (goal: 0.5 s).

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

SCRIPT = """
import time
from transformers import PreTrainedModel, ProcessorMixin
start = time.perf_counter()
import hf_speechllm
print(time.perf_counter() - start)
"""
REPETITIONS = 5

if __name__ == "__main__":
    seconds = [float(subprocess.check_output([sys.executable, "-c", SCRIPT])) for _ in range(REPETITIONS)]
    median, most = statistics.median(seconds), max(seconds)
    print(f"import hf_speechllm: median {median:.2f} s of {REPETITIONS} imports, at most {most:.2f} s")
