"""Recordings in: files, URLs, bytes or arrays, any format, rate and channel count, to one mono waveform."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import itertools
import os
import re
import stat
import struct
import urllib.error
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .archives import container_of, read_member
from .downloads import DownloadError, download, is_url, redact
from .truncation import missing_bytes, mp3_has_length

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16000  # Hz
BLOCK_LENGTH = 1 << 20  # samples decoded at once; a minute at 16 kHz, so that most recordings are one block
PLAIN_PCM = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32")  # libsndfile's names
LONGEST = 1e9  # seconds; a stream without a length says 2^63 samples
UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's number of samples for a FLAC stream without a length
# What most WAV files of integer PCM start with: no chunk before the data but the format and FFmpeg's version.
_SIMPLE_WAV = re.compile(
    rb"RIFF.{4}WAVEfmt \x10\0\0\0\x01\0.{14}"
    rb"(?:LIST\x1a\0\0\0INFOISFT[\x0d\x0e]\0\0\0Lavf[0-9.]{8}[0-9.\0]\0)?data.{4}",
    re.DOTALL,
)
_SIMPLE_WAV_LENGTH = 78  # bytes of the longest


class AudioError(ValueError):
    """A recording that can't be used; the message has its path and the reason, without secrets of a URL."""

    def __init__(self, message: str):
        super().__init__(redact(message))


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


def load_audio(source: Any, sampling_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Loads a recording as mono.

    Args:
        source: path, http(s) URL, the bytes of a file, or anything else that `inputs.to_source` takes: samples
            without a rate are already at `sampling_rate`.
        sampling_rate: of the result, in Hz.

    Returns:
        Waveform, float32, shape = (samples,), in [-1, 1]; channels are averaged.

    Raises:
        AudioError: if the recording is missing, empty, damaged or not audio, or the URL can't be reached; or if
            samples are not finite, or their scale is not known.
    """
    if not isinstance(source, (str, Path, bytes)):
        from .inputs import to_source  # `inputs` builds on this module

        source = to_source(source, sampling_rate)
    if isinstance(source, np.ndarray):
        return source
    waveform, rate = read_audio(source, mono=True)
    return resample(waveform, rate, sampling_rate)


def read_audio(source: str | Path | bytes, mono: bool = False) -> tuple[np.ndarray, int]:
    """Decodes a recording: float32, shape = (samples, channels), in [-1, 1], and its rate in Hz.

    Args:
        mono: whether to average the channels; the shape is then (samples,).

    Raises:
        AudioError: as `load_audio`.
    """
    # Averaged block by block: an hour in six channels would take 4 GB.
    decoded = ((_average(block) if mono else block, rate) for block, rate in _decode(source))
    blocks, rates = zip(*decoded, strict=True)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), rates[0]


def _average(block: np.ndarray) -> np.ndarray:
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def probe_audio(source: str | Path | bytes) -> tuple[int, int]:
    """Number of samples (of one channel) and rate in Hz of a recording that can be decoded to its end.

    A WAV file of integer PCM can't hold anything that does not decode, so its header is compared with its size.
    Everything else is decoded, block by block where the decoder can, so that long recordings need little memory.

    Raises:
        AudioError: as `load_audio`.
    """
    data = read_bytes(source) if is_url(source) or container_of(source) else None
    plain = _probe_plain_wav(source if data is None else data)
    if plain:
        return plain
    lengths, rates = zip(*((len(block), rate) for block, rate in _decode(source, data)), strict=True)
    return sum(lengths), rates[0]


def header_seconds(path: str | Path, formats: Collection[str] | None = None) -> float | None:
    """Length of a local recording in seconds by its header; `None` if there is none to go by.

    Args:
        formats: libsndfile's names of those that are believed; default all.
    """
    import soundfile

    try:
        check_regular(path)
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            if (formats is None or file.format in formats) and 0 < seconds < LONGEST:
                return seconds
    except (OSError, soundfile.LibsndfileError):
        pass  # not libsndfile's format, or damaged: decoding tells
    return None


def _probe_plain_wav(source: str | Path | bytes) -> tuple[int, int] | None:
    """As `probe_audio`; `None` for whatever must be decoded, or can't be read, which decoding then says."""
    import soundfile

    try:
        if not isinstance(source, bytes):
            check_regular(source)
        # Without a buffer: to fill one takes longer than all the rest.
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0) as file:
            head = file.read(_SIMPLE_WAV_LENGTH)
            simple = _parse_simple_wav(head, file.seek(0, os.SEEK_END)) if head.startswith(b"RIFF") else None
            if simple:
                return simple
            if not head.startswith((b"RIFF", b"RF64")) or missing_bytes(file):
                return None
            file.seek(0)
            # By its name where it has one: libsndfile then reads by itself, not through Python.
            with soundfile.SoundFile(file if isinstance(source, bytes) else source) as wav:
                return (wav.frames, wav.samplerate) if wav.subtype in PLAIN_PCM and wav.frames else None
    except (OSError, ValueError, soundfile.LibsndfileError):
        return None


