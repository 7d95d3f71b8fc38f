"""Training data that is read on the way: no cache, no list of all rows, memory that does not grow with the corpus."""

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
from .dataset import FRAMES_PER_SECOND, longest_usable, too_long
from .file_lists import expand
from .kaldi import measure_recording, speech_length
from .options import DataOptions
from .sampler import ROW_COST, BudgetBatchSampler
from .shards import read_shard, shards_of

logger = logging.getLogger(__name__)

MIN_ROWS = 1000  # of a worker, before its share of bad rows counts
MAX_IDLE_PASSES = 10  # a weight below 1 may leave out all rows of a small file once


@dataclass(frozen=True)
class Place:
    """How far a worker has come: where its window begins, and what it has dealt of it.

    Args:
        epoch: passes over the data that are complete.
        shard: number of the shard within the worker's share.
        position: within the shard; see `shards.read_shard`.
        row: rows of the shard that were read.
        window: number of the window.
        batch: batches of the window that were dealt.
        rows: read in all, before the window.
        bad_rows: of these.
        bad_recordings: found when they were decoded.
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
    """Endless batches from sharded files, for the ranks and workers of a run.

    The shards of all files are put into a new order for every pass and dealt out to all workers of all ranks, each of
    which reads its own; with fewer shards than workers, each worker reads all shards and takes every n-th row. A
    worker reads a window of rows, makes batches of similar lengths of them by the same budget as `BudgetBatchSampler`,
    deals them in random order, and reads the next window. It goes on to its next pass by itself, so that no rank waits
    for another one's data.

    Args:
        files: JSONL, tar or Parquet files; a glob stands for all that it matches.
        collator: makes the model's inputs of rows.
        batch_seconds: the most padded seconds in a batch.
        max_feature_frames: the most frames of one recording that the encoder takes.
        window_rows: rows that a worker holds at a time.
        weights: how often the rows of each entry of `files` are seen in a pass; default 1.
        seed: of the order and of augmentation.
        rank: of this process.
        num_ranks: processes that train.
        max_bad_fraction: the share of a worker's rows that may be bad.
        audio_root: folder that paths in a JSONL may not leave.

    Raises:
        FileNotFoundError: if a file is missing.
        BadDataError: if a file is of a kind that cannot be read.
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
        for names, weight in zip(expand(files), weights or [1.0] * len(files), strict=True):
            for name in names:
                shards = shards_of(name)
                self.shards += shards
                shares += [weight] * len(shards)
        # A weight of 2.5 reads a shard twice, and half of its rows once more.
        self.parts = [
            (shard, copy, min(1.0, weight - copy))
            for shard, weight in enumerate(shares)
            for copy in range(int(np.ceil(weight)))
        ]
        self.places: list[Place] = []  # where the workers go on; empty: from the start
        self.first_worker = 0  # whose batch comes first

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], Place]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        worker = (worker + self.first_worker) % workers
        place = self.places[worker] if self.places else Place()
        return self.batches(place, worker, workers)

    def batches(self, place: Place, worker: int, workers: int) -> Iterator[tuple[dict[str, torch.Tensor], Place]]:
        """Batches of a worker from a place on, each with the place after it.

        Raises:
            BadDataError: if too many rows are bad, or none is left.
        """
        reader = self.rank * workers + worker
        readers = self.num_ranks * workers
        # The first windows differ in size, so that workers do not fill theirs at the same time later on.
        size = max(1, self.window_rows * (worker + 1) // workers) if place.window == 0 else self.window_rows
        rows = self._rows(place, reader, readers)
        while True:
            window: list[dict | None] = []
            seconds, following = [], place
            while len(window) < size:
                row, following = next(rows)
                if row is not None:
                    window.append(row)
                    seconds.append(row["num_frames"] / FRAMES_PER_SECOND)
            order = np.random.SeedSequence((self.seed, reader, place.window)).generate_state(1)[0]
            dealt = BudgetBatchSampler(seconds, self.batch_seconds, seed=int(order), row_cost=ROW_COST).batches(0)
            usable = place.batch > 0
            for number in range(place.batch, len(dealt)):
                place = replace(place, batch=number + 1)
                batch = []
                for index in dealt[number]:
                    row, window[index] = window[index], None
                    assert row is not None
                    try:
                        batch.append(self._decode(row))
                    except AudioError as error:
                        place = replace(place, bad_recordings=place.bad_recordings + 1)
                        counts = replace(following, bad_recordings=place.bad_recordings)
                        self._report(BadRow(row["file"], row["line"], str(error)), counts)
                if batch:
                    usable = True
                    yield self.collator(batch), place
            if not usable:
                raise BadDataError(
                    f"{', '.join(self.files)}: of {len(seconds)} rows in a row no recording can be decoded"
                )
            place = replace(following, window=place.window + 1, batch=0, bad_recordings=place.bad_recordings)
            size = self.window_rows

    def _rows(self, place: Place, reader: int, readers: int) -> Iterator[tuple[dict[str, Any] | None, Place]]:
        """Rows that can be used, or `None` for one that cannot, with the place after each; without an end."""
        shared = len(self.parts) < readers
        idle = 0  # passes in a row that gave nothing
        for epoch in itertools.count(place.epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.parts))
            mine = order if shared else order[reader::readers]
            before = place.rows
            found = epoch == place.epoch and (place.shard, place.position) != (0, 0)
            for number in range(place.shard, len(mine)):
                shard, copy, keep = self.parts[mine[number]]
                draws = np.random.default_rng((self.seed, epoch, shard, copy))
                draws.bit_generator.advance(place.row)  # type: ignore[attr-defined]
                for item in read_shard(self.shards[shard], place.position):
                    row, key = item.row, place.row
                    place = replace(place, position=item.next, row=place.row + 1)
                    if draws.random() >= keep or (shared and key % readers != reader):
                        continue
                    place = replace(place, rows=place.rows + 1)
                    row = row if isinstance(row, BadRow) else self._check(row)
                    if isinstance(row, BadRow):
                        place = replace(place, bad_rows=place.bad_rows + 1)
                        self._report(row, place)
                        yield None, place
                    else:
                        found = True
                        yield {**row, "seed": (self.seed, epoch, shard, copy, key)}, place
                place = replace(place, shard=number + 1, position=0, row=0)
            idle = 0 if found else idle + 1
            if not found and place.rows > before:
                raise BadDataError(f"{', '.join(self.files)}: no row can be used")
            if idle == MAX_IDLE_PASSES:
                raise BadDataError(
                    f"{', '.join(self.files)}: no row for one of {readers} workers; give fewer "
                    "--dataloader_num_workers, or more data"
                )
            place = replace(place, epoch=epoch + 1, shard=0)

    def _check(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """A row with `num_frames`, of all its recordings."""
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
        if reason := too_long(extractor, num_frames, self.max_feature_frames, self.batch_seconds):
            raise AudioError(reason)

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        rate = self.collator.processor.sampling_rate
        limit = min(longest_usable(self.collator.processor, self.max_feature_frames), self.batch_seconds + 1.0)
        waveforms = [load_audio(source, rate, limit) for source in row["recordings"]]
        lengths = [speech_length(len(waveform), rate) for waveform in waveforms]
        if min(lengths) < 1:
            raise AudioError("a recording shorter than one frame of 25 ms")
        self._check_length(lengths)  # `speech_length` of the row may be wrong
        return {**row, "recordings": waveforms}

    def _report(self, row: BadRow, place: Place) -> None:
        bad = place.bad_rows + place.bad_recordings
        if bad <= NUM_NAMED:
            logger.warning("left out: %s", row)
        # With fewer rows the share says little; where no row may be bad, the first one is too many.
        if bad > self.max_bad_fraction * max(place.rows, MIN_ROWS):
            raise BadDataError(
                f"{bad} of {place.rows} rows that a worker read are bad, the last one: {row}\n"
                f"Mend them, or raise --max_bad_fraction (now {self.max_bad_fraction:g}; of at least {MIN_ROWS} rows)"
            )


def open_stream(
    files: Sequence[str],
    collator: SpeechLLMCollator,
    batch_seconds: float,
    max_feature_frames: int,
    options: DataOptions,
    **of_run: Any,
) -> RowStream:
    """The stream of this process, as the options ask for it.

    Args:
        files, collator, batch_seconds, max_feature_frames: as for `RowStream`.
        options: about windows and where recordings may lie.
        **of_run: `weights`, `seed`, `rank`, `num_ranks`, `max_bad_fraction` of `RowStream`.

    Raises:
        FileNotFoundError, BadDataError, ValueError: as `RowStream`.
    """
    return RowStream(
        files,
        collator,
        batch_seconds,
        max_feature_frames,
        window_rows=options.shuffle_buffer,
        audio_root=options.audio_root,
        **of_run,
    )
