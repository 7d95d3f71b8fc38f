"""Manifest of a checkpoint: sizes and hashes of all files, written last; a checkpoint with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import atomic_write

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_CHUNK = 1 << 22  # bytes


def write_manifest(folder: Path) -> None:
    """Writes sizes and SHA-256 hashes of all files of a folder into the manifest, after all files are on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's global lock
        hashes = list(pool.map(sha256, files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    with atomic_write(folder / MANIFEST_FILE) as file:
        json.dump({"files": entries}, file, indent=1)


def find_damage(folder: Path) -> str | None:
    """Describes the damage of a checkpoint; returns `None` if the checkpoint is complete and unchanged."""
    try:
        entries = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing, because writing was interrupted"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error!r})"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(sha256, [folder / name for name in entries])
    changed = [
        name for (name, entry), digest in zip(entries.items(), hashes, strict=True) if digest != entry["sha256"]
    ]
    return f"{', '.join(changed)} changed since the checkpoint was written" if changed else None


def sha256(path: Path) -> str:
    """Returns the SHA-256 hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoint_folders(output_dir: str | Path) -> dict[int, Path]:
    """Returns the folders `checkpoint-STEP` by step, in order, complete or not."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return dict(sorted(found.items()))


def last_complete(output_dir: str | Path) -> Path | None:
    """Returns the last complete checkpoint, and warns about later incomplete checkpoints; `None` without checkpoints.

    Raises:
        ValueError: if checkpoints exist, but none is complete.
    """
    damages: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir).values()):
        damage = find_damage(folder)
        if damage is None:
            for text in damages:
                logger.warning("cannot resume from %s; %s is the last complete checkpoint", text, folder)
            return folder
        damages.append(f"{folder}: {damage}")
    if damages:
        raise ValueError(
            "--resume_from_checkpoint: no checkpoint is complete; move these checkpoints away to start fresh:\n  "
            + "\n  ".join(damages)
        )
    return None
