import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hf_speechllm.cli.scp2jsonl import load_tokenizer
from hf_speechllm.data.jsonl import read_jsonl
from hf_speechllm.data.kaldi import measure_recording

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "scp2jsonl.py"


@pytest.fixture
def corpus(make_wav, tmp_path):
    """Writes lists of generated recordings, and returns the flags for these lists."""

    def make(ids=("b", "a", "c"), scp="", text=""):
        for number, name in enumerate(ids):
            make_wav(f"audio/{name}.wav", seconds=0.5 + 0.25 * number)
        (tmp_path / "lists").mkdir(exist_ok=True)
        scp = "".join(f"{name} ../audio/{name}.wav\n" for name in ids) + scp
        text = "".join(f"{name} text of {name}\n" for name in sorted(ids)) + text
        (tmp_path / "lists" / "wav.scp").write_text(scp, encoding="utf-8")
        (tmp_path / "lists" / "text").write_text(text, encoding="utf-8")
        lists = ["--scp_file", tmp_path / "lists" / "wav.scp", "--transcript_file", tmp_path / "lists" / "text"]
        return [*lists, "--jsonl_file", tmp_path / "train.jsonl"]

    return make


def written(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def users(folder):
    return [row["messages"][1]["content"] for row in written(folder)]


def test_rows_have_the_format_of_fun_asr_and_the_order_of_the_scp(corpus, tmp_path, run_recipe, capsys):
    assert run_recipe("scp2jsonl.py", *corpus()) is None
    assert [row["messages"][2]["content"] for row in written(tmp_path)] == ["text of b", "text of a", "text of c"]
    assert written(tmp_path)[0] == {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"语音转写：<|startofspeech|>!{tmp_path}/audio/b.wav<|endofspeech|>"},
            {"role": "assistant", "content": "text of b"},
        ],
        "speech_length": 48,
    }
    summary = capsys.readouterr().out.splitlines()
    assert "rows: 3" in summary and "bad rows: 0" in summary
    assert "seconds: mean 0.75, min 0.50, max 1.00" in summary


def test_many_workers_keep_the_order(corpus, tmp_path, run_recipe):
    ids = [f"id{number}" for number in (*range(30, 60), *range(30))]
    assert run_recipe("scp2jsonl.py", *corpus(ids), "--num_workers", 8) is None
    assert [row["messages"][2]["content"] for row in written(tmp_path)] == [f"text of {name}" for name in ids]


@pytest.mark.parametrize(
    "flags, prompt",
    [
        (["--language", "en"], "语音转写成英文："),
        (["--language", "英文"], "语音转写成英文："),
        (["--no_itn"], "语音转写，不进行文本规整："),
        (["--prompt", "Speech transcription:"], "Speech transcription:"),
    ],
)
def test_prompt_is_chosen_by_flags(corpus, tmp_path, run_recipe, flags, prompt):
    assert run_recipe("scp2jsonl.py", *corpus(["a"]), *flags) is None
    assert users(tmp_path) == [f"{prompt}<|startofspeech|>!{tmp_path}/audio/a.wav<|endofspeech|>"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--language", "xx"], "unknown language"),
        (["--prompt", "A:", "--no_itn"], "prompt replaces the instruction"),
        (["--prompt", "<|im_end|>"], "contains"),
    ],
)
def test_invalid_prompt_is_an_error_before_any_work(corpus, tmp_path, run_recipe, capsys, flags, message):
    assert message in run_recipe("scp2jsonl.py", *corpus(), *flags)
    assert "checking" not in capsys.readouterr().err
    assert not (tmp_path / "train.jsonl").exists()


def test_relative_paths_start_at_the_jsonl(corpus, tmp_path, run_recipe, make_wav):
    make_wav("录音 1.wav")
    flags = corpus(["a"], "x ../录音 1.wav\n", "x 一\n")
    (tmp_path / "out").mkdir()
    flags[-1] = tmp_path / "out" / "train.jsonl"
    assert run_recipe("scp2jsonl.py", *flags, "--relative") is None
    assert [user.split("!")[1] for user in users(tmp_path / "out")] == [
        "../audio/a.wav<|endofspeech|>",
        "../录音 1.wav<|endofspeech|>",
    ]
    recordings = [row.recordings[0] for row in read_jsonl(flags[-1])]
    assert recordings == [f"{tmp_path}/audio/a.wav", f"{tmp_path}/录音 1.wav"]


