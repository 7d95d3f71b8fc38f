"""Benchmarks that need a GPU run on a CPU with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_measurements_of_the_ctc_head(model_with_head, tiny_corpus, tmp_path):
    command = [
        sys.executable, ROOT / "benchmarks/ctc_gpu.py", "--tiny", "--seconds", "1", "--thresholds", "0.5",
        "--model", model_with_head, "--jsonl_file", tiny_corpus.jsonl, "--output", tmp_path / "lines.jsonl",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    written = (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line for line in result.stdout.splitlines() if line.startswith("{")] == written
    lines = [json.loads(line) for line in written]
    trained = [line for line in lines if line["what"] == "train"]
    heads = [(line["head"], line["vocabulary"]) for line in trained]
    assert heads == [("sanm", "characters"), ("sanm", "llm"), ("linear", "characters"), ("linear", "llm")]
    assert all(line["steps"] == 5 and line["minutes_for_1000_hours"] > 0 for line in trained)
    assert {line["what"] for line in lines} == {"encode", "train", "draft", "released"}
    greedy = next(line for line in lines if line["what"] == "draft")
    assert not greedy["draft"] and greedy["llm_passes"] > 1 and greedy["different_texts"] == 0
