"""Damaged files of the caches of `datasets` and of `data.encoder_cache`, found after a read has failed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from .bad_rows import BadDataError

ENCODED_FOLDER = "encoded"  # in a cache, beside `generator` of `datasets`
FOLDERS = ("generator", ENCODED_FOLDER)
MAPPED = "cache-*"  # files that `map` computes; the others of a folder of `datasets` belong together


def cache_root(cache_dir: str | None) -> Path:
    """The folder of the caches; by default that of `datasets`."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE)


@contextlib.contextmanager
def naming_damage(cache_dir: str | None) -> Iterator[None]:
    """Names the damaged file if reading the cache fails in the block.

    Raises:
        BadDataError: with what to delete, so that it is computed again.
    """
    try:
        yield
    except BadDataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        damaged = next(_find_damaged(cache_root(cache_dir)), None)
        if damaged is None:
            raise
        raise BadDataError(
            f"the feature cache is damaged: {damaged[0]} ({' '.join(str(error).split())}); delete {damaged[1]}: it is "
            "computed again"
        ) from error


def _find_damaged(root: Path) -> Iterator[tuple[Path, Path]]:
    """Damaged files, and what is to be deleted."""
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            try:
                if file.suffix == ".arrow":
                    with pa.memory_map(str(file)) as mapped:
                        pa.ipc.open_stream(mapped).read_all()
                elif file.name == "dataset_info.json":
                    json.loads(file.read_bytes())
            except (OSError, ValueError):
                single = folder == ENCODED_FOLDER or file.match(MAPPED)
                yield file, file if single else file.parent