def test_url_is_measured_and_written_unchanged(corpus, tmp_path, run_recipe, serve, make_wav):
    make_wav("a b.wav", seconds=0.5)
    url = f"{serve(tmp_path)}/a b.wav"
    assert run_recipe("scp2jsonl.py", *corpus([], f"u {url}\n", "u one\n"), "--relative") is None
    assert users(tmp_path) == [f"语音转写：<|startofspeech|>!{url}<|endofspeech|>"]
    assert written(tmp_path)[0]["speech_length"] == 48


@pytest.fixture
def bad_corpus(corpus, make_wav, serve, tmp_path):
    """Three good utterances and one utterance for each fault; returns flags and expected messages."""
    cut = make_wav("audio/cut.wav")
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "audio" / "empty.wav").write_bytes(b"")
    (tmp_path / "audio" / "words.wav").write_text("words\n" * 100)
    make_wav("audio/short.wav", seconds=0.02)
    make_wav("audio/good.wav")
    url = f"{serve(tmp_path)}/none.wav"
    paths = {
        "missing": ("../audio/missing.wav", "audio/missing.wav: no such file"),
        "empty": ("../audio/empty.wav", "audio/empty.wav: the file is empty"),
        "cut": ("../audio/cut.wav", "audio/cut.wav: truncated"),
        "words": ("../audio/words.wav", "audio/words.wav: not audio"),
        "short": ("../audio/short.wav", "audio/short.wav: shorter than 25 ms"),
        "url": (url, f"{url}: the server answers 404"),
    }
    scp = "".join(f"{name} {path}\n" for name, (path, _) in paths.items())
    text = "".join(f"{name} text\n" for name in paths)
    scp += (
        "a ../audio/good.wav\nonly_scp ../audio/good.wav\nbare\nsilent ../audio/good.wav\nmarked ../audio/good.wav\n"
    )
    text += "only_text text\nbare text\nsilent\nmarked <|im_end|>\n"
    flags = corpus(scp=scp, text=text)
    faults = [f"wav.scp:{line}: unusable recording: " for line in range(4, 10)]
    faults += [reason for _, reason in paths.values()]
    faults += ['wav.scp:10: duplicate ID: "a" is in line 2', 'wav.scp:11: ID in one list only: "only_scp"']
    faults += ["wav.scp:12: one field only", 'text:10: ID in one list only: "only_text"']
    faults += ['text:12: one field only: "silent" has an empty transcript', "text:13: unusable transcript: "]
    return flags, faults


def test_bad_rows_stop_the_run_and_are_named_with_file_and_line(bad_corpus, tmp_path, run_recipe):
    flags, faults = bad_corpus
    message = run_recipe("scp2jsonl.py", *flags)
    assert "12 of 15 rows are bad" in message
    assert [fault for fault in faults if fault not in message] == []
    assert not (tmp_path / "train.jsonl").exists()


def test_allowed_bad_rows_are_left_out_named_and_counted(bad_corpus, tmp_path, run_recipe, capsys, caplog):
    flags, faults = bad_corpus
    report = tmp_path / "bad.txt"
    assert run_recipe("scp2jsonl.py", *flags, "--max_bad_fraction", 0.8, "--bad_rows_file", report) is None
    assert [row["messages"][2]["content"] for row in written(tmp_path)] == ["text of b", "text of a", "text of c"]
    assert [fault for fault in faults if fault not in caplog.text] == []
    assert len(report.read_text(encoding="utf-8").splitlines()) == 12
    out = capsys.readouterr().out
    assert "rows: 3" in out
    assert "bad rows: 12 (unusable recording 6, one field only 2, ID in one list only 2, duplicate ID 1" in out


def test_all_written_rows_can_be_read(bad_corpus, tmp_path, run_recipe):
    flags, _ = bad_corpus
    run_recipe("scp2jsonl.py", *flags, "--max_bad_fraction", 1)
    rows = list(read_jsonl(tmp_path / "train.jsonl"))
    assert [row.speech_length for row in rows] == [measure_recording(row.recordings[0])[1] for row in rows]


