"""Locks on the output folder of a training run and on the output file of a decoding run: one run per output.

The operating system provides the locks (`flock` on POSIX) and releases them when a process ends in any way. Locks work
between machines if the file system of a shared folder supports it; NFS on Linux does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.json"
GRACE_SECONDS = 20.0  # wait for data loader processes of a killed run, which still have the lock
OWNER_SECONDS = 1.0  # wait for the owner file, which is written after the lock is acquired and removed before release
_held: dict[str, FileLock] = {}


def acquire_output_lock(output_dir: str | Path) -> None:
    """Locks an output folder until this process ends.

    Raises:
        ValueError: if another run has locked the folder; the message names host and process.
    """
    folder = Path(output_dir).resolve()
    if str(folder) in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _held[str(folder)] = _acquire(folder / LOCK_FILE, folder / OWNER_FILE, str(output_dir), "--output_dir")


@contextlib.contextmanager
def output_file_lock(path: str | os.PathLike[str], output: str, option: str) -> Iterator[None]:
    """Locks a file, which need not exist, while the block runs.

    Creates `.NAME.lock` and `.NAME.run.json` (names the owner) beside the file and removes both at the end.

    Args:
        output: name of the output in the error message.
        option: option that chooses another output, for the error message.

    Raises:
        ValueError: if another run has locked the file; the message names host and process.
        OSError: if the folder is not writable.
    """
    target = Path(path).resolve()
    lock_file, owner_file = (target.with_name(f".{target.name}.{ending}") for ending in ("lock", "run.json"))
    lock = _acquire(lock_file, owner_file, output, option)
    try:
        yield
    finally:
        # Removed before the release: a process that has already opened the lock file detects that it was removed and
        # does not acquire it. Windows cannot remove an open file; there, the release removes it.
        with contextlib.suppress(OSError):
            owner_file.unlink()
            lock_file.unlink()
        lock.release()


def _acquire(lock_file: Path, owner_file: Path, output: str, option: str) -> FileLock:
    lock = FileLock(lock_file, thread_local=False)
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            owner = _read_owner(owner_file)
            patience = OWNER_SECONDS if not owner else 0.0 if _is_alive(owner) else GRACE_SECONDS
            if time.monotonic() - started >= patience:
                raise ValueError(
                    f"{output} is in use by another run, process {owner.get('pid', '?')} on "
                    f"{owner.get('host', 'an unknown host')}; wait until it ends, or choose another {option}"
                ) from None
            time.sleep(0.1)
    owner_file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
    return lock


def _read_owner(file: Path) -> dict:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict) -> bool:
    """Returns whether the owner may still run: false only if the process is on this host and does not exist."""
    if owner.get("host") != socket.gethostname() or os.name == "nt":  # on Windows, signal 0 interrupts a process
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, ValueError, TypeError):
        return True
    return True
