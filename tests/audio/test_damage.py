"""Recordings that decoders silently read as shorter, quieter or different: refused, or read completely."""

import io
import random
import sys
import tracemalloc

import av
import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm.audio.inputs import to_source
from hf_speechllm.audio.waveform import AudioError, _join, load_audio, probe_audio

pytestmark = pytest.mark.core


def encoded(tone, format, subtype=None, seconds=1.5, frequency=440.0):
    content = io.BytesIO()
    samples = tone(seconds, frequency=frequency)
    samples += 0.05 * np.random.default_rng(0).standard_normal(samples.shape)
    soundfile.write(content, samples, 16000, format=format, subtype=subtype)
    return content.getvalue()


def muxed(tone, format, codec, tracks=1):
    content = io.BytesIO()
    with av.open(content, "w", format=format) as container:
        streams = [container.add_stream(codec, rate=16000, layout="mono") for _ in range(tracks)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray((tone(1.5).T * 32767).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate = 16000
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return content.getvalue()


def pages_of(content):
    starts = [place for place in range(len(content)) if content.startswith(b"OggS\0", place)]
    return [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_with_a_damaged_or_missing_page_is_refused(tone, subtype):
    """Decoders silently skip such a page, which may contain a second of speech."""
    content = encoded(tone, "OGG", subtype, seconds=5)
    whole = len(load_audio(content))
    rng = random.Random(0)
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.randrange(200, len(content))] ^= 1 << rng.randrange(8)
        with pytest.raises(AudioError, match="damaged|truncated"):
            load_audio(bytes(damaged))
    pages = pages_of(content)
    assert len(pages) > 3 and b"".join(pages) == content
    with pytest.raises(AudioError, match="Ogg pages are missing before byte"):
        load_audio(b"".join(pages[:2] + pages[3:]))
    with pytest.raises(AudioError, match="no Ogg page at byte .*, but more pages follow"):
        load_audio(b"".join([*pages[:-1], b"x" * 5, pages[-1]]))
    assert len(load_audio(content + b"TAG" + bytes(125))) == whole


@pytest.mark.parametrize("kind", ["CAF", "CAF ALAC_16", "NIST", "voc", "avi"])
def test_truncated_file_of_each_container_is_refused(tone, kind):
    format, _, subtype = kind.partition(" ")
    content = encoded(tone, format, subtype or None) if format.isupper() else muxed(tone, format, "pcm_s16le")
    assert len(load_audio(content)) == pytest.approx(24000, abs=400)
    for missing in (2, 50, 400, len(content) // 2):  # the last byte may be an end marker or padding
        with pytest.raises(AudioError, match="truncated: according to its header"):
            load_audio(content[:-missing])


JOINED = [
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("FLAC", None), ("WAV", "PCM_16"), ("AIFF", None), ("AU", None),
    ("CAF", None), ("W64", None), ("RF64", None), ("NIST", None),
]  # fmt: skip


@pytest.mark.parametrize(("format", "subtype"), JOINED)
def test_joined_recordings_are_read_in_full(tone, format, subtype):
    parts = [encoded(tone, format, subtype, frequency=frequency) for frequency in (440, 880)]
    samples, rate = probe_audio(b"".join(parts))
    assert samples / rate == pytest.approx(3.0, abs=0.1)
    waveform = load_audio(b"".join(parts))
    for start, frequency in ((0.2, 440), (1.7, 880)):
        piece = waveform[int(start * 16000) :][:16000]
        assert np.abs(np.fft.rfft(piece)).argmax() == pytest.approx(frequency, abs=2)


@pytest.mark.parametrize("format", ["mp4", "matroska", "adts", "flv", "mpegts", "avi", "mov"])
def test_joined_recordings_of_other_containers_are_read_in_full(tone, format):
    codec = "pcm_s16le" if format in ("mov", "avi", "matroska") else "aac"
    content = muxed(tone, format, codec)
    assert len(load_audio(content * 2)) == pytest.approx(2 * len(load_audio(content)), abs=1600)


def test_joined_recordings_of_different_rates_are_refused(tone):
    other = io.BytesIO()
    soundfile.write(other, tone(1.0, rate=8000), 8000, format="FLAC")
    with pytest.raises(AudioError, match="recordings with different rates or channels"):
        load_audio(encoded(tone, "FLAC") + other.getvalue())


@pytest.mark.parametrize("format", ["WAV", "AIFF"])
def test_two_chunks_of_samples_are_refused(tone, format):
    """Some recorders write a second chunk after a pause. Decoders read only the first."""
    content = encoded(tone, format)
    start = content.index(b"data" if format == "WAV" else b"SSND")
    content += content[start:]
    order = "little" if format == "WAV" else "big"
    content = content[:4] + (len(content) - 8).to_bytes(4, order) + content[8:]
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match="two chunks of samples"):
            function(content)


def test_caf_with_two_chunks_of_samples_is_refused(tone):
    content = encoded(tone, "CAF")
    start = content.index(b"data")
    with pytest.raises(AudioError, match="two chunks of samples"):
        load_audio(content + content[start:])


@pytest.mark.parametrize("format", ["WAV", "AIFF", "CAF", "W64"])
def test_unscaled_16_bit_samples_in_32_bits_are_refused(tone, format):
    """Such samples would be almost silent."""
    content = io.BytesIO()
    samples = (tone(1.0) * 32767).astype(np.int32)
    soundfile.write(content, samples, 16000, format=format, subtype="PCM_32")
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match="32-bit samples in the range of 16 bits"):
            function(content.getvalue())
    for scale in (1 << 16, 0):  # scaled samples, and silence
        content = io.BytesIO()
        soundfile.write(content, samples * scale, 16000, format=format, subtype="PCM_32")
        assert probe_audio(content.getvalue()) == (16000, 16000)
        assert abs(load_audio(content.getvalue())).max() == pytest.approx(0.5 if scale else 0, rel=1e-3)


@pytest.mark.parametrize("scale", [1 << 15, 128, 8])
def test_floats_in_the_range_of_integers_are_refused_and_clipping_is_accepted(tone, scale, tmp_path):
    for factor, is_refused in ((scale, True), (3.9 / 0.5, False)):
        soundfile.write(tmp_path / "a.wav", tone(1.0) * factor * (1.01 if is_refused else 1), 16000, subtype="FLOAT")
        for function in (load_audio, probe_audio):
            if is_refused:
                with pytest.raises(AudioError, match="their range must be"):
                    function(tmp_path / "a.wav")
            else:
                function(tmp_path / "a.wav")


def test_mp3_in_wav_is_read(tone):
    content = muxed(tone, "wav", "libmp3lame")
    assert probe_audio(content)[0] == len(load_audio(content)) == pytest.approx(24000, abs=1600)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_in_opposite_phase_do_not_cancel(tone, caplog, tmp_path, channels):
    wave = tone(2.0)[:, 0] * np.linspace(0.5, 1, 32000, dtype=np.float32)
    signs = np.array([0.9, -1.0] * 2)[:channels]
    noise = 0.001 * np.random.default_rng(0).standard_normal((32000, 1))
    soundfile.write(tmp_path / "a.wav", wave[:, None] * signs + 0.1 + noise, 16000, subtype="FLOAT")
    level = np.abs(load_audio(tmp_path / "a.wav") - 0.1).max()
    assert level > (0.45 if channels != 3 else 0.1)
    assert ("in opposite phase" in caplog.text) == (channels != 3)  # of three channels, one remains


def test_channels_of_an_audio_decoder_do_not_cancel(tone, caplog):
    class Decoder:
        sample_rate = 16000

        def __init__(self, data):
            self.data = data

        def get_all_samples(self):
            return self

    wave = torch.from_numpy(tone(1.0)[:, 0])
    loaded = to_source(Decoder(torch.stack([wave, -wave])), 16000)
    np.testing.assert_array_equal(loaded, wave.numpy())
    assert "in opposite phase" in caplog.text


def test_unused_audio_tracks_are_reported(tone, caplog):
    assert len(load_audio(muxed(tone, "matroska", "pcm_s16le"))) == 24000
    assert not caplog.text
    assert len(load_audio(muxed(tone, "matroska", "pcm_s16le", tracks=2))) == 24000
    assert "has 2 audio tracks; using only the first" in caplog.text


def test_joining_blocks_needs_little_extra_memory():
    """Blocks of the resampler are views of larger arrays. A list of the blocks of eight hours at 48 kHz took 16 GB."""

    def blocks():
        for number in range(100):
            yield np.full(200_000, number, np.float32)[50_000:150_000]

    tracemalloc.start()
    joined = _join(blocks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(joined, np.repeat(np.arange(100, dtype=np.float32), 100_000))
    assert peak < 1.3 * joined.nbytes


@pytest.mark.parametrize(
    ("first", "second"),
    [("OGG", "FLAC"), ("FLAC", "AU"), ("CAF", "OGG"), ("mp4", "CAF"), ("mov", "NIST"), ("tta", "WAV"), ("flv", "mp4"),
     ("matroska", "AIFF"), ("NIST", "mpegts"), ("mpegts", "W64")],
)  # fmt: skip
def test_recordings_of_different_formats_are_joined_or_refused(tone, first, second):
    codecs = {"mov": "pcm_s16le", "matroska": "pcm_s16le", "tta": "tta"}
    parts = [encoded(tone, n) if n.isupper() else muxed(tone, n, codecs.get(n, "aac")) for n in (first, second)]
    try:
        assert len(load_audio(b"".join(parts))) == pytest.approx(
            sum(len(load_audio(part)) for part in parts), abs=2000
        )
    except AudioError as error:
        assert "recordings with different" in str(error) or "two chunks" in str(error)


def test_wav_header_in_flac_metadata_is_not_a_second_recording(tone):
    """`flac --keep-foreign-metadata` writes such files."""
    content, header = encoded(tone, "FLAC"), b"riff" + encoded(tone, "WAV")[:44]
    block = bytes([2]) + len(header).to_bytes(3, "big") + header  # an APPLICATION block, after STREAMINFO
    assert len(load_audio(content[:42] + block + content[42:])) == 24000


@pytest.mark.parametrize("content", [b"RIFF$\0\0\0WAVE", b"no audio", bytes(100)])
def test_an_unreadable_recording_is_reported_without_pyav(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.wav: (not audio, damaged \(libsndfile: .*the package av|truncated)"):
        load_audio(tmp_path / "a.wav")


def test_error_message_is_one_printable_line():
    error = AudioError("https://me:word@host/a: junk\r\n\x1b[31m")
    assert str(error).isprintable() and "word" not in str(error)


@pytest.mark.parametrize(
    "format", ["OGG", "FLAC", "CAF", "W64", "AIFF", "NIST", "mp4", "matroska", "voc", "flv", "adts"]
)
def test_file_of_only_the_first_bytes_is_refused(tone, format):
    codecs = {"matroska": "pcm_s16le", "voc": "pcm_s16le"}
    content = encoded(tone, format) if format.isupper() else muxed(tone, format, codecs.get(format, "aac"))
    for length in (*range(1, 30), 40, 63, 64, 65):
        for function in (load_audio, probe_audio):
            with pytest.raises(AudioError):
                function(content[:length])
