"""Detection of damaged files in the caches of `datasets` and `data.encoder_cache`, after a failed read."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from .bad_rows import BadDataError

ENCODED_FOLDER = "encoded"  # in a cache, beside `generator` of `datasets`
FOLDERS = ("generator", ENCODED_FOLDER)
MAPPED = "cache-*"  # files written by `map`, which may be deleted one by one; other files of a folder belong together


def cache_root(cache_dir: str | None) -> Path:
    """Returns the cache folder; default: the cache folder of `datasets`."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE)


@contextlib.contextmanager
def report_damaged_cache(cache_dir: str | None) -> Iterator[None]:
    """Reports the damaged file if reading the cache fails in the block, and the folder if it cannot be written.

    Raises:
        BadDataError: if a cache file is damaged; the message names the files to delete. Also if the disk is full.
    """
    try:
        yield
    except BadDataError:
        raise
    except (OSError, ValueError) as error:  # types of pyarrow's errors
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise BadDataError(
                f"the feature cache cannot be written to {cache_root(cache_dir)}: {error.strerror}; free space, or "
                "choose another --cache_dir"
            ) from error
        damaged = next(_find_damaged(cache_root(cache_dir)), None)
        if damaged is None:
            raise
        raise BadDataError(
            f"the feature cache is damaged: {damaged[0]} ({' '.join(str(error).split())}); delete {damaged[1]} "
            "to compute it again"
        ) from error


def _find_damaged(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yields damaged files, and the file or folder to delete."""
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
