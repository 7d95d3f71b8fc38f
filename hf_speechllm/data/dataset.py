"""Conversion of JSONL files to a `datasets.Dataset` of rows, with features cached by `map`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import SequenceFeatureExtractor

from ..audio.front_ends import cacheable_features, num_encoder_input_frames
from ..audio.waveform import (
    MAX_SECONDS,
    AudioError,
    check_root,
    display_name,
    is_url,
    load_audio,
    local_path,
    source_stamp,
)
from ..model.processing import SpeechLLMProcessor
from ..options import usable_cores
from .bad_rows import BadDataError, BadRows
from .cache_files import report_damaged_cache
from .column_values import read_column
from .file_lists import expand_paths
from .kaldi import FRAME_LENGTH, measure_recording
from .native_collator import drop_unsupported
from .options import DataOptions
from .processes import end_with_parent
from .row_files import ROW_FEATURES, generate_rows, generator_arguments, weight_of
from .shards import is_archive

logger = logging.getLogger(__name__)

FEATURES_VERSION = 1  # increase if results of `cacheable_features` change, to invalidate old caches
FRAMES_PER_SECOND = 100  # frame rate of the cached features


def load_rows(
    files: Sequence[str | Path],
    bad_rows: BadRows,
    cache_dir: str | None = None,
    audio_root: str | None = None,
    split: str = "train",
) -> Dataset:
    """Reads the rows of training files, one dialogue per row.

    Args:
        files: JSONL, tar or Parquet files, or other sources (see `sources`). Rows are cached until a file or source
            changes. Recordings in tar and Parquet files are not copied; see `archives`.
        bad_rows: receives all unusable rows; call `bad_rows.check` afterwards.
        cache_dir: default: the cache folder of `datasets`.
        audio_root: folder that must contain all recordings.
        split: split of sources with splits, `train` or `dev`.

    Returns:
        A dataset with `messages` (JSON), `recordings` (paths or URLs), `stamps` (size and time of recordings),
        `hotwords`, `speech_length`, `text_length`, `file`, `line`.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    # One file per call: for several shards, `datasets` may start processes.
    parts = [
        Dataset.from_generator(
            generate_rows,
            features=ROW_FEATURES,
            cache_dir=cache_dir,
            gen_kwargs=generator_arguments(file, split),
        )
        for file in files
    ]
    rows = drop_bad_rows(concatenate_datasets(parts), bad_rows)
    if audio_root is not None:
        rows = _drop_outside(rows, bad_rows, audio_root)
    stamps = [[source_stamp(source) for source in sources] for sources in read_column(rows, "recordings")]
    return rows.add_column("stamps", stamps, feature=List(Value("string")))


def _drop_outside(rows: Dataset, bad_rows: BadRows, audio_root: str) -> Dataset:
    good = []
    for index, sources in enumerate(read_column(rows, "recordings")):
        try:
            for source in sources:
                check_root(source, audio_root)
            good.append(index)
        except AudioError as error:
            row = rows[index]
            bad_rows.add(row["file"], row["line"], str(error))
    return rows if len(good) == len(rows) else rows.select(good)


def drop_bad_rows(dataset: Dataset, bad_rows: BadRows) -> Dataset:
    """Moves rows with an `error` from the dataset to `bad_rows` and removes the column `error`."""
    errors = list(read_column(dataset, "error"))
    good = [index for index, error in enumerate(errors) if error is None]
    if len(good) < len(dataset):
        for index in sorted(set(range(len(dataset))) - set(good)):
            row = dataset[index]
            bad_rows.add(row["file"], row["line"], row["error"])
        dataset = dataset.select(good)
    return dataset.remove_columns("error")


@dataclass
class FeatureMapper:
    """Computes the features of a row. `map` hashes this object for the cache fingerprint.

    Args:
        extractor: feature extractor.
        dtype: `"float16"` or `"float32"`.
        max_seconds: maximum length of a recording; a longer recording is an error.
        version: `FEATURES_VERSION`.
    """

    extractor: Any
    dtype: str
    max_seconds: float = MAX_SECONDS
    version: int = FEATURES_VERSION

    def __getstate__(self) -> dict:
        # Only the extractor's settings: an object with caches or arrays has a different hash in every process.
        return {
            "extractor": self.extractor.to_json_string(),
            "class": type(self.extractor),
            "dtype": self.dtype,
            "max_seconds": self.max_seconds,
            "version": self.version,
        }

    def __setstate__(self, state: dict) -> None:
        self.extractor = state["class"](**json.loads(state["extractor"]))
        self.dtype, self.max_seconds, self.version = state["dtype"], state["max_seconds"], state["version"]

    def __call__(self, recordings: list[Any]) -> dict[str, Any]:
        """Returns features (as bytes) and number of frames of each recording in a row; or the `error`."""
        end_with_parent()
        features, num_frames = [], []
        try:
            for source in recordings:
                waveform = load_audio(source, self.extractor.sampling_rate, self.max_seconds)
                if 1000 * len(waveform) < FRAME_LENGTH * self.extractor.sampling_rate:
                    raise AudioError(f"{display_name(source)}: shorter than {FRAME_LENGTH} ms")
                item, frames = self.features_of(waveform)
                features.append(item)
                num_frames.append(frames)
        except AudioError as error:
            return {"features": [], "num_frames": [], "error": str(error)}
        return {"features": features, "num_frames": num_frames, "error": None}

    def features_of(self, waveform: np.ndarray) -> tuple[bytes, int]:
        """Returns the features of a waveform as bytes, and the number of frames."""
        item = cacheable_features(self.extractor, waveform)
        return item.astype(self.dtype).tobytes(), len(item)


