"""Readers of data sets of `datasets`: folders of `save_to_disk`, Parquet files, and the Hub."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...audio.archives import num_arrow_rows, table_member
from ...console import quiet_hub
from ..bad_rows import BadDataError
from ..utterance import Utterance
from .reading import Reading, sort_by_split, split_of, split_of_path
from .tables import find_columns, utterance_of_record

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")  # suffixes of files, hardly of a name on the Hub


def is_saved(source: str) -> bool:
    """Returns whether a source is a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(os.path.join(source, name)) for name in ("dataset_info.json", "dataset_dict.json")) and (
        os.path.isfile(os.path.join(source, "dataset_dict.json")) or os.path.isfile(os.path.join(source, "state.json"))
    )


def is_hub_id(source: str) -> bool:
    """Returns whether a source can only be the id of a data set on the Hub."""
    return not (os.path.exists(source) or source.endswith(_LISTS)) and _HUB_ID.fullmatch(source) is not None


def read_saved(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads a folder of `save_to_disk`. Recordings inside are not copied."""
    from datasets import load_from_disk

    name = os.path.abspath(source)
    found = load_from_disk(name, keep_in_memory=False)
    for part, dataset in found.items() if isinstance(found, Mapping) else [("", found)]:
        columns = find_columns(dataset.features, reading.columns, name)
        members = _members(dataset, columns["audio"])
        if members is None:
            yield from _read({part: dataset}, name, reading)
            continue
        records = zip(dataset.remove_columns(columns["audio"]), members, strict=True)
        for number, (record, (recording, path)) in enumerate(records, start=1):
            item = utterance_of_record(
                reading, record, columns, name, f"{part} row {number}".strip(), name, split_of(part) if part else None,
                recording, path,
            )  # fmt: skip
            if item is not None:
                yield item


def _members(dataset: Any, audio: str) -> Iterator[tuple[str, str]] | None:
    """Returns addresses and paths (or `""`) of the recordings in the Arrow files of a data set; does not read them.

    The address of a row without bytes is the path. Returns `None` if the column cannot contain bytes.
    """
    import pyarrow.compute

    column = dataset.data.column(audio)
    fields = _fields(column.type)
    contents = pyarrow.compute.struct_field(column, "bytes") if "bytes" in fields else column
    if not (pyarrow.types.is_binary(contents.type) or pyarrow.types.is_large_binary(contents.type)):
        return None
    present = contents.is_valid()
    paths = pyarrow.compute.struct_field(column, "path") if "path" in fields else None
    places = (
        (file["filename"], row) for file in dataset.cache_files for row in range(num_arrow_rows(file["filename"]))
    )

    def member(number: int, place: tuple[str, int]) -> tuple[str, str]:
        path = (paths[number].as_py() if paths is not None else None) or ""
        return table_member(*place, audio) if present[number].as_py() else path, path

    return itertools.starmap(member, enumerate(places))


def read_hub(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads all splits, or one split, of a data set on the Hub.

    Raises:
        BadDataError: if the data set cannot be loaded.
    """
    from datasets import load_dataset

    quiet_hub()
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
            value = record[columns["audio"]]
            audio = _address(value, f"{part or 'all'}-{number:08d}", reading, name)
            item = utterance_of_record(
                reading, record, columns, name, place, _folder(name), split_of(part) if part else None, audio,
                value.get("path") if isinstance(value, Mapping) else None,
            )  # fmt: skip
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
    root = os.path.abspath(source)
    files = sorted(glob.glob(f"{glob.escape(root)}/**/*.parquet", recursive=True))
    return [(path, split_of_path(path, root)) for path in files]


def is_parquet(source: str) -> bool:
    """Returns whether a source is a Parquet file or a folder with Parquet files."""
    return bool(_parquet_files(source))


def read_parquet(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads Parquet files. Recordings inside are not copied.

    Raises:
        BadDataError: if a file is not Parquet, or damaged; if only some files of a folder are named after splits.
    """
    import pyarrow

    files = _parquet_files(source)
    if any(split is not None for _, split in files):
        files = sort_by_split(source, files)
    for path, split in files:
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
        audio = columns["audio"]
        fields = _fields(schema.field(audio).type)
        contents = schema.field(audio).type.field("bytes").type if "bytes" in fields else schema.field(audio).type
        if not (pyarrow.types.is_binary(contents) or pyarrow.types.is_large_binary(contents)):
            rows = load_dataset("parquet", data_files=path, split="train", streaming=True)
            yield from _read({split or "": rows}, path, reading)
            return
        present = _have_bytes(file, f"{audio}.bytes" if "bytes" in fields else audio)
        names = [name for role, name in columns.items() if role != "audio"]
        number = 0
        for batch in file.iter_batches(1024, columns=[*names, *([f"{audio}.path"] if "path" in fields else [])]):
            for record in batch.to_pylist():
                original = (record.get(audio) or {}).get("path")
                item = utterance_of_record(
                    reading, record, columns, path, f"row {number + 1}", os.path.dirname(path), split,
                    table_member(path, number, audio) if next(present) else original or "", original,
                )  # fmt: skip
                number += 1
                if item is not None:
                    yield item


def _have_bytes(file: Any, column: str) -> Iterator[bool]:
    """Yields whether each row of a Parquet file has bytes; reads the bytes only if some rows have no bytes."""
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        chunks = (facts.column(index) for index in range(facts.num_columns))
        statistics = next(chunk for chunk in chunks if chunk.path_in_schema == column).statistics
        missing = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if missing in (0, facts.num_rows):
            yield from itertools.repeat(not missing, facts.num_rows)
            continue
        for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
            values = batch.column(0)
            yield from (values.flatten()[0] if values.type.num_fields else values).is_valid().to_pylist()


def _fields(kind: Any) -> list[str]:
    """Returns the names of the fields of a struct; an empty list for other types."""
    return [kind.field(index).name for index in range(kind.num_fields)]
