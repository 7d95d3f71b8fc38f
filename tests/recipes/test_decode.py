"""decode.py: resuming, several processes, voice detection, repetition guard, failures."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from safetensors.torch import load_file, save_file

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.files import read_record
from hf_speechllm.hub.results import decoding_settings
from hf_speechllm.inference import decoding
from hf_speechllm.inference.journal import Journal
from hf_speechllm.inference.measuring import RequestMeter
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.model import chat

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def decode(run_recipe, tiny_corpus, tiny_model, tmp_path):
    """Runs decode.py in this process; returns exit code or message, and the output."""

    def run(*options, output="hyp.txt", scp=tiny_corpus.scp, model=tiny_model):
        output = tmp_path / output
        list_options = ["--scp_file", scp] if scp else []
        end = run_recipe("decode.py", "--model_name_or_path", model, *list_options, "--output_file", output, *options)
        return end, output.read_text(encoding="utf-8") if output.exists() else None

    return run


def start_decoding(model, scp, output, *options):
    """Starts decode.py in a new process, and waits for some texts."""
    command = [
        sys.executable, REPOSITORY / "recipes/decode.py", "--model_name_or_path", model, "--scp_file", scp,
        "--output_file", output, *options,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    journal = Path(f"{output}.partial-0.jsonl")
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_resumed_list_has_the_same_file_as_an_uninterrupted_run(decode, tiny_corpus, tiny_model, tmp_path, caplog):
    options = ["--max_new_tokens", "60", "--batch_seconds", "1"]
    killed, journal = tmp_path / "killed.txt", tmp_path / "killed.txt.partial-0.jsonl"
    process = start_decoding(tiny_model, tiny_corpus.scp, killed, *options)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes().count(b"\n") - 1
    assert not killed.exists() and 4 <= kept < 24

    caplog.set_level(logging.INFO)
    assert "num_beams (1, now 2)" in decode("--num_beams", "2", *options, output="killed.txt")[0]
    assert decode(*options, output="killed.txt") == decode(*options, output="whole.txt")
    assert f"{kept} of 24 requests are already decoded" in caplog.text
    assert len((tmp_path / "whole.txt").read_text().splitlines()) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.decoding.json", "killed.txt", "whole.decoding.json", "whole.txt",
    ]  # fmt: skip


def test_two_processes_share_a_list_and_write_the_same_file(decode, tiny_corpus, tiny_model, tmp_path, launch):
    scp, options = tmp_path / "wav.scp", ["--max_new_tokens", "20"]
    scp.write_text(tiny_corpus.scp.read_text() + "gone /no/such.wav\n")
    output = tmp_path / "two.txt"
    result = launch(
        "recipes/decode.py", "--model_name_or_path", tiny_model, "--scp_file", scp, "--output_file", output, *options,
        config=REPOSITORY / "accelerate_configs/cpu.yaml",
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("gone: /no/such.wav: no such file") == 2  # early, and at the end
    # The launcher may end the second of two failed processes, but no process may crash at the end.
    assert not any(sign in result.stderr for sign in ("SIGABRT", "SIGSEGV", "terminate called"))
    parts = [
        {json.loads(line)["key"]: json.loads(line)["seconds"] for line in path.read_text().splitlines()[1:]}
        for path in sorted(tmp_path.glob("two.txt.partial-*.jsonl"))
    ]
    assert len(parts) == 2 and not parts[0].keys() & parts[1].keys()
    sums = [sum(part.values()) for part in parts]
    assert max(sums) - min(sums) < 1.5  # seconds, about one recording
    message, text = decode(*options, output="one.txt", scp=scp)
    assert "1 failed" in message
    assert output.read_text(encoding="utf-8") == text and len(text.splitlines()) == 24


def test_only_corrected_recordings_are_decoded_again(decode, make_wav, tmp_path, caplog):
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
    assert end is None and "1 of 2 requests are already decoded" in caplog.text
    assert [line.split("\t")[0] for line in text.splitlines()] == ["empty", "whole"]
    assert decode(*options, scp=scp)[0] == 1  # a complete file is not replaced without --overwrite
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


def test_loops_are_cut_counted_and_flagged(decode, tmp_path, caplog, capsys):
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
    assert f"{len(looped)} loops cut" in capsys.readouterr().out
    assert all(f"{name}: a loop at the end of the text is cut" in caplog.text for name in looped)


def test_drafts_above_the_threshold_are_the_texts(decode, model_with_head):
    options = ["--max_new_tokens", "8", "--batch_seconds", "4"]
    greedy = decode(*options, model=model_with_head)
    assert decode(*options, "--ctc_draft", model=model_with_head, output="verified.txt") == greedy
    taken = decode(
        *options, "--ctc_draft", "--ctc_draft_threshold", "1e-300", model=model_with_head, output="taken.txt"
    )
    assert taken[0] is None and len(taken[1].splitlines()) == 24 and taken[1] != greedy[1]


def test_the_ctc_head_rescores_hypotheses_and_its_weight_is_recorded(decode, model_with_head, tmp_path, capsys):
    options = ["--max_new_tokens", "8", "--num_beams", "3"]
    texts = {
        weight: decode(*options, "--ctc_weight", weight, model=model_with_head, output=f"{weight}.txt")
        for weight in ("0", "0.9")
    }
    assert texts["0"] == decode(*options, model=model_with_head)
    assert texts["0.9"][0] is None and len(texts["0.9"][1].splitlines()) == 24 and texts["0.9"] != texts["0"]
    record = read_record(tmp_path / "0.9.txt")
    assert record["settings"]["ctc_weight"] == 0.9
    assert decoding_settings(record)["search"] == "3 beams, rescored by the CTC head (weight 0.9)"
    assert decoding_settings(read_record(tmp_path / "0.txt"))["search"] == "3 beams"
    message = decode(*options, "--ctc_weight", "0.9", output="none.txt")[0]  # a model without a head
    assert "the model has no CTC head, which word times and all --ctc_* options require" in message


def test_wrong_options_are_reported_before_decoding(decode, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"word {number}" for number in range(10_000)))
    assert "words.txt: 10000 hotwords" in decode("--hotwords", words)[0]
    assert "hotword.txt: no such file" in decode("--hotwords", "hotword.txt")[0]
    for option in ("--num_beams", "--max_new_tokens", "--batch_seconds"):
        assert decode(option, "0")[0] == 2
        assert f"{option} must be above 0" in capsys.readouterr().err
    for options, message in (
        (["--ctc_draft_threshold", "0.9"], "--ctc_draft_threshold requires --ctc_draft"),
        (["--ctc_draft", "--ctc_draft_threshold", "90"], "--ctc_draft_threshold must be above 0 and at most 1"),
        (["--ctc_weight", "0.3"], "--ctc_weight requires --num_beams above 1"),
        (["--ctc_weight", "1", "--num_beams", "2"], "--ctc_weight must be at least 0 and below 1"),
        (["--ctc_weight", "-0.1", "--num_beams", "2"], "--ctc_weight must be at least 0 and below 1"),
        (["--ctc_weight", "nan", "--num_beams", "2"], "--ctc_weight must be at least 0 and below 1"),
        (["--ctc_weight", "0.3", "--ctc_draft"], "--ctc_draft is not supported with --num_beams, --ctc_weight and"),
    ):
        assert decode(*options)[0] == 2 and message in capsys.readouterr().err
    assert "at least 1 s" in decode("--vad", "--vad_max_seconds", "0.1")[0]
    assert decode(output="words.txt/folder/hyp.txt")[0] == 1
    assert "words.txt/folder cannot be created: Not a directory; choose another folder" in capsys.readouterr().err
    assert decode(scp=tmp_path / "gone.scp")[0] == 1
    assert "gone.scp: no such file" in capsys.readouterr().err
    scp = tmp_path / "wav.scp"
    scp.write_text("\n")
    assert f"{scp}: no recordings" in decode(scp=scp)[0]
    assert not list(tmp_path.glob("hyp*"))


def test_a_recording_that_is_too_long_is_named_before_decoding_starts(decode, tmp_path, tone, caplog, monkeypatch):
    soundfile.write(tmp_path / "hour.flac", np.zeros(3600 * 8000, dtype=np.int16), 8000)
    soundfile.write(tmp_path / "short.wav", tone(0.5), 16000)
    scp = tmp_path / "wav.scp"
    scp.write_text("short short.wav\nhour hour.flac\n", encoding="utf-8")
    reported = []
    original = Transcriber.__call__

    def transcribe(*arguments):
        reported.extend(record.getMessage() for record in caplog.records)
        return original(*arguments)

    monkeypatch.setattr(Transcriber, "__call__", transcribe)
    with caplog.at_level("WARNING"):
        message, text = decode("--max_new_tokens", "4", scp=scp)
    assert text.startswith("short\t") and "1 failed" in message
    (line,) = [line for line in reported if "unusable" in line]
    assert line.startswith("1 of 2 requests are unusable") and "the first: hour: " in line and "--vad" in line


def test_each_hostile_recording_has_an_error(decode, tmp_path):
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
    assert read_record(tmp_path / "hyp.txt")["failed"] == 5
    reasons = {line.partition(": ")[0]: line for line in message.splitlines()}
    assert "5 failed" in message
    assert "3600.0 s; the encoder accepts at most" in reasons["hour"] and "--vad" in reasons["hour"]
    assert "the file is empty" in reasons["empty"] and "no such file" in reasons["such"]
    assert "not UTF-8" in reasons[f"{scp}:6"]
    assert "cannot be reached" in reasons["url"] and "secret" not in message and "key=k" not in message

    message, text = decode("--vad", "--max_new_tokens", "4", scp=scp, output="new/folder/vad.txt")
    texts = dict(line.split("\t") for line in text.splitlines())
    assert list(texts) == ["surround", "hour", "noise"] and "4 failed" in message
    assert texts["hour"] == texts["noise"] == ""
    segments = [json.loads(line) for line in (tmp_path / "new/folder/vad.segments.jsonl").read_text().splitlines()]
    assert {segment["id"] for segment in segments} == {"surround"}


def test_prompt_contains_context_and_hotwords(decode, monkeypatch):
    measure, prompts = RequestMeter.__call__, []

    def listen(meter, requests):
        prompts.append(requests[0].messages[-1]["content"])
        return measure(meter, requests)

    monkeypatch.setattr(RequestMeter, "__call__", listen)
    options = ["--hotwords", "one,二", "--context", "课堂", "--language", "en", "--max_new_tokens", "1"]
    assert decode(*options)[0] is None
    assert chat.transcription_prompt("en", hotwords=["one", "二"], context="课堂") in prompts[0]


def test_a_second_run_is_refused_and_the_first_ends_with_all_texts(decode, tiny_corpus, tiny_model, tmp_path):
    options = ["--max_new_tokens", "60", "--batch_seconds", "1"]
    first = start_decoding(tiny_model, tiny_corpus.scp, tmp_path / "hyp.txt", *options)
    for more in ([], ["--overwrite"], ["--num_beams", "2"]):
        message, text = decode(*options, *more)
        assert f"hyp.txt is in use by another run, process {first.pid} on " in message and text is None
    assert first.wait(120) == 0
    assert len((tmp_path / "hyp.txt").read_text().splitlines()) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"hyp.decoding.json", "hyp.txt"}


def test_run_does_not_replace_the_output_of_another_run_that_has_just_ended(decode, tmp_path, monkeypatch):
    """The other run ends between the check of the output file and the lock."""
    output_file_lock = decoding.output_file_lock

    def wait(*args):
        (tmp_path / "hyp.txt").write_text("a\tb\n")
        return output_file_lock(*args)

    monkeypatch.setattr(decoding, "output_file_lock", wait)
    message, text = decode("--max_new_tokens", "1")
    assert "hyp.txt exists; remove the file, or replace it with --overwrite" in message and text == "a\tb\n"


def test_results_do_not_depend_on_a_removed_journal(decode, tmp_path, monkeypatch):
    add = Journal.add

    def add_and_remove(journal, key, transcript):
        add(journal, key, transcript)
        Path(journal.path).unlink(missing_ok=True)

    monkeypatch.setattr(Journal, "add", add_and_remove)
    end, text = decode("--max_new_tokens", "2")
    assert end is None and len(text.splitlines()) == 24


def test_requests_without_a_result_are_failures(decode, monkeypatch):
    call = Transcriber.__call__

    def lose_two(transcriber, *args):
        for transcript in call(transcriber, *args):
            if transcript.index not in (3, 5):
                yield transcript

    monkeypatch.setattr(Transcriber, "__call__", lose_two)
    message, text = decode("--max_new_tokens", "2")
    assert "2 failed" in message and len(text.splitlines()) == 22
    assert "utt03: no result and no error" in message and "utt05: no result" in message
    monkeypatch.undo()


def test_results_lost_from_a_damaged_journal_are_decoded_again(decode, tiny_corpus, tiny_model, tmp_path, caplog):
    options = ["--max_new_tokens", "60", "--batch_seconds", "1"]
    process = start_decoding(tiny_model, tiny_corpus.scp, tmp_path / "hyp.txt", *options)
    process.send_signal(signal.SIGKILL)
    process.wait()
    journal = tmp_path / "hyp.txt.partial-0.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"text": "', b'"text": "other ')
    journal.write_bytes(b"\n".join(lines))
    end, text = decode(*options)
    assert f"{journal}:3: damaged" in caplog.text
    assert (end, text) == decode(*options, output="whole.txt")


def test_an_unfinished_run_is_not_resumed_with_other_weights(decode, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    scp = tmp_path / "wav.scp"
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    scp.write_text("a a.wav\ngone gone.wav\n")
    options = {"scp": scp, "model": model}
    assert "1 failed" in decode("--max_new_tokens", "2", **options)[0]
    weights = model / "model.safetensors"
    status, tensors = weights.stat(), load_file(weights)
    tensors["llm.model.norm.weight"] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_size == status.st_size
    message, text = decode("--max_new_tokens", "2", **options)
    assert "an unfinished run with other settings: weights (" in message and len(text.splitlines()) == 1
    assert "1 failed" in decode("--max_new_tokens", "2", "--overwrite", **options)[0]


def test_recordings_folders_and_archives_are_decoded_without_a_list(decode, parts, tiny_corpus, tmp_path):
    a, b = tmp_path / "in/a.wav", tmp_path / "in/deep/b.flac"
    b.parent.mkdir(parents=True)
    shutil.copy(tiny_corpus.folder / "utt13.wav", a)
    soundfile.write(b, *soundfile.read(a))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        tar.add(a, "c.wav")
    rows = {"audio": [{"bytes": a.read_bytes(), "path": "d.wav"}, {"bytes": b"", "path": "bad.wav"}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    options = {"scp": None, "model": tmp_path / "model"}
    sources = [tmp_path / "in", tmp_path / "c.tar", tmp_path / "d.parquet"]
    message, text = decode(*sources, "--max_new_tokens", "40", **options)
    assert "1 failed" in message and "bad: " in message
    lines = [line.split("\t") for line in text.splitlines()]
    assert [line[0] for line in lines] == ["a", "deep/b", "c", "d"]
    assert len({line[1] for line in lines}) == 1 and lines[0][1]
    end, two = decode(a, b, "--max_new_tokens", "40", output="two.txt", **options)
    assert end is None and two == f"a\t{lines[0][1]}\nb\t{lines[1][1]}\n"


def test_only_one_kind_of_input_is_accepted(decode, make_wav, tiny_corpus, tmp_path, capsys):
    wav = make_wav()
    for options in ([wav], ["--jsonl_file", tiny_corpus.jsonl]):
        assert decode(*options)[0] == 2
    assert decode(scp=None)[0] == 2
    assert capsys.readouterr().err.count("pass exactly one of") == 3
    assert "gone.wav: no such file" in decode(tmp_path / "gone.wav", scp=None)[0]
    assert "table.csv is no recording; `hf-speechllm prepare`" in decode(tmp_path / "table.csv", scp=None)[0]


def test_a_list_is_checked_before_the_model_is_loaded(decode, tiny_model, tmp_path, make_wav, monkeypatch, caplog):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"damaged")
    scp = tmp_path / "wav.scp"
    scp.write_text("one gone.wav\ntwo\nthree gone.wav\n")
    message, text = decode(scp=scp, model=model)
    assert "3 failed" in message and "one: " in message and f"{scp}:2: one field only" in message and text is None
    make_wav("whole.wav")
    scp.write_text("one gone.wav\ntwo whole.wav\n")
    message, _ = decode(scp=scp, model=model)
    assert "1 of 2 requests are unusable" in caplog.text and "model.safetensors is damaged" in message


def test_the_first_20_failures_are_named_and_all_are_in_a_file(decode, tmp_path, make_wav, capsys):
    scp, failures = tmp_path / "wav.scp", tmp_path / "hyp.txt.failures"
    scp.write_text("".join(f"id{number:02d} gone{number}.wav\n" for number in range(25)))
    message, _ = decode(scp=scp)
    assert "written" not in capsys.readouterr().out  # no text, no file
    lines = message.splitlines()
    assert "25 failed" in lines[0] and sum("no such file" in line for line in lines) == 20
    assert f"and 5 more; {failures} lists all" in message
    named = failures.read_text().splitlines()
    assert [line.split(":")[0] for line in named] == [f"id{number:02d}" for number in range(25)]
    for number in range(25):
        make_wav(f"gone{number}.wav", seconds=0.1)
    assert decode("--max_new_tokens", "1", scp=scp)[0] is None
    assert not failures.exists()


def test_ids_of_any_length_and_characters_have_different_files(decode, make_wav, tmp_path):
    make_wav()
    ids = ["x" * 300 + "1", "x" * 300 + "2", "语" * 200, "a/b", "a%2Fb", ".."]
    scp = tmp_path / "wav.scp"
    scp.write_text("".join(f"{id_} a.wav\n" for id_ in ids), encoding="utf-8")
    end, text = decode("--vad", "--max_new_tokens", "1", scp=scp)
    assert end is None and [line.split("\t")[0] for line in text.splitlines()] == ids
    assert len(list((tmp_path / "hyp.subtitles").iterdir())) == 2 * len(ids)


def test_pipes_and_devices_in_a_list_are_errors(decode, make_wav, tmp_path):
    make_wav()
    os.mkfifo(tmp_path / "pipe.wav")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "endless.wav").symlink_to("/dev/zero")
    (tmp_path / "folder.wav").mkdir()
    names = ["pipe.wav", "pipe.tar::a.wav@0+9", "endless.wav", "folder.wav", "a.wav"]
    scp = tmp_path / "wav.scp"
    scp.write_text("".join(f"id{number} {name}\n" for number, name in enumerate(names)))
    message, text = decode("--max_new_tokens", "1", scp=scp)
    assert "4 failed" in message and message.count("not a regular file") == 4
    assert text.startswith("id4\t") and len(text.splitlines()) == 1


def test_full_disk_ends_a_run_in_one_line_and_keeps_results(decode, tmp_path, monkeypatch, caplog):
    add, added = Journal.add, []

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(journal, key, transcript):
        added.append(key)
        if len(added) > 5:
            journal._file = Full()
        add(journal, key, transcript)

    monkeypatch.setattr(Journal, "add", fill)
    message, text = decode("--max_new_tokens", "2", "--batch_seconds", "1")
    assert "hyp.txt.partial-0.jsonl cannot be written: No space left on device" in message and text is None
    assert "start again" in message and len(message.splitlines()) == 1
    monkeypatch.setattr(Journal, "add", add)
    caplog.set_level(logging.INFO)
    end, text = decode("--max_new_tokens", "2", "--batch_seconds", "1")
    assert end is None and len(text.splitlines()) == 24 and "5 of 24 requests are already decoded" in caplog.text


def test_a_model_whose_logits_are_not_finite_ends_with_an_error(decode, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["llm.model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message, text = decode("--max_new_tokens", "2", model=model)
    assert "24 failed" in message and "logits are not finite" in message and text is None
