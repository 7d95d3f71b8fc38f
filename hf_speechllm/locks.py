"""One run for one output: locks on the folder of a training run and on the output file of a decoding run.

The locks are those of the operating system (`flock` on POSIX), which releases them however a process ends. They hold
between the machines of a shared folder as far as its file system shares such locks; NFS under Linux does.
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
GRACE_SECONDS = 20.0  # that loader processes may outlive a run that was killed
OWNER_SECONDS = 1.0  # between taking a lock and naming its owner, or between both of these and their removal
_held: dict[str, FileLock] = {}


def acquire_output_lock(output_dir: str | Path) -> None:
    """Takes an output folder for this process, up to its end; the system gives it back however the process ends.

    Raises:
        ValueError: if another run has it; the message names its host and process.
    """
    folder = Path(output_dir).resolve()
    if str(folder) in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _held[str(folder)] = _acquire(folder / LOCK_FILE, folder / OWNER_FILE, str(output_dir), "--output_dir")


@contextlib.contextmanager
def hold_file(path: str | os.PathLike[str], output: str, option: str) -> Iterator[None]:
    """Holds a lock on a file while the block runs, for this process alone; the file itself need not exist.

    Beside it lie `.NAME.lock` and `.NAME.run.json`, which names the owner; both are removed at the end of the block.

    Args:
        output: what is locked, for the error message.
        option: that chooses another output, for the error message.

    Raises:
        ValueError: if another run has it; the message names its host and process.
        OSError: if the folder can't be written.
    """
    target = Path(path).resolve()
    lock_file, owner_file = (target.with_name(f".{target.name}.{ending}") for ending in ("lock", "run.json"))
    lock = _acquire(lock_file, owner_file, output, option)
    try:
        yield
    finally:
        # Removed while the lock is held: who opened the file before finds it without a name, and does not take it.
        # Windows removes no open file; there, it is removed on release.
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
                    f"{owner.get('host', 'an unknown host')}: wait for its end, or choose another {option}"
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
    """Whether the owner may still run: only a process of this host that is gone is known not to."""
    if owner.get("host") != socket.gethostname() or os.name == "nt":  # there, signal 0 interrupts a process
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, ValueError, TypeError):
        return True
    return True
