"""Shared fixtures: rows in a JSONL, and a real recording to plant faults in."""

import json
from pathlib import Path

import pytest

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.diagnosis.doctor import diagnose
from hf_speechllm.diagnosis.rows import read_rows
from hf_speechllm.model.chat import transcription_messages, transcription_prompt

PROMPT = transcription_prompt()
QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart_data"


@pytest.fixture(scope="session")
def speech():
    """A recording of speech (three seven nine eight), float32 at 16 kHz."""
    text = dict(line.split(" ", 1) for line in (QUICKSTART / "train" / "text").read_text().splitlines())
    key = next(key for key, value in sorted(text.items()) if len(value.split()) == 4 and key.startswith("en-us-train"))
    return load_audio(str(QUICKSTART / "audio" / f"{key}.ogg"))


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows (path, text, other keys) to a JSONL and returns its path."""

    def write(rows, name="train.jsonl", prompt=PROMPT):
        lines = []
        for path, text, *others in rows:
            row = {"messages": transcription_messages(str(path), prompt, text)}
            lines.append(json.dumps({**row, **(others[0] if others else {})}, ensure_ascii=False) + "\n")
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def examine():
    """Examines files; returns the kinds of findings by file name and line."""

    def run(*files, **options):
        found = {}
        for finding in diagnose(read_rows(list(map(str, files))), **{"vad": False, **options}).findings:
            found.setdefault((Path(finding.file).name, finding.line), []).append(finding.kind)
        return found

    return run
