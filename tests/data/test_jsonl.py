import json
import tracemalloc

import pytest

from hf_speechllm.data.bad_rows import BadRow
from hf_speechllm.data.jsonl import read_jsonl, write_jsonl
from hf_speechllm.model import chat

START, END = chat.SPEECH_START, chat.SPEECH_END


def messages(user=f"语音转写：{START}!a.wav{END}", answer="几点了？"):
    result = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": user}]
    return result if answer is None else [*result, {"role": "assistant", "content": answer}]


@pytest.fixture
def jsonl(tmp_path):
    """Writes lines (bytes, text, or objects) and returns the path."""

    def write(*lines, name="train.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, (bytes, str)) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_bytes(b"".join((t.encode() if isinstance(t, str) else t) + b"\n" for t in texts))
        return path

    return write


def reason(path, **options):
    """Returns the reason of the only row, which must be bad."""
    (row,) = read_jsonl(path, **options)
    assert isinstance(row, BadRow), row
    assert row.file == str(path) and row.line == 1
    return row.reason


def test_row_contains_the_content_of_the_line(jsonl, tmp_path):
    path = jsonl({"messages": messages(), "speech_length": 145, "text_length": 3})
    (row,) = read_jsonl(path)
    recording = str(tmp_path / "a.wav")
    assert row.recordings == [recording] == row.dialogue.recordings
    assert row.messages == messages(f"语音转写：{START}!{recording}{END}")
    assert row.dialogue == chat.parse_messages(row.messages)
    assert (row.speech_length, row.text_length, row.hotwords) == (145, 3, [])
    assert (row.file, row.line) == (str(path), 1)


def test_keys_of_funasr_are_read(jsonl):
    keys = {"hotwords": "a", "asr_hotwords": ["b", "c"], "hist_context": "before", "one_pass_result": "guess"}
    dialogue = messages()
    dialogue[-1]["prev_content"] = "现在"
    (row,) = read_jsonl(jsonl({"messages": dialogue, **keys}))
    assert row.hotwords == ["b", "c"]
    (turn,) = row.dialogue.turns
    assert turn.pieces[0] == chat.hotword_context(["b", "c"], "历史转写结果：before\n一遍解码结果：guess")
    assert (turn.prefix, turn.answer) == ("现在", "几点了？")
    assert chat.parse_messages(row.messages, row.hotwords) == row.dialogue  # what training reads


@pytest.mark.parametrize("key", [7.5, True, []])
def test_keys_that_are_no_names_are_bad(jsonl, key):
    assert 'bad "key"' in reason(jsonl({"messages": messages(), "key": key}))


@pytest.mark.parametrize("key, id_", [(7, "7"), ("b ", "b"), (None, "a"), ("", "a")])
def test_keys_are_text_or_whole_numbers(jsonl, key, id_):
    (row,) = read_jsonl(jsonl({"messages": messages(), "key": key}))
    assert row.id == id_


@pytest.mark.parametrize("key", ["asr_hotwords", "hist_context", "one_pass_result"])
def test_keys_of_funasr_of_a_wrong_type_are_bad(jsonl, key):
    assert f'bad "{key}"' in reason(jsonl({"messages": messages(), key: {"a": 1}}))


def test_missing_lengths_are_none(jsonl):
    (row,) = read_jsonl(jsonl({"messages": messages(), "text_length": None}))
    assert row.speech_length is None and row.text_length is None


@pytest.mark.parametrize(
    "written, read",
    [
        ("sub/a b 录音.wav", "{folder}/sub/a b 录音.wav"),
        ("../audio/a.wav", "{parent}/audio/a.wav"),
        ("/data/a.wav", "/data/a.wav"),
        ("https://example.com/a b.wav?x=1", "https://example.com/a b.wav?x=1"),
    ],
)
def test_paths_are_relative_to_the_file_and_urls_stay(jsonl, tmp_path, monkeypatch, written, read):
    path = jsonl({"messages": messages(f"{START}!{written}{END}")})
    monkeypatch.chdir("/")
    (row,) = read_jsonl(path)
    assert row.recordings == [read.format(folder=tmp_path, parent=tmp_path.parent)]


def test_parent_folder_of_a_linked_folder_is_the_parent_of_the_target(jsonl, tmp_path):
    (tmp_path / "real" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "train")
    path = jsonl({"messages": messages(f"{START}!../a.wav{END}")}, name="link/train.jsonl")
    (row,) = read_jsonl(path)
    assert row.recordings == [str(tmp_path / "real" / "a.wav")]


def test_several_turns_and_parts_keep_their_order(jsonl, tmp_path):
    second = [{"type": "text", "text": "English:"}, {"type": "audio", "path": "b.wav"}]
    turns = [*messages(), {"role": "user", "content": second}, {"role": "assistant", "content": "two"}]
    (row,) = read_jsonl(jsonl({"messages": turns}))
    assert row.recordings == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    assert [turn.answer for turn in row.dialogue.turns] == ["几点了？", "two"]
    assert row.messages[3]["content"][1] == {"type": "audio", "path": str(tmp_path / "b.wav")}


@pytest.mark.parametrize("hotwords", [["开放时间", "Qwen"], "开放时间，Qwen", "开放时间, Qwen"])
def test_hotwords_of_a_row_are_in_the_first_prompt(jsonl, hotwords):
    (row,) = read_jsonl(jsonl({"messages": messages(), "hotwords": hotwords}))
    assert row.hotwords == ["开放时间", "Qwen"]
    assert row.dialogue.turns[0].pieces[0] == chat.hotword_context(["开放时间", "Qwen"])


def test_byte_order_mark_windows_line_ends_and_empty_lines_are_accepted(jsonl):
    line = json.dumps({"messages": messages()}, ensure_ascii=False).encode()
    rows = list(read_jsonl(jsonl(b"\xef\xbb\xbf" + line + b"\r", b"", line, b"  ", b"")))
    assert [row.line for row in rows] == [1, 3]
    assert not any(isinstance(row, BadRow) for row in rows)


def test_line_separator_of_unicode_does_not_end_a_row(jsonl):
    (row,) = read_jsonl(jsonl({"messages": messages(answer="a\u2028b\x85c")}))
    assert row.dialogue.turns[0].answer == "a\u2028b\x85c"


def test_bad_lines_do_not_hide_the_good_ones(jsonl):
    good = {"messages": messages()}
    rows = list(read_jsonl(jsonl(good, "{", good, b"\xff", good)))
    assert [(row.line, isinstance(row, BadRow)) for row in rows] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
        (5, False),
    ]


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"messages": "\xc4\xe3"}', "not UTF-8"),
        ('{"messages": ', "not JSON"),
        ("id1 audio/a.wav", "hf-speechllm prepare converts Kaldi lists"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        ("[1]", "not an object"),
        ("{}", 'no "messages"'),
        ({"messages": {"role": "user"}}, '"messages" must be a list'),
        ({"messages": messages("语音转写：a.wav")}, "no recording: write <|startofspeech|>!PATH<|endofspeech|>"),
        ({"messages": messages(f"{START}a.wav{END}")}, "write <|startofspeech|>!a.wav<|endofspeech|>"),
        ({"messages": messages(f"{START}!{END}")}, "no path"),
        ({"messages": messages(f"{START}! {END}")}, "no path"),
        ({"messages": messages(f"{START}!a.wav")}, "without <|endofspeech|>"),
        ({"messages": messages(f"{START}!a.wav{END}{START}!b.wav{END}")}, "two recordings in one user message"),
        ({"messages": messages([{"type": "audio", "audio": 5}])}, "bad recording"),
        ({"messages": messages([{"type": "audio"}])}, "exactly one"),
        ({"messages": messages([{"type": "text"}, {"type": "audio", "audio": "a.wav"}])}, 'needs "text"'),
        ({"messages": messages()[:1]}, 'no "user" message'),
        ({"messages": messages()[::2]}, 'expected "user"'),
        ({"messages": [{"content": "x"}]}, 'expected "user"'),
        ({"messages": messages(answer=None)}, "no answer"),
        ({"messages": messages(answer=" ")}, "transcript) is empty"),
        ({"messages": messages(answer="a<|im_end|>")}, "contains <|im_end|>"),
        ({"messages": messages(), "speech_length": "145"}, "bad \"speech_length\": '145'"),
        ({"messages": messages(), "text_length": 3.5}, 'bad "text_length": 3.5'),
        ({"messages": messages(), "text_length": True}, 'bad "text_length": True'),
        ({"messages": messages(), "text_length": -1}, 'bad "text_length": -1'),
        ({"messages": messages(), "hotwords": 5}, 'bad "hotwords"'),
        ({"messages": messages(), "hotwords": ["a", 5]}, 'bad "hotwords"'),
        ({"messages": messages(), "hotwords": ["a", "b<|im_end|>"]}, 'bad "hotwords": a hotword contains <|im_end|>'),
    ],
)
def test_bad_line_is_reported_with_the_reason(jsonl, line, expected):
    assert expected in reason(jsonl(line))


