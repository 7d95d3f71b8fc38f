"""Transcripts for a new tokenizer come from any list."""

import json

import pytest

from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.corpus import read_texts
from hf_speechllm.model.chat import transcription_messages


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("text", "a one two\nb\nc\tthree\n", ["one two", "three"]),
        ("a.csv", 'path,text\na.wav,one two\nb.wav,"three, four"\n', ["one two", "three, four"]),
        ("a.tsv", "path\ttext\na.wav\tone two\n", ["one two"]),
        ("a.jsonl", json.dumps({"audio_filepath": "a.wav", "text": "one two", "duration": 1}), ["one two"]),
        (
            "b.jsonl",
            json.dumps({"messages": transcription_messages("a.wav", "Write:", "one two")}) + "\n",
            ["one two"],
        ),
    ],
)
def test_transcripts_are_read_completely(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_texts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "path,text\na.wav,\n", "no transcripts"),
        ("a.csv", "clip,said\na.wav,one\n", "no column of recordings"),
        ("wav.scp", "a a.wav\n", "instead of transcripts"),
        ("a.parquet", "a one", "not Parquet"),
    ],
)
def test_files_without_transcripts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadDataError, match=message):
        read_texts(str(tmp_path / name))
