"""`hf-speechllm doctor`: table, reports, clean rows and exit status."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_speechllm.cli import doctor, parser
from hf_speechllm.cli.main import main  # noqa: F401  (the fixture `run` starts it)
from hf_speechllm.diagnosis.kinds import KINDS
from hf_speechllm.diagnosis.page import histogram
from hf_speechllm.model.chat import transcription_messages, transcription_prompt

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart_data"
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


@pytest.fixture
def corpus(tmp_path):
    """train.jsonl with recordings that are silent or clipped, markup and a bad row; test.jsonl shares a recording."""
    texts = dict(line.split(" ", 1) for line in (QUICKSTART / "train" / "text").read_text("utf-8").splitlines())
    rows = []
    for key, text in sorted(texts.items()):
        if key.startswith("en-us-train") and " " in text and len(rows) < 13:
            rows.append((str(QUICKSTART / "audio" / f"{key}.ogg"), text, key))
    samples, _ = soundfile.read(rows.pop()[0], dtype="float32")
    for name, changed in (("silent", 0 * samples), ("clipped", np.clip(8 * samples, -1, 1))):
        soundfile.write(tmp_path / f"{name}.wav", changed, 16000)
        rows.append((str(tmp_path / f"{name}.wav"), "three eight", name))
    rows.append((rows[2][0] + "x", "one two", "missing"))
    rows[3] = (rows[3][0], f"{rows[3][1]} <script>", f"id{HOSTILE}")

    def line(path, text, key):
        messages = transcription_messages(path, transcription_prompt(), text)
        return json.dumps({"messages": messages, "key": key, "extra": [1]}, ensure_ascii=False) + "\n"

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(line(*row) for row in rows) + "{\n", encoding="utf-8")
    (tmp_path / "data" / "test.jsonl").write_text(line(rows[5][0], rows[5][1], "t"), encoding="utf-8")
    return tmp_path / "data"


def kinds_by_line(path):
    found = {}
    for finding in json.loads(path.read_text(encoding="utf-8"))["findings"]:
        found.setdefault((Path(finding["file"]).name, finding["line"]), []).append(finding["kind"])
    return found


def test_reports_and_clean_rows(run, corpus, tmp_path):
    outputs = {name: tmp_path / name for name in ("f.json", "f.html", "clean.jsonl")}
    arguments = ["--json", outputs["f.json"], "--html", outputs["f.html"], "--fix", outputs["clean.jsonl"], "--no_vad"]
    code, output = run("doctor", corpus, *arguments)
    assert code == 1
    assert "17 rows" in output.out and re.search(r"error +silent +1 .*train.jsonl:13: all samples are 0", output.out)
    assert kinds_by_line(outputs["f.json"]) == {
        ("train.jsonl", 4): ["markup"],
        ("train.jsonl", 6): ["recording-in-two-splits"],
        ("train.jsonl", 13): ["silent"],
        ("train.jsonl", 14): ["clipped"],
        ("train.jsonl", 15): ["missing-recording"],
        ("train.jsonl", 16): ["bad-row"],
    }
    report = json.loads(outputs["f.json"].read_text("utf-8"))
    assert report["rows"] == 17 and report["errors"] == 4 and report["warnings"] == 2
    markup = next(finding for finding in report["findings"] if finding["kind"] == "markup")
    assert markup["id"] == f"id{HOSTILE}" and markup["severity"] == "warning" and markup["split"] == "train"

    kept = (tmp_path / "clean.train.jsonl").read_text("utf-8").splitlines(keepends=True)
    lines = (corpus / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    assert kept == [line for number, line in enumerate(lines, 1) if number not in (4, 6, 13, 14, 15, 16)]
    assert (tmp_path / "clean.test.jsonl").read_text("utf-8") == (corpus / "test.jsonl").read_text("utf-8")
    table = [line.split("\t") for line in (tmp_path / "clean.dropped.tsv").read_text("utf-8").splitlines()]
    assert table[0] == ["file", "line", "id", "split", "kinds", "details"]
    assert [(line[1], line[4]) for line in table[1:]] == [
        ("16", "bad-row"), ("4", "markup"), ("6", "recording-in-two-splits"), ("13", "silent"), ("14", "clipped"),
        ("15", "missing-recording"),
    ]  # fmt: skip
    # The clean rows have no findings.
    assert run("doctor", f"train={tmp_path}/clean.train.jsonl", tmp_path / "clean.test.jsonl", "--strict")[0] == 0

    page = outputs["f.html"].read_text("utf-8")
    assert "<script>alert" not in page and "<img" not in page and "http" not in re.sub("http-equiv", "", page)
    assert page.count("<audio") == 4 and page.count("data:audio/ogg;base64,") == 4  # not the missing one
    if BROWSER:
        probe = """<script>document.body.setAttribute("data-wide", document.documentElement.scrollWidth - innerWidth);
        document.body.setAttribute("data-heights", [...document.querySelectorAll("figure svg")].map(
          figure => Math.round(figure.getBoundingClientRect().height)))</script>"""
        policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
        (tmp_path / "probe.html").write_text(policy.sub("", page).replace("</body>", probe + "</body>"), "utf-8")
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=500,900", "--dump-dom", (tmp_path / "probe.html").as_uri()]
        shown = subprocess.run(
            command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=120
        ).stdout
        assert int(re.search(r'data-wide="(-?\d+)"', shown)[1]) <= 0  # negative with a scroll bar
        heights = re.search(r'data-heights="([\d,]+)"', shown)[1].split(",")
        assert len(heights) == 4 and min(map(int, heights)) > 100


def test_exit_status(run, corpus, tmp_path, monkeypatch):
    errors = ["bad-row", "silent", "missing-recording", "recording-in-two-splits"]
    assert run("doctor", corpus, "--no_vad", "--ignore", *errors)[0] == 0
    assert run("doctor", corpus, "--no_vad", "--strict", "--ignore", *errors)[0] == 1
    assert run("doctor", corpus, "--no_vad", "--strict", "--ignore", *errors, "markup", "clipped")[0] == 0
    for arguments, message in (
        ((), "DATA is missing"),
        ((tmp_path / "none.jsonl",), "no such file"),
        ((corpus, "--ignore", "clip"), "unknown kind; did you mean clipped?"),
        ((corpus, "--json", corpus / "train.jsonl" / "f.json"), "choose another folder"),
        ((corpus, "--html", tmp_path, "--overwrite"), "is a folder; name a file"),
        ((corpus / "train.jsonl", "--fix", corpus / "train.jsonl"), "is an input of this command"),
        ((corpus, "--model", tmp_path), ""),
    ):
        code, output = run("doctor", *arguments)
        assert code == 2 and message in output.err and "Traceback" not in output.err, arguments
    with monkeypatch.context() as patch:  # a read-only disk; found before the examination
        patch.setattr(parser.tempfile, "TemporaryFile", lambda dir: (Path(dir) / "missing" / "file").touch())
        patch.setattr(doctor, "examine", None)
        code, output = run("doctor", corpus, "--json", tmp_path / "f.json")
        assert code == 2 and f"--json {tmp_path / 'f.json'}: the folder {tmp_path} is not writable" in output.err
    (tmp_path / "f.json").touch()
    assert run("doctor", corpus, "--json", tmp_path / "f.json")[0] == 2
    assert run("doctor", corpus, "--json", tmp_path / "f.json", "--overwrite", "--no_vad")[0] == 1
    (tmp_path / "x.dropped.tsv").touch()
    assert run("doctor", corpus, "--fix", tmp_path / "x.jsonl", "--no_vad")[0] == 2


def test_warnings_can_be_kept(run, corpus, tmp_path):
    assert run("doctor", corpus, "--no_vad", "--fix", tmp_path / "c.jsonl", "--drop", "error")[0] == 1
    assert len((tmp_path / "c.train.jsonl").read_text("utf-8").splitlines()) == 12
    assert (tmp_path / "c.dropped.tsv").read_text("utf-8").count("\n") == 5


def test_order_does_not_depend_on_the_processes(run, corpus, tmp_path):
    reports = []
    for number in (1, 2):
        run("doctor", corpus, "--no_vad", "--json", tmp_path / f"{number}.json", "--num_workers", number)
        reports.append((tmp_path / f"{number}.json").read_text("utf-8"))
    assert reports[0] == reports[1]


def test_speaker_of_a_prepared_corpus_in_two_splits(run, tmp_path):
    rows = {"train": ("en-us-train-0090", "anna"), "test": ("en-us-test-0000", "anna")}
    rows["dev"] = ("en-us-test-0006", "ben")
    for split, (key, speaker) in rows.items():
        (tmp_path / split).mkdir()
        for name, value in (("wav.scp", QUICKSTART / "audio" / f"{key}.ogg"), ("text", "one"), ("utt2spk", speaker)):
            (tmp_path / split / name).write_text(f"{key} {value}\n")
    out = tmp_path / "out"
    assert run("prepare", tmp_path, "--output_dir", out)[0] is None
    row = json.loads((out / "train.jsonl").read_text("utf-8"))
    assert (row["key"], row["speaker"]) == rows["train"] and "language" not in row
    _, output = run("doctor", out, "--no_vad")
    assert "speaker anna has rows in several splits" in output.out
    assert "hf-speechllm plan" in output.out and "--fix" not in output.out  # no row to leave out
    _, output = run("doctor", out / "train.jsonl", out / "test.jsonl", "--no_vad")
    assert "has rows in several splits" not in output.out  # all rows have one speaker


def test_paths_are_relative(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = QUICKSTART / "audio" / "en-us-train-0090.ogg"
    (tmp_path / "list.csv").write_text(f"audio,text\n{source},one\n{source},one\n")
    run("prepare", "list.csv", "--output_dir", "data", "--split", "1", "0", "0")
    _, output = run("doctor", "data", "--no_vad")
    assert "same recording as data/train.jsonl:1" in output.out and str(tmp_path) not in output.out
    _, output = run("doctor", "data", "--no_vad", "--fix", "new/clean.jsonl")
    _, output = run("doctor", "new/clean.jsonl", "--no_vad")
    assert "--train_file new/clean.jsonl" in output.out and str(tmp_path) not in output.out


def test_list_of_kinds(run):
    code, output = run("doctor", "--list_kinds")
    lines = output.out.splitlines()
    assert code == 0 and sum(not line.startswith(" ") for line in lines) == len(KINDS)
    assert max(map(len, lines)) <= 120


def test_histogram():
    bars = [int(count) for count in re.findall(r": (\d+)</title>", histogram(np.array([1.0] * 7 + [2.0, 30.0]), True))]
    assert sum(bars) == 9 and bars[0] == 7
    assert histogram(np.array([8.0, 8.0]), False).count("<rect") == 1
    labels = re.findall(r">([^<]+)</text>", histogram(np.linspace(-60, -10, 50), False))
    assert labels == ["−60", "−50", "−40", "−30", "−20", "−10"]
