"""Recordings that would waste memory, time or sockets: refused, or read at low cost."""

import os
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
import soundfile

from hf_speechllm.audio.waveform import AudioError, load_audio, probe_audio
from hf_speechllm.data import dataset
from hf_speechllm.data.dataset import FeatureMapper

pytestmark = pytest.mark.core


def with_rate(make_wav, rate):
    """Returns a WAV file of 0.5 s at 16 kHz with another rate in the header."""
    path = make_wav()
    content = bytearray(path.read_bytes())
    content[24:32] = rate.to_bytes(4, "little") + (2 * rate % 2**32).to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("rate", [1, 100, 3999, 768_001, 2**31 - 1])
def test_impossible_sampling_rates_are_refused(make_wav, rate):
    path = with_rate(make_wav, rate)
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match=f"{path}: .*{rate} Hz"):
            function(path)


@pytest.mark.parametrize("rate", [22_254, 48_001, 44_099, 16_001, 767_999])
def test_resampling_of_coprime_rates_needs_little_memory(tone, tmp_path, rate):
    """The filters of torchaudio need 2.8 GB for 22,254 Hz."""
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate)
    load_audio(tmp_path / "a.wav")  # imports
    began = time.monotonic()
    tracemalloc.start()
    waveform = load_audio(tmp_path / "a.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(waveform) == 16000 and peak < 50e6 and time.monotonic() - began < 10
    assert np.abs(np.fft.rfft(waveform)).argmax() == 440
    np.testing.assert_allclose(waveform[500:-500], tone(1.0)[500:-500, 0], atol=0.01)


def test_empty_too_long_and_special_files_are_refused_immediately(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 16000)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 4000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(9):
            file.write(np.zeros(3600 * 4000, np.int16))
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "x.tar").write_bytes(b"a" * 1000)
    began = time.monotonic()
    for name in ("one.wav", "long.flac", "pipe.wav", "x.tar::a@0+99999999999999", "x.tar::a@99999999999999999+1"):
        with pytest.raises(AudioError) as error:
            load_audio(str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path}/{name.partition('::')[0]}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "content",
    [
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 45454 RTP/AVP 0\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{file}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {file}\n",
        ";FFMETADATA1\ntitle=a\n",
        "<smil><body><audio src='{file}'/></body></smil>",
    ],
)
def test_lists_of_urls_or_files_are_refused(make_wav, tmp_path, content):
    """For SDP, FFmpeg would open UDP sockets and wait."""
    (tmp_path / "list.sdp").write_text(content.format(file=make_wav()))
    began = time.monotonic()
    with pytest.raises(AudioError, match="not audio"):
        load_audio(tmp_path / "list.sdp")
    assert time.monotonic() - began < 5


def test_too_long_recordings_are_refused_before_features_are_computed(tmp_path, tiny_model, monkeypatch):
    from hf_speechllm import SpeechLLMProcessor

    with soundfile.SoundFile(tmp_path / "long.flac", "w", 16000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(4):
            file.write(np.zeros(3600 * 16000, np.int16))
    monkeypatch.setattr(dataset, "cacheable_features", lambda *arguments: pytest.fail("computed"))
    extractor = SpeechLLMProcessor.from_pretrained(tiny_model).feature_extractor
    tracemalloc.start()
    result = FeatureMapper(extractor, "float16", 128.0)([str(tmp_path / "long.flac")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "14400.0 s" in result["error"] and not result["features"] and peak < 50e6


class Answer(BaseHTTPRequestHandler):
    """Answers with a part of a file, or a redirect, according to the path; records the addresses."""

    seen: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.seen.append(self.path)
        self.send_response(206 if "part" in self.path else 302 if "away" in self.path else 200)
        self.send_header("Location", "http://169.254.169.254/secret")
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"abc")

    def log_message(self, *arguments):
        pass


def test_partial_answers_are_refused(serve):
    with pytest.raises(AudioError, match="206"):
        load_audio(f"{serve(handler=Answer)}/part.wav")


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "http://[fe80::1]/a", "http://100.100.100.200/a"]
)
def test_forbidden_addresses_are_not_requested_from_a_proxy(serve, monkeypatch, address):
    Answer.seen.clear()
    monkeypatch.setenv("http_proxy", serve(handler=Answer))
    with pytest.raises(AudioError, match="--allow_private_redirects"):
        load_audio(address)
    assert not Answer.seen
    with pytest.raises(AudioError, match="169.254.169.254"):
        load_audio("http://example.invalid/away.wav")
    assert Answer.seen == ["http://example.invalid/away.wav"]
