"""Tar and Parquet shards: all samples are read, from any position; bad samples are reported with their key."""

import json
import tarfile
from datetime import datetime

import numpy as np
import pytest

from hf_speechllm.audio.archives import find_archive, read_member
from hf_speechllm.audio.waveform import load_audio, probe_audio, source_stamp
from hf_speechllm.data.bad_rows import BadDataError, BadRow
from hf_speechllm.data.file_lists import expand_paths
from hf_speechllm.data.shards import Shard, read_shard, recordings_of_archive, shards_of

WAV = b"RIFF, or so"


def rows_of(path, **options):
    return [item.row for shard in shards_of(str(path)) for item in read_shard(shard, **options)]


def answers(rows):
    return [json.loads(row["messages"])[-1]["content"] for row in rows]


@pytest.fixture
def tar(write_tar, samples):
    return write_tar(
        [
            member
            for name, data, text in samples
            for member in ((f"a/{name}.wav", data), (f"a/{name}.txt", f"{text}\n".encode()))
        ]
    )


@pytest.fixture
def parquet(write_parquet, samples):
    return write_parquet(
        [{"audio": {"bytes": data, "path": f"{name}.wav"}, "text": text} for name, data, text in samples]
    )


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_read_samples_equal_written_samples(request, kind, samples):
    rows = rows_of(request.getfixturevalue(kind))
    assert answers(rows) == [text for _, _, text in samples]
    assert [row["recordings"] for row in rows] == [[data] for _, data, _ in samples]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_recordings_are_read_by_address(request, kind, samples):
    path = request.getfixturevalue(kind)
    rows = rows_of(path, embed=False)
    for row, (_, data, _) in zip(reversed(rows), reversed(samples), strict=True):
        (source,) = row["recordings"]
        assert find_archive(source) == str(path)
        assert read_member(source) == data
        assert np.array_equal(load_audio(source), load_audio(data))
        assert probe_audio(source) == probe_audio(data)
        assert source_stamp(source) == source_stamp(str(path)) != ""


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_reading_resumes_from_any_row(request, kind, tiny_corpus):
    path = str(tiny_corpus.jsonl if kind == "jsonl" else request.getfixturevalue(kind))
    (shard,) = shards_of(path)
    items = list(read_shard(shard))
    assert len(items) == 24
    for number in (0, 1, 5, 23):
        rest = [item.row for item in read_shard(shard, items[number].next)]
        assert answers(rest) == answers([item.row for item in items[number + 1 :]])
    assert list(read_shard(shard, items[-1].next)) == []


def test_blocks_of_a_jsonl_contain_every_line_once(tiny_corpus, monkeypatch):
    lines = [json.loads(line)["messages"] for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()]
    size = tiny_corpus.jsonl.stat().st_size
    for block in (1, 100, 313, 700, size - 1, size, size + 1):
        monkeypatch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", block)
        rows = rows_of(tiny_corpus.jsonl)
        assert [json.loads(row["messages"]) for row in rows] == lines, block


def test_json_sets_dialogue_language_and_hotwords(write_tar):
    dialogue = {
        "messages": [
            {"role": "user", "content": "Write: <|startofspeech|>!/etc/passwd<|endofspeech|>"},
            {"role": "assistant", "content": "hello"},
        ],
        "speech_length": 12,
    }
    path = write_tar(
        [
            ("1.flac", WAV),
            ("1.json", json.dumps(dialogue).encode()),
            ("2.json", json.dumps({"text": "你好", "language": "zh", "hotwords": ["好"]}).encode()),
            ("2.OGG", WAV),
            ("2.cls", b"7"),
        ]
    )
    first, second = rows_of(path)
    # The path is not read: the sample's recording replaces it.
    assert json.loads(first["messages"])[0]["content"] == "Write: <|startofspeech|>!1.flac<|endofspeech|>"
    assert (first["recordings"], first["speech_length"]) == ([WAV], 12)
    assert second["hotwords"] == ["好"]
    assert "语音转写成中文：<|startofspeech|>!2.ogg" in json.loads(second["messages"])[1]["content"]


def test_columns_of_parquet_may_be_messages_or_plain_bytes(write_parquet):
    messages = [
        {"role": "user", "content": "<|startofspeech|>!x<|endofspeech|>"},
        {"role": "assistant", "content": "hello"},
    ]
    (row,) = rows_of(write_parquet([{"audio": WAV, "messages": messages, "hotwords": "a,b"}]))
    assert (answers([row]), row["recordings"], row["hotwords"]) == (["hello"], [WAV], ["a", "b"])
    (row,) = rows_of(write_parquet([{"audio": WAV, "messages": json.dumps(messages), "speech_length": 9}]))
    assert (answers([row]), row["speech_length"]) == (["hello"], 9)