def test_decoding_reads_rows_with_and_without_answers(jsonl):
    rows = read_jsonl(jsonl({"messages": messages()}, {"messages": messages(answer=None)}), require_answers=False)
    assert [row.dialogue.turns[-1].answer for row in rows] == ["几点了？", None]


def test_decoding_needs_a_recording_too(jsonl):
    assert "no recording" in reason(jsonl({"messages": messages("语音转写：", None)}), require_answers=False)


def test_memory_does_not_grow_with_the_file(jsonl):
    line = json.dumps({"messages": messages(answer="字" * 2000)}, ensure_ascii=False)
    path = jsonl(*[line] * 2000)
    tracemalloc.start()
    count = sum(1 for _ in read_jsonl(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < path.stat().st_size / 10


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        next(read_jsonl(tmp_path / "none.jsonl"))


def test_written_rows_are_read_again(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text_length": 3, "speech_length": 145, "messages": messages()}, {"messages": messages(), "key": "b"}]
    write_jsonl(rows, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [
        ["messages", "speech_length", "text_length"],
        ["messages", "key"],
    ]
    assert [json.loads(line) for line in lines] == rows
    assert "几点了？" in lines[0]
    assert [row.speech_length for row in read_jsonl(path)] == [145, None]


def test_missing_lengths_are_not_written(tmp_path):
    write_jsonl([{"messages": messages(), "speech_length": 145, "text_length": None}], tmp_path / "train.jsonl")
    assert list(json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8"))) == ["messages", "speech_length"]


def test_failure_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("old")

    def rows():
        yield {"messages": messages()}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(rows(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


def test_reads_the_reference_data(shared):
    path = shared / "golden" / "funasr_tiny" / "data.jsonl"
    rows = list(read_jsonl(path))
    assert [len(row.recordings) for row in rows] == [1, 1, 1, 1, 1, 1, 2]
    assert rows[0].recordings == [str(path.parent / "audio" / "BAC009S0150W0050.wav")]


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 12, "1e9", "-1"])
def test_excessive_lengths_are_bad(jsonl, number):
    line = json.dumps({"messages": messages()}, ensure_ascii=False)[:-1] + f', "speech_length": {number}}}'
    (row,) = read_jsonl(jsonl(line.encode()))
    assert isinstance(row, BadRow)
    assert "not JSON: Exceeds the limit" in row.reason or 'bad "speech_length"' in row.reason