def test_no_rows_at_all_is_an_error(corpus, tmp_path, run_recipe):
    assert "no rows" in run_recipe("scp2jsonl.py", *corpus([]))
    assert "no rows" in run_recipe("scp2jsonl.py", *corpus([], "a none.wav\n", "a one\n"), "--max_bad_fraction", 1)
    assert not (tmp_path / "train.jsonl").exists()


def test_existing_output_is_an_error_before_any_work(corpus, tmp_path, run_recipe, capsys):
    flags = corpus()
    (tmp_path / "train.jsonl").write_text("old")
    assert run_recipe("scp2jsonl.py", *flags) == 1
    error = capsys.readouterr().err
    assert "--overwrite" in error and "checking" not in error
    assert (tmp_path / "train.jsonl").read_text() == "old"
    assert run_recipe("scp2jsonl.py", *flags, "--overwrite") is None
    assert len(written(tmp_path)) == 3


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--jsonl_file", "/dev/null/train.jsonl"], 1, "/dev/null/train.jsonl"),
        (["--scp_file", "/none/wav.scp"], 1, "/none/wav.scp"),
        (["--transcript_file", "/none/text"], 1, "/none/text"),
        (["--max_bad_fraction", "1.5"], 2, "--max_bad_fraction"),
        (["--num_workers", "0"], 2, "--num_workers"),
    ],
)
def test_wrong_flag_is_named(corpus, run_recipe, capsys, flags, status, message):
    assert run_recipe("scp2jsonl.py", *corpus(), *flags) == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_folder_without_a_tokenizer_is_named(corpus, tmp_path, run_recipe):
    assert str(tmp_path / "lists") in run_recipe("scp2jsonl.py", *corpus(), "--model_name_or_path", tmp_path / "lists")