def _parse_simple_wav(head: bytes, size: int) -> tuple[int, int] | None:
    """As `_probe_plain_wav`, for a header that leaves no doubt; `None` for any other, which is libsndfile's to judge.

    Opening with soundfile takes several times as long as reading the header, and lists have millions of short files.

    Args:
        head: the first bytes of the file, `_SIMPLE_WAV_LENGTH` if it has as many.
        size: of the whole file.
    """
    match = _SIMPLE_WAV.match(head)
    if match is None:
        return None
    riff_length, channels, rate, byte_rate, width, bits = struct.unpack_from("<4xI14xHIIHH", head)
    length = int.from_bytes(head[match.end() - 4 : match.end()], "little")
    consistent = (
        0 < channels <= 1024  # libsndfile's limits of channels and rate
        and 0 < rate < 1 << 31
        and bits in (8, 16, 24, 32)
        and width == channels * bits // 8
        and byte_rate == rate * width
        and riff_length == size - 8
        and 0 < length == size - match.end()
        and length % width == 0
    )
    return (length // width, rate) if consistent else None


def _decode(source: str | Path | bytes, data: bytes | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of a recording, at least one: float32, shape = (samples, channels), in [-1, 1], with the rate in Hz.

    Args:
        data: the recording's bytes, if they have been read.

    libsndfile reads WAV, FLAC, Ogg, Opus and MP3; FFmpeg, as bundled by PyAV, the rest (M4A, AAC, WMA, AMR, video).

    Raises:
        AudioError: as `load_audio`; possibly after some blocks.
    """
    import soundfile

    name = "<bytes>" if isinstance(source, bytes) else str(source)
    opened: Any = source
    if data is None and _is_file(source):
        # By its name: libsndfile then reads by itself, not through Python, where threads would wait for each other.
        with _telling_why(name):
            check_regular(source)
        with _telling_why(name), open(source, "rb") as stream:
            size, missing = stream.seek(0, os.SEEK_END), missing_bytes(stream)
    else:
        data = read_bytes(source) if data is None else data
        size, missing, opened = len(data), missing_bytes(io.BytesIO(data)), io.BytesIO(data)
    if not size:
        raise AudioError(f"{name}: the file is empty")
    if missing:
        raise AudioError(f"{name}: truncated: the file announces {missing} more bytes than there are")
    try:
        file, cause = soundfile.SoundFile(opened), "no length in the header"
    except soundfile.LibsndfileError as error:
        file, cause = None, error.error_string.rstrip(".")
    # libsndfile reads as far as it believes the length goes; without one, it would stop early or not start at all.
    if file and 0 < file.frames < UNKNOWN_LENGTH and file.format != "MP3":
        blocks = _blocks_of_libsndfile(file, name)
    else:
        data = read_bytes(source) if data is None else data
        if file and 0 < file.frames < UNKNOWN_LENGTH and mp3_has_length(data, file.frames):
            blocks = _blocks_of_libsndfile(file, name)
        else:
            blocks = _blocks_of_ffmpeg(data, name, cause)
    samples = 0
    for block, rate in blocks:
        if not np.isfinite(block).all():
            raise AudioError(f"{name}: holds samples that are not finite")
        samples += len(block)
        yield block, rate
    if not samples:
        raise AudioError(f"{name}: no samples")


def _blocks_of_libsndfile(file: soundfile.SoundFile, name: str) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    # soundfile seeks after each block, which puts the MP3 decoder off: that must read all at once.
    length = -1 if file.format == "MP3" else BLOCK_LENGTH
    samples = 0
    with file:
        try:
            while len(block := file.read(length, dtype="float32", always_2d=True)):
                samples += len(block)
                yield block, file.samplerate
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{name}: truncated or damaged: {error.error_string}") from error
        if samples < file.frames:
            raise AudioError(f"{name}: truncated: {samples} of {file.frames} samples can be read")


def _blocks_of_ffmpeg(data: bytes, name: str, cause: str) -> Iterator[tuple[np.ndarray, int]]:
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: not audio: the file has no audio stream")
            # Every rate and channel count stays; only the sample format is converted. Not to a plane for each channel:
            # PyAV looks for more of them than a frame may have, and the process dies.
            resampler = av.AudioResampler(format="flt")
            for frame in itertools.chain(container.decode(container.streams.audio[0]), [None]):
                for block in resampler.resample(frame):
                    yield block.to_ndarray().reshape(-1, block.layout.nb_channels), block.sample_rate
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        raise AudioError(f"{name}: not audio, or damaged (libsndfile: {cause}; FFmpeg: {reason})") from error


def read_bytes(source: str | Path | bytes) -> bytes:
    """The content of a file, a URL, or a recording in a tar or Parquet file (see `archives`).

    Raises:
        AudioError: if it can't be had.
    """
    if isinstance(source, bytes):
        return source
    with _telling_why(str(source)):
        if is_url(source):
            return download(str(source))
        check_regular(container_of(source) or source)
        if container_of(source):
            return read_member(str(source))
        return Path(source).read_bytes()


def check_regular(path: str | bytes | Path) -> None:
    """Sees to it that reading a path ends: a pipe waits for ever, and a device may have no end.

    Raises:
        OSError: if it is missing, or no regular file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def _is_file(source: str | Path | bytes) -> bool:
    """Whether it is the name of a file of its own."""
    return not isinstance(source, bytes) and not is_url(source) and not container_of(source)


@contextlib.contextmanager
def _telling_why(source: str) -> Iterator[None]:
    """Turns what reading raises into an `AudioError`."""
    try:
        yield
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


@functools.cache
def _resampler(rate: int, sampling_rate: int):
    from torchaudio.transforms import Resample

    return Resample(rate, sampling_rate)


def resample(waveform: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """Resamples a waveform, shape = (samples,), as the original does: torchaudio's windowed sinc."""
    if rate == sampling_rate:
        return np.ascontiguousarray(waveform)
    import torch

    return _resampler(rate, sampling_rate)(torch.from_numpy(np.ascontiguousarray(waveform))).numpy()


def source_stamp(source: str) -> str:
    """What changes when a file changes: size and modification time; empty for a URL or a missing file."""
    if is_url(source):
        return ""
    try:
        status = os.stat(container_of(source) or source)
    except (OSError, ValueError):  # a path with a zero byte gives the latter
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
