"""Fingerprints of sources change with the data."""

import os

import pytest

from hf_speechllm.data.file_lists import SMALL_FILE, fingerprint


@pytest.mark.parametrize("name", ["text", "sub/text", "data.arrow"])
def test_a_change_in_a_folder_changes_the_fingerprint(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / name).write_text("a one")
    before = fingerprint([str(tmp_path)])
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    assert fingerprint([str(tmp_path)]) == before
    (tmp_path / name).write_text("a two")
    changed = fingerprint([str(tmp_path)])
    (tmp_path / name).rename(tmp_path / "other")
    assert len({before, changed, fingerprint([str(tmp_path)])}) == 3


@pytest.mark.parametrize("name", ["", "a.tar", "a.parquet"])
def test_archives_and_large_files_are_compared_by_size_and_time(tmp_path, name):
    file = tmp_path / (name or "data.arrow")
    file.write_bytes(b"a" * (SMALL_FILE + 1))
    source = str(tmp_path / name)
    before = fingerprint([source])
    assert fingerprint([source]) == before
    os.utime(file, ns=(1, 1))
    assert fingerprint([source]) != before


def test_a_list_of_rows_is_compared_by_its_contents(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}')
    before = fingerprint([str(file)])
    os.utime(file, ns=(1, 1))
    assert fingerprint([str(file)]) == before
    file.write_text('{"a": 2}')
    assert fingerprint([str(file)]) != before
