"""Detection of truncated files and of files with several recordings, from lengths in the container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

MAX_CHUNKS = 1_000_000  # maximum of chunks or pages that are read; hours of speech have 100,000
MAX_TAIL = 1 << 24  # maximum of bytes after the end of a recording; tags and pictures are smaller
_READ = 1 << 20  # bytes per read
_MARGIN = 64  # bytes of the longest signature
# Signatures at the start of recordings, for formats whose headers contain no length.
_SIGNATURES = {
    b"fLaC": re.compile(rb"fLaC[\x00\x80]\x00\x00\x22"),
    b"#!AM": re.compile(rb"#!AMR(-WB)?\n"),
    b"caff": re.compile(rb"caff\x00\x01\x00\x00desc"),
    b"TTA1": re.compile(rb"TTA1[\x01\x02]\x00"),
    b"FLV\x01": re.compile(rb"FLV\x01[\x01\x04\x05]\x00\x00\x00\x09"),
    b"Crea": re.compile(rb"Creative Voice File\x1a"),
    b"\x1aE\xdf\xa3": re.compile(rb"\x1aE\xdf\xa3.{1,48}?(webm|matroska)", re.DOTALL),
}
_HEADS = (b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b".snd", b"caff", b"riff\x2e\x91", b"#!AMR", b"\x1aE\xdf\xa3")
_MP3_TAGS = (b"Xing", b"Info")  # tags in the first frame that contain the number of bytes


def missing_bytes(file: BinaryIO) -> int:
    """Returns the number of bytes missing from a recording according to its header; 0 if the header has no length.

    Decoders silently read a truncated WAV, AIFF, AU, Ogg, WebM or MP3 file as a shorter recording.
    """
    return max(0, _ends(file)[0] - file.seek(0, os.SEEK_END))


def second_recording(file: BinaryIO) -> int:
    """Returns the first byte of a second recording in a file; 0 if the file contains only one recording.

    `cat a.wav b.wav` and chained Ogg produce files with several recordings. Decoders stop after the first one.

    Raises:
        ValueError: if the first recording is followed by other data that is too long for a tag, for example in a WAV
            file of more than 4 GiB.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4)
    if head == b"OggS":
        return _second_chain(file)
    if head in _SIGNATURES:
        return _find_again(file, _SIGNATURES[head])
    end = _ends(file)[1]
    if not 0 < end < size:
        return 0
    for start in (end, end + 1):  # there may be one byte of padding
        if _is_recording(file, start):
            return start
    if size - end > MAX_TAIL:
        raise ValueError(f"{size - end} bytes follow after the end according to the header; write the file again")
    return 0


