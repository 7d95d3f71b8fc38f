"""Decoding of recordings into blocks of samples, with libsndfile (WAV, FLAC, Ogg, ...) or FFmpeg (through PyAV)."""

from __future__ import annotations

import errno
import itertools
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .downloads import printable, redact
from .truncation import missing_bytes

if TYPE_CHECKING:
    import soundfile

    from .time_range import TimeRange

logger = logging.getLogger(__name__)

# Limits of recordings. No speech recording exceeds them; others would waste memory and time.
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz
MAX_SECONDS = 8 * 3600.0  # per recording; 1.8 GB as float32 at 16 kHz
MAX_FILE_BYTES = 16 * 10**9  # per local file; 8 hours in two channels of 24 bits at 96 kHz
MAX_BYTES_IN_MEMORY = 10**9  # per recording in an archive, or per file with several recordings
MAX_PEAK = 4.0  # of samples whose range should be [-1, 1]; clipping may exceed this range a little
MIN_PEAK_32 = 2.0**-16  # of 32-bit integers that are not silence; unscaled 16-bit samples stay below it

BLOCK_LENGTH = 1 << 20  # samples per block, over all channels; one minute at 16 kHz, so most utterances fit in a block
UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's number of samples for a FLAC stream without a length
# libsndfile's names of the formats that it reads to the end at a known rate; others contain instrument samples or
# tables of numbers.
FORMATS = (
    "WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "NIST", "SVX", "IRCAM", "PAF", "PVF", "AVR",
    "HTK",
)  # fmt: skip
# FFmpeg's names of audio containers. Excluded are pictures, subtitles, and lists of URLs or files (SDP, HLS, concat,
# ...), whose entries FFmpeg would open.
CONTAINERS = (
    "aac,ac3,adx,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,ircam,loas,matroska,webm,"
    "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,nut,ogg,oma,rm,sds,sox,tak,truehd,tta,voc,w64,wav,"
    "wsaud,wv,xwma"
)

Block = tuple[np.ndarray, int]  # float32, shape = (samples, channels), and the rate in Hz


class AudioError(ValueError):
    """An unusable recording. The message has path and reason on one line, without secrets of a URL."""

    def __init__(self, message: str):
        super().__init__(printable(redact(message)))


class TooLongError(AudioError):
    """A recording that exceeds the maximum length."""


def decode_blocks(
    stream: BinaryIO, path: Any, name: str, max_seconds: float, part: TimeRange | None = None
) -> Iterator[Block]:
    """Decodes a file with one recording.

    Args:
        stream: content of the file.
        path: path of the file, if any. libsndfile then reads the file without Python, so threads do not block each
            other.
        name: name of the recording in messages.
        max_seconds: maximum length of the recording, or of its part.
        part: part to decode; default: all. libsndfile seeks to its start; FFmpeg decodes from the start of the file.

    Raises:
        AudioError: if the file is damaged, is not audio, or exceeds a limit; possibly after some blocks.
        OSError, ValueError: if the file cannot be read.
    """
    if missing := missing_bytes(stream):
        raise AudioError(f"{name}: truncated: according to its header, {missing} more bytes should follow")
    samples = 0
    for block, rate in _decode(stream, path, name, max_seconds, part):
        samples += len(block)
        _check_limits(samples, rate, name, max_seconds, f"more than {max_seconds:.1f}")
        if not len(block):
            continue
        peak = max(-float(block.min()), float(block.max()))
        if not math.isfinite(peak):
            raise AudioError(f"{name}: contains samples that are not finite")
        if peak > MAX_PEAK:
            raise AudioError(f"{name}: {out_of_scale(peak)}")
        yield block, rate
    if not samples:
        raise AudioError(f"{name}: no samples")


def out_of_scale(peak: float) -> str:
    """Returns the error message for samples far outside [-1, 1]."""
    return f"samples reach {peak:g}; their range must be [-1, 1]: divide 16-bit samples by 32768"


def _check_limits(samples: int, rate: int, name: str, max_seconds: float, length: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: sampling rate of {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz")
    if samples > max_seconds * rate:
        raise TooLongError(f"{name}: length of {length} s; the maximum is {max_seconds:.1f} s")


def _decode(stream: BinaryIO, path: Any, name: str, max_seconds: float, part: TimeRange | None) -> Iterator[Block]:
    import soundfile

    stream.seek(0)
    try:
        file, cause = soundfile.SoundFile(path or stream), "no length in the header"
    except soundfile.LibsndfileError as error:
        file, cause = None, error.error_string.rstrip(".")
    # libsndfile needs the length in the header; without a length it stops early or does not start. It trusts damaged
    # MP3 tags and cannot read MP3 in blocks; it reports MP3 inside WAV as truncated. FFmpeg decodes these files.
    if file and file.format in FORMATS and 0 < file.frames < UNKNOWN_LENGTH and not file.subtype.startswith("MPEG"):
        first, stop = part.samples(file.frames, file.samplerate, name) if part else (0, file.frames)
        seconds = (stop - first) / file.samplerate
        _check_limits(stop - first, file.samplerate, name, max_seconds, f"{seconds:.1f}")
        return _blocks_of_libsndfile(file, name, first, stop)
    if file:
        file.close()
    stream.seek(0)
    blocks = _blocks_of_ffmpeg(stream, name, cause)
    return part.cut(blocks, name) if part else blocks


def _blocks_of_libsndfile(file: soundfile.SoundFile, name: str, first: int, stop: int) -> Iterator[Block]:
    import soundfile

    length = max(1, BLOCK_LENGTH // file.channels)
    samples, peak = first, 0.0
    with file:
        try:
            if first:
                file.seek(first)
            while len(block := file.read(min(length, stop - samples), dtype="float32", always_2d=True)):
                samples += len(block)
                if file.subtype == "PCM_32":
                    peak = max(peak, -float(block.min()), float(block.max()))
                yield block, file.samplerate
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{name}: truncated or damaged: {error.error_string}") from error
        if samples < stop:
            raise AudioError(f"{name}: truncated: only {samples} of {file.frames} samples can be read")
        if 0 < peak <= MIN_PEAK_32 and stop - first == file.frames:  # a part may be quiet
            raise AudioError(f"{name}: 32-bit samples in the range of 16 bits; write them as 16 bits")


def _blocks_of_ffmpeg(stream: BinaryIO, name: str, cause: str) -> Iterator[Block]:
    try:
        import av
    except ImportError as error:  # only for formats that libsndfile does not read, and for damaged files
        raise AudioError(
            f"{name}: not audio, damaged (libsndfile: {cause}), or of a format for which the package av is missing: "
            f"{error}"
        ) from error

    # A file can refer to other files and URLs. No protocol is allowed, so FFmpeg reads only the given stream.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    try:
        with av.open(stream, "r", options=options) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: not audio: the file has no audio stream")
            if (tracks := len(container.streams.audio)) > 1:
                logger.warning("%s: has %d audio tracks; using only the first", redact(name), tracks)
            # Converts only the sample format; rate and channel count do not change. The format must be interleaved:
            # with one plane per channel, PyAV reads more planes than a frame may have, and the process crashes.
            resampler = av.AudioResampler(format="flt")
            held: list[np.ndarray] = []  # frames of 20 ms, joined to blocks
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
            reason = "not an audio container"
        raise AudioError(f"{name}: not audio, or damaged (libsndfile: {cause}; FFmpeg: {reason})") from error
