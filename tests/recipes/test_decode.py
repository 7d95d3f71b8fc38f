"""decode.py: killed and started again, by two processes, with voice detection, with a guard against loops."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.model import chat

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def decode(run_recipe, tiny_corpus, tiny_model, tmp_path):
    """Runs decode.py in this process; gives its exit code or message, and what it wrote."""

    def run(*options, output="hyp.txt", scp=tiny_corpus.scp):
        output = tmp_path / output
        end = run_recipe(
            "decode.py", "--model_name_or_path", tiny_model, "--scp_file", scp, "--output_file", output, *options
        )
        return end, output.read_text(encoding="utf-8") if output.exists() else None

    return run


def test_a_list_that_was_killed_half_way_gives_the_same_file_as_in_one_go(
    decode, tiny_corpus, tiny_model, tmp_path, caplog
):
    options = ["--max_new_tokens", "60", "--batch_seconds", "1"]
    killed, journal = tmp_path / "killed.txt", tmp_path / "killed.txt.partial-0.jsonl"
    command = [
        sys.executable, REPOSITORY / "recipes/decode.py", "--model_name_or_path", tiny_model,
        "--scp_file", tiny_corpus.scp, "--output_file", killed, *options,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes().count(b"\n") - 1
    assert not killed.exists() and 4 <= kept < 24

    caplog.set_level(logging.INFO)
    assert "num_beams (1, now 2)" in decode("--num_beams", "2", *options, output="killed.txt")[0]
    assert decode(*options, output="killed.txt") == decode(*options, output="whole.txt")
    assert f"{kept} of 24 are decoded already" in caplog.text
    assert len((tmp_path / "whole.txt").read_text().splitlines()) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.txt", "whole.txt"]


def test_two_processes_share_a_list_and_write_what_one_does(decode, tiny_corpus, tiny_model, tmp_path, launch):
    scp, options = tmp_path / "wav.scp", ["--max_new_tokens", "20"]
    scp.write_text(tiny_corpus.scp.read_text() + "gone /no/such.wav\n")
    output = tmp_path / "two.txt"
    result = launch(
        "recipes/decode.py", "--model_name_or_path", tiny_model, "--scp_file", scp, "--output_file", output, *options,
        config=REPOSITORY / "accelerate_configs/cpu.yaml",
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("gone: /no/such.wav: no such file") == 1
    # The launcher may end the second of two that fail, but neither may break on its way out.
    assert not any(sign in result.stderr for sign in ("SIGABRT", "SIGSEGV", "terminate called"))
    parts = [
        {json.loads(line)["key"]: json.loads(line)["seconds"] for line in path.read_text().splitlines()[1:]}
        for path in sorted(tmp_path.glob("two.txt.partial-*.jsonl"))
    ]
    assert len(parts) == 2 and not parts[0].keys() & parts[1].keys()
    sums = [sum(part.values()) for part in parts]
    assert max(sums) - min(sums) < 1.5  # seconds: no more than one recording
    message, text = decode(*options, output="one.txt", scp=scp)
    assert "1 failed" in message
    assert output.read_text(encoding="utf-8") == text and len(text.splitlines()) == 24


def test_mended_recordings_are_decoded_alone_when_started_again(decode, make_wav, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole, empty = make_wav("whole.wav"), make_wav("empty.wav")
    content = empty.read_bytes()
    empty.write_bytes(b"")
    scp = tmp_path / "wav.scp"
    scp.write_text("empty empty.wav\nwhole whole.wav\n")
    options = ["--max_new_tokens", "2"]
    message, text = decode(*options, scp=scp)
    assert "empty.wav: the file is empty" in message and "start again" in message
    assert [line.split("\t")[0] for line in text.splitlines()] == ["whole"]
    empty.write_bytes(content)
    end, text = decode(*options, scp=scp)
    assert end is None and "1 of 2 are decoded already" in caplog.text
    assert [line.split("\t")[0] for line in text.splitlines()] == ["empty", "whole"]
    assert decode(*options, scp=scp)[0] == 2  # complete: it is not replaced unasked
    assert decode(*options, "--overwrite", scp=scp) == (None, text)
    assert not list(tmp_path.glob("*.partial-*"))
    assert whole.exists()


def test_long_recordings_are_decoded_in_segments_with_times(decode, tmp_path):
    rng = np.random.default_rng(0)
    recordings = sorted((REPOSITORY / "recipes/quickstart_data/audio").glob("*.ogg"))[:8]
    speech = [load_audio(path) for path in recordings]
    pause = np.zeros(8000, dtype=np.float32)
    long = np.concatenate([part for waveform in speech for part in (pause, waveform)])
    soundfile.write(tmp_path / "long.flac", np.stack([long] * 6, axis=1), 16000)
    soundfile.write(tmp_path / "noise.wav", 0.1 * rng.standard_normal(160000), 16000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(160000), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    scp = tmp_path / "wav.scp"
    scp.write_text("".join(f"{path.stem} {path.name}\n" for path in sorted(tmp_path.iterdir())))
    message, text = decode("--vad", "--vad_max_seconds", "5", "--max_new_tokens", "4", scp=scp)
    assert "1 failed" in message and "empty.wav: the file is empty" in message
    lines = dict(line.split("\t") for line in text.splitlines())
    assert list(lines) == ["long", "noise", "silence"]
    assert lines["noise"] == lines["silence"] == "" != lines["long"]

    rows = [json.loads(line) for line in (tmp_path / "hyp.segments.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {"long"} and len(rows) > 2
    assert all(0 < row["end"] - row["start"] <= 5 for row in rows)
    assert all(first["end"] <= second["start"] for first, second in zip(rows, rows[1:], strict=False))
    start = 0.0
    for waveform in speech:  # the middle of each utterance is in a segment
        middle = start + 0.5 + len(waveform) / 32000
        assert any(row["start"] <= middle <= row["end"] for row in rows)
        start += 0.5 + len(waveform) / 16000
    subtitles = tmp_path / "hyp.subtitles"
    assert sorted(path.name for path in subtitles.iterdir()) == [
        f"{name}.{ending}" for name in ("long", "noise", "silence") for ending in ("srt", "vtt")
    ]
    assert (subtitles / "long.srt").read_text().count(" --> ") == len([row for row in rows if row["text"]])
    assert (subtitles / "silence.vtt").read_text() == "WEBVTT\n"


def test_loops_are_cut_counted_and_flagged(decode, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    free = dict(line.split("\t") for line in decode("--max_new_tokens", "100", output="free.txt")[1].splitlines())
    assert not (tmp_path / "free.segments.jsonl").exists()
    end, text = decode("--max_new_tokens", "100", "--repetition_guard")
    assert end is None
    guarded = dict(line.split("\t") for line in text.splitlines())
    rows = [json.loads(line) for line in (tmp_path / "hyp.segments.jsonl").read_text().splitlines()]
    looped = {row["id"] for row in rows if row["looped"]}
    assert looped and all(len(guarded[name]) < len(free[name]) for name in looped)
    assert all(guarded[name] == free[name] for name in free.keys() - looped)
    assert f"{len(looped)} loops cut" in caplog.text
    assert all(f"{name}: the text ended in a loop" in caplog.text for name in looped)


def test_wrong_options_are_named_before_anything_is_decoded(decode, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"word {number}" for number in range(10_000)))
    assert "words.txt: 10000 hotwords" in decode("--hotwords", words)[0]
    assert "hotword.txt: no such file" in decode("--hotwords", "hotword.txt")[0]
    for option in ("--num_beams", "--max_new_tokens", "--batch_seconds"):
        assert decode(option, "0")[0] == 2
        assert f"{option} must be above 0" in capsys.readouterr().err
    assert "at least 1 s" in decode("--vad", "--vad_max_seconds", "0.1")[0]
    assert decode(output="no/such/folder/hyp.txt")[0] == 2
    assert "no such folder" in capsys.readouterr().err
    assert decode(scp=tmp_path / "gone.scp")[0] == 2
    assert "gone.scp: no such file" in capsys.readouterr().err
    scp = tmp_path / "wav.scp"
    scp.write_text("\n")
    assert f"{scp}: no recordings" in decode(scp=scp)[0]
    assert not list(tmp_path.glob("hyp*"))


def test_hostile_recordings_and_lists_get_an_answer_each(decode, tmp_path):
    speech = load_audio(next(iter(sorted((REPOSITORY / "recipes/quickstart_data/audio").glob("*.ogg")))))
    speech = np.interp(np.arange(0, len(speech), 16000 / 44100), np.arange(len(speech)), speech)
    soundfile.write(tmp_path / "surround.wav", np.stack([speech] * 6, axis=1), 44100)
    soundfile.write(tmp_path / "hour.flac", np.zeros(3600 * 8000, dtype=np.int16), 8000)
    soundfile.write(tmp_path / "noise.wav", 0.2 * np.random.default_rng(0).standard_normal(48000), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    names = ["surround.wav", "hour.flac", "noise.wav", "empty.wav", "no/such.wav"]
    lines = [f"{Path(name).stem} {name}\n".encode() for name in names]
    scp = tmp_path / "wav.scp"
    scp.write_bytes(
        b"".join([*lines, "坏 noise.wav\n".encode("gb18030"), b"url http://me:secret@127.0.0.1:9/a.wav?key=k\n"])
    )

    message, text = decode("--max_new_tokens", "4", scp=scp)
    assert [line.split("\t")[0] for line in text.splitlines()] == ["surround", "noise"]
    reasons = {line.partition(": ")[0]: line for line in message.splitlines()}
    assert "5 failed" in message
    assert "3600.0 s; the encoder takes at most" in reasons["hour"] and "--vad" in reasons["hour"]
    assert "the file is empty" in reasons["empty"] and "no such file" in reasons["such"]
    assert "not UTF-8" in reasons[f"{scp}:6"]
    assert "can't be reached" in reasons["url"] and "secret" not in message and "key=k" not in message

    message, text = decode("--vad", "--max_new_tokens", "4", scp=scp, output="vad.txt")
    texts = dict(line.split("\t") for line in text.splitlines())
    assert list(texts) == ["surround", "hour", "noise"] and "4 failed" in message
    assert texts["hour"] == texts["noise"] == ""
    segments = [json.loads(line) for line in (tmp_path / "vad.segments.jsonl").read_text().splitlines()]
    assert {segment["id"] for segment in segments} == {"surround"}


def test_context_and_hotwords_reach_the_prompt(decode, monkeypatch):
    measure, prompts = Transcriber.measure, []

    def listen(transcriber, requests):
        prompts.append(requests[0].messages[-1]["content"])
        return measure(transcriber, requests)

    monkeypatch.setattr(Transcriber, "measure", listen)
    options = ["--hotwords", "one,二", "--context", "课堂", "--language", "en", "--max_new_tokens", "1"]
    assert decode(*options)[0] is None
    assert chat.transcription_prompt("en", hotwords=["one", "二"], context="课堂") in prompts[0]