def _is_recording(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    head = file.read(16)
    return head.startswith(_HEADS) or head[4:8] == b"ftyp" or _mp3_tag(file, start)[1] >= 0


def _ends(file: BinaryIO) -> tuple[int, int]:
    """Returns the end of the samples and the end of the whole recording, in bytes; 0 if the header has no length."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _riff_ends(file, b"data", "little")
    if head[:4] == b"FORM":
        return _riff_ends(file, b"BODY" if head[8:12] == b"8SVX" else b"SSND", "big")
    if head[:4] == b".snd":
        start, length = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        ends = 0 if length == 0xFFFFFFFF else start + length
    elif head[:6] == b"riff\x2e\x91":  # W64: a 64-bit size after a GUID of 16 bytes
        ends = int.from_bytes(head[16:24], "little")
    elif head[:4] == b"OggS":
        ends = _last_ogg_page_end(file, size)
    elif head[4:8] == b"ftyp":
        return _mp4_ends(file)
    elif head[:4] == b"\x1aE\xdf\xa3":
        ends = _matroska_end(head)
    else:
        ends = _mp3_end(file)
    return ends, ends


def _chunks(file: BinaryIO, order: Literal["little", "big"]) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, first content byte and size of each chunk in a RIFF, RF64 or AIFF file."""
    position = 12
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(8)
        size = int.from_bytes(header[4:], order)
        if len(header) < 8 or not header[:4].isascii() or not header[:4].decode("ascii").isprintable():
            return
        yield header[:4], position + 8, size
        position += 8 + size + size % 2


def _riff_ends(file: BinaryIO, name: bytes, order: Literal["little", "big"]) -> tuple[int, int]:
    """Returns the end of the sample chunk and of the whole RIFF, RF64 or AIFF file.

    Raises:
        ValueError: if there are two sample chunks. Some recorders write a second one after a pause, but decoders read
            only one.
    """
    file.seek(4)
    form_end = 8 + int.from_bytes(file.read(4), order)
    large_size = samples_end = 0
    for chunk, start, size in _chunks(file, order):
        if samples_end and start > form_end:
            break
        if chunk == b"ds64":  # RF64: the 64-bit sizes of the file and of the data chunk
            sizes = file.read(16)
            form_end, large_size = 8 + int.from_bytes(sizes[:8], "little"), int.from_bytes(sizes[8:], "little")
        elif chunk == name:
            if samples_end:
                raise ValueError(f"two chunks of samples ({name.decode()}); write the file again with one chunk")
            # Writers that cannot seek back leave a number near 2^31 or 2^32: the length is then unknown, not wrong.
            size = size if size < 0x7FFFF000 else large_size
            if not size:
                return 0, 0
            samples_end = start + size
    return samples_end, max(samples_end, form_end) if samples_end else 0


def _last_ogg_page_end(file: BinaryIO, size: int) -> int:
    """Returns the end of the last page in an Ogg file (RFC 3533, section 6: a page has at most 65,307 bytes)."""
    start = file.seek(max(0, size - 2 * 65307))
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0
    if page + 27 > len(tail):
        return size + 1  # truncated within the page's header
    segments = tail[page + 26]
    return start + page + 27 + segments + sum(tail[page + 27 : page + 27 + segments])


def _second_chain(file: BinaryIO) -> int:
    """Returns the start of a second chain in an Ogg file (RFC 3533, section 4): a first page after other pages."""
    position, after_first = 0, False
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        page = file.read(27 + 255)
        if page[:4] != b"OggS" or len(page) < 27:
            return position if page.startswith(_HEADS) else 0
        first = bool(page[5] & 2)
        if first and after_first:
            return position
        after_first = after_first or not first
        segments = page[26]
        position += 27 + segments + sum(page[27 : 27 + segments])
    return 0


def _find_again(file: BinaryIO, signature: re.Pattern[bytes]) -> int:
    """Returns the position of a second signature in a file; 0 if there is none."""
    position = file.seek(4)
    held = b""
    while block := file.read(_READ):
        searched = held + block
        if found := signature.search(searched):
            return position - len(held) + found.start()
        position += len(block)
        held = searched[-_MARGIN:]
    return 0


def _mp4_ends(file: BinaryIO) -> tuple[int, int]:
    """Returns the end of samples and index, and of the whole MP4 or M4A file (ISO/IEC 14496-12, section 4.2)."""
    position = end = 0
    for number in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8 or number and header[4:8] == b"ftyp":
            break
        size = int.from_bytes(header[:4], "big")
        if size == 1:  # a 64-bit size follows the name
            size = int.from_bytes(header[8:], "big")
        if header[4:8] in (b"mdat", b"moov"):
            end = position + size
        if size < 8:  # 0: up to the end of the file
            break
        position += size
    return end, position


def _matroska_end(head: bytes) -> int:
    """Returns the end of the segment in a Matroska or WebM file (RFC 8794, section 4: sizes of variable width)."""

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
    return 0 if size < 0 else start + size  # live recordings have no size


def _mp3_end(file: BinaryIO) -> int:
    """Returns the end of an MP3 stream according to a tag in the first frame; 0 without this tag."""
    start, offset, frame = _mp3_tag(file, 0)
    if offset < 0 or not frame[offset + 7] & 2:  # one flag for each number that follows: frames, then bytes
        return 0
    offset += 8 + 4 * (frame[offset + 7] & 1)
    length = int.from_bytes(frame[offset : offset + 4], "big")
    return start + length if length else 0


def _mp3_tag(file: BinaryIO, start: int) -> tuple[int, int, bytes]:
    """Returns the start of the first MP3 frame, the offset of the length tag in this frame, and the frame.

    The tag follows header and side information (4 to 38 bytes). The offset is -1 without a tag.
    """
    file.seek(start)
    head = file.read(10)
    if head[:3] == b"ID3":  # a tag before the frame; its size is stored in four bytes of 7 bits each
        start += 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
    file.seek(start)
    frame = file.read(64)
    if len(frame) < 64 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return start, -1, frame
    return start, max(frame.find(tag, 4, 48) for tag in _MP3_TAGS), frame
