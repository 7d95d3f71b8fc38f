"""Files, folders and archives on the command line."""

import io
import os
import tarfile

import pytest

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.inference.requests import requests_of_sources
from hf_speechllm.inference.sources import find_recordings


def find(*sources):
    bad_rows = BadRows(1.0)
    return find_recordings(list(map(str, sources)), bad_rows), list(map(str, bad_rows))


@pytest.fixture
def make_tar(make_wav, tmp_path):
    content = make_wav("source/x.wav").read_bytes()

    def make(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                data = content if member.lower().endswith(".wav") else b"text"
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return make


def test_ids_of_files_and_urls_are_stems(make_wav, tmp_path):
    files = [make_wav("b.wav"), make_wav("my talk.2.flac"), make_wav("a/c.wav")]
    (tmp_path / "raw").write_bytes(files[0].read_bytes())
    found, bad = find(*files, tmp_path / "raw", "https://host/x/d.mp3?key=1")
    assert [item.id for item in found] == ["b", "my_talk.2", "c", "raw", "d"] and not bad
    assert all(len(load_audio(item.recording)) for item in found[:4])


def test_recordings_with_equal_names_have_paths_as_ids(make_wav, tmp_path, monkeypatch):
    for name in ("one/a.wav", "two/a.wav", "two/a.flac", "two/b.wav"):
        make_wav(name)
    monkeypatch.chdir(tmp_path)
    found, _ = find("one/a.wav", "two")
    assert [item.id for item in found] == ["one/a.wav", "two/a.flac", "two/a.wav", "b"]
    assert all(os.path.isabs(item.recording) for item in found)


def test_folder_is_searched_recursively(make_wav, make_tar, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "talks"
    for name in ("b.WAV", "a.flac", "deep/er/c.ogg", "._a.wav"):
        make_wav(f"talks/{name}", **({"format": "WAV"} if name.endswith(("WAV", "wav")) else {}))
    (folder / "notes.txt").write_text("text")
    (folder / "README").write_text("text")
    make_tar("talks/d.tar", ["t/1.wav", "t/1.txt"])
    found, bad = find(folder)
    assert [item.id for item in found] == ["a", "b", "t/1", "deep/er/c"] and not bad
    assert all(len(load_audio(item.recording)) for item in found)
    assert "2 other files are skipped" in caplog.text and ".txt" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no recordings"):
        find(tmp_path / "empty")


def test_members_of_a_tar_file_need_no_transcripts(make_tar):
    path = make_tar("a.tar", ["x/1.wav", "x/1.json", "x/2.WAV", "x/._2.wav", "x/3.txt", "4.wav"])
    found, bad = find(path)
    assert [item.id for item in found] == ["x/1", "x/2", "4"] and not bad
    assert all(len(load_audio(item.recording)) == 8000 for item in found)


def test_damaged_and_empty_archives_are_reported(make_tar, tmp_path):
    cut = make_tar("cut.tar", ["1.wav", "2.wav"])
    cut.write_bytes(cut.read_bytes()[: 512 + 16384 + 512 + 100])
    garbage, nothing = tmp_path / "garbage.tar", make_tar("nothing.tar", ["a.txt"])
    garbage.write_bytes(b"no tar file" * 100)
    (tmp_path / "garbage.parquet").write_bytes(b"no parquet file")
    (tmp_path / "empty.tar").write_bytes(b"")
    _, bad = find(cut, garbage, nothing, tmp_path / "garbage.parquet", tmp_path / "empty.tar")
    for name in ("cut", "garbage", "nothing", "garbage.parquet", "empty.tar"):
        assert any(name in line for line in bad), (name, bad)


@pytest.mark.parametrize("kind", ["struct", "binary", "ids"])
def test_rows_of_a_parquet_file_need_no_transcripts(make_wav, tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    content = make_wav().read_bytes()
    if kind == "binary":
        columns = {"audio": [content] * 3}
    else:
        columns = {"audio": [{"bytes": content, "path": path} for path in ("x/one.wav", None, "two.wav")]}
    if kind == "ids":
        columns["id"] = [7, None, 9]
    pyarrow.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    found, bad = find(tmp_path / "a.parquet")
    expected = {"struct": ["one", "a-1", "two"], "binary": ["a-0", "a-1", "a-2"], "ids": ["7", "a-1", "9"]}[kind]
    assert [item.id for item in found] == expected and not bad
    assert all(len(load_audio(item.recording)) == 8000 for item in found)
    pyarrow.write_table(pa.table({"sound": [content]}), tmp_path / "b.parquet")
    assert "no column 'audio'" in find(tmp_path / "b.parquet")[1][0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.wav", "gone.wav: no such file"),
        ("gone.wav#t=abc", "gone.wav#t=abc: no such file; #t=abc is not a part of a recording: write #t=START or"),
        ("gone.wav#t=1", "gone.wav#t=1: no such file$"),
        ("a.jsonl", "--jsonl_file"),
        ("wav.scp", "--scp_file"),
        ("a.tar.gz", "compressed"),
        ("a.zip", "compressed"),
    ],
)
def test_unsupported_sources_are_refused_with_advice(tmp_path, name, message):
    if not name.startswith("gone"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises((ValueError, OSError), match=message):
        find(tmp_path / name)


def test_urls_with_equal_names_have_different_ids_without_secrets():
    found, _ = find("https://me:word@host/x/a.wav?key=1", "https://host/y/a.wav?key=2")
    assert [item.id for item in found] == ["https://***@host/x/a.wav?***", "https://host/y/a.wav?***"]


def test_file_names_that_cannot_be_ids_are_reported(make_wav, tmp_path):
    name = os.fsdecode(b"bad\xff.wav")
    os.rename(make_wav("a.wav"), tmp_path / name)
    make_wav("b.wav")
    bad_rows = BadRows(1.0)
    requests = requests_of_sources([str(tmp_path)], "Write:", bad_rows)
    assert [request.id for request in requests] == ["b"]
    (row,) = map(str, bad_rows)
    assert "is not UTF-8; rename the file" in row
    row.encode("utf-8")
