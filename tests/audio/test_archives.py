"""Recordings inside tar and Parquet files: found by their names, and never taken for others after a change."""

import os

import pyarrow
import pyarrow.parquet
import pytest

from hf_speechllm.audio.archives import find_archive, read_member, table_member, tar_member

CONTENT = bytes(range(256)) * 4


def write_parquet(path, rows, group=2, column="audio"):
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), path, row_group_size=group)


@pytest.fixture
def tar(tmp_path):
    """A file whose bytes 512 to 1023 are a recording, and the name of this recording."""
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    return path, tar_member(str(path), "utt/1.wav", 512, 512)


@pytest.fixture
def parquet(tmp_path):
    """A file of five recordings in groups of two."""
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"recording {number}".encode() for number in range(5)])
    return path


def test_sources_name_their_container(tar, parquet):
    path, name = tar
    assert name == f"{path}::utt/1.wav@512+512"
    assert find_archive(name) == str(path)
    assert table_member(str(parquet), 3) == f"{parquet}::3"
    assert find_archive(f"{parquet}::3") == str(parquet)
    for other in ("a.wav", "a.tar", "a.parquet", b"a.tar::b", None):
        assert find_archive(other) is None


def test_member_of_a_tar_is_its_bytes(tar):
    assert read_member(tar[1]) == CONTENT[512:1024]


@pytest.mark.parametrize(("kept", "present"), [(1023, 511), (512, 0), (100, 0)])
def test_tar_truncated_after_listing_is_reported(tar, kept, present):
    path, name = tar
    path.write_bytes(CONTENT[:kept])
    with pytest.raises(ValueError, match=f"truncated: {present} of 512 bytes"):
        read_member(name)
    with pytest.raises(ValueError, match=f"truncated: {kept} of {10**18} bytes"):  # before room is made for them
        read_member(f"{path}::a.wav@0+{10**18}")


def test_tar_truncated_during_reading_is_reported(tar, monkeypatch):
    path, name = tar
    status = os.stat(path)
    path.write_bytes(CONTENT[:600])
    monkeypatch.setattr(os, "fstat", lambda _: status)
    with pytest.raises(ValueError, match="truncated: 88 of 512 bytes"):
        read_member(name)


@pytest.mark.parametrize("place", ["utt/1.wav", "utt/1.wav@5", "utt/1.wav@5+", "utt/1.wav@-5+6", "utt/1.wav@5+6 "])
def test_member_of_a_tar_without_its_place_is_refused(tar, place):
    with pytest.raises(ValueError, match="FIRST_BYTE"):
        read_member(f"{tar[0]}::{place}")


def test_every_row_of_a_parquet_file_is_found(parquet):
    assert [read_member(f"{parquet}::{row}") for row in range(5)] == [b"recording %d" % row for row in range(5)]
    for row in (5, 10**18):
        with pytest.raises(ValueError, match=f"no row {row}"):
            read_member(f"{parquet}::{row}")
    with pytest.raises(ValueError, match="-1"):
        read_member(f"{parquet}::-1")


@pytest.mark.parametrize("same_size", [True, False])
def test_parquet_that_was_rewritten_after_it_was_read_gives_its_new_recordings(parquet, same_size):
    assert read_member(f"{parquet}::4") == b"recording 4"
    status = parquet.stat()
    group = 2 if same_size else 3  # other groups: the row lies elsewhere
    write_parquet(parquet, [f"recordinG {number}".encode() for number in range(5)], group)
    os.utime(parquet, ns=(status.st_atime_ns, status.st_mtime_ns + same_size))
    assert (parquet.stat().st_size == status.st_size) == same_size
    assert [read_member(f"{parquet}::{row}") for row in range(5)] == [b"recordinG %d" % row for row in range(5)]


def test_parquet_without_recordings_is_reported(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["a.wav"])
    with pytest.raises(ValueError, match="no bytes in column 'audio'"):
        read_member(f"{path}::0")
    write_parquet(path, [b"data"], column="sound")
    with pytest.raises(ValueError, match="not a Parquet file with a column 'audio'"):
        read_member(f"{path}::0")


def test_recording_may_have_the_largest_size_and_no_more(tar, parquet):
    for name, size in ((tar[1], 512), (f"{parquet}::0", 11)):
        assert len(read_member(name, size)) == size
        with pytest.raises(ValueError, match="GB"):
            read_member(name, size - 1)


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a.wav"):
        read_member("a.wav")
    with pytest.raises(OSError):
        read_member(f"{tmp_path}/none.tar::a@0+1")
