"""Loading of recordings (files, URLs, bytes or arrays of any format, rate and channel count) as mono waveforms."""

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
from .archives import find_archive, read_member
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
from .time_range import TimeRange, split_time_range, time_range_hint
from .truncation import second_recording
from .wav_header import probe_plain_wav

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000  # Hz
# Suffixes of recordings in a folder; a file that the user names may have any suffix.
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".amr", ".aif", ".aiff", ".au", ".caf",
    ".w64", ".sph", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".ts",
)  # fmt: skip
CANCELLED = 0.1  # channels cancel each other if their mean has less than this share of independent channels' energy
CANCELLED_CHANNELS = "%s: channels in opposite phase cancel each other; using only channel %d"
GROWTH = 8  # an array grows by at least 1/8 of its length
MAX_HEADER_SECONDS = 1e9  # seconds; the header of a stream without a length may contain 2^63 samples


def resolve_source(source: str, folder: str) -> str:
    """Returns a path, relative to a folder, as an absolute path; a URL unchanged.

    Resolves symbolic links of the folder before `..`, as the operating system does.
    """
    if "://" in source:
        return source
    base = _real_folder(folder) if ".." in source else os.path.abspath(folder)
    return os.path.normpath(os.path.join(base, source))


def check_root(source: str, root: str) -> None:
    """Checks that a path is inside a folder after resolving symbolic links. URLs are not checked.

    Raises:
        AudioError: if the path is outside the folder.
    """
    if is_url(source):
        return
    if "\0" in source:
        raise AudioError(f"{source!r}: a path must not contain a zero byte")
    path = os.path.realpath(local_path(source))
    if os.path.commonpath((path, _real_folder(root))) != _real_folder(root):
        raise AudioError(f"{source}: outside --audio_root {root}; move the recording or change --audio_root")


