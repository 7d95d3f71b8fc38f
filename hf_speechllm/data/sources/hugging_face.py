"""Readers of data sets of `datasets`: folders of `save_to_disk`, Parquet files, and the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...audio.archives import AUDIO_COLUMN, parquet_member
from ..bad_rows import BadDataError
from ..utterance import SPLITS, Utterance
from .reading import Reading, split_of
from .tables import find_columns, utterance_of_record

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_saved(source: str) -> bool:
    """Returns whether a source is a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(os.path.join(source, name)) for name in ("dataset_info.json", "dataset_dict.json")) and (
        os.path.isfile(os.path.join(source, "dataset_dict.json")) or os.path.isfile(os.path.join(source, "state.json"))
    )


def is_hub_id(source: str) -> bool:
    """Returns whether a source can only be the id of a data set on the Hub."""
    return not os.path.exists(source) and _HUB_ID.fullmatch(source) is not None


def read_saved(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads a folder of `save_to_disk`."""
    from datasets import load_from_disk

    yield from _read(load_from_disk(source), os.path.abspath(source), reading)


def read_hub(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads all splits, or one split, of a data set on the Hub.

    Raises:
        BadDataError: if the data set cannot be loaded.
    """
    from datasets import load_dataset

    try:
        found = load_dataset(source, reading.config, split=reading.hub_split, streaming=reading.streaming)
    except (OSError, ValueError, RuntimeError) as error:  # no such data set, config or split; no connection
        raise BadDataError(
            f"{source}: no such file, and no data set with this name can be loaded from the Hub: {error}"
        ) from error
    yield from _read(found, source, reading, reading.hub_split)


def _read(found: Any, name: str, reading: Reading, split: str | None = None) -> Iterator[Utterance]:
    from datasets import Audio

    for part, dataset in found.items() if isinstance(found, Mapping) else [(split or "", found)]:
        features: Mapping[str, Any] = dataset.features or next(iter(dataset), {})  # streams may have no features
        columns = find_columns(features, reading.columns, name)
        if isinstance(features[columns["audio"]], Audio):
            dataset = dataset.cast_column(columns["audio"], Audio(decode=False))
        for number, record in enumerate(dataset, start=1):
            place = f"{part} row {number}".strip()
            audio = _address(record[columns["audio"]], f"{part or 'all'}-{number:08d}", reading, name)
            item = utterance_of_record(
                reading, record, columns, name, place, _folder(name), split_of(part) if part else None, audio
            )
            if item is not None:
                yield item


def _folder(name: str) -> str:
    """Returns the base folder of relative paths: the folder of a file, or the folder itself."""
    path = os.path.abspath(name)
    return path if os.path.isdir(path) else os.path.dirname(path)


def _address(value: Any, name: str, reading: Reading, source: str) -> str | None:
    """Returns the recording of a row: the path, or for bytes the address in the written tar file.

    Returns:
        `None` if the row has neither a file nor bytes.

    Raises:
        BadDataError: if the recording is bytes, and no tar file is written.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(content, bytes):
        if reading.recordings_tar is None:
            raise BadDataError(f"{source}: recordings are not files; write them with `hf-speechllm prepare {source}`")
        return reading.recordings_tar.add(name + os.path.splitext(path or "")[1], content)
    return content if isinstance(content, str) else path


def _parquet_files(source: str) -> list[tuple[str, str | None]]:
    if os.path.isfile(source):
        return [(os.path.abspath(source), None)] if source.endswith(".parquet") else []
    files = sorted(glob.glob(f"{glob.escape(os.path.abspath(source))}/**/*.parquet", recursive=True))
    named = [(path, split_of(os.path.basename(path))) for path in files]
    with_split = [item for item in named if item[1] is not None]
    return sorted(with_split, key=lambda item: (SPLITS.index(str(item[1])), item[0])) or named


def is_parquet(source: str) -> bool:
    """Returns whether a source is a Parquet file or a folder with Parquet files."""
    return bool(_parquet_files(source))


def read_parquet(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads Parquet files. Recordings in a column `audio` are not copied; recordings in other columns are copied.

    Raises:
        BadDataError: if a file is not Parquet, or damaged.
    """
    import pyarrow

    for path, split in _parquet_files(source):
        try:
            yield from _read_parquet_file(path, split, reading)
        except pyarrow.ArrowException as error:
            raise BadDataError(f"{path}: not Parquet, or damaged: {error}") from error


def _read_parquet_file(path: str, split: str | None, reading: Reading) -> Iterator[Utterance]:
    import pyarrow.parquet
    from datasets import load_dataset

    with pyarrow.parquet.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            return
        schema = file.schema_arrow
        columns = find_columns(schema.names, reading.columns, path)
        kind = schema.field(columns["audio"]).type
        audio = columns["audio"]
        fields = [kind.field(index).name for index in range(kind.num_fields)]
        embedded = _first(file, audio)
        if not (embedded and audio == AUDIO_COLUMN):
            rows = load_dataset("parquet", data_files=path, split="train", streaming=True)
            yield from _read({split or "": rows}, path, reading)
            return
        names = [name for role, name in columns.items() if role != "audio"]
        number = 0
        for batch in file.iter_batches(1024, columns=[*names, *(["audio.path"] if "path" in fields else [])]):
            for record in batch.to_pylist():
                item = utterance_of_record(
                    reading, record, columns, path, f"row {number + 1}", os.path.dirname(path), split,
                    parquet_member(path, number),
                )  # fmt: skip
                number += 1
                if item is not None:
                    yield item


def _first(file, audio: str) -> bool:
    """Returns whether the first recording of a Parquet file is stored as bytes."""
    for batch in file.iter_batches(1, columns=[audio]):
        value = batch.column(0)[0].as_py()
        return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)
    return False