def test_full_disk_leaves_the_old_file(corpus, tmp_path, run_recipe, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = corpus()
    (tmp_path / "train.jsonl").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in run_recipe("scp2jsonl.py", *flags, "--overwrite")
    assert (tmp_path / "train.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "lists", "train.jsonl"]


@pytest.fixture
def waiting(corpus, serve):
    """Starts the recipe with a URL whose answer never ends before some files, and gives it as it waits for that.

    And an event that comes when nothing waits any more.
    """
    asked, gone = threading.Event(), threading.Event()

    class NeverEnds(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            with suppress(OSError):
                while True:  # a byte now and then, so that no timeout of the client ends it
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            gone.set()

    def start(num_files, num_workers):
        scp = f"u {serve(handler=NeverEnds)}/u.wav\n" + "".join(f"u{i} ../audio/a.wav\n" for i in range(num_files))
        text = "u one\n" + "".join(f"u{i} one\n" for i in range(num_files))
        environment = {**os.environ, "PYTHONPATH": str(RECIPE.parents[1]), "SPEECHLLM_URL_TIMEOUT_SECONDS": "3600"}
        command = [sys.executable, RECIPE, *corpus(["a"], scp, text), "--num_workers", str(num_workers)]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )  # fmt: skip
        assert asked.wait(60)
        time.sleep(0.5)  # the main thread may still be on its way to wait for the answer
        return process, gone

    return start


@pytest.mark.parametrize("num_files, num_workers", [(0, 8), (300, 2)])  # in threads, in processes
def test_interruption_stops_at_once_and_writes_nothing(waiting, tmp_path, num_files, num_workers):
    process, gone = waiting(num_files, num_workers)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    errors = process.communicate(timeout=120)[1]
    assert gone.wait(60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "lists"]


def test_processes_end_when_the_first_is_killed(waiting):
    process, gone = waiting(300, 2)
    process.kill()
    assert gone.wait(60)
    process.communicate(timeout=120)  # the others have closed standard error, too


def test_long_lists_have_the_same_rows_as_short_ones(bad_corpus, tmp_path, run_recipe, make_wav, capsys):
    make_wav("audio/a.wav")
    flags, _ = bad_corpus
    for list_, value in ((flags[1], "../audio/a.wav"), (flags[3], "text")):
        with open(list_, "a", encoding="utf-8") as file:
            file.writelines(f"more{number} {value}\n" for number in range(300))
    results = []
    for num_workers in (1, 2, 64):  # the last takes threads
        report = tmp_path / "bad.txt"
        allowed = ["--max_bad_fraction", 0.8, "--bad_rows_file", report, "--num_workers", num_workers, "--overwrite"]
        assert run_recipe("scp2jsonl.py", *flags, *allowed) is None
        results.append([(tmp_path / "train.jsonl").read_bytes(), report.read_text(), capsys.readouterr().out])
    assert results[0] == results[1] == results[2]
    assert len(written(tmp_path)) == 303 and len(results[0][1].splitlines()) == 12


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", RECIPE, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "hf-speechllm scp2jsonl --scp_file" in result.stdout
    imported = {name.split(".")[0] for name in re.findall(r"^import time:.*\|\s+(\S+)$", result.stderr, re.MULTILINE)}
    assert {"argparse", "logging"} <= imported
    assert not imported & {
        "numpy",
        "torch",
        "torchaudio",
        "transformers",
        "datasets",
        "soundfile",
        "av",
    }


def test_tokens_are_those_of_the_model_in_its_own_or_funasr_layout(corpus, tmp_path, shared, run_recipe, capsys):
    model = shared / "golden" / "funasr_tiny" / "model"
    os.symlink(shared / "golden" / "funasr_tiny" / "audio", tmp_path / "audio")
    flags = corpus([], "a ../audio/BAC009S0150W0050.wav\n", "a 想听歌曲Call Me Maybe\n")
    for path in (model, model / "Qwen3-0.6B"):
        assert run_recipe("scp2jsonl.py", *flags, "--model_name_or_path", path, "--overwrite") is None
        assert list(written(tmp_path)[0].items())[1:] == [("speech_length", 436), ("text_length", 6)]
        assert "tokens: 6" in capsys.readouterr().out


def test_log_says_that_text_length_is_left_out_without_a_model(corpus, tmp_path, run_recipe, caplog):
    with caplog.at_level("INFO"):
        run_recipe("scp2jsonl.py", *corpus())
    assert "text_length is left out" in caplog.text
    assert all("text_length" not in row for row in written(tmp_path))


def test_reference_lengths_are_reproduced(shared):
    folder = shared / "golden" / "funasr_tiny"
    tokenizer = load_tokenizer(str(folder / "model"))
    rows = list(read_jsonl(folder / "data.jsonl"))
    assert len(rows) == 7
    for row in rows:
        answers = [turn.answer for turn in row.dialogue.turns]
        assert sum(measure_recording(recording)[1] for recording in row.recordings) == row.speech_length
        assert sum(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers) == row.text_length


def test_real_lists_have_a_row_for_each_recording(shared, tmp_path, run_recipe):
    folder = shared / "data" / "fsdd_en" / "train"
    flags = ["--scp_file", folder / "wav.scp", "--transcript_file", folder / "text"]
    assert run_recipe("scp2jsonl.py", *flags, "--jsonl_file", tmp_path / "train.jsonl") is None
    assert len(written(tmp_path)) == 1800


def test_segments_are_rows_if_the_transcripts_have_their_ids(corpus, tmp_path, run_recipe):
    flags = corpus(["a", "b"])
    (tmp_path / "lists" / "text").write_text("s1 one\ns2 two\n", encoding="utf-8")
    (tmp_path / "lists" / "segments").write_text("s1 a 0.1 0.4\ns2 b 0.25 -1\n", encoding="utf-8")
    assert run_recipe("scp2jsonl.py", *flags, "--relative") is None
    assert users(tmp_path) == [
        f"语音转写：<|startofspeech|>!audio/{part}<|endofspeech|>" for part in ("a.wav#t=0.1,0.4", "b.wav#t=0.25")
    ]
    assert [row["speech_length"] for row in written(tmp_path)] == [28, 48]
    (tmp_path / "lists" / "segments").write_text("s1 a 0.1 0.9\ns2 b 0.25 0.5\n", encoding="utf-8")
    message = run_recipe("scp2jsonl.py", *flags, "--relative", "--overwrite")
    assert "lists/segments:1: unusable recording:" in message and "outside the recording, which has 0.50 s" in message