@functools.cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def load_audio(source: Any, sampling_rate: int = SAMPLE_RATE, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Loads a recording as mono.

    Args:
        source: path, http(s) URL, bytes of a file, or another input of `inputs.to_source`; samples without a rate must
            have the rate `sampling_rate`. `PATH#t=START,END` is a part of a recording (see `time_range`).
        sampling_rate: rate of the result in Hz.
        max_seconds: maximum length; decoding of a longer recording stops at this length.

    Returns:
        Waveform, float32, shape = (samples,), in [-1, 1]. Channels are averaged. If channels cancel each other
        (opposite phase), the loudest channel is used, with a warning.

    Raises:
        AudioError: if the recording is missing, empty, damaged or not audio, the URL cannot be reached, or a limit in
            `decoders` is exceeded; `TooLongError` if the recording is too long.
    """
    if not isinstance(source, (str, Path, bytes)):
        from .inputs import to_source  # only for other inputs than files and bytes

        source = to_source(source, sampling_rate)
    if isinstance(source, np.ndarray):
        return source
    (content, part), name = _content(source), display_name(source)
    energies = _Energies()

    def waveform(mono: Iterable[Block]) -> np.ndarray:
        blocks = iter(mono)
        first, rate = next(blocks)
        return _join(resample_blocks(_chain(first, blocks), rate, sampling_rate))

    mixed = waveform((energies.mix(block), rate) for block, rate in _decode(content, name, max_seconds, part))
    if len(mixed) < 2:
        raise AudioError(f"{name}: only one sample")
    if not energies.cancelled:
        return mixed
    del mixed
    channel = energies.loudest
    logger.warning(CANCELLED_CHANNELS, name, channel + 1)
    return waveform((block[:, channel], rate) for block, rate in _decode(content, name, max_seconds, part))


def _chain(first: np.ndarray, others: Iterable[Block]) -> Iterator[np.ndarray]:
    yield first
    for block, _ in others:
        yield block


class _Energies:
    """Averages the channels of blocks and sums up the energies of the channels and of their mean."""

    def __init__(self):
        self.channels: np.ndarray | float = 0.0
        self.mean = 0.0

    def mix(self, block: np.ndarray) -> np.ndarray:
        """Returns the mean of a block's channels, shape = (samples,)."""
        if block.shape[1] == 1:
            return block[:, 0]
        mean = block.mean(axis=1)
        # Energy of differences ignores a constant offset or hum, which may have opposite signs in two channels.
        changes = np.diff(block, axis=0)
        self.channels = self.channels + np.einsum("ij,ij->j", changes, changes)
        self.mean += float(np.square(changes.mean(axis=1)).sum())
        return mean

    @property
    def cancelled(self) -> bool:
        """Whether the low energy of the mean shows that channels are in opposite phase.

        The mean of independent channels has the energy of one channel, divided by the number of channels.
        """
        return bool(self.mean < CANCELLED * np.mean(self.channels) / np.size(self.channels))

    @property
    def loudest(self) -> int:
        """The channel with the most energy, counted from 0."""
        return int(np.argmax(self.channels))


def mix_channels(samples: np.ndarray, name: str) -> np.ndarray:
    """Averages channels; returns the loudest channel, with a warning, if the channels cancel each other.

    Args:
        samples: shape = (samples, channels).
        name: name of the recording, for the warning.
    """
    energies = _Energies()
    mixed = energies.mix(samples)
    if not energies.cancelled:
        return mixed
    logger.warning(CANCELLED_CHANNELS, name, energies.loudest + 1)
    return samples[:, energies.loudest]


def read_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Decodes a recording to float32, shape = (samples, channels), in [-1, 1], and the rate in Hz.

    Raises:
        AudioError: see `load_audio`.
    """
    blocks = read_blocks(source)
    first, rate = next(blocks)
    return _join(_chain(first, blocks)), rate


def read_blocks(source: str | Path | bytes) -> Iterator[Block]:
    """Decodes a recording like `read_audio`, block by block, so a long recording needs little memory.

    Raises:
        AudioError: see `load_audio`; possibly after some blocks.
    """
    content, part = _content(source)
    yield from _decode(content, display_name(source), part=part)


def _join(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenates blocks. A list of the blocks would need twice the memory."""
    iterator = iter(blocks)
    first = joined = np.ascontiguousarray(next(iterator))
    filled = len(joined)
    for block in iterator:
        end = filled + len(block)
        if end > len(joined):
            if joined is first:  # owned by the caller, so it must not be resized
                joined = first.copy()
            # Some systems resize in place; others copy the whole array. Growing by a share keeps copies rare.
            joined.resize((max(end, filled + filled // GROWTH), *joined.shape[1:]), refcheck=False)
        joined[filled:end] = block
        filled = end
    if filled < len(joined):
        joined.resize((filled, *joined.shape[1:]), refcheck=False)
    return joined


def probe_audio(source: str | Path | bytes) -> tuple[int, int]:
    """Returns the number of samples (per channel) and the rate in Hz, and checks that the recording can be decoded.

    Reads only the header of integer PCM WAV files, since their samples always decode, and compares it with the file
    size. Decodes all other recordings, in blocks if possible, so long recordings need little memory.

    Raises:
        AudioError: see `load_audio`.
    """
    (content, part), name = _content(source), display_name(source)
    if plain := probe_plain_wav(content):
        first, stop = part.samples(*plain, name) if part else (0, plain[0])
        return stop - first, plain[1]
    blocks = ((len(block), rate) for block, rate in _decode(content, name, part=part))
    lengths, rates = zip(*blocks, strict=True)
    return sum(lengths), rates[0]


def header_seconds(path: str | Path, formats: Collection[str] | None = None) -> float | None:
    """Returns the length of a local recording in seconds according to the header; `None` if unknown.

    Args:
        formats: libsndfile's names of formats with reliable headers; default: all.
    """
    import soundfile

    try:
        open_regular(path).close()  # refuses a FIFO, where libsndfile would block
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            reliable = (formats is None or file.format in formats) and not file.subtype.startswith("MPEG")
            if reliable and MIN_RATE <= file.samplerate <= MAX_RATE and 0 < seconds < MAX_HEADER_SECONDS:
                return seconds
    except (OSError, ValueError, soundfile.LibsndfileError):
        pass  # not a format of libsndfile, or damaged: decoding reports the reason
    return None


def _content(source: str | Path | bytes) -> tuple[str | bytes, TimeRange | None]:
    """Returns the path of a local file, or the bytes of any other source, and the part to decode."""
    if isinstance(source, bytes):
        return source, None
    whole, part = split_time_range(source)
    return (read_bytes(whole) if is_url(whole) or find_archive(whole) else whole), part


def _decode(
    content: str | bytes, name: str, max_seconds: float = MAX_SECONDS, part: TimeRange | None = None
) -> Iterator[Block]:
    """Yields blocks (at least one) of float32, shape = (samples, channels), in [-1, 1], with the rate in Hz.

    Decodes several consecutive recordings in one file as one recording.

    Args:
        content, part: results of `_content`.
        name: name of the recording in messages.
        max_seconds: maximum length of the recording, or of its part.

    Raises:
        AudioError: see `load_audio`; possibly after some blocks.
    """
    path = None if isinstance(content, bytes) else content
    with _as_audio_error(name), io.BytesIO(content) if isinstance(content, bytes) else open_regular(content) as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            raise AudioError(f"{name}: the file is empty")
        if size > MAX_FILE_BYTES:
            raise AudioError(f"{name}: size of {size / 1e9:.1f} GB; the maximum is {MAX_FILE_BYTES / 1e9:g} GB")
        if path is not None and part is not None:  # one of many parts of a possibly long file
            joined = _is_joined(path, size, os.fstat(stream.fileno()).st_mtime_ns)
        else:
            joined = bool(second_recording(stream))
        if not joined:
            yield from decode_blocks(stream, path, name, max_seconds, part)
            return
        if size > MAX_BYTES_IN_MEMORY:
            raise AudioError(
                f"{name}: several recordings in a file of more than {MAX_BYTES_IN_MEMORY / 1e9:g} GB; split the file"
            )
        stream.seek(0)
        blocks = _decode_joined(stream.read(), name, MAX_SECONDS if part else max_seconds)
        yield from part.cut(blocks, name) if part else blocks


@functools.lru_cache(maxsize=256)
def _is_joined(path: str, size: int, modified: int) -> bool:
    """Returns whether a file has several recordings. Cached, because some formats must be read completely."""
    with open_regular(path) as stream:
        return bool(second_recording(stream))


def _decode_joined(data: bytes, name: str, max_seconds: float) -> Iterator[Block]:
    kind = None
    seconds = 0.0
    while data:
        end = second_recording(io.BytesIO(data)) or len(data)
        for block, rate in decode_blocks(io.BytesIO(data[:end]), None, name, max_seconds - seconds):
            if (rate, block.shape[1]) != (kind or (rate, block.shape[1])):
                raise AudioError(f"{name}: contains recordings with different rates or channels; split the file")
            kind = rate, block.shape[1]
            seconds += len(block) / rate
            yield block, rate
        data = data[end:]


def read_bytes(source: str | Path | bytes) -> bytes:
    """Reads the content of a file, a URL, or a recording in a tar or Parquet file (see `archives`).

    Raises:
        AudioError: if the source cannot be read.
    """
    if isinstance(source, bytes):
        return source
    with _as_audio_error(display_name(source)):
        if is_url(source):
            return download(str(source))
        if find_archive(source):
            return read_member(str(source), MAX_BYTES_IN_MEMORY)
        with open_regular(source) as file:
            return file.read()


def display_name(source: str | Path | bytes | np.ndarray) -> str:
    """Returns the name of a source in messages: a path, or a URL without secrets."""
    if isinstance(source, bytes):
        return "<bytes>"
    if isinstance(source, np.ndarray):
        return "the waveform"
    return redact_url(str(source)) if is_url(source) else str(source)


@contextlib.contextmanager
def _as_audio_error(source: str) -> Iterator[None]:
    """Converts errors of reading to `AudioError`."""
    try:
        yield
    except AudioError:
        raise
    except DownloadError as error:
        raise AudioError(f"{source}: {error}") from error
    except urllib.error.HTTPError as error:
        raise AudioError(f"{source}: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise AudioError(f"{source}: cannot be reached: {error.reason}") from error
    except http.client.IncompleteRead as error:
        raise AudioError(f"{source}: truncated: connection lost after {len(error.partial)} bytes") from error
    except FileNotFoundError as error:
        hint = "; only http and https URLs are supported" if "://" in source else ""
        raise AudioError(f"{source}: no such file{hint or time_range_hint(source)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AudioError(f"{source}: cannot be read: {error}") from error


def local_path(source: str) -> str:
    """Returns the path of the file that contains a source: a recording, a part of one, or a member of an archive."""
    whole = split_time_range(source)[0]
    return find_archive(whole) or whole


def source_stamp(source: str) -> str:
    """Returns size and modification time of a file, to detect changes; empty for a URL or a missing file."""
    if is_url(source):
        return ""
    try:
        status = os.stat(local_path(source))
    except (OSError, ValueError):  # ValueError: the path contains a zero byte
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
