import io
import socket
import struct
from http.server import BaseHTTPRequestHandler

import av
import numpy as np
import pytest
import soundfile

from hf_speechllm.audio import decoders, downloads, wav_header
from hf_speechllm.audio import waveform as audio
from hf_speechllm.audio.truncation import missing_bytes
from hf_speechllm.audio.waveform import AudioError, check_root, load_audio, probe_audio, read_audio, resolve_source

pytestmark = pytest.mark.core

SECONDS = 1.5


def encode(path, codec, waveform, rate=16000, container=None, options=None, codec_options=None):
    """Writes a waveform, shape = (samples, 1), with FFmpeg."""
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono", options=codec_options or {})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return path


@pytest.fixture
def recording(tmp_path, tone):
    """Writes a tone of 440 Hz in the format of the file name extension and returns the path."""

    def make(ending, subtype=None, rate=16000, channels=1, name="a"):
        path = tmp_path / f"{name}.{ending}"
        waveform = tone(SECONDS, rate, channels)
        codecs = {"m4a": "aac", "webm": "libopus", "mka": "aac", "aac": "aac"}
        if ending in codecs:
            return encode(path, codecs[ending], waveform, rate)
        container = {"opus": "OGG", "rf64": "RF64"}.get(ending)
        soundfile.write(path, waveform, rate, subtype="OPUS" if ending == "opus" else subtype, format=container)
        return path

    return make


def assert_is_tone(waveform, rate=16000, channels=1, tolerance=0.02):
    """Checks frequency, length and loudness of the tone that `recording` writes."""
    assert waveform.ndim == 1 and waveform.dtype == np.float32
    assert len(waveform) / rate == pytest.approx(SECONDS, abs=0.2)
    middle = waveform[rate // 4 : rate // 4 + rate]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440  # 1 s of samples: a bin is 1 Hz
    level = np.mean(0.5 * 0.9 ** np.arange(channels))
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(level, abs=tolerance)


FORMATS = [
    ("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"), ("wav", "DOUBLE"),
    ("wav", "ULAW"), ("wav", "IMA_ADPCM"), ("rf64", "PCM_16"), ("aiff", "PCM_16"), ("flac", "PCM_16"),
    ("flac", "PCM_24"), ("ogg", "VORBIS"), ("opus", None), ("mp3", None), ("m4a", None), ("webm", None), ("mka", None),
]  # fmt: skip


@pytest.mark.parametrize("ending, subtype", FORMATS)
def test_format_is_read(recording, ending, subtype):
    path = recording(ending, subtype, rate=48000 if ending == "webm" else 16000)
    assert_is_tone(load_audio(path))
    waveform, rate = read_audio(path)
    assert probe_audio(path) == (len(waveform), rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "m4a"])
def test_rate_is_kept_when_reading_and_changed_when_loading(recording, ending, rate):
    path = recording(ending, rate=rate)
    assert read_audio(path)[1] == rate == probe_audio(path)[1]
    assert_is_tone(load_audio(path))


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_channels_are_averaged(recording, ending, channels):
    path = recording(ending, channels=channels)
    assert read_audio(path)[0].shape == (SECONDS * 16000, channels)
    assert probe_audio(path) == (SECONDS * 16000, 16000)
    assert_is_tone(load_audio(path), channels=channels)


def test_integer_samples_are_scaled_to_one(tmp_path):
    samples = np.array([-32768, -1, 0, 1, 32767] * 100, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    assert np.array_equal(load_audio(tmp_path / "a.wav"), samples.astype(np.float32) / 32768)


def test_bytes_and_waveforms_load_like_the_file(recording):
    path = recording("wav")
    expected = load_audio(path)
    assert np.array_equal(load_audio(path.read_bytes()), expected)
    assert np.array_equal(load_audio(str(path)), expected)
    assert np.array_equal(load_audio(expected), expected)
    assert probe_audio(path.read_bytes()) == probe_audio(path)


def test_waveform_of_two_dimensions_is_refused():
    with pytest.raises(AudioError, match=r"\(2, 100\)"):
        load_audio(np.zeros((2, 100)))


@pytest.mark.parametrize("name", ["录音 1", "a b", "ünï#?%20"])
def test_file_name_may_contain_any_character(recording, name):
    path = recording("wav", name=name)
    assert_is_tone(load_audio(str(path)))
    assert probe_audio(str(path)) == (SECONDS * 16000, 16000)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "opus", "mp3"])
def test_decoding_in_blocks_equals_decoding_at_once(recording, monkeypatch, ending):
    path = recording(ending)
    whole = read_audio(path)[0]
    monkeypatch.setattr(decoders, "BLOCK_LENGTH", 1000)
    assert np.array_equal(read_audio(path)[0], whole)
    assert probe_audio(path) == (len(whole), 16000)


def test_plain_wav_is_probed_without_decoding(recording, monkeypatch):
    monkeypatch.setattr(audio, "_decode", None)
    assert probe_audio(recording("wav", "PCM_24")) == (SECONDS * 16000, 16000)
    with pytest.raises(TypeError):
        probe_audio(recording("flac"))


