"""Shards of the tiny corpus."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hf_speechllm import SpeechLLMProcessor


@pytest.fixture
def write_tar(tmp_path):
    """Writes a tar file from (name, content) pairs."""

    def write(members, name="shard.tar"):
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path):
    """Writes a Parquet file of rows."""

    def write(rows, name="shard.parquet", group=4):
        path = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
        return path

    return write


@pytest.fixture
def processor(tiny_model):
    return SpeechLLMProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def samples(tiny_corpus):
    """Name, WAV bytes and transcript of each recording in the corpus."""
    found = []
    for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        path = Path(messages[1]["content"].partition("!")[2].partition("<|")[0])
        found.append((path.stem, path.read_bytes(), messages[2]["content"]))
    return found