def add_features(
    rows: Dataset,
    processor: SpeechLLMProcessor,
    bad_rows: BadRows,
    dtype: str = "float16",
    num_proc: int | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Dataset:
    """Adds `features` (bytes) and `num_frames` (10 ms frames) of every recording, cached by `map` in Arrow files.

    The cache stays valid until the rows, the size or time of a recording, the feature extractor's settings, `dtype` or
    `max_seconds` change.

    Args:
        rows: result of `load_rows`.
        processor: processor of the model.
        bad_rows: receives all rows with unusable audio.
        dtype: `"float16"` or `"float32"`.
        num_proc: number of processes.
        max_seconds: maximum length of a recording; rows with longer recordings are bad.
    """
    features = Features(
        {
            **rows.features,
            "features": List(Value("large_binary")),
            "num_frames": List(Value("int64")),
            "error": Value("string"),
        }
    )
    num_proc = None if num_proc is None or num_proc < 2 else min(num_proc, len(rows))
    with single_thread():
        mapped = rows.map(
            FeatureMapper(processor.feature_extractor, dtype, max_seconds),
            input_columns=["recordings"],
            features=features,
            num_proc=num_proc,
            writer_batch_size=200,  # a row is about 100 kB
            desc="fbank",
        )
    return drop_bad_rows(mapped, bad_rows)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Limits torch to one thread while the block runs, for the processes of `map`.

    More threads would compete for the cores. They would also hang if torch has already used threads in this process,
    because a forked process has no copies of these threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def add_lengths(rows: Dataset, bad_rows: BadRows, num_proc: int | None = None) -> Dataset:
    """Adds `num_frames` (10 ms frames) of every recording, for training without cached features.

    Decodes recordings of rows without `speech_length` or with several recordings. For other rows, only checks that the
    recording exists.

    Args:
        rows: result of `load_rows`.
        bad_rows: receives all rows with unusable audio.
        num_proc: number of processes.
    """
    features = Features({**rows.features, "num_frames": List(Value("int64")), "error": Value("string")})
    mapped = rows.map(
        _measure, input_columns=["recordings", "speech_length"], features=features, num_proc=num_proc, desc="lengths"
    )
    return drop_bad_rows(mapped, bad_rows)


def _measure(recordings: list[str], length: int | None) -> dict[str, Any]:
    end_with_parent()
    try:
        if length is None or len(recordings) > 1:
            return {"num_frames": [measure_recording(source)[1] for source in recordings], "error": None}
        if not is_url(recordings[0]) and os.path.getsize(local_path(recordings[0])) == 0:
            raise AudioError(f"{recordings[0]}: the file is empty")
    except AudioError as error:
        return {"num_frames": [], "error": str(error)}
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        reason = getattr(error, "strerror", None) or error
        return {"num_frames": [], "error": f"{recordings[0]}: cannot be read: {reason}"}
    return {"num_frames": [length], "error": None}


def row_seconds(rows: Dataset) -> np.ndarray:
    """Returns the seconds of audio of each row, shape = (rows,)."""
    return (
        np.fromiter((sum(frames) for frames in read_column(rows, "num_frames")), float, len(rows)) / FRAMES_PER_SECOND
    )


def decoding_limit(processor: SpeechLLMProcessor, max_feature_frames: int) -> float:
    """Returns the maximum length of a recording to decode, in seconds: somewhat more than the encoder's limit.

    The result is a power of two, so small changes of the encoder's limit (for example through tempo perturbation) do
    not invalidate a feature cache.

    Args:
        max_feature_frames: maximum number of feature frames per recording, see `SpeechLLMConfig.max_feature_frames`.
    """
    return min(MAX_SECONDS, 2.0 ** math.ceil(math.log2(max_feature_frames * processor.frame_seconds + 1.0)))


def too_long_reason(
    feature_extractor: SequenceFeatureExtractor,
    num_frames: Sequence[int],
    max_feature_frames: int,
    batch_seconds: float,
) -> str | None:
    """Returns the reason why a row is too long for the encoder or the batch budget; `None` if it is not.

    Args:
        num_frames: 10 ms frames of each recording in the row.
        max_feature_frames: maximum number of feature frames per recording, see `SpeechLLMConfig.max_feature_frames`.
        batch_seconds: batch budget in seconds.
    """
    longest, seconds = max(num_frames), sum(num_frames) / FRAMES_PER_SECOND
    inputs = num_encoder_input_frames(feature_extractor, longest)
    if inputs > max_feature_frames:
        limit = max_feature_frames * longest / inputs / FRAMES_PER_SECOND
        return f"recording of {longest / FRAMES_PER_SECOND:.1f} s; the encoder accepts at most {limit:.1f} s"
    if seconds > batch_seconds:
        return f"{seconds:.1f} s of audio; the batch budget is {batch_seconds:g} s (--per_device_train_batch_seconds)"
    return None


def drop_too_long(
    rows: Dataset, bad_rows: BadRows, processor: SpeechLLMProcessor, max_feature_frames: int, batch_seconds: float
) -> Dataset:
    """Moves rows that are too long for the encoder or the batch budget to `bad_rows`; see `too_long_reason`."""
    good = []
    for index, num_frames in enumerate(read_column(rows, "num_frames")):
        reason = too_long_reason(processor.feature_extractor, num_frames, max_feature_frames, batch_seconds)
        if reason is None:
            good.append(index)
        else:
            row = rows[index]
            bad_rows.add(row["file"], row["line"], reason)
    return rows if len(good) == len(rows) else rows.select(good)


def prepare_rows(
    files: Sequence[str],
    processor: SpeechLLMProcessor,
    max_feature_frames: int,
    options: DataOptions,
    weights: Sequence[float] = (),
    *,
    batch_seconds: float = math.inf,
    max_bad_fraction: float = 0.0,
    split: str = "train",
) -> tuple[Dataset, np.ndarray | None]:
    """Prepares training rows: reads files, adds features or lengths, and checks both.

    Args:
        files: JSONL, tar or Parquet files, globs, or other sources (see `sources`).
        processor: processor of the model.
        max_feature_frames: maximum number of feature frames per recording, see `SpeechLLMConfig.max_feature_frames`.
        options: options for caches, workers and the folder of recordings.
        weights: one weight per entry of `files`, or none.
        batch_seconds: batch budget in seconds, the maximum length of a row; 0 if the budget is determined later.
        max_bad_fraction: allowed share of bad rows.
        split: split of sources with splits, `train` or `dev`.

    Returns:
        The rows, and the weight of each row (times per epoch), shape = (rows,), or `None` without weights.

    Raises:
        BadDataError: if more rows are bad than `max_bad_fraction` allows, or no rows are left.
        FileNotFoundError: if a file is missing.
    """
    bad_rows = BadRows(max_bad_fraction)
    found = expand_paths(files)
    with report_damaged_cache(options.cache_dir):
        parts = [
            load_rows(unit, bad_rows, options.cache_dir, options.audio_root, split) for unit in _cache_units(found)
        ]
    total = sum(map(len, parts)) + len(bad_rows)
    parts = [drop_unsupported(part, bad_rows, processor) for part in parts]
    bad_rows.check(total)
    parts = [part for part in parts if len(part)]
    if not parts:
        raise BadDataError(f"{', '.join(files)}: no usable rows")
    for key in ("speech_length", "text_length"):
        lacking = sum(length is None for part in parts for length in read_column(part, key))
        if lacking:
            count = sum(map(len, parts))
            logger.info("%s: %d of %d rows lack %s; computing it", ", ".join(files), lacking, count, key)
    workers = options.preprocessing_num_workers or usable_cores()
    with report_damaged_cache(options.cache_dir):
        if options.feature_cache == "off":
            parts = [add_lengths(part, bad_rows, workers) for part in parts]
        else:
            # Independent of the batch budget, which changes often and would invalidate the cache.
            limit = decoding_limit(processor, max_feature_frames)
            parts = [add_features(part, processor, bad_rows, options.feature_cache, workers, limit) for part in parts]
    rows = concatenate_datasets(parts)
    budget = batch_seconds or math.inf
    rows = drop_too_long(rows, bad_rows, processor, max_feature_frames, budget)
    bad_rows.check(total)
    if len(rows) == 0:
        raise BadDataError(f"{', '.join(files)}: no usable rows")
    if not weights:
        return rows, None
    by_file = {os.path.abspath(file): weight for group, weight in zip(found, weights, strict=True) for file in group}
    return rows, np.array([weight_of(file, by_file) for file in read_column(rows, "file")])


def _cache_units(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns groups of files whose features are cached together, so that other groups beside them change nothing.

    Neighbouring archives of one folder are one unit: a shell may expand the pattern of a group, and a unit starts
    processes.
    """
    units: list[list[str]] = []
    last = None
    for group in filter(None, groups):  # a list may be empty
        folders = {os.path.dirname(file) for file in group}
        folder = folders.pop() if len(folders) == 1 and all(is_archive(file) for file in group) else None
        if folder is not None and folder == last:
            units[-1] += group
        else:
            units.append(list(group))
        last = folder
    return units