@pytest.mark.parametrize("subtype", wav_header.PLAIN_PCM)
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("version", [None, b"Lavf58.29.100\0", b"Lavf61.7.100\0\0"])
def test_simple_wav_header_agrees_with_libsndfile(recording, monkeypatch, subtype, channels, version):
    data = recording("wav", subtype, channels=channels).read_bytes()
    if version:  # as FFmpeg writes it
        data = data[:36] + b"LIST\x1a\0\0\0INFOISFT" + struct.pack("<I", version.index(0) + 1) + version + data[36:]
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        expected = (file.frames, file.samplerate)
    monkeypatch.setattr(soundfile, "SoundFile", None)
    assert probe_audio(data) == expected == (SECONDS * 16000, 16000)


@pytest.mark.parametrize("position", [*range(0, 44), -1])
def test_inconsistent_wav_header_is_left_to_libsndfile(recording, position):
    data = bytearray(recording("wav").read_bytes())
    assert wav_header._parse_simple_wav(bytes(data[:78]), len(data)) == (SECONDS * 16000, 16000)
    if position < 0:
        del data[-1]
    else:
        data[position] ^= 1
    assert wav_header._parse_simple_wav(bytes(data[:78]), len(data)) is None


@pytest.mark.parametrize("channels", [2, 8, 9, 16])
def test_wav_of_64_bits_is_read_with_any_number_of_channels(channels):
    samples = np.arange(100 * channels).reshape(100, channels) << 48
    width, data = 8 * channels, samples.astype("<i8").tobytes()
    header = struct.pack("<4sI8sIHHIIHH", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, 1, channels, 16000, 16000 * width,
                         width, 64) + struct.pack("<4sI", b"data", len(data))  # fmt: skip
    loaded = load_audio(header + data, 16000)
    np.testing.assert_allclose(loaded, samples.mean(axis=1) / 2.0**63, rtol=1e-5)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_without_a_valid_length_is_read_to_the_end(recording, size):
    path = recording("wav")
    data = path.read_bytes()
    position = data.index(b"data") + 4
    path.write_bytes(data[:position] + struct.pack("<I", size) + data[position + 4 :])
    assert probe_audio(path) == (SECONDS * 16000, 16000)
    assert_is_tone(load_audio(path))


def test_flac_without_a_length_is_read_to_its_end(recording):
    path = recording("flac")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples: 36 bits in STREAMINFO
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert probe_audio(path) == (SECONDS * 16000, 16000)
    assert_is_tone(load_audio(path))


def test_mp3_of_changing_bit_rate_without_a_length_is_read_to_its_end(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (32000, 1)).astype(np.float32)
    waveform = np.concatenate([noise, np.zeros_like(noise)])
    quality = {"flags": "+qscale", "global_quality": "236"}
    path = encode(tmp_path / "a.mp3", "libmp3lame", waveform, options={"write_xing": "0"}, codec_options=quality)
    assert b"Xing" not in path.read_bytes() and b"Info" not in path.read_bytes()
    samples, rate = probe_audio(path)
    assert samples / rate == pytest.approx(4, abs=0.15)
    assert len(load_audio(path)) == samples


def test_mp3_with_a_long_id3_tag_keeps_its_length(recording):
    path = recording("mp3")
    tag = b"ID3\x03\x00\x00" + bytes([0, 0, 40, 0]) + bytes(40 * 128)
    data = tag + path.read_bytes()
    path.write_bytes(data)
    assert probe_audio(path) == (SECONDS * 16000, 16000)
    path.write_bytes(data[:-1000])
    with pytest.raises(AudioError, match="truncated"):
        probe_audio(path)


def test_bytes_after_the_end_are_accepted(recording):
    for ending in ("wav", "ogg", "mp3"):
        path = recording(ending)
        path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
        assert_is_tone(load_audio(path))


@pytest.mark.parametrize("ending", ["wav", "rf64", "aiff", "flac", "ogg", "opus", "mp3", "m4a", "webm"])
@pytest.mark.parametrize("kept", [0.001, 0.03, 0.3, 0.6, 0.8, 0.95, 0.99])
def test_truncated_file_is_refused(recording, tmp_path, ending, kept):
    data = recording(ending, rate=48000).read_bytes()
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(data[: int(len(data) * kept)])
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match="cut"):
            function(path)


@pytest.mark.parametrize("ending", ["wav", "rf64", "aiff", "ogg", "opus", "m4a", "webm"])
def test_every_missing_byte_at_the_end_is_detected(recording, ending):
    data = recording(ending, rate=48000).read_bytes()
    assert missing_bytes(io.BytesIO(data)) == 0
    for missing in range(1, 200):
        assert missing_bytes(io.BytesIO(data[:-missing])) > 0


