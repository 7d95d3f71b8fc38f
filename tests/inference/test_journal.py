"""The journal: results survive a kill, and are used only for the same requests with the same settings."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from hf_speechllm.inference.distributed import assign_shares
from hf_speechllm.inference.journal import Journal, request_key
from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.requests import Request
from hf_speechllm.inference.segments import Segment
from hf_speechllm.model.chat import transcription_messages

RESULT = Transcript(7, "几点了？", 1.5, segments=(Segment(0.0, 1.5, "几点了？", True),))


def request(path, prompt="语音转写：", id_="a", hotwords=()):
    return Request(id_, transcription_messages(path if isinstance(path, np.ndarray) else str(path), prompt), hotwords)


def test_results_of_all_ranks_are_read(tmp_path):
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
def test_line_cut_off_by_a_kill_is_overwritten(tmp_path, kept_bytes):
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


def test_settings_added_later_are_compared(tmp_path):
    journal = Journal(tmp_path / "hyp.txt", {"num_beams": 1})
    journal.require({"weights": "a"})
    journal.open()
    journal.add("first", RESULT)
    later = Journal(tmp_path / "hyp.txt", {"num_beams": 1})
    assert later.read().keys() == {"first"}
    later.require({"weights": "a"})
    with pytest.raises(ValueError, match=r"partial-0\.jsonl: .*weights \('a', now 'b'\)\. "):
        later.require({"weights": "b"})


def write_three(folder):
    journal = Journal(folder / "hyp.txt", {"num_beams": 1})
    journal.open()
    for key in ("first", "second", "third"):
        journal.add(key, RESULT)
    return Path(journal.path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\0" * len(line),
        lambda line: b"",
        lambda line: line[: len(line) // 2],
        lambda line: line.replace("几点了".encode(), "九点了".encode()),  # JSON all the same
        lambda line: line.replace(b"1.5", b"1.4"),
        lambda line: line.replace("几".encode(), b"\xff"),
        lambda line: b"[]",
        lambda line: b'"text"',
        lambda line: b"{}",
        lambda line: b"[" * 100_000,
        lambda line: line + line,
        lambda line: b'{"settings": {}}',
    ],
)
def test_damaged_line_is_reported_and_ignored(tmp_path, caplog, damage):
    path = write_three(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage(lines[2])
    path.write_bytes(b"\n".join(lines))
    journal = Journal(tmp_path / "hyp.txt", {"num_beams": 1})
    assert journal.read().keys() == {"first", "third"}
    assert f"{path}:3: damaged" in caplog.text
    journal.open()
    journal.add("second", RESULT)
    assert Journal(tmp_path / "hyp.txt", {"num_beams": 1}).read().keys() == {"first", "second", "third"}


def test_results_with_damaged_settings_are_ignored(tmp_path, caplog):
    path = write_three(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"num_beams": 1', b'"num_beams": 2', 1))
    journal = Journal(tmp_path / "hyp.txt", {"num_beams": 2})
    assert journal.read() == {}
    assert f"{path}:1: damaged" in caplog.text and "3 results" in caplog.text
    journal.open()
    journal.add("fourth", RESULT)
    assert Journal(tmp_path / "hyp.txt", {"num_beams": 2}).read().keys() == {"fourth"}


def test_full_disk_is_reported_and_earlier_results_are_kept(tmp_path):
    path = write_three(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path / "hyp.txt", {"num_beams": 1})
    journal.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"hyp\.txt\.partial-0\.jsonl cannot be written: "):
            journal.add("fourth", RESULT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes()[-1:] != b"\n"  # half a line
    again = Journal(tmp_path / "hyp.txt", {"num_beams": 1})
    assert again.read().keys() == {"first", "second", "third"}
    again.open()
    again.add("fourth", RESULT)
    assert again.read().keys() == {"first", "second", "third", "fourth"}


def test_key_depends_on_recording_and_prompt(make_wav):
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


def test_shares_have_similar_durations_and_every_row_once():
    seconds = np.random.default_rng(0).lognormal(2, 0.6, 1000).tolist() + [0.0] * 5
    parts = assign_shares(seconds, 4)
    assert sorted(sum(parts, [])) == list(range(1005))
    sums = [sum(seconds[index] for index in part) for part in parts]
    assert max(sums) - min(sums) < 0.01 * max(sums)
    assert assign_shares([1.0], 3) == [[0], [], []]
    assert assign_shares([], 2) == [[], []]


def test_warning_lists_the_first_20_damaged_lines(tmp_path, caplog):
    path = write_three(tmp_path)
    with path.open("ab") as file:
        file.write(b"{}\n" * 30)
    assert len(Journal(tmp_path / "hyp.txt", {"num_beams": 1}).read()) == 3
    assert f"{path}:24: damaged" in caplog.text and f"{path}:25: damaged" not in caplog.text
    assert "and 10 more damaged lines" in caplog.text
