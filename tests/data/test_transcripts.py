"""Transcripts and maps by ID: what is read, and what is refused with its place."""

import json

import pytest

from hf_speechllm.data.bad_rows import BadDataError, BadRows
from hf_speechllm.data.transcripts import (
    read_durations,
    read_map,
    read_transcripts,
    require_common_ids,
    split_line,
)
from hf_speechllm.inference.requests import requests_of_jsonl
from hf_speechllm.model.chat import transcription_messages


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path."""

    def make(content, name="list"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.fixture
def jsonl(write):
    """Writes rows of (recording, text, hotwords)."""

    def make(*rows):
        lines = [
            json.dumps({"messages": transcription_messages(path, "x", text), "hotwords": words}) + "\n"
            for path, text, words in rows
        ]
        return write("".join(lines), "rows.jsonl")

    return make


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a one two\r\n", ("a", "one two")),
        ("  a   one\ttwo", ("a   one", "two")),
        ("a b \t one ", ("a b", "one")),
        ("a\t", ("a", "")),
        ("a", ("a", "")),
        ("a\u3000b one", ("a\u3000b", "one")),
    ],
)
def test_a_line_is_an_id_and_the_rest(line, parts):
    assert split_line(line) == parts


def test_lines_of_a_map_have_an_id_and_a_value_each(write):
    path = write("\ufeffa one\n\n \t\nb\ttwo words\n")
    assert read_map(path) == {"a": "one", "b": "two words"}
    with pytest.raises(BadDataError, match=":2: one field only"):
        read_map(write("a one\nb\n"))
    assert read_map(write("a one\nb\n"), empty_values=True) == {"a": "one", "b": ""}
    with pytest.raises(BadDataError, match=r':3: duplicate ID: "a" is in line 1'):
        read_map(write("a one\nb two\na three\n"))
    with pytest.raises(BadDataError, match=r":2: not UTF-8 \(byte 3 of the line\)"):
        read_map(write(b"a one\nb \xff\n"))


def test_rows_as_references_are_known_by_their_recordings(jsonl):
    found = read_transcripts(jsonl(("/x/a.wav", "one", ["Ann"]), ("https://h/b.flac?c=d", "two", [])))
    assert found.texts == {"a": "one", "b": "two"}
    assert found.recordings == {"a": "/x/a.wav", "b": "https://h/b.flac?c=d"}
    assert found.hotwords == {"a": ["Ann"], "b": []}
    with pytest.raises(BadDataError, match=r'jsonl:2: duplicate ID: line 1 .*"a"'):
        read_transcripts(jsonl(("/x/a.wav", "one", []), ("/y/a.mp3", "two", [])))
    path = jsonl(("/x/a.wav", "one", []))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(BadDataError, match="rows.jsonl:2: not JSON"):
        read_transcripts(path)


def test_rows_with_a_key_are_known_by_the_key(jsonl):
    path = jsonl(("/x/a.wav", "one", []), ("/y/a.mp3", "two", []), ("/y/b.mp3", "three", []))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, key in zip(rows, (" s1/a ", 7, ""), strict=True):
        row["key"] = key
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_transcripts(path).texts == {"s1/a": "one", "7": "two", "b": "three"}
    assert [request.id for request in requests_of_jsonl(path, None, BadRows())] == ["s1/a", "7", "b"]
    rows[1]["key"] = "s1/a"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadDataError, match=r'jsonl:2: duplicate ID: line 1 also has the key "s1/a"'):
        read_transcripts(path)
    for key, shown in (("a\tb", r"'a\tb'"), ("a\0b", r"'a\x00b'")):
        path.write_text(json.dumps(rows[1] | {"key": key}) + "\n")
        bad_rows = BadRows()
        assert requests_of_jsonl(path, None, bad_rows) == []
        assert f"the key {shown} contains a tab, a line end or a zero byte" in str(list(bad_rows)[0])


def test_recordings_are_not_taken_for_transcripts(write):
    for content in ("a x.wav\nb y.FLAC\nc three\n", "a cat x |\n", "a x.ark:17\n"):
        with pytest.raises(BadDataError, match="recordings .* transcripts"):
            read_transcripts(write(content))
    assert len(read_transcripts(write("a x.wav\nb two\n")).texts) == 2  # half of them may be
    assert read_transcripts(write("a see x.wav\n")).texts == {"a": "see x.wav"}


def test_no_transcripts_are_an_error_where_there_must_be_some(write):
    assert read_transcripts(write("")).texts == {}
    with pytest.raises(BadDataError, match="no transcripts"):
        read_transcripts(write(""), required=True)


def test_lists_without_a_common_id_are_named_with_their_first(write):
    texts = {"a": "one", "b": "two"}
    require_common_ids("ref", texts, {"hyp": {"x": 1, "b": 2}, None: {}})
    with pytest.raises(BadDataError, match='hyp.*ref.*"x".*"a"'):
        require_common_ids("ref", texts, {"hyp": {"x": 1}})
    with pytest.raises(BadDataError, match="hyp.*ref"):
        require_common_ids("ref", texts, {"hyp": {}})


def test_durations_are_positive_numbers(write):
    assert read_durations(write("a 1.5\nb 0.04\nc 12\n")) == {"a": 1.5, "b": 0.04, "c": 12.0}
    for value in ("0", "0.0", "-1", "1e3", "nan", "1.", "long"):
        with pytest.raises(BadDataError, match='"b" has no .*duration'):
            read_durations(write(f"a 1.5\nb {value}\n"))
