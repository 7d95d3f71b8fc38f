"""Lengths of integer PCM WAV files from their headers; the samples of these files always decode."""

from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path

from ..files import open_regular
from .decoders import MAX_RATE, MAX_SECONDS, MIN_RATE
from .truncation import missing_bytes, second_recording

# libsndfile's names. PCM_32 is excluded: only the samples show whether the scale is that of 16 bits.
PLAIN_PCM = ("PCM_U8", "PCM_16", "PCM_24")
# Header of most integer PCM WAV files: before the data only the format, and possibly FFmpeg's version.
_SIMPLE_WAV = re.compile(
    rb"RIFF.{4}WAVEfmt \x10\0\0\0\x01\0.{14}"
    rb"(?:LIST\x1a\0\0\0INFOISFT[\x0d\x0e]\0\0\0Lavf[0-9.]{8}[0-9.\0]\0)?data.{4}",
    re.DOTALL,
)
_SIMPLE_WAV_LENGTH = 78  # bytes of the longest simple header


def probe_plain_wav(source: str | Path | bytes) -> tuple[int, int] | None:
    """Returns the result of `audio.probe_audio`, or `None` if the source must be decoded or cannot be read."""
    import soundfile

    try:
        # Unbuffered: filling a buffer would take longer than all other steps.
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, buffering=0) as file:
            head = file.read(_SIMPLE_WAV_LENGTH)
            simple = _parse_simple_wav(head, file.seek(0, os.SEEK_END)) if head.startswith(b"RIFF") else None
            if simple:
                return simple
            if not head.startswith((b"RIFF", b"RF64")) or missing_bytes(file) or second_recording(file):
                return None
            file.seek(0)
            # With a path, libsndfile reads the file without Python.
            with soundfile.SoundFile(file if isinstance(source, bytes) else source) as wav:
                usable = wav.subtype in PLAIN_PCM and _is_within_limits(wav.frames, wav.samplerate)
                return (wav.frames, wav.samplerate) if usable else None
    except (OSError, ValueError, soundfile.LibsndfileError):
        return None


def _parse_simple_wav(head: bytes, size: int) -> tuple[int, int] | None:
    """Returns samples and rate of a simple, consistent WAV header; `None` for other headers, left to libsndfile.

    Opening a file with soundfile takes several times longer, and lists contain millions of short files.

    Args:
        head: the first `_SIMPLE_WAV_LENGTH` bytes of the file, or all bytes of a shorter file.
        size: size of the whole file in bytes.
    """
    match = _SIMPLE_WAV.match(head)
    if match is None:
        return None
    riff_length, channels, rate, byte_rate, width, bits = struct.unpack_from("<4xI14xHIIHH", head)
    length = int.from_bytes(head[match.end() - 4 : match.end()], "little")
    consistent = (
        0 < channels <= 1024  # libsndfile's limit
        and bits in (8, 16, 24)
        and width == channels * bits // 8
        and byte_rate == rate * width
        and riff_length == size - 8
        and length == size - match.end()
        and length % width == 0
        and _is_within_limits(length // width, rate)
    )
    return (length // width, rate) if consistent else None


def _is_within_limits(samples: int, rate: int) -> bool:
    return MIN_RATE <= rate <= MAX_RATE and 0 < samples <= MAX_SECONDS * rate
