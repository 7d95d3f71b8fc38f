"""A corpus with planted faults from the quickstart recordings: every fault is found, no clean row is reported."""

import importlib.util
import logging
from pathlib import Path

import pytest

from hf_speechllm.diagnosis.doctor import diagnose
from hf_speechllm.diagnosis.rows import read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "planted_faults.py"
SLOW = ("too long", "one minute")  # faults of recordings of a minute or more


@pytest.fixture(scope="module")
def planted():
    spec = importlib.util.spec_from_file_location("planted_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def without_warnings_of_recordings():
    logger = logging.getLogger("hf_speechllm.audio")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def check(planted, folder, num_rows, rows_per_fault, seed):
    places = planted.write_corpus(folder, num_rows, rows_per_fault, seed)
    findings = [finding._asdict() for finding in diagnose(read_rows([str(folder)])).findings]
    result = planted.compare(places, findings)
    assert result["missed"] == [] and result["false_alarms"] == []
    assert result["rows"] == num_rows and result["faults"] > 80 - len(SLOW) and result["clean"] > 150


def test_all_planted_faults_are_found(planted, tmp_path, monkeypatch):
    pytest.importorskip("silero_vad")
    few = {name: fault for name, fault in planted.FAULTS.items() if name not in SLOW}
    monkeypatch.setattr(planted, "FAULTS", few)
    check(planted, tmp_path / "corpus", 300, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_planted_faults_are_found_in_500_rows(planted, tmp_path, seed):
    pytest.importorskip("silero_vad")
    check(planted, tmp_path / "corpus", 500, 3, seed)
