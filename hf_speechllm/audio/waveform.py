"""Recordings in: files, URLs, bytes or arrays, any format, rate and channel count, to one mono waveform."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import logging
import os
import urllib.error
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..files import open_regular
from .archives import container_of, read_member
from .decoders import (
    MAX_BYTES_IN_MEMORY,
    MAX_FILE_BYTES,
    MAX_RATE,
    MAX_SECONDS,
    MIN_RATE,
    AudioError,
    Block,
    decode_blocks,
)
from .downloads import DownloadError, download, is_url, redact_url
from .resampling import resample_blocks
from .truncation import second_recording
from .wav_header import probe_plain_wav

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000  # Hz
CANCELLED = 0.1  # channels cancel each other if their mean has less than this share of the energy of independent ones
LONGEST = 1e9  # seconds; a stream without a length says 2^63 samples


def resolve_source(source: str, folder: str) -> str:
    """A path as an absolute one, taken from a folder; a URL as it is.

    A folder that is a symbolic link is followed before a `..` is taken, as the system does it.
    """
    if "://" in source:
        return source
    base = _real_folder(folder) if ".." in source else os.path.abspath(folder)
    return os.path.normpath(os.path.join(base, source))


def check_root(source: str, root: str) -> None:
    """Sees to it that a path, symbolic links followed, lies in a folder; URLs do not point into the file system.

    Raises:
        AudioError: if it does not.
    """
    if is_url(source):
        return
    if "\0" in source:
        raise AudioError(f"{source!r}: a path can't hold a zero byte")
    path = os.path.realpath(container_of(source) or source)
    if os.path.commonpath((path, _real_folder(root))) != _real_folder(root):
        raise AudioError(f"{source}: outside --audio_root {root}")


@functools.cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def load_audio(source: Any, sampling_rate: int = SAMPLE_RATE, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Loads a recording as mono.

    Args:
        source: path, http(s) URL, the bytes of a file, or anything else that `inputs.to_source` takes: samples
            without a rate are already at `sampling_rate`.
        sampling_rate: of the result, in Hz.
        max_seconds: the longest recording; a longer one is not decoded beyond that.

    Returns:
        Waveform, float32, shape = (samples,), in [-1, 1]; channels are averaged. Where they cancel each other (one is
        wired in opposite phase), the loudest one is taken, with a warning.

    Raises:
        AudioError: if the recording is missing, empty, damaged or not audio, or the URL can't be reached; if its rate
            or samples are beyond the limits of `decoders`; `TooLongError` if it is too long.
    """
    if not isinstance(source, (str, Path, bytes)):
        from .inputs import to_source  # `inputs` builds on this module

        source = to_source(source, sampling_rate)
    if isinstance(source, np.ndarray):
        return source
    content, name = _content(source), shown(source)
    energies = _Energies()

    def waveform(mono: Iterable[Block]) -> np.ndarray:
        blocks = iter(mono)
        first, rate = next(blocks)
        return _join(resample_blocks(_chain(first, blocks), rate, sampling_rate))

    mixed = waveform((energies.mix(block), rate) for block, rate in _decode(content, name, max_seconds))
    if len(mixed) < 2:
        raise AudioError(f"{name}: a single sample")
    if not energies.cancelled:
        return mixed
    del mixed
    channel = energies.loudest
    logger.warning(
        "%s: its channels are in opposite phase and cancel each other; channel %d is used", name, channel + 1
    )
    return waveform((block[:, channel], rate) for block, rate in _decode(content, name, max_seconds))


def _chain(first: np.ndarray, others: Iterable[Block]) -> Iterator[np.ndarray]:
    yield first
    for block, _ in others:
        yield block


class _Energies:
    """Averages the channels of blocks, and keeps the energies of both."""

    def __init__(self):
        self.channels: np.ndarray | float = 0.0
        self.mean = 0.0

    def mix(self, block: np.ndarray) -> np.ndarray:
        """The mean of a block's channels, shape = (samples,)."""
        if block.shape[1] == 1:
            return block[:, 0]
        mean = block.mean(axis=1)
        # Of differences: a constant offset or hum, which may have opposite signs in two channels, is not speech.
        changes = np.diff(block, axis=0)
        self.channels = self.channels + np.einsum("ij,ij->j", changes, changes)
        self.mean += float(np.square(changes.mean(axis=1)).sum())
        return mean

    @property
    def cancelled(self) -> bool:
        """Whether the mean has so little energy that channels must be in opposite phase.

        The mean of independent channels has the energy of one of them, divided by their number.
        """
        return bool(self.mean < CANCELLED * np.mean(self.channels) / np.size(self.channels))

    @property
    def loudest(self) -> int:
        """The channel with the most energy, counted from 0."""
        return int(np.argmax(self.channels))


def read_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Decodes a recording: float32, shape = (samples, channels), in [-1, 1], and its rate in Hz.

    Raises:
        AudioError: as `load_audio`.
    """
    blocks = _decode(_content(source), shown(source))
    first, rate = next(blocks)
    return _join(_chain(first, blocks)), rate


def _join(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """One array of all; each block's memory is given back when it is copied."""
    held = list(blocks)
    if len(held) == 1:
        return np.ascontiguousarray(held[0])
    joined = np.empty((sum(map(len, held)), *held[0].shape[1:]), held[0].dtype)
    end = len(joined)
    while held:
        block = held.pop()
        joined[end - len(block) : end] = block
        end -= len(block)
    return joined


