"""Detection of truncated files and of files with several recordings, from lengths in the container."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal

MAX_CHUNKS = 1_000_000  # chunks or pages read per container; hours of speech have 100,000
MAX_TAIL = 1 << 24  # bytes after the end of a recording; tags and pictures are smaller
_READ = 1 << 20  # bytes searched at once
_MARGIN = 64  # maximum length of a signature, in bytes
TWO_CHUNKS = "two chunks of samples ({}); rewrite the file with one chunk"
# Signatures of recordings, searched in files whose header has no length. They are long enough not to occur by chance.
_SIGNATURES = {
    prefix: re.compile(pattern, re.DOTALL)
    for prefix, pattern in {
        b"RIFF": rb"RIFF.{4}(WAVE|AVI )", b"RF64": rb"RF64.{4}WAVE", b"FORM": rb"FORM.{4}AIF[FC]",
        b"fLaC": rb"fLaC[\x00\x80]\x00\x00\x22", b"OggS": rb"OggS\x00\x02\x00{8}", b"#!AMR": rb"#!AMR(-WB)?\n",
        b"caff": rb"caff\x00\x01\x00\x00desc", b"TTA1": rb"TTA1[\x01\x02]\x00[\x01-\x08]\x00",
        b"FLV\x01": rb"FLV\x01[\x01\x04\x05]\x00\x00\x00\x09", b"Creative": rb"Creative Voice File\x1a",
        b"\x1aE\xdf\xa3": rb"\x1aE\xdf\xa3.{1,48}?(webm|matroska)", b"NIST_1A": rb"NIST_1A\n *1024\n",
        b".snd": rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1b]\x00", b"riff.\x91\xcf\x11": rb"",
        b"wvpk": rb"wvpk.{4}[\x02-\x10]\x04", b"ftyp": rb"ftyp(isom|iso[2-9]|mp4[12]|M4[AVB] |qt  |3gp|3g2|dash)",
    }.items()
}  # fmt: skip
_HEADS = (
    b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b".snd", b"caff", b"riff\x2e\x91", b"#!AMR", b"\x1aE\xdf\xa3",
    b"NIST_1A\n", b"TTA1", b"wvpk", b"FLV\x01", b"Creative Voice", b"\x0bw",
)  # fmt: skip
_BOXES = (  # top-level boxes of an MP4 file
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"udta", b"meta",
    b"mfra", b"sidx", b"ssix", b"pdin", b"prft", b"emsg",
)  # fmt: skip
_MP3_TAGS = (b"Xing", b"Info")  # in the first frame, with the number of bytes
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte with reversed bits


def missing_bytes(file: BinaryIO) -> int:
    """Returns the number of bytes missing from a recording according to its header; 0 if the header has no length.

    Decoders silently read a truncated WAV, AIFF, AU, Ogg, WebM or MP3 file as a shorter recording.
    """
    return max(0, _ends(file)[0] - file.seek(0, os.SEEK_END))


def second_recording(file: BinaryIO) -> int:
    """Returns the first byte of a second recording in a file; 0 if the file contains only one recording.

    `cat a.wav b.wav` and chained Ogg produce files with several recordings. Decoders stop after the first one.

    Raises:
        ValueError: if other data after the recording are too long for a tag, as in a WAV file of more than 4 GiB; if a
            page of an Ogg file is damaged or missing, which decoders silently skip.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4)
    if head == b"OggS":
        return _second_chain(file)
    end = _ends(file)[1]
    if not end:
        return _find_signature(file, _flac_start(file) if head == b"fLaC" else 4)
    if end >= size:
        return 0
    for start in (end, end + 1):  # there may be one byte of padding
        if _is_recording(file, start):
            return start
    _check_tail(size - end)
    return 0


def _check_tail(size: int) -> None:
    if size > MAX_TAIL:
        raise ValueError(f"{size} bytes after the end of the recording according to the header; rewrite the file")


