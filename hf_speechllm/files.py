"""Atomic writing of files (readers get the complete old or new content), reading of regular files only, digests."""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Opens a file for reading bytes. Refuses FIFOs and devices, which may have no end, without blocking.

    Args:
        buffering: see `open`.

    Raises:
        OSError: if the file is not a regular file, or cannot be read.
        ValueError: if the path contains a zero byte.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer. The flag has no effect on regular files; Windows lacks it.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("not a regular file")
    return os.fdopen(number, "rb", buffering)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", encoding: str = "utf-8") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it to `path` if the block ends without an exception.

    After any failure, including KeyboardInterrupt, the temporary file is removed and `path` is unchanged. If `path` is
    a symbolic link, the target file is replaced and the link stays. A replaced file keeps its permissions.

    Args:
        path: file to write; a missing folder is created.
        mode: "w" for text, with "\\n" line ends on every system, or "wb" for bytes.
        encoding: encoding of text; ignored with "wb".

    Raises:
        ValueError: if `mode` is neither "w" nor "wb".
        OSError: if `path` is a folder or a device, its folder cannot be created or written, or the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'mode must be "w" or "wb", not {mode!r}')
    target = Path(path).resolve()
    replaced = target.exists()
    if replaced and not target.is_file():
        raise OSError(f"{path}: cannot be written: not a regular file; name a file in an existing folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The random name separates writers of the same file and is short, even if the file name has the maximum length.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    text_options: dict[str, Any] = {} if mode == "wb" else {"encoding": encoding, "newline": "\n"}
    try:
        with open(temporary, mode.replace("w", "x"), **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the file is renamed
        if replaced:
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:  # after the renaming, there is nothing to remove
        temporary.unlink(missing_ok=True)


def apply_umask(folder: str | os.PathLike[str], pattern: str = "*.safetensors") -> None:
    """Sets the permissions of files to the default for new files; safetensors creates files only the user can read."""
    probe = Path(folder) / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(probe, "x"):
            mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    for path in Path(folder).glob(pattern):
        os.chmod(path, mode)


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of the content of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_path(output_file: str | os.PathLike[str]) -> Path:
    """Returns the file in which `decode` records how it made an output file: `hyp.decoding.json` for `hyp.txt`."""
    output = Path(output_file)
    # Other suffixes stay, so that the files of hyp.v1 and hyp.v2 differ.
    return output.with_name(f"{output.stem if output.suffix == '.txt' else output.name}.decoding.json")


def read_record(output_file: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the record of `decode` about an output file; `None` without a record.

    Raises:
        ValueError: if the record is not a JSON object with a digest.
    """
    path = record_path(output_file)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["sha256"], record["settings"]["weights"]  # noqa: B018
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of `hf-speechllm decode`; remove the file") from error
    return record