def probe_audio(source: str | Path | bytes) -> tuple[int, int]:
    """Number of samples (of one channel) and rate in Hz of a recording that can be decoded to its end.

    A WAV file of integer PCM can't hold anything that does not decode, so its header is compared with its size.
    Everything else is decoded, block by block where the decoder can, so that long recordings need little memory.

    Raises:
        AudioError: as `load_audio`.
    """
    content = _content(source)
    plain = probe_plain_wav(content)
    if plain:
        return plain
    lengths, rates = zip(*((len(block), rate) for block, rate in _decode(content, shown(source))), strict=True)
    return sum(lengths), rates[0]


def header_seconds(path: str | Path, formats: Collection[str] | None = None) -> float | None:
    """Length of a local recording in seconds by its header; `None` if there is none to go by.

    Args:
        formats: libsndfile's names of those that are believed; default all.
    """
    import soundfile

    try:
        open_regular(path).close()  # libsndfile would wait for the other end of a FIFO
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            believed = (formats is None or file.format in formats) and not file.subtype.startswith("MPEG")
            if believed and MIN_RATE <= file.samplerate <= MAX_RATE and 0 < seconds < LONGEST:
                return seconds
    except (OSError, ValueError, soundfile.LibsndfileError):
        pass  # not libsndfile's format, or damaged: decoding tells
    return None


def _content(source: str | Path | bytes) -> str | Path | bytes:
    """The path of a file of its own, or the bytes of what has none."""
    is_file = not isinstance(source, bytes) and not is_url(source) and not container_of(source)
    return source if is_file else read_bytes(source)


def _decode(content: str | Path | bytes, name: str, max_seconds: float = MAX_SECONDS) -> Iterator[Block]:
    """Blocks of a recording, at least one: float32, shape = (samples, channels), in [-1, 1], with the rate in Hz.

    Where a file holds several recordings, one after the other, all are decoded as one.

    Args:
        content: what `_content` gives.
        name: for messages.
        max_seconds: the longest recording.

    Raises:
        AudioError: as `load_audio`; possibly after some blocks.
    """
    path = None if isinstance(content, bytes) else content
    with _telling_why(name), io.BytesIO(content) if isinstance(content, bytes) else open_regular(content) as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            raise AudioError(f"{name}: the file is empty")
        if size > MAX_FILE_BYTES:
            raise AudioError(f"{name}: {size / 1e9:.1f} GB; at most {MAX_FILE_BYTES / 1e9:g} GB are read")
        if not second_recording(stream):
            yield from decode_blocks(stream, path, name, max_seconds)
            return
        if size > MAX_BYTES_IN_MEMORY:
            raise AudioError(f"{name}: several recordings in a file of more than {MAX_BYTES_IN_MEMORY / 1e9:g} GB")
        stream.seek(0)
        yield from _decode_joined(stream.read(), name, max_seconds)


def _decode_joined(data: bytes, name: str, max_seconds: float) -> Iterator[Block]:
    kind = None
    seconds = 0.0
    while data:
        end = second_recording(io.BytesIO(data)) or len(data)
        for block, rate in decode_blocks(io.BytesIO(data[:end]), None, name, max_seconds - seconds):
            if (rate, block.shape[1]) != (kind or (rate, block.shape[1])):
                raise AudioError(f"{name}: holds several recordings, of different rates or channels: split it")
            kind = rate, block.shape[1]
            seconds += len(block) / rate
            yield block, rate
        data = data[end:]


def read_bytes(source: str | Path | bytes) -> bytes:
    """The content of a file, a URL, or a recording in a tar or Parquet file (see `archives`).

    Raises:
        AudioError: if it can't be had.
    """
    if isinstance(source, bytes):
        return source
    with _telling_why(shown(source)):
        if is_url(source):
            return download(str(source))
        if container_of(source):
            return read_member(str(source), MAX_BYTES_IN_MEMORY)
        with open_regular(source) as file:
            return file.read()


def shown(source: str | Path | bytes | np.ndarray) -> str:
    """What a message calls a source: a path, or a URL without its secrets."""
    if isinstance(source, bytes):
        return "<bytes>"
    if isinstance(source, np.ndarray):
        return "the waveform"
    return redact_url(str(source)) if is_url(source) else str(source)


@contextlib.contextmanager
def _telling_why(source: str) -> Iterator[None]:
    """Turns what reading raises into an `AudioError`."""
    try:
        yield
    except AudioError:
        raise
    except DownloadError as error:
        raise AudioError(f"{source}: {error}") from error
    except urllib.error.HTTPError as error:
        raise AudioError(f"{source}: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise AudioError(f"{source}: can't be reached: {error.reason}") from error
    except http.client.IncompleteRead as error:
        raise AudioError(f"{source}: truncated: the connection broke after {len(error.partial)} bytes") from error
    except FileNotFoundError as error:
        hint = "; only http and https URLs can be read" if "://" in source else ""
        raise AudioError(f"{source}: no such file{hint}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AudioError(f"{source}: can't be read: {error}") from error


def source_stamp(source: str) -> str:
    """What changes when a file changes: size and modification time; empty for a URL or a missing file."""
    if is_url(source):
        return ""
    try:
        status = os.stat(container_of(source) or source)
    except (OSError, ValueError):  # a path with a zero byte gives the latter
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