def _is_recording(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    head = file.read(16)
    mpeg = head[:1] == b"\xff" and head[1:2] >= b"\xe0"  # a frame of MP3 or AAC
    file.seek(start + 188)
    transport_stream = head[:1] == file.read(1) == b"\x47"  # packets of 188 bytes
    known = head.startswith(_HEADS) or head[4:8] == b"ftyp" or mpeg or transport_stream
    return known or _mp3_tag(file, start)[1] >= 0


def _ends(file: BinaryIO) -> tuple[int, int]:
    """Returns the end of the samples and the end of the whole recording, in bytes; 0 if the header has no length."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _riff_ends(file, b"data", "little")
    if head[:4] == b"FORM":
        return _riff_ends(file, b"BODY" if head[8:12] == b"8SVX" else b"SSND", "big")
    if head[:4] == b"caff":
        return _caf_ends(file)
    if head[:4] == b".snd":
        start, length = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        ends = 0 if length == 0xFFFFFFFF else start + length
    elif head[:6] == b"riff\x2e\x91":  # W64: a 64-bit size after a GUID of 16 bytes
        ends = int.from_bytes(head[16:24], "little")
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        ends = 8 + int.from_bytes(head[4:8], "little")
    elif head[:8] == b"NIST_1A\n":
        ends = _nist_end(file)
    elif head[:20] == b"Creative Voice File\x1a":
        ends = _voc_end(file, int.from_bytes(head[20:22], "little"))
    elif head[:4] == b"OggS":
        ends = _last_ogg_page_end(file, size)
    elif head[4:8] == b"ftyp":
        return _mp4_ends(file)
    elif head[:4] == b"\x1aE\xdf\xa3":
        ends = _matroska_end(head)
    else:
        ends = _mp3_end(file)
    return ends, ends


def _chunks(
    file: BinaryIO, order: Literal["little", "big"], position: int = 12, width: int = 4
) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start of the content, and size of each chunk in a RIFF, RF64, AIFF or CAF file.

    Args:
        order: byte order of the sizes.
        position: position of the first chunk.
        width: bytes per size; with 4 bytes, chunks are padded to even lengths.
    """
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(4 + width)
        size = int.from_bytes(header[4:], order)
        if len(header) < 4 + width or not header[:4].isascii() or not header[:4].decode("ascii").isprintable():
            return
        yield header[:4], position + 4 + width, size
        position += 4 + width + size + (size % 2 if width == 4 else 0)
        if position >= 1 << 63:  # beyond the largest file position
            return


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
                raise ValueError(TWO_CHUNKS.format(name.decode()))
            # Writers that cannot seek back leave a number near 2^31 or 2^32: the length is then unknown, not wrong.
            size = size if size < 0x7FFFF000 else large_size
            if not size:
                return 0, 0
            samples_end = start + size
    return samples_end, max(samples_end, form_end) if samples_end else 0


def _caf_ends(file: BinaryIO) -> tuple[int, int]:
    """Returns the end of the samples (with the packet table) and of the whole CAF file.

    Raises:
        ValueError: see `_riff_ends`.
    """
    samples_end = end = number = 0
    for chunk, start, size in _chunks(file, "big", position=8, width=8):
        if not (chunk.isalpha() and chunk.islower()) or chunk in (b"caff", b"riff"):  # another file follows
            break
        if chunk in (b"data", b"pakt"):
            if size >= 1 << 63:  # -1: up to the end of the file
                return 0, 0
            samples_end = max(samples_end, start + size)
            number += chunk == b"data"
        end = start + size
    if number > 1:
        raise ValueError(TWO_CHUNKS.format("data"))
    return samples_end, end


def _nist_end(file: BinaryIO) -> int:
    """Returns the end of a NIST SPHERE file according to the text header; 0 for compressed samples."""
    file.seek(8)
    line = file.readline(16).strip()
    start = int(line) if line.isdigit() else 0
    file.seek(0)
    header = dict(re.findall(rb"^(\w+) -(?:i|s\d+) (\S+)", file.read(min(start, _READ)), re.MULTILINE))
    if not header.get(b"sample_coding", b"pcm").isalnum():  # such as "pcm,embedded-shorten-v2.00"
        return 0
    sizes = [header.get(name, b"") for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    if not all(size.isdigit() and len(size) < 16 for size in sizes):
        return 0
    count, channels, width = map(int, sizes)
    return start + count * channels * width


def _voc_end(file: BinaryIO, position: int) -> int:
    """Returns the end of the last block in a VOC file: blocks have a type (one byte; 0: end) and a size (three)."""
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(4)
        if not header or not header[0]:
            return position + len(header[:1])
        position += 4 + int.from_bytes(header[1:], "little")
    return 0


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
    """Returns the start of a second chain in an Ogg file (RFC 3533, section 4); 0 for a single chain.

    A chain starts with the first pages of its streams.

    Raises:
        ValueError: if a page is damaged or missing, or other data are between two pages.
    """
    position, after_first = 0, False
    numbers: dict[bytes, int] = {}  # number of the last page, by stream
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        page = file.read(27 + 255)
        if page[:4] != b"OggS" or len(page) < 27:
            return _after_pages(file, position, page)
        first = bool(page[5] & 2)
        if first and after_first:
            return position
        after_first = after_first or not first
        segments = page[26]
        length = 27 + segments + sum(page[27 : 27 + segments])
        page += file.read(max(0, length - len(page)))
        page = page[:length]
        if len(page) < length:  # truncated, which `missing_bytes` reports
            return 0
        if _ogg_checksum(page) != int.from_bytes(page[22:26], "little"):
            raise ValueError(f"damaged: wrong checksum of the Ogg page at byte {position}")
        stream, number = page[14:18], int.from_bytes(page[18:22], "little")
        if not first and number != numbers.get(stream, number - 1) + 1:
            raise ValueError(f"damaged: Ogg pages are missing before byte {position}")
        numbers[stream] = number
        position += length
    return 0


def _after_pages(file: BinaryIO, position: int, start: bytes) -> int:
    """Returns the start of a recording after the pages of an Ogg file; 0 for a short tail of other data."""
    if not start.startswith(b"OggS") and _is_recording(file, position):
        return position
    size = file.seek(0, os.SEEK_END) - position
    _check_tail(size)
    file.seek(position + 1)
    if file.read(size).find(b"OggS") >= 0:
        raise ValueError(f"damaged: no Ogg page at byte {position}, but more pages follow")
    return 0


def _ogg_checksum(page: bytes) -> int:
    """Returns the checksum of a page (RFC 3533, section 6): the polynomial of zlib, with the bits in reverse order."""
    reverse = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    checksum = zlib.crc32(reverse, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{checksum:032b}"[::-1], 2)


def _find_signature(file: BinaryIO, position: int) -> int:
    """Returns the start of the first recording of any format after a position; 0 without another recording."""
    file.seek(position)
    held = b""
    while block := file.read(_READ):
        searched = held + block
        found = [
            place - 4 * (prefix == b"ftyp")  # a size precedes the name of a box
            for prefix, pattern in _SIGNATURES.items()
            for place in _places(searched, prefix)
            if pattern.match(searched, place)
        ]
        if found:
            return position - len(held) + min(found)
        position += len(block)
        held = searched[-_MARGIN:]
    return 0


def _places(data: bytes, prefix: bytes) -> Iterator[int]:
    place = data.find(prefix)
    while place >= 0:
        yield place
        place = data.find(prefix, place + 1)


def _flac_start(file: BinaryIO) -> int:
    """Returns the start of the frames in a FLAC file. Metadata may contain the header of the original WAV file."""
    position = 4
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        block = file.read(4)
        position += 4 + int.from_bytes(block[1:], "big")
        if len(block) < 4 or block[0] & 0x80:
            break
    return position


def _mp4_ends(file: BinaryIO) -> tuple[int, int]:
    """Returns the end of samples and index, and of the whole MP4 or M4A file (ISO/IEC 14496-12, section 4.2)."""
    position = end = 0
    for number in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(16)
        name = header[4:8]
        if name not in _BOXES or number and name == b"ftyp":
            break
        size = int.from_bytes(header[:4], "big")
        if size == 1:  # a 64-bit size follows the name
            size = int.from_bytes(header[8:], "big")
        if name in (b"mdat", b"moov"):
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

    if len(head) < 12:
        return 0
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
