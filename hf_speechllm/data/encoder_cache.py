"""Cache of the outputs of frozen parts: encoder output or audio tokens of every row, in Arrow files.

The cache stages are fbank (`data.dataset`), encoder output, and audio tokens. A stage requires that all earlier parts
are frozen and that the features do not change between epochs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import generate_fingerprint
from transformers import PreTrainedModel

from ..audio.front_ends import pad_features
from ..console import progress_bar
from ..files import atomic_write
from ..formats.partial import hash_tensors
from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from .cache_files import ENCODED_FOLDER, cache_root, report_damaged_cache
from .collator import ENCODED_COLUMNS, SpeechLLMCollator
from .dataset import row_seconds
from .sampler import BudgetBatchSampler

CACHE_VERSION = 1  # increase if the stored values change
ROWS_PER_FILE = 2000
LOCAL_PROCESSES = (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))  # set by launchers; default without launcher
COLUMNS = dict(zip(("encoder", "adaptor"), ENCODED_COLUMNS, strict=True))


def add_encoded(
    rows: Dataset,
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    level: str,
    cache_dir: str | None = None,
    *,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    batch_seconds: float = 240.0,
    show_progress: bool = True,
) -> Dataset:
    """Replaces the features of rows by outputs of the frozen parts.

    The folder name is a hash of rows, weights and precision, so a change of any of them computes the cache again. The
    files contain bfloat16 with `bf16`, otherwise float32. All processes of a host share the work.

    Args:
        rows: rows with `features`.
        model: model with or without adapters.
        processor: processor of the model.
        level: `encoder` or `adaptor`.
        cache_dir: cache folder of `datasets`; default: the default of `datasets`.
        device: device of the computation.
        bf16: whether training computes in bfloat16.
        batch_seconds: padded audio seconds per batch.
        show_progress: whether this process shows a progress bar.

    Returns:
        The rows with `encoder_states` or `audio_tokens` instead of `features`, as bytes; see `collator.stored_states`.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    starts = range(0, len(rows), ROWS_PER_FILE)
    local_rank, local_ranks = (int(os.environ.get(name, default)) for name, default in LOCAL_PROCESSES)
    with _gathered(model, level):
        folder = cache_root(cache_dir) / ENCODED_FOLDER / _key(rows, model, level, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [start for start in starts if not _file(folder, start).exists()]
        if missing:
            was_training = model.training
            model.to(device).eval()
            own = {start: min(ROWS_PER_FILE, len(rows) - start) for start in missing[local_rank::local_ranks]}
            title = f"caching {level} outputs"
            with progress_bar(
                desc=title, total=sum(own.values()), unit=" rows", disable=not show_progress
            ) as progress:
                for start, number in own.items():
                    part = rows.select(range(start, start + number))
                    encoded = _encode(part, model, processor, level, dtype, batch_seconds, progress.update)
                    _write(_file(folder, start), COLUMNS[level], encoded)
            model.train(was_training)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    with report_damaged_cache(cache_dir):
        encoded = concatenate_datasets([Dataset.from_file(str(_file(folder, start))) for start in starts])
        return concatenate_datasets([rows.remove_columns("features").flatten_indices(), encoded], axis=1)


def _parts(model: SpeechLLMForConditionalGeneration, level: str) -> list[PreTrainedModel]:
    return [getattr(model, part) for part in PARTS[: 1 + (level == "adaptor")]]


@contextlib.contextmanager
def _gathered(model: SpeechLLMForConditionalGeneration, level: str):
    """Gathers the weights of the parts, which DeepSpeed ZeRO stage 3 shards over the ranks, while the block runs."""
    sharded = [item for part in _parts(model, level) for item in part.parameters() if hasattr(item, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded):
        yield


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:010d}.arrow"


def _key(rows: Dataset, model: SpeechLLMForConditionalGeneration, level: str, dtype: torch.dtype) -> str:
    facts = [str(CACHE_VERSION), generate_fingerprint(rows), level, str(dtype)]
    for module in _parts(model, level):
        facts += [module.config.to_json_string(), hash_tensors(module.state_dict())]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


@torch.inference_mode()
def _encode(
    rows: Dataset, model, processor, level: str, dtype: torch.dtype, batch_seconds: float, report: Callable[[int], Any]
) -> list[list[bytes]]:
    """Computes the outputs of the parts for each row's recordings, in the order of the rows; reports finished rows."""
    collator = SpeechLLMCollator(processor)
    result: list[list[bytes]] = [[] for _ in range(len(rows))]
    seconds = row_seconds(rows)
    sampler = BudgetBatchSampler(seconds, max(batch_seconds, float(seconds.max())), shuffle=False)
    for indices in sampler.batches(0):
        chosen = rows.__getitems__([int(index) for index in indices])
        inputs = [collator.row_inputs(row) for row in chosen]
        batch = pad_features([item for items in inputs for item in items])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            if level == "encoder":
                states, mask = model.encode_audio(**batch)
                lengths = mask.sum(-1)
            else:
                states, lengths = model.get_audio_features(**batch)
        header = np.array([states.shape[-1], dtype.itemsize], dtype=np.int32).tobytes()
        recordings = iter(zip(states.to(dtype).cpu(), lengths.tolist(), strict=True))
        for index, items in zip(indices, inputs, strict=True):
            for state, length in (next(recordings) for _ in items):
                result[index].append(header + state[:length].contiguous().view(torch.uint8).numpy().tobytes())
        report(len(indices))
    return result


def _write(path: Path, column: str, rows: list[list[bytes]]) -> None:
    schema = pa.schema([(column, pa.list_(pa.large_binary()))])
    with atomic_write(path, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(rows), 100):
            stream.write_batch(
                pa.RecordBatch.from_arrays([pa.array(rows[start : start + 100], schema.types[0])], schema=schema)
            )
