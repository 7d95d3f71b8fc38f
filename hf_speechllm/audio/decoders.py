"""Recordings to blocks of samples: libsndfile for WAV, FLAC, Ogg and their like, FFmpeg (by PyAV) for the rest."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .downloads import redact
from .truncation import missing_bytes

if TYPE_CHECKING:
    import soundfile

# Limits of recordings: beyond them, memory and time would be taken for what no speech recording is.
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz
MAX_SECONDS = 8 * 3600.0  # of a recording; 1.8 GB as float32 at 16 kHz
MAX_FILE_BYTES = 16 * 10**9  # of a local file; 8 hours in two channels of 24 bits at 96 kHz
MAX_BYTES_IN_MEMORY = 10**9  # of a recording in an archive, or of a file that holds several recordings
MAX_PEAK = 4.0  # of samples that should lie in [-1, 1]; clipping goes beyond, but not that far

BLOCK_LENGTH = 1 << 20  # samples decoded at once, of all channels; a minute at 16 kHz, so that most take one block
UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's number of samples for a FLAC stream without a length
# libsndfile's names of formats that it reads to their end at a known rate; its others hold samples of instruments and
# tables of numbers.
FORMATS = (
    "WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "NIST", "SVX", "IRCAM", "PAF", "PVF", "AVR",
    "HTK",
)  # fmt: skip
# FFmpeg's names of containers that hold recordings. Others are lists of addresses or files (SDP, HLS, concat, ...),
# which FFmpeg would open, or pictures and subtitles.
CONTAINERS = (
    "aac,ac3,adx,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,ircam,loas,matroska,webm,"
    "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,nut,ogg,oma,rm,sds,sox,tak,truehd,tta,voc,w64,wav,"
    "wsaud,wv,xwma"
)

Block = tuple[np.ndarray, int]  # float32, shape = (samples, channels), and the rate in Hz


class AudioError(ValueError):
    """A recording that can't be used; the message has its path and the reason, without secrets of a URL."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class TooLongError(AudioError):
    """A recording that is longer than what can be used."""


def decode_blocks(stream: BinaryIO, path: Any, name: str, max_seconds: float) -> Iterator[Block]:
    """Decodes a file that holds one recording.

    Args:
        stream: its bytes.
        path: of the file, if it has one: by its name, libsndfile reads by itself and not through Python, where threads
            would wait for each other.
        name: for messages.
        max_seconds: the longest recording.

    Raises:
        AudioError: if it is damaged or not audio, or beyond a limit; possibly after some blocks.
        OSError, ValueError: if it can't be read.
    """
    if missing := missing_bytes(stream):
        raise AudioError(f"{name}: truncated: the file announces {missing} more bytes than there are")
    samples = 0
    for block, rate in _decode(stream, path, name, max_seconds):
        samples += len(block)
        _check_limits(samples, rate, name, max_seconds, f"more than {max_seconds:.1f}")
        if not len(block):
            continue
        peak = max(-float(block.min()), float(block.max()))
        if not math.isfinite(peak):
            raise AudioError(f"{name}: holds samples that are not finite")
        if peak > MAX_PEAK:
            raise AudioError(f"{name}: {out_of_scale(peak)}")
        yield block, rate
    if not samples:
        raise AudioError(f"{name}: no samples")


def out_of_scale(peak: float) -> str:
    """The reason to refuse a waveform whose samples go so far beyond [-1, 1]."""
    return f"samples reach {peak:.4g}; they must lie in [-1, 1]: divide those of 16 bits by 32768"


def _check_limits(samples: int, rate: int, name: str, max_seconds: float, length: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: a sampling rate of {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz")
    if samples > max_seconds * rate:
        raise TooLongError(f"{name}: {length} s; at most {max_seconds:.1f} s can be used")


def _decode(stream: BinaryIO, path: Any, name: str, max_seconds: float) -> Iterator[Block]:
    import soundfile

    stream.seek(0)
    try:
        file, cause = soundfile.SoundFile(path or stream), "no length in the header"
    except soundfile.LibsndfileError as error:
        file, cause = None, error.error_string.rstrip(".")
    # libsndfile reads as far as it believes the length goes; without one, it would stop early or not start at all. Of
    # MP3 it believes a damaged tag, and can't read it in blocks; in WAV, it takes it for truncated.
    if file and file.format in FORMATS and 0 < file.frames < UNKNOWN_LENGTH and not file.subtype.startswith("MPEG"):
        seconds = file.frames / file.samplerate
        _check_limits(file.frames, file.samplerate, name, max_seconds, f"{seconds:.1f}")
        return _blocks_of_libsndfile(file, name)
    if file:
        file.close()
    stream.seek(0)
    return _blocks_of_ffmpeg(stream, name, cause)


def _blocks_of_libsndfile(file: soundfile.SoundFile, name: str) -> Iterator[Block]:
    import soundfile

    length = max(1, BLOCK_LENGTH // file.channels)
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


def _blocks_of_ffmpeg(stream: BinaryIO, name: str, cause: str) -> Iterator[Block]:
    import av

    # A file can name others, also by an address: no protocol is allowed, so that only the stream given is read.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    try:
        with av.open(stream, "r", options=options) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: not audio: the file has no audio stream")
            # Every rate and channel count stays; only the sample format is converted. Not to a plane for each channel:
            # PyAV looks for more of them than a frame may have, and the process dies.
            resampler = av.AudioResampler(format="flt")
            held: list[np.ndarray] = []  # frames are of 20 ms: many make a block
            rate = length = 0
            for frame in itertools.chain(container.decode(container.streams.audio[0]), [None]):
                for part in resampler.resample(frame):
                    rate = part.sample_rate
                    held.append(part.to_ndarray().reshape(-1, part.layout.nb_channels))
                    length += held[-1].size
                if held and (frame is None or length >= BLOCK_LENGTH):
                    yield np.concatenate(held), rate
                    held, length = [], 0
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        if isinstance(error, av.FFmpegError) and error.errno == errno.EINVAL:
            reason = "not a container of audio"
        raise AudioError(f"{name}: not audio, or damaged (libsndfile: {cause}; FFmpeg: {reason})") from error
