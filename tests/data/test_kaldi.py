import numpy as np
import pytest
import soundfile

from hf_speechllm.audio.waveform import AudioError
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.data.kaldi import join, measure_recording, read_list, read_scp, require_transcripts, speech_length
from hf_speechllm.inference.requests import requests_of_scp


@pytest.fixture
def lists(tmp_path):
    """Writes wav.scp and text, and returns the joined utterances and the bad rows."""

    def write(scp, text):
        bad_rows = BadRows()
        for name, content in (("wav.scp", scp), ("text", text)):
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        recordings = read_scp(tmp_path / "wav.scp", bad_rows)
        transcripts = read_list(tmp_path / "text", bad_rows, "transcript")
        return join(recordings, transcripts, bad_rows), named(bad_rows, tmp_path)

    return write


def named(bad_rows, folder):
    return [str(row).replace(f"{folder}/", "") for row in bad_rows]


def test_order_follows_the_scp(lists, tmp_path):
    utterances, bad = lists("b b.wav\na a.wav\nc c.wav\n", "a one\nc three\nb two words\n")
    assert [(u.id, u.transcript) for u in utterances] == [("b", "two words"), ("a", "one"), ("c", "three")]
    assert [u.recording for u in utterances] == [str(tmp_path / name) for name in ("b.wav", "a.wav", "c.wav")]
    assert [(u.recording_line, u.transcript_line) for u in utterances] == [(1, 3), (2, 1), (3, 2)]
    assert bad == []


def test_tabs_spaces_windows_line_ends_byte_order_mark_and_empty_lines_are_accepted(lists, tmp_path):
    scp = b"\xef\xbb\xbfa\ta.wav\r\n\r\n  b \t  my b.wav  \r\n   \n"
    utterances, bad = lists(scp, "b 你好  世界 \na one")
    assert [(u.id, u.recording, u.transcript) for u in utterances] == [
        ("a", str(tmp_path / "a.wav"), "one"),
        ("b", str(tmp_path / "my b.wav"), "你好  世界"),
    ]
    assert bad == []


def test_spaces_of_unicode_are_part_of_a_value(lists):
    utterances, bad = lists("a a.wav\n", "a 你好\u3000世界\u2028再见\n")
    assert utterances[0].transcript == "你好\u3000世界\u2028再见"
    assert bad == []


@pytest.mark.parametrize(
    "written, read",
    [
        ("../audio/录音.wav", "{parent}/audio/录音.wav"),
        ("/data/a.wav", "/data/a.wav"),
        ("HTTP://example.com/a b.wav", "HTTP://example.com/a b.wav"),
    ],
)
def test_paths_are_relative_to_the_list_and_urls_stay(lists, tmp_path, monkeypatch, written, read):
    monkeypatch.chdir("/")
    utterances, _ = lists(f"a {written}\n", "a one\n")
    assert utterances[0].recording == read.format(parent=tmp_path.parent)


def test_ids_in_one_list_only_are_reported_with_file_and_line(lists):
    utterances, bad = lists("a a.wav\nb b.wav\n", "c three\na one\n")
    assert [u.id for u in utterances] == ["a"]
    assert [line.partition(": ID")[0] for line in bad] == ["wav.scp:2", "text:1"]
    assert '"b" is not in' in bad[0] and '"c" is not in' in bad[1]


def test_line_with_one_field_is_reported_once(lists):
    utterances, bad = lists("a\nb b.wav\nc c.wav\n", "a one\nb two\nc \t\n")
    assert [u.id for u in utterances] == ["b"]
    assert len(bad) == 2
    assert bad[0].startswith('wav.scp:1: one field only: "a" has an empty path')
    assert bad[1].startswith('text:3: one field only: "c" has an empty transcript')


def test_transcript_of_unicode_spaces_is_empty(lists):
    utterances, bad = lists("a a.wav\n", "a \u3000\n")
    assert utterances == []
    assert bad[0].startswith("text:1: ") and "empty transcript" in bad[0]


def test_first_line_of_a_duplicate_id_is_kept_and_named(lists):
    utterances, bad = lists("a a.wav\nb b.wav\na c.wav\n", "a one\n\na two\nb three\n")
    assert [(u.recording[-5:], u.transcript) for u in utterances] == [("a.wav", "one"), ("b.wav", "three")]
    assert bad == ['wav.scp:3: duplicate ID: "a" is in line 1, too', 'text:3: duplicate ID: "a" is in line 1, too']


