"""Checks of recordings, on speech with planted faults; and measurements."""

import numpy as np
import pytest
import soundfile

from hf_speechllm.audio.resampling import resample
from hf_speechllm.diagnosis.kinds import KINDS
from hf_speechllm.diagnosis.measurement import measure_recording
from hf_speechllm.diagnosis.recording_checks import RECORDING_CHECKS, check_recording

RATE = 16000


def low_pass(samples, hertz):
    spectrum = np.fft.rfft(samples)
    spectrum[int(hertz * len(samples) / RATE) :] = 0
    return np.fft.irfft(spectrum, len(samples))


def again(samples, size):
    """Repeats a buffer at the loudest place."""
    place = min(int(np.abs(samples).argmax()), len(samples) - size)
    return np.insert(samples, place, samples[place : place + size])


@pytest.fixture
def check(tmp_path):
    """Writes samples and returns kinds and measurement."""

    def run(samples, rate=RATE, name="a.wav", max_seconds=None, **options):
        path = tmp_path / name
        soundfile.write(path, samples, rate, **({"subtype": "PCM_16"} if name.endswith("wav") else {}) | options)
        measured = measure_recording(str(path))
        return {kind for kind, _ in check_recording(measured, max_seconds)}, measured

    return run


def test_every_check_has_a_kind():
    assert set(RECORDING_CHECKS) <= set(KINDS)


def test_speech_has_no_findings(check, speech):
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3"):
        kinds, measured = check(speech, name=name)
        assert kinds == set(), name
        assert measured.seconds == pytest.approx(len(speech) / RATE, abs=0.05)
    assert check(np.stack([speech, 0.5 * speech], 1))[0] == set()
    assert check(resample(speech, RATE, 44100), 44100)[0] == set()
    # A second microphone, 5 m away.
    assert check(np.stack([speech, 0.3 * np.roll(speech, 230)], 1))[0] == set()


def test_levels_are_those_of_the_samples(check):
    time = np.arange(2 * RATE) / RATE
    kinds, measured = check(0.1 * np.sin(2 * np.pi * 440 * time))
    assert kinds == {"steady-signal", "hum"}
    assert measured.level == pytest.approx(-23.0, abs=0.1)
    assert measured.tone == pytest.approx((440, -23.0), abs=2.5)
    assert measured.peak == pytest.approx(0.1, abs=1e-3) and measured.spread < 0.2


