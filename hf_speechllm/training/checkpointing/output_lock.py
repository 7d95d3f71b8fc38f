"""One run for one output folder."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.json"
GRACE_SECONDS = 20.0  # that loader processes may outlive a run that was killed
_held: dict[str, FileLock] = {}


def hold_output(output_dir: str | Path) -> None:
    """Takes an output folder for this process, up to its end; the system gives it back however the process ends.

    Raises:
        ValueError: if another run has it; the message names its host and process.
    """
    folder = Path(output_dir).resolve()
    if str(folder) in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            owner = _read_owner(folder)
            if _is_alive(owner) or time.monotonic() > deadline:
                raise ValueError(
                    f"{output_dir} is in use by another run, process {owner.get('pid', '?')} on "
                    f"{owner.get('host', 'an unknown host')}: wait for its end, or choose another --output_dir"
                ) from None
            time.sleep(0.5)
    (folder / OWNER_FILE).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
    _held[str(folder)] = lock


def _read_owner(folder: Path) -> dict:
    try:
        return json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_alive(owner: dict) -> bool:
    """Whether the owner may still run: only a process of this host that is gone is known not to."""
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
