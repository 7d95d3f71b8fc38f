"""Calibration of the confidence of words."""

import json
import sys

import numpy as np
import pytest

from hf_speechllm.cli.main import main
from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.evaluation.confidence import (
    JudgedWord,
    calibration_error,
    fit,
    held_out_confidence,
    judge_words,
    raw_confidence,
    read_words,
)
from hf_speechllm.evaluation.scoring import score_utterances
from hf_speechllm.model.calibration import Calibration


@pytest.fixture(scope="module")
def words():
    """Words whose correctness follows a known calibration of overconfident probabilities."""
    rng = np.random.default_rng(0)
    truth, result = Calibration(-1.0, 0.6, 0.3), []
    for index in range(4000):
        ctc, llm = rng.uniform(0.05, 0.999, 2)
        result.append(JudgedWord(str(index // 10), bool(rng.random() < truth(ctc, llm)), ctc, llm))
    return result


def test_fit_finds_the_weights(words):
    found = fit(words)
    assert [found.bias, found.ctc, found.llm] == pytest.approx([-1.0, 0.6, 0.3], abs=0.1)
    raw, calibrated = calibration_error(raw_confidence(words)), calibration_error(held_out_confidence(words))
    assert raw > 0.1 and calibrated < 0.03


def test_unknown_probabilities():
    only_ctc = [JudgedWord("a", index % 2 == 0, 0.9 if index % 2 == 0 else 0.2, None) for index in range(20)]
    found = fit(only_ctc)
    assert found.llm == 0 and found(0.9, None) > 0.5 > found(0.2, None)
    assert Calibration(0, 1, 1)(0.5, None) is None
    assert fit([]) is None and fit([JudgedWord("a", True, None, None)]) is None
    assert calibration_error([]) is None


def test_words_are_judged_by_alignment():
    utterances = score_utterances(
        {"a": "the cat sat", "b": "十二点 了", "c": "x"}, {"a": "The bat sat on", "b": "12点了"}
    )
    words = {
        "a": [{"word": word, "ctc": 0.5, "llm": None} for word in ("The", "bat", "sat", "on.", "...")],
        "b": [{"word": word, "ctc": 0.5, "llm": 0.5} for word in ("12", "点", "了")],
    }
    judged = judge_words(utterances, words)
    assert [(word.id, word.correct) for word in judged] == [
        ("a", True), ("a", False), ("a", True), ("a", False), ("b", True), ("b", True), ("b", True),
    ]  # fmt: skip


def test_broken_files(tmp_path):
    path = tmp_path / "hyp.words.jsonl"
    path.write_text('{"id": "a", "words": []}\n{"id": "b"}\n')
    with pytest.raises(BadDataError, match="hyp.words.jsonl:2"):
        read_words(path)
    path.write_text('{"slope": 1}')
    with pytest.raises(ValueError, match="is not a confidence.json"):
        Calibration.read(path)


def test_command(words, tmp_path, monkeypatch):
    lists = {"ref": [], "hyp": [], "words": []}
    for start in range(0, 400, 10):
        row, id_ = words[start : start + 10], f"u{start}"
        lists["ref"].append(f"{id_} " + " ".join("yes" if word.correct else "no" for word in row))
        lists["hyp"].append(f"{id_} " + " ".join(["yes"] * 10))
        items = [{"word": "yes", "start": 0, "end": 1, "ctc": word.ctc, "llm": word.llm} for word in row]
        lists["words"].append(json.dumps({"id": id_, "words": items}))
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    arguments = [tmp_path / "ref", tmp_path / "hyp", "--output_dir", tmp_path / "out", "--words", tmp_path / "words"]
    monkeypatch.setattr(sys, "argv", ["hf-speechllm", "score", *map(str, arguments), "--num_workers", "1"])
    main()
    section = json.loads((tmp_path / "out" / "score.json").read_text())["confidence"]
    assert section["words"] == 400 and section["calibration_error_calibrated"] < section["calibration_error"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Least confident utterances" in page and "share of correct words" in page
    assert Calibration.read(tmp_path / "out" / "confidence.json") == fit(
        [
            JudgedWord(f"u{index // 10 * 10}", word.correct, word.ctc, word.llm)
            for index, word in enumerate(words[:400])
        ]
    )
