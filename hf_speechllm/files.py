"""Writing files so that a reader sees the old content or the complete new one, never a part; reading real files."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Opens a file for reading bytes; a FIFO or a device, which may have no end, is refused without waiting for it.

    Args:
        buffering: as of `open`.

    Raises:
        OSError: if the file is not a regular one, or can't be read.
        ValueError: if the path holds a zero byte.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer. It changes nothing for regular files; Windows lacks it.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("not a regular file")
    return os.fdopen(number, "rb", buffering)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", encoding: str = "utf-8") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that takes its place once the block has ended without an exception.

    After any failure, KeyboardInterrupt included, the temporary file is removed and `path` is as it was. A symbolic
    link is followed: the file it points to is replaced, the link stays. A replaced file keeps its permissions.

    Args:
        path: file to write; its folder must exist.
        mode: "w" for text, with "\\n" line ends on every system, or "wb" for bytes.
        encoding: encoding of text; not used with "wb".

    Raises:
        ValueError: if `mode` is neither "w" nor "wb".
        OSError: if `path` is a folder or a device, its folder is missing or not writable, or the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'mode must be "w" or "wb", not {mode!r}: a file is written whole')
    target = Path(path).resolve()
    replaced = target.exists()
    if replaced and not target.is_file():
        raise OSError(f"{path}: cannot be written: not a regular file; name a file in an existing folder")
    # The random part keeps writers of the same file apart; the name stays short where that of the file is long.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    text_options: dict[str, Any] = {} if mode == "wb" else {"encoding": encoding, "newline": "\n"}
    try:
        with open(temporary, mode.replace("w", "x"), **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name points to it
        if replaced:
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    finally:  # once it has taken its place, it is not there any more
        temporary.unlink(missing_ok=True)


def apply_umask(folder: str | os.PathLike[str], pattern: str = "*.safetensors") -> None:
    """Gives files the permissions that new files of their folder have; safetensors makes them private to the user."""
    probe = Path(folder) / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(probe, "x"):
            mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    for path in Path(folder).glob(pattern):
        os.chmod(path, mode)