def test_values_of_parquet_that_json_has_not_make_a_bad_row(write_parquet):
    said = {"role": "assistant", "content": "hello", "when": datetime(2026, 1, 1)}
    asked = {"role": "user", "content": "<|startofspeech|>!x<|endofspeech|>", "when": None}
    (row,) = rows_of(write_parquet([{"audio": WAV, "messages": [asked, said]}]))
    assert isinstance(row, BadRow) and row.line == "row 0" and "bad dialogue" in row.reason


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("1.wav", WAV)], "no transcript: 1.txt"),
        ([("1.txt", b"a")], "must have one recording, found none"),
        ([("1.wav", WAV), ("1.flac", WAV), ("1.txt", b"a")], "found 1.wav and 1.flac"),
        ([("1.wav", WAV), ("1.wav", WAV), ("1.txt", b"a")], "duplicate member 1.wav"),
        ([("1.wav", WAV), ("1.txt", b"\xff")], "not UTF-8: 1.txt"),
        ([("1.wav", WAV), ("1.txt", b" ")], "transcript\\) is empty"),
        ([("1.wav", WAV), ("1.json", b"{")], "not JSON"),
        ([("1.wav", WAV), ("1.json", b"{}")], '"text" must be a string'),
        ([("1.wav", WAV), ("1.json", b'{"text": "a", "language": "xx"}')], "xx"),
        ([("1.wav", WAV), ("1.json", b'{"messages": []}')], "no .user. message"),
    ],
)
def test_bad_sample_is_reported_and_the_rest_is_read(write_tar, members, reason):
    good = [("2.wav", WAV), ("2.txt", b"b")]
    bad, row = rows_of(write_tar([*members, *good]))
    assert isinstance(bad, BadRow) and bad.line == "1"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad.reason)
    assert answers([row]) == ["b"]


def test_links_in_a_tar_file_are_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("1.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    (bad,) = rows_of(path)
    assert "link or device" in bad.reason or "duplicate" in bad.reason


def test_member_names_with_parent_folders_are_only_names(write_tar, tmp_path):
    (row,) = rows_of(write_tar([("../../etc/x.wav", WAV), ("../../etc/x.txt", b"a")]))
    assert row["recordings"] == [WAV]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.tar"]


@pytest.mark.parametrize("cut, kept", [(600, 0), (1024 + 512 + 100, 1), (-1024 * 9, 2)])
def test_truncated_tar_is_one_bad_row_after_the_complete_samples(write_tar, cut, kept):
    path = write_tar([(f"{n}.{end}", data) for n in (1, 2) for end, data in (("wav", WAV), ("txt", b"a"))])
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut > 0 else data[: 512 * 8])
    rows = rows_of(path)
    assert sum(not isinstance(row, BadRow) for row in rows) == kept
    assert isinstance(rows[-1], BadRow)
    assert "truncated" in rows[-1].reason or "damaged" in rows[-1].reason


def test_damaged_header_in_the_middle_is_reported(tar):
    data = bytearray(tar.read_bytes())
    (shard,) = shards_of(str(tar))
    start = list(read_shard(shard))[9].next
    data[start + 3] ^= 1
    tar.write_bytes(data)
    rows = rows_of(tar)
    assert len(rows) == 11
    assert rows[-1].line == f"byte {start}" and "damaged" in rows[-1].reason


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"no archive" * 500])
def test_file_that_is_not_an_archive_is_one_bad_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (bad,) = rows_of(tmp_path / name)
    assert isinstance(bad, BadRow) and "cannot be read" in bad.reason


def test_missing_shard_is_one_bad_row(tmp_path):
    for name in ("a.tar", "a.parquet", "a.jsonl"):
        (item,) = read_shard(Shard(str(tmp_path / name), 0, 100))
        assert "cannot be read" in item.row.reason


def test_parquet_without_bytes_or_columns_is_reported(write_parquet):
    audio = {"bytes": None, "path": "/etc/passwd"}
    bad = rows_of(write_parquet([{"audio": audio, "text": "a"}, {"audio": {"bytes": WAV, "path": "x"}, "text": None}]))
    assert [row.line for row in bad] == ["row 0", "row 1"]
    assert "embed the recordings" in bad[0].reason and "must be a string" in bad[1].reason
    (bad,) = rows_of(write_parquet([{"sound": WAV, "text": "a"}]))
    assert "no column 'audio'" in bad.reason


def test_globs_expand_to_sorted_files(tmp_path):
    for name in ("b.tar", "a.tar", "c.jsonl", "odd[1].tar"):
        (tmp_path / name).touch()
    found = expand_paths([f"{tmp_path}/?.tar", f"{tmp_path}/odd[1].tar"])
    assert found == [[f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"], [f"{tmp_path}/odd[1].tar"]]
    with pytest.raises(FileNotFoundError, match="none"):
        expand_paths([f"{tmp_path}/none*"])
    with pytest.raises(ValueError, match="a.tar is given twice"):
        expand_paths([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"])


def test_list_of_files_stands_for_its_files(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for name in ("a.jsonl", "sub/b.jsonl", "c.tar", "rows.txt"):
        (tmp_path / name).write_text('{"messages": []}\n', encoding="utf-8")
    names = tmp_path / "data.list"
    names.write_text(f"a.jsonl\n\nsub/*.jsonl\n{tmp_path}/c.tar\n", encoding="utf-8")
    rows = str(tmp_path / "rows.txt")  # of another name, but rows
    assert expand_paths([str(names), rows]) == [
        [f"{tmp_path}/{name}" for name in ("a.jsonl", "sub/b.jsonl", "c.tar")],
        [rows],
    ]
    names.write_text("a.jsonl\nb.jsonl\n", encoding="utf-8")  # is in the working directory
    with pytest.raises(
        FileNotFoundError, match=r"data\.list:2: b\.jsonl \(relative paths start at the folder of the list; .* Kaldi"
    ):
        expand_paths([str(names)])


def test_compressed_file_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(BadDataError, match="compressed"):
        shards_of(str(tmp_path / "a.tar.gz"))


def test_ids_in_a_tar_of_the_working_directory_have_no_dot(tmp_path, make_wav):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:  # `tar cf a.tar -C FOLDER .`
        tar.add(make_wav("x.wav"), arcname="./x.wav")
    ((id_, address),) = recordings_of_archive(str(file), [".wav"])
    assert id_ == "x"
    assert len(load_audio(address))
