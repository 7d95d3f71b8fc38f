"""What is decoded is kept over a kill, and used again for the same requests with the same settings only."""

import os
from pathlib import Path

import numpy as np
import pytest

from hf_speechllm.inference.distributed import shares
from hf_speechllm.inference.journal import Journal, model_stamp, request_key
from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.requests import Request
from hf_speechllm.inference.segments import Segment
from hf_speechllm.model.chat import transcription_messages

RESULT = Transcript(7, "几点了？", 1.5, segments=(Segment(0.0, 1.5, "几点了？", True),))


def request(path, prompt="语音转写：", id_="a", hotwords=()):
    return Request(id_, transcription_messages(path if isinstance(path, np.ndarray) else str(path), prompt), hotwords)


def test_results_of_all_ranks_are_read_back(tmp_path):
    for rank in (0, 1):
        journal = Journal(tmp_path / "hyp.txt", {"num_beams": 1}, rank)
        journal.open()
        journal.add(f"key{rank}", RESULT)
    kept = Journal(tmp_path / "hyp.txt", {"num_beams": 1}).read()
    assert kept.keys() == {"key0", "key1"}
    assert (kept["key1"].text, kept["key1"].segments, kept["key1"].looped) == (RESULT.text, RESULT.segments, True)
    journal.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept_bytes", [1, 30, -1, -20])
def test_a_line_that_a_kill_cut_off_is_dropped_and_written_over(tmp_path, kept_bytes):
    journal = Journal(tmp_path / "hyp.txt", {})
    journal.open()
    journal.add("first", RESULT)
    journal.add("second", RESULT)
    content = Path(journal.path).read_bytes()
    Path(journal.path).write_bytes(content[:kept_bytes])
    again = Journal(tmp_path / "hyp.txt", {})
    assert again.read().keys() == ({"first"} if kept_bytes < 0 else set())
    again.open()
    again.add("third", RESULT)
    assert again.read().keys() == ({"first", "third"} if kept_bytes < 0 else {"third"})


def test_other_settings_are_refused_by_name(tmp_path):
    journal = Journal(tmp_path / "hyp.txt", {"num_beams": 1, "vad": False})
    journal.open()
    with pytest.raises(ValueError, match=r"num_beams \(1, now 4\)\. .*--overwrite"):
        Journal(tmp_path / "hyp.txt", {"num_beams": 4, "vad": False}).read()


def test_a_request_is_known_by_its_recording_and_prompt(make_wav):
    path = make_wav()
    key = request_key(request(path))
    assert request_key(request(path)) == key
    others = [
        request(path, "Transcribe:"), request(path, id_="b"), request(path, hotwords=("Qwen",)),
        request(np.zeros(10)), request(np.ones(10)), request("https://host/a.wav"),
    ]  # fmt: skip
    assert len({key, *map(request_key, others)}) == 7
    os.utime(path, (1, 1))
    assert request_key(request(path)) != key


def test_a_model_is_known_by_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12")
    stamp = model_stamp(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")
    assert model_stamp(str(tmp_path)) == stamp
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert model_stamp(str(tmp_path)) != stamp
    assert model_stamp("someone/model") == ["someone/model"]


def test_shares_hold_alike_seconds_and_every_row_once():
    seconds = np.random.default_rng(0).lognormal(2, 0.6, 1000).tolist() + [0.0] * 5
    parts = shares(seconds, 4)
    assert sorted(sum(parts, [])) == list(range(1005))
    sums = [sum(seconds[index] for index in part) for part in parts]
    assert max(sums) - min(sums) < 0.01 * max(sums)
    assert shares([1.0], 3) == [[0], [], []]
    assert shares([], 2) == [[], []]
