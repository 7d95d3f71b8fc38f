"""Recordings from Python code: scaled and resampled correctly, or refused."""

import io
import pathlib

import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm.audio.inputs import as_list, to_source, to_waveform
from hf_speechllm.audio.waveform import AudioError, load_audio

RATE = 16000


@pytest.fixture
def wave():
    return (0.5 * np.sin(np.arange(RATE) * 0.05)).astype(np.float32)


def integers(wave, dtype):
    return np.round(wave.astype(np.float64) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_integers_are_scaled_by_their_range(wave, dtype):
    result = to_waveform(integers(wave, dtype))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, wave, atol=0.01)


def test_unsigned_bytes_are_centred(wave):
    np.testing.assert_allclose(to_waveform(np.round(wave * 127 + 128).astype(np.uint8)), wave, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wave: wave * 32768, r"samples reach 16\d\d\d"),
        (lambda wave: wave.astype(np.float64) * 2**31, "samples reach"),
        (lambda wave: integers(wave, np.int16).astype(np.int32), "range of 16 bits"),
        (lambda wave: integers(wave, np.int16).astype(np.int64), "type int64"),
        (lambda wave: integers(wave, np.int16).astype(np.uint16), "type uint16"),
        (lambda wave: wave > 0, "type bool"),
        (lambda wave: wave.astype(complex), "type complex"),
        (lambda wave: wave.astype(object), "type object"),
        (lambda wave: wave * np.nan, "not finite"),
        (lambda wave: np.append(wave, np.inf), "not finite"),
        (lambda wave: wave[:0], "no samples"),
        (lambda wave: wave.reshape(2, -1), "one dimension"),
        (lambda wave: np.stack([wave] * 2, axis=1), "one dimension"),
        (lambda wave: wave[0], "one dimension"),
    ],
)
def test_samples_of_unknown_scale_or_shape_are_refused(wave, change, message):
    for load in (to_waveform, load_audio):
        with pytest.raises(AudioError, match=message):
            load(change(wave))


def test_clipping_and_single_channels_in_two_dimensions_are_accepted(wave):
    assert np.abs(to_waveform(wave * 3)).max() == pytest.approx(1.5, abs=0.01)
    for array in (wave[None], wave[:, None], torch.from_numpy(wave), wave.astype(np.float64)):
        np.testing.assert_array_equal(to_waveform(array), wave)
    half = torch.from_numpy(wave).to(torch.bfloat16).requires_grad_()
    np.testing.assert_allclose(to_waveform(half), wave, atol=0.01)


class Decoder:
    """A stand-in for `torchcodec.decoders.AudioDecoder`."""

    def __init__(self, data, rate):
        self.data, self.sample_rate = data, rate

    def get_all_samples(self):
        return self


def test_every_type_of_recording_is_read(wave, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    content = path.read_bytes()
    stereo = torch.from_numpy(np.stack([wave * 1.5, wave * 0.5]))
    holders = [
        str(path), path, content, bytearray(content), memoryview(content), io.BytesIO(content),
        wave, torch.from_numpy(wave), (wave, RATE), (RATE, wave), (integers(wave, np.int16), np.int64(RATE)),
        {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, {"path": "gone.wav", "bytes": content},
        {"array": wave, "sampling_rate": RATE, "path": "gone.wav"}, {"array": wave.tolist(), "sampling_rate": RATE},
        {"raw": wave, "sampling_rate": RATE}, {"audio": {"array": wave, "sampling_rate": RATE}, "text": "one"},
        {"audio": str(path)}, Decoder(stereo, RATE), {"audio": Decoder(stereo, RATE)},
    ]  # fmt: skip
    for holder in holders:
        assert as_list(holder) == ([holder], True) or isinstance(as_list(holder)[0][0], (np.ndarray, tuple))
        assert isinstance(to_source(holder, RATE), (str, bytes, np.ndarray))
        for _ in range(2):  # for its length, and for its samples
            np.testing.assert_allclose(load_audio(holder), wave, atol=1e-3)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(load_audio(file), wave)


def test_rows_of_datasets_are_read(wave, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    rows = datasets.Dataset.from_dict({"audio": [str(path)] * 2}).cast_column("audio", datasets.Audio(decode=False))
    recordings, alone = as_list(rows)
    assert len(recordings) == 2 and not alone
    np.testing.assert_allclose(load_audio(recordings[1]), wave, atol=1e-6)


def test_samples_are_resampled_to_the_requested_rate(wave):
    slow = wave[::2].copy()
    for source in (to_source(slow, RATE, 8000), to_source((slow, 8000), RATE), to_source((slow, 8000), RATE, 8000)):
        assert len(source) == RATE
    assert len(to_source({"array": slow, "sampling_rate": 8000}, RATE)) == RATE
    assert len(to_source(Decoder(torch.from_numpy(slow)[None], 8000), RATE)) == RATE
    with pytest.raises(AudioError, match="sampling_rate is 16000 Hz, but the recording has 8000 Hz"):
        to_source((slow, 8000), RATE, RATE)
    for rate in (0, -1, 0.5, float("nan"), float("inf"), True, "8000"):
        with pytest.raises(AudioError, match="whole number of Hz"):
            to_source(slow, RATE, rate)


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        (0.5, "type float"),
        (None, "type NoneType"),
        ({"text": "one"}, "the keys are text"),
        ({}, "the keys are none"),
        ({"array": np.zeros(9)}, 'also needs "sampling_rate"'),
        (io.StringIO("text"), 'mode "rb"'),
    ],
)
def test_other_objects_are_refused(holder, message):
    with pytest.raises(AudioError, match=message):
        load_audio(holder)


def test_lists_are_distinguished_from_a_single_recording(wave):
    path = pathlib.Path("a.wav")
    for recordings in (["a.wav", "b.wav"], ("a.wav", "b.wav"), [path], iter([wave]), [(wave, 8000)], (wave, wave), []):
        assert not as_list(recordings)[1]
    for recording in ("a.wav", path, b"", wave, (wave, 8000), {"path": "a.wav"}, 3):
        assert as_list(recording)[1]