def test_error_of_a_truncated_wav_contains_the_number_of_missing_bytes(recording):
    path = recording("wav")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AudioError, match=r"a\.wav: truncated: according to its header, 1000 more bytes"):
        probe_audio(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"These are words, not sounds.\n" * 50, "not audio"),
        (bytes(5000), "not audio"),
        (np.random.default_rng(0).bytes(5000), "not audio"),
        (b'{"messages": []}', "not audio"),
    ],
)
def test_file_that_is_not_audio_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match=rf"a\.wav: .*{reason}"):
            function(path)


def test_wav_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="no samples"):
        probe_audio(tmp_path / "a.wav")


def test_samples_that_are_not_finite_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0, np.nan] * 1000), 16000, subtype="FLOAT")
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match="not finite"):
            function(tmp_path / "a.wav")


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(AudioError, match=r"none\.wav: no such file"):
        probe_audio(str(tmp_path / "none.wav"))
    with pytest.raises(AudioError, match="cannot be read"):
        probe_audio(str(tmp_path))
    with pytest.raises(AudioError, match="only http and https"):
        probe_audio("s3://bucket/a.wav")


@pytest.mark.parametrize("name", ["a", "a b", "录音"])
@pytest.mark.parametrize("ending", ["wav", "ogg"])
def test_url_is_read(recording, tmp_path, serve, name, ending):
    path = recording(ending, name=name)
    url = f"{serve(tmp_path)}/{name}.{ending}"
    assert np.array_equal(load_audio(url), load_audio(path))
    assert probe_audio(url) == (SECONDS * 16000, 16000)


def test_quoted_url_is_not_quoted_again(recording, tmp_path, serve):
    recording("wav", name="a b")
    assert probe_audio(f"{serve(tmp_path)}/a%20b.wav?token=a%2Fb&x=1") == (SECONDS * 16000, 16000)


def test_url_that_the_server_lacks_is_refused(tmp_path, serve):
    with pytest.raises(AudioError, match=r"/none\.wav: the server answers 404"):
        probe_audio(f"{serve(tmp_path)}/none.wav")


def test_unreachable_server_is_refused():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening
        with pytest.raises(AudioError, match=r"a\.wav: cannot be reached"):
            probe_audio(f"http://127.0.0.1:{unused.getsockname()[1]}/a.wav")


def test_broken_and_silent_connections_are_refused(serve, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"RIFF")
            if "silent" in self.path:
                self.rfile.read(1)  # until the client closes the connection

        def log_message(self, *args):
            pass

    address = serve(handler=Handler)
    with pytest.raises(AudioError, match="truncated: connection lost after 4 bytes"):
        probe_audio(f"{address}/broken.wav")
    monkeypatch.setattr(downloads, "URL_TIMEOUT", 0.2)
    with pytest.raises(AudioError, match=r"silent\.wav: cannot be read: .*timed out"):
        probe_audio(f"{address}/silent.wav")


def test_source_is_resolved_relative_to_a_folder():
    assert resolve_source("a/../b.wav", "/data") == "/data/b.wav"
    assert resolve_source("/x/b.wav", "/data") == "/x/b.wav"
    assert resolve_source("https://x/../b.wav", "/data") == "https://x/../b.wav"


@pytest.mark.parametrize(
    "name, inside",
    [
        ("a.wav", True), ("b/../a.wav", True), ("missing.wav", True), ("shard.tar::../../x@0+9", True),
        ("../a.wav", False), ("../rootless/a.wav", False), ("link/a.wav", False), ("link.wav", False),
        ("/etc/passwd", False), ("link/shard.tar::x@0+9", False), ("a\0.wav", False),
    ],
)  # fmt: skip
def test_paths_outside_the_root_are_refused(tmp_path, name, inside):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "rootless").mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "link.wav").symlink_to("/etc/passwd")
    source = name if name.startswith("/") else f"{root}/{name}"
    if inside:
        check_root(source, str(root))
    else:
        with pytest.raises(AudioError, match="outside --audio_root|zero byte"):
            check_root(source, str(root))
    check_root("https://host/a.wav", str(root))


def test_root_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "root")
    check_root(f"{tmp_path}/link/a.wav", f"{tmp_path}/root")
    check_root(f"{tmp_path}/root/a.wav", f"{tmp_path}/link")


def test_secrets_of_a_url_are_not_shown(serve, tmp_path):
    address = serve(tmp_path).removeprefix("http://")
    with pytest.raises(AudioError) as info:
        load_audio(f"http://user:pa%40ss@{address}/none.wav?token=secret#frag")
    assert str(info.value) == f"http://***@{address}/none.wav?***: the server answers 404 File not found"


def test_real_recordings_have_no_errors(shared):
    for folder in ("fsdd_en", "aishell_sample_zh", "asterisk_en", "longform"):
        for path in sorted((shared / "data" / folder / "audio").iterdir())[:5]:
            samples, rate = probe_audio(path)
            assert (samples, rate) == (soundfile.info(path).frames, soundfile.info(path).samplerate)
