"""Whether a recording's file is all there: what its container announces, against what it has."""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

MP3_SAMPLES_PER_BYTE = 100  # at 8 kbit/s and 24 kHz, the least and the most, there are 24


def missing_bytes(file: BinaryIO) -> int:
    """How many bytes a recording announces that are not there; 0 where its format (or writer) does not say.

    Decoders read a truncated WAV, AIFF, Ogg or WebM file as a shorter one, without a word.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        end = _chunk_end(file, b"data", "little")
    elif head[:4] == b"FORM":
        end = _chunk_end(file, b"SSND", "big")
    elif head[:4] == b"OggS":
        end = _last_ogg_page_end(file, size)
    elif head[4:8] == b"ftyp":
        end = _mp4_end(file)
    elif head[:4] == b"\x1aE\xdf\xa3":
        end = _matroska_end(head)
    else:
        end = 0
    return max(0, end - size)


def _chunk_end(file: BinaryIO, name: bytes, order: Literal["little", "big"]) -> int:
    """Where a chunk of a RIFF, RF64 or AIFF file ends."""
    position, large_size = 12, 0
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return 0
        size = int.from_bytes(header[4:], order)
        if header[:4] == b"ds64":  # RF64: the 64-bit size of the data chunk follows that of the file
            large_size = int.from_bytes(file.read(16)[8:], "little")
        elif header[:4] == name:
            # Writers that can't seek back leave a number near 2^31 or 2^32: the length is then unknown, not wrong.
            size = size if size < 0x7FFFF000 else large_size
            return position + 8 + size if size else 0
        position += 8 + size + size % 2


def _last_ogg_page_end(file: BinaryIO, size: int) -> int:
    """Where the last page of an Ogg file ends (RFC 3533, section 6: at most 65,307 bytes after its start)."""
    start = file.seek(max(0, size - 2 * 65307))
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0
    if page + 27 > len(tail):
        return size + 1  # within the page's header
    segments = tail[page + 26]
    return start + page + 27 + segments + sum(tail[page + 27 : page + 27 + segments])


def _mp4_end(file: BinaryIO) -> int:
    """Where the samples and the index of an MP4 or M4A file end (ISO/IEC 14496-12, section 4.2: boxes)."""
    position, end = 0, 0
    while True:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return end
        size = int.from_bytes(header[:4], "big")
        if size == 1:  # a 64-bit size follows the name
            size = int.from_bytes(header[8:], "big")
        if header[4:8] in (b"mdat", b"moov"):
            end = position + size
        if size < 8:  # 0: up to the end of the file
            return end
        position += size


def _matroska_end(head: bytes) -> int:
    """Where the segment of a Matroska or WebM file ends (RFC 8794, section 4: sizes of variable width)."""

    def size_at(position: int) -> tuple[int, int]:
        width = 9 - head[position].bit_length()
        largest = (1 << 7 * width) - 1
        size = int.from_bytes(head[position : position + width], "big") & largest
        return position + width, -1 if size == largest else size

    start, size = size_at(4)
    segment = start + size
    if head[segment : segment + 4] != b"\x18S\x80g" or segment + 12 > len(head):
        return 0
    start, size = size_at(segment + 4)
    return 0 if size < 0 else start + size  # live recordings leave the size open


def mp3_has_length(data: bytes, samples: int) -> bool:
    """Whether an MP3 file tells its number of samples, in a tag in the first frame; else libsndfile guesses it.

    More samples than that many bytes can hold are a damaged tag, and memory for them must not be asked for.
    """
    if samples > MP3_SAMPLES_PER_BYTE * len(data):
        return False
    start = 0
    if data[:3] == b"ID3":  # four bytes of 7 bits each
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    first_frame = data[start : start + 2048]
    return b"Xing" in first_frame or b"Info" in first_frame