@pytest.mark.parametrize(
    "kind, change",
    [
        ("silent", lambda x: 0 * x),
        ("silent", lambda x: np.where(np.arange(len(x)) % 2, 2.0**-15, 0)),
        ("low-level", lambda x: 0.003 * x),
        ("steady-signal", lambda x: 0.1 * np.random.default_rng(0).standard_normal(len(x))),
        ("white-noise", lambda x: 0.1 * np.random.default_rng(0).standard_normal(len(x))),
        ("white-noise", lambda x: (32767 * x).astype("<i2").byteswap().astype(np.int16)),
        ("clipped", lambda x: np.clip(6 * x, -1, 1)),
        ("clipped", lambda x: np.clip(6 * x, -0.3, 0.3)),
        ("dc-offset", lambda x: 0.5 * x - 0.1),
        ("hum", lambda x: 0.5 * x + 0.05 * np.sin(2 * np.pi * 60 * np.arange(len(x)) / RATE)),
        ("hum", lambda x: 0.5 * x + 0.05 * np.sin(2 * np.pi * 3000 * np.arange(len(x)) / RATE)),
        ("dropouts", lambda x: np.where(abs(np.arange(len(x)) - np.abs(x).argmax()) < 400, 0, x)),
        ("repeated-sound", lambda x: again(x, 400)),
        # A pause of equal buffers, longer than the repetition in speech.
        ("repeated-sound", lambda x: np.concatenate([np.tile(x[:400], 3), again(x, 400)])),
        ("dead-channel", lambda x: np.stack([x, 0 * x], 1)),
        ("dead-channel", lambda x: np.stack([x, 1e-4 * x[::-1]], 1)),
        ("inverted-channel", lambda x: np.stack([x, -x], 1)),
        ("unrelated-channels", lambda x: np.stack([np.pad(x, (0, 12000)), np.pad(x[::-1], (12000, 0))], 1)),
        ("narrow-band", lambda x: resample(resample(x, RATE, 8000), 8000, RATE)),
        ("reduced-band", lambda x: low_pass(x, 6000)),
        ("long-silence", lambda x: np.pad(x, (6 * RATE, 0))),
        ("long-silence", lambda x: np.pad(x, (0, 6 * RATE))),
        ("too-short", lambda x: x[4000:5500]),
        ("long-recording", lambda x: np.tile(x, 61 * RATE // len(x) + 1)),
    ],
)
def test_fault_is_found(check, speech, kind, change):
    assert kind in check(change(speech))[0]


@pytest.mark.parametrize("hertz", [3600, 4000, 5500])
def test_bandwidth_is_that_of_the_filter(check, speech, hertz):
    assert check(low_pass(speech, hertz))[1].bandwidth == pytest.approx(hertz, abs=250)


def test_limit_of_the_model(check, speech):
    assert "too-long" in check(speech, max_seconds=0.5)[0]
    assert "too-long" not in check(speech, max_seconds=30)[0]


def test_a_quiet_low_frequency_edge_is_not_narrow_band(check, speech):
    """A file with a rate of 8 kHz has no content above 4 kHz, and says so in its rate."""
    assert check(resample(speech, RATE, 8000), 8000)[0] == set()


def test_long_recordings_are_measured_in_blocks(check, speech):
    """Measures do not depend on the block in which a fault is."""
    samples = np.concatenate([0.3 * np.tile(speech, 56), np.tile(np.clip(6 * speech, -1, 1), 4)])
    kinds, measured = check(samples, name="a.flac")
    assert {"clipped", "long-recording"} <= kinds
    assert measured.seconds == len(samples) / RATE


def test_hash_depends_on_samples_only(check, speech):
    samples = (32767 * speech).astype(np.int16)
    digests = {check(samples, name=name, subtype="PCM_16")[1].digest for name in ("a.wav", "a.flac")}
    digests.add(check(np.stack([samples, samples], 1))[1].digest)
    digests.add(check(np.pad(samples, (700, 7000)), subtype="PCM_16")[1].digest)
    digests.add(check(np.pad(samples, (1 << 20, 1 << 20)), name="a.flac", subtype="PCM_16")[1].digest)
    assert len(digests) == 1
    assert check(0.9 * speech)[1].digest not in digests


@pytest.mark.parametrize(
    "kind, content",
    [
        ("unreadable-recording", b""),
        ("unreadable-recording", b"<html>not found</html>"),
        ("truncated-recording", None),
        ("missing-recording", False),
    ],
)
def test_unreadable_files(tmp_path, speech, kind, content):
    path = tmp_path / "a.wav"
    if content is None:
        soundfile.write(path, speech, RATE)
        path.write_bytes(path.read_bytes()[:-1000])
    elif content is not False:
        path.write_bytes(content)
    measured = measure_recording(str(path))
    assert [found for found, _ in check_recording(measured)] == [kind]
    assert not measured.error.startswith(str(path))


@pytest.mark.parametrize("times", ["9,10", "0,9", "0.5,0.2", "x"])
def test_parts_outside_of_a_recording(tmp_path, speech, times):
    soundfile.write(path := tmp_path / "a.wav", speech, RATE)
    measured = measure_recording(f"{path}#t={times}")
    kind = "wrong-times" if times != "x" else "missing-recording"
    assert [found for found, _ in check_recording(measured)] == [kind]


def test_gaps_of_speech_without_noise_are_no_dropouts(check, speech):
    gaps = np.where(abs(np.arange(len(speech)) - np.abs(speech).argmax()) < 400, 0, speech)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(RATE // 2)
    assert "dropouts" not in check(np.pad(gaps, RATE // 2))[0]
    assert "dropouts" in check(np.concatenate([noise, gaps, noise]))[0]


def test_vad_finds_quiet_speech_and_no_noise(tmp_path, speech):
    pytest.importorskip("silero_vad")
    from hf_speechllm.audio.vad import VoiceDetector

    detector = VoiceDetector()
    rng = np.random.default_rng(0)
    pink = np.fft.irfft(np.fft.rfft(rng.standard_normal(32000)) / np.sqrt(np.arange(16001) + 1))
    for samples, speaks in ((0.003 * speech, True), (0.1 * pink, False), (0.001 * rng.standard_normal(32000), False)):
        soundfile.write(path := tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
        kinds = {kind for kind, _ in check_recording(measure_recording(str(path), detector))}
        assert ("no-speech" not in kinds) is speaks
