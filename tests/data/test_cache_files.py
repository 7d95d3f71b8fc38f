"""Damaged cache files are reported with the file to delete, and deleting it helps."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.cache_files import report_damaged_cache
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.data.options import DataOptions


@pytest.fixture
def use_cache(tiny_model, tiny_corpus, tmp_path):
    """Returns a function that reads encoder outputs of rows through a cache and returns their size in bytes."""
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    options = DataOptions(cache_dir=str(tmp_path / "cache"), preprocessing_num_workers=1)

    def use():
        rows, _ = prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)
        encoded = add_encoded(rows, model, processor, "encoder", options.cache_dir, show_progress=False)
        return sum(len(states) for row in encoded["encoder_states"] for states in row)

    return use


@pytest.mark.parametrize(
    "pattern", ["generator-train.arrow", "dataset_info.json", "cache-*.arrow", "encoded/*/*.arrow"]
)
def test_damaged_file_is_reported_and_computed_again_after_deletion(use_cache, tmp_path, pattern):
    size = use_cache()
    files = sorted((tmp_path / "cache").rglob(pattern))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(BadDataError) as error:
            use_cache()
        message = str(error.value)
        assert "\n" not in message and f"the feature cache is damaged: {file} (" in message
        path = Path(re.search(r"delete (.*) to compute it again", message)[1])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert use_cache() == size


def test_a_full_disk_is_reported_with_the_folder(tmp_path):
    message = f"written to {re.escape(str(tmp_path))}: No space"
    with pytest.raises(BadDataError, match=message), report_damaged_cache(str(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(OSError, match="disk"), report_damaged_cache(str(tmp_path)):
        raise OSError("no space on the disk")
