"""Output files, and joining of texts."""

import json

import pytest

from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.segments import Segment, join_texts
from hf_speechllm.inference.writers import srt, vtt, write_failures, write_results

SEGMENTS = (
    Segment(0.0, 1.25, "Hello there."),
    Segment(1.25, 2.0),
    Segment(3661.0004, 3725.9996, "a < b & c --> d\n\nnew", looped=True),
)


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one two", "three"], "one two three"),
        (["你好。", "再见"], "你好。再见"),
        (["今天", "很好"], "今天很好"),
        (["用", "Python"], "用 Python"),
        (["Python", "语言"], "Python 语言"),
        (["好。", "Good."], "好。Good."),
        (["안녕", "하세요"], "안녕 하세요"),
        (["ありがとう", "ございます"], "ありがとうございます"),
        (["", " a ", "", "b", ""], "a b"),
        ([], ""),
    ],
)
def test_texts_join_according_to_the_script(texts, joined):
    assert join_texts(texts) == joined


def test_subtitles_in_both_formats():
    assert srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,250\nHello there.\n\n2\n01:01:01,000 --> 01:02:06,000\na < b & c --> d new\n"
    )
    assert vtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nHello there.\n\n"
        "01:01:01.000 --> 01:02:06.000\na &lt; b &amp; c --&gt; d new\n"
    )
    assert (srt(()), vtt(())) == ("", "WEBVTT\n")


def test_segments_and_subtitles_are_optional(tmp_path):
    results = [("a/1", Transcript(0, "Hello\nthere.", 9.0, segments=SEGMENTS)), ("b", Transcript(1))]
    assert write_results(tmp_path / "hyp.txt", results) == [str(tmp_path / "hyp.txt")]
    assert [path.name for path in tmp_path.iterdir()] == ["hyp.txt"]
    assert (tmp_path / "hyp.txt").read_text() == "a/1\tHello there.\nb\t\n"
    written = write_results(tmp_path / "hyp.txt", results, segments=True, subtitles=True)
    assert sorted(written) == sorted(map(str, tmp_path.iterdir()))
    rows = [json.loads(line) for line in (tmp_path / "hyp.segments.jsonl").read_text().splitlines()]
    assert rows[0] == {"id": "a/1", "start": 0.0, "end": 1.25, "text": "Hello there.", "looped": False}
    assert [row["looped"] for row in rows] == [False, False, True]
    assert sorted(path.name for path in (tmp_path / "hyp.subtitles").iterdir()) == [
        "a%2F1.srt", "a%2F1.vtt", "b.srt", "b.vtt",
    ]  # fmt: skip
    assert (tmp_path / "hyp.subtitles/a%2F1.vtt").read_text() == vtt(SEGMENTS)


def test_missing_recordings_say_where_relative_paths_start(tmp_path):
    named = write_failures(tmp_path / "hyp.txt", ["a: /data/a.wav: no such file"]).splitlines()
    assert named[1] == "Relative paths start at the folder of the list, not at the working directory."
