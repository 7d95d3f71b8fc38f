"""Streaming of training data: no cache, no list of all rows, constant memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..audio.waveform import AudioError, check_root, load_audio
from .bad_rows import NUM_NAMED, BadDataError, BadRow
from .collator import SpeechLLMCollator
from .dataset import FRAMES_PER_SECOND, decoding_limit, too_long_reason
from .file_lists import expand_paths
from .kaldi import measure_recording, speech_length
from .native_collator import unsupported_reason
from .options import DataOptions
from .row_files import require_row_file
from .sampler import BudgetBatchSampler, budget_before_augmentation
from .shards import read_shard, shards_of

logger = logging.getLogger(__name__)

MIN_ROWS = 1000  # rows of a worker on which the allowed number of bad rows is based at least
MAX_IDLE_PASSES = 10  # consecutive passes without rows; a weight below 1 may skip all rows of a small file in a pass


@dataclass(frozen=True)
class StreamState:
    """Position of a worker: start of the current window, and number of its completed batches.

    Args:
        epoch: number of complete passes over the data.
        shard: index of the shard within the worker's shards.
        position: position within the shard; see `shards.read_shard`.
        row: number of rows read from the shard.
        window: index of the window.
        batch: number of yielded batches of the window.
        rows: total number of rows read before the window.
        bad_rows: number of bad rows among these rows.
        bad_recordings: number of recordings that could not be decoded.
    """

    epoch: int = 0
    shard: int = 0
    position: int = 0
    row: int = 0
    window: int = 0
    batch: int = 0
    rows: int = 0
    bad_rows: int = 0
    bad_recordings: int = 0


class RowStream(IterableDataset):
    """Yields endless batches from sharded files, for the ranks and workers of a run.

    Each pass shuffles the shards of all files and assigns them to all workers of all ranks. With fewer shards than
    workers, each worker reads all shards and keeps every n-th row. A worker reads a window of rows, builds batches of
    similar lengths with the budget of `BudgetBatchSampler`, yields them in random order, and reads the next window.
    Workers start a new pass independently, so no rank waits for the data of another rank.

    Args:
        files: JSONL, tar or Parquet files, or globs.
        collator: converts rows to the model's inputs.
        batch_seconds: maximum of padded seconds per batch.
        max_feature_frames: maximum number of feature frames per recording, see `SpeechLLMConfig.max_feature_frames`.
        window_rows: rows per window.
        weights: times per pass that the rows of each entry of `files` are used; default: 1.
        seed: seed of the order and of augmentation.
        rank: rank of this process.
        num_ranks: number of ranks.
        max_bad_fraction: allowed share of bad rows per worker.
        audio_root: folder that must contain all recordings of a JSONL.

    Raises:
        FileNotFoundError: if a file is missing.
        BadDataError: if a file is compressed.
    """

    def __init__(
        self,
        files: Sequence[str],
        collator: SpeechLLMCollator,
        batch_seconds: float,
        max_feature_frames: int,
        window_rows: int = 2000,
        weights: Sequence[float] = (),
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        max_bad_fraction: float = 0.0,
        audio_root: str | None = None,
    ):
        self.files = list(files)
        self.collator = collator
        self.batch_seconds = batch_seconds
        self.max_feature_frames = max_feature_frames
        self.window_rows = window_rows
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.max_bad_fraction = max_bad_fraction
        self.audio_root = audio_root
        self.shards, shares = [], []
        for names, weight in zip(expand_paths(files), weights or [1.0] * len(files), strict=True):
            for name in names:
                require_row_file(name)
                shards = shards_of(name)
                self.shards += shards
                shares += [weight] * len(shards)
        # A weight of 2.5 reads a shard twice, and half of the rows a third time.
        self.parts = [
            (shard, copy, min(1.0, weight - copy))
            for shard, weight in enumerate(shares)
            for copy in range(int(np.ceil(weight)))
        ]
        self.states: list[StreamState] = []  # positions from which workers resume; empty: from the start
        self.first_worker = 0  # worker of the first batch

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], StreamState]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        worker = (worker + self.first_worker) % workers
        state = self.states[worker] if self.states else StreamState()
        return self.batches(state, worker, workers)

    def batches(
        self, state: StreamState, worker: int, workers: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], StreamState]]:
        """Yields batches of a worker from a position, each with the position after the batch.

        Raises:
            BadDataError: if too many rows are bad, or no usable row is left.
        """
        reader = self.rank * workers + worker
        readers = self.num_ranks * workers
        # First windows of workers have different sizes, so workers do not fill later windows at the same time.
        size = max(1, self.window_rows * (worker + 1) // workers) if state.window == 0 else self.window_rows
        rows = self._rows(state, reader, readers)
        while True:
            window: list[dict | None] = []
            seconds, following = [], state
            while len(window) < size:
                row, following = next(rows)
                if row is not None:
                    window.append(row)
                    seconds.append(row["num_frames"] / FRAMES_PER_SECOND)
            order = np.random.SeedSequence((self.seed, reader, state.window)).generate_state(1)[0]
            budget = budget_before_augmentation(seconds, self.batch_seconds, self.collator.largest_stretch)
            sampler = BudgetBatchSampler(seconds, budget, seed=int(order), row_cost=self.collator.row_cost)
            batches = sampler.batches(0)
            usable = state.batch > 0
            for number in range(state.batch, len(batches)):
                state = replace(state, batch=number + 1)
                batch = []
                for index in batches[number]:
                    row, window[index] = window[index], None
                    assert row is not None
                    try:
                        batch.append(self._decode(row))
                    except AudioError as error:
                        state = replace(state, bad_recordings=state.bad_recordings + 1)
                        counts = replace(following, bad_recordings=state.bad_recordings)
                        self._report(BadRow(row["file"], row["line"], str(error)), counts)
                if batch:
                    usable = True
                    yield self.collator(batch), state
            if not usable:
                raise BadDataError(
                    f"{', '.join(self.files)}: no recording of {len(seconds)} consecutive rows can be decoded"
                )
            state = replace(following, window=state.window + 1, batch=0, bad_recordings=state.bad_recordings)
            size = self.window_rows

    def _rows(
        self, state: StreamState, reader: int, readers: int
    ) -> Iterator[tuple[dict[str, Any] | None, StreamState]]:
        """Yields usable rows, or `None` for a bad row, with the position after each row; never ends."""
        shared = len(self.parts) < readers
        idle = 0  # consecutive passes without rows
        for epoch in itertools.count(state.epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.parts))
            assigned = order if shared else order[reader::readers]
            rows_before = state.rows
            found = epoch == state.epoch and (state.shard, state.position) != (0, 0)
            for number in range(state.shard, len(assigned)):
                shard, copy, keep = self.parts[assigned[number]]
                draws = np.random.default_rng((self.seed, epoch, shard, copy))
                draws.bit_generator.advance(state.row)  # type: ignore[attr-defined]
                for item in read_shard(self.shards[shard], state.position):
                    row, key = item.row, state.row
                    state = replace(state, position=item.next, row=state.row + 1)
                    if draws.random() >= keep or (shared and key % readers != reader):
                        continue
                    state = replace(state, rows=state.rows + 1)
                    row = row if isinstance(row, BadRow) else self._check(row)
                    if isinstance(row, BadRow):
                        state = replace(state, bad_rows=state.bad_rows + 1)
                        self._report(row, state)
                        yield None, state
                    else:
                        found = True
                        yield {**row, "seed": (self.seed, epoch, shard, copy, key)}, state
                state = replace(state, shard=number + 1, position=0, row=0)
            idle = 0 if found else idle + 1
            if not found and state.rows > rows_before:
                raise BadDataError(f"{', '.join(self.files)}: no usable rows")
            if idle == MAX_IDLE_PASSES:
                raise BadDataError(
                    f"{', '.join(self.files)}: no row for one of {readers} workers; reduce --dataloader_num_workers "
                    "or use more data"
                )
            state = replace(state, epoch=epoch + 1, shard=0)

    def _check(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """Checks a row and adds `num_frames`, the sum over all recordings."""
        if (reason := unsupported_reason(self.collator.processor, row)) is not None:
            return BadRow(row["file"], row["line"], reason)
        try:
            if self.audio_root is not None:
                for source in row["recordings"]:
                    if isinstance(source, str):
                        check_root(source, self.audio_root)
            frames = [row["speech_length"]]
            if row["speech_length"] is None or len(row["recordings"]) > 1:
                frames = [measure_recording(source)[1] for source in row["recordings"]]
            self._check_length(frames)
        except AudioError as error:
            return BadRow(row["file"], row["line"], str(error))
        return {**row, "num_frames": sum(frames)}

    def _check_length(self, num_frames: Sequence[int]) -> None:
        extractor = self.collator.processor.feature_extractor
        if reason := too_long_reason(extractor, num_frames, self.max_feature_frames, self.batch_seconds):
            raise AudioError(reason)

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        rate = self.collator.processor.sampling_rate
        limit = min(decoding_limit(self.collator.processor, self.max_feature_frames), self.batch_seconds + 1.0)
        waveforms = [load_audio(source, rate, limit) for source in row["recordings"]]
        lengths = [speech_length(len(waveform), rate) for waveform in waveforms]
        if min(lengths) < 1:
            raise AudioError("the recording is shorter than one frame of 25 ms")
        self._check_length(lengths)  # `speech_length` of the row may be wrong
        return {**row, "recordings": waveforms}

    def _report(self, row: BadRow, state: StreamState) -> None:
        bad = state.bad_rows + state.bad_recordings
        if bad <= NUM_NAMED:
            logger.warning("skipped: %s", row)
        # The share of few rows is not reliable. If no row may be bad, the first bad row is an error.
        if bad > self.max_bad_fraction * max(state.rows, MIN_ROWS):
            raise BadDataError(
                f"{bad} of {state.rows} rows that a worker read are bad, the last one: {row}\n"
                f"Fix them, or raise --max_bad_fraction (now {self.max_bad_fraction:g}, of at least {MIN_ROWS} rows)"
            )


def open_stream(
    files: Sequence[str],
    collator: SpeechLLMCollator,
    batch_seconds: float,
    max_feature_frames: int,
    options: DataOptions,
    **run_options: Any,
) -> RowStream:
    """Builds the stream of this process according to the options.

    Args:
        files, collator, batch_seconds, max_feature_frames: see `RowStream`.
        options: options for the window size and the folder of recordings.
        **run_options: `weights`, `seed`, `rank`, `num_ranks` and `max_bad_fraction`, see `RowStream`.

    Raises:
        FileNotFoundError, BadDataError, ValueError: see `RowStream`.
    """
    return RowStream(
        files,
        collator,
        batch_seconds,
        max_feature_frames,
        window_rows=options.shuffle_buffer,
        audio_root=options.audio_root,
        **run_options,
    )