def test_line_that_is_not_utf8_is_reported_once(lists):
    utterances, bad = lists("a a.wav\nb b.wav\n", b"a one\nb \xc4\xe3\xba\xc3\n")
    assert [u.id for u in utterances] == ["a"]
    assert [line.partition(" ")[0] for line in bad] == ["text:2:"]
    assert "not UTF-8" in bad[0]


@pytest.mark.parametrize(
    "value, what",
    [
        ("cat x.wav |", "command"),
        ("sph2pipe -f wav x.sph|", "command"),
        ("x.ark:123", "archive"),
        ("/data/raw_wav.1.ark:4567[0:3]", "archive"),
        ("x.ark", "archive"),
    ],
)
def test_kaldi_commands_and_archives_are_reported_once(lists, value, what):
    utterances, bad = lists(f"a {value}\nb b.wav\n", "a one\nb two\n")
    assert [u.id for u in utterances] == ["b"]
    assert len(bad) == 1 and bad[0].startswith("wav.scp:1: not a file: ") and what in bad[0] and value in bad[0]


def test_names_similar_to_archives_are_accepted(lists):
    utterances, bad = lists("a x.ark.wav\nb noah.ark/b:1.wav\n", "a one\nb two\n")
    assert len(utterances) == 2 and bad == []


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_speech_length_follows_the_formula_in_milliseconds(rate):
    for num_samples in [*range(rate // 40, rate // 5), 5 * rate, 3600 * rate + 1]:
        assert speech_length(num_samples, rate) == int((1000 * num_samples / rate - 25) // 10 + 1)


def test_speech_length_equals_the_number_of_fbank_frames():
    assert [speech_length(samples, 16000) for samples in (399, 400, 559, 560)] == [0, 1, 1, 2]


def test_recording_of_25_ms_has_one_frame_and_a_shorter_one_is_an_error(tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.zeros(400), 16000)
    assert measure_recording(str(path)) == (0.025, 1)
    soundfile.write(path, np.zeros(399), 16000)
    with pytest.raises(AudioError, match=r"short\.wav: shorter than 25 ms: 24\.9 ms"):
        measure_recording(str(path))


def test_missing_list_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_list(tmp_path / "none", BadRows())


def test_paths_outside_the_root_are_bad(tmp_path):
    (tmp_path / "wav.scp").write_text("a a.wav\nb ../b.wav\nc /etc/passwd\nd https://h/d.wav\n")
    bad_rows = BadRows()
    scp = read_scp(tmp_path / "wav.scp", bad_rows, str(tmp_path))
    assert [entry.id for entry in scp.entries] == ["a", "d"]
    assert [row.line for row in bad_rows] == [2, 3]
    assert all("outside --audio_root" in row.reason for row in bad_rows)


def test_byte_order_marks_inside_joined_lists_are_removed(lists):
    utterances, bad = lists(b"a a.wav\n\xef\xbb\xbfb b.wav\n", b"\xef\xbb\xbfb two\na one\n")
    assert [u.id for u in utterances] == ["a", "b"] and bad == []


def test_ignored_segments_file_is_reported(tmp_path, caplog):
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "segments").write_text("a-1 a 0.0 1.0\n")
    requests = requests_of_scp(tmp_path / "wav.scp", "Write:", BadRows(), tmp_path / "segments")
    assert [request.id for request in requests] == ["a-1"] and not caplog.text
    requests_of_scp(tmp_path / "wav.scp", "Write:", BadRows())
    assert f"{tmp_path}/segments is ignored" in caplog.text


def test_transcripts_in_place_of_recordings_are_reported_once(tmp_path):
    (tmp_path / "text").write_text("a hello world\nb 几点了？\nc good morning. yes\n", encoding="utf-8")
    with pytest.raises(ValueError, match='"hello world" is not a URL, a path or an existing file'):
        read_scp(tmp_path / "text", BadRows())
    (tmp_path / "wav.scp").write_text("a hello world\nb a recording\n", encoding="utf-8")
    (tmp_path / "a recording").write_bytes(b"RIFF")
    assert len(read_scp(tmp_path / "wav.scp", BadRows()).entries) == 2


def test_swapped_lists_are_reported_without_secrets(tmp_path):
    (tmp_path / "text").write_text("a https://user:word@host/a.wav?key=1\n")
    with pytest.raises(ValueError, match="swapped") as error:
        require_transcripts(read_list(tmp_path / "text", BadRows()))
    assert "word" not in str(error.value) and "key" not in str(error.value)
