"""Fbank features: same values as the original, alone and in a batch, and precision of stored features."""

import json

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from hf_speechllm import FbankFeatureExtractor, SpeechLLMProcessor
from hf_speechllm.audio.front_ends import cacheable_features, encoder_input, num_encoder_input_frames
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.model.chat import transcription_messages

pytestmark = pytest.mark.core


def noise(samples, seed=0):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def stack_frame_by_frame(fbank, num_frames=7, stride=6):
    """`apply_lfr` of FunASR's `wav_frontend.py`: the first frame three times in front, the last as often as needed."""
    frames = [fbank[0]] * ((num_frames - 1) // 2) + list(fbank)
    stacks = []
    for index in range(int(np.ceil(len(fbank) / stride))):
        chosen = frames[index * stride : index * stride + num_frames]
        chosen += [frames[-1]] * (num_frames - len(chosen))
        stacks.append(torch.cat(chosen))
    return torch.stack(stacks)


def fbank_of_the_original(waveform):
    """`WavFrontend.forward` of FunASR before stacking, without its dither."""
    waveform = torch.from_numpy(waveform)[None] * (1 << 15)
    return torchaudio.compliance.kaldi.fbank(
        waveform, num_mel_bins=80, frame_length=min(25, waveform.shape[1] / 16000 * 1000), frame_shift=10, dither=0.0,
        energy_floor=0.0, window_type="hamming", sample_frequency=16000, snip_edges=True,
    )  # fmt: skip


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 561, 1360, 4000, 16000, 33333])
def test_shapes(samples):
    extractor = FbankFeatureExtractor()
    frames = 1 + (samples - 400) // 160
    assert extractor.fbank(noise(samples)).shape == (frames, 80)
    batch = extractor(noise(samples), sampling_rate=16000)
    assert batch["input_features"].shape == (1, -(-frames // 6), 560)
    assert batch["input_features"].dtype == torch.float32
    assert batch["input_features_mask"].sum() == -(-frames // 6)


@pytest.mark.parametrize("samples", [80, 200, 399, 400, 1000, 16000])
def test_fbank_equals_the_original_including_short_recordings(samples):
    waveform = noise(samples)
    found = FbankFeatureExtractor().fbank(waveform)
    assert torch.equal(found, fbank_of_the_original(waveform))
    assert len(found) == max(1, 1 + (samples - 400) // 160)
    assert torch.isfinite(found).all()


def test_silence_is_finite():
    assert torch.isfinite(FbankFeatureExtractor().fbank(np.zeros(16000, np.float32))).all()


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 60), num_frames=st.integers(1, 9), stride=st.integers(1, 8))
def test_stacking_equals_a_plain_loop(frames, num_frames, stride):
    fbank = torch.randn(frames, 5, generator=torch.Generator().manual_seed(frames))
    extractor = FbankFeatureExtractor(feature_size=5, num_frames_lfr=num_frames, stride_lfr=stride)
    expected = stack_frame_by_frame(fbank, num_frames, stride)
    assert torch.equal(extractor.stack(fbank), expected)
    assert num_encoder_input_frames(extractor, frames) == len(expected)


def test_batch_contains_the_features_of_single_recordings_and_zeros():
    extractor = FbankFeatureExtractor()
    waveforms = [noise(samples, samples) for samples in (5000, 16000, 9000)]
    batch = extractor(waveforms, sampling_rate=16000)
    assert batch["input_features_mask"].sum(-1).tolist() == [
        -(-(1 + (n - 400) // 160) // 6) for n in (5000, 16000, 9000)
    ]
    for row, waveform in enumerate(waveforms):
        frames = int(batch["input_features_mask"][row].sum())
        assert torch.equal(batch["input_features"][row, :frames], extractor(waveform)["input_features"][0])
        assert not batch["input_features"][row, frames:].any()


@pytest.mark.parametrize("kind", ["array", "tensor", "list of numbers", "list of arrays", "two-dimensional"])
def test_waveforms_of_any_container(kind):
    waveform = noise(2000)
    given_as = {
        "array": waveform,
        "tensor": torch.from_numpy(waveform),
        "list of numbers": waveform.tolist(),
        "list of arrays": [waveform],
        "two-dimensional": waveform[None],
    }[kind]
    extractor = FbankFeatureExtractor()
    assert torch.equal(extractor(given_as)["input_features"], extractor([waveform])["input_features"])


def test_other_sampling_rate_is_refused():
    with pytest.raises(ValueError, match="has 8000 Hz, the feature extractor needs 16000 Hz"):
        FbankFeatureExtractor()(noise(8000), sampling_rate=8000)


def test_features_are_deterministic_without_dither():
    waveform = noise(8000)
    plain, dithered = FbankFeatureExtractor(), FbankFeatureExtractor(dither=1.0)
    assert torch.equal(plain.fbank(waveform), plain.fbank(waveform))
    assert not torch.equal(dithered.fbank(waveform), dithered.fbank(waveform))


def test_saved_feature_extractor_keeps_its_options(tmp_path):
    extractor = FbankFeatureExtractor(
        feature_size=40, window_type="povey", num_frames_lfr=5, stride_lfr=3, frame_length=20, waveform_scale=1.0,
        dither=0.5,
    )  # fmt: skip
    extractor.save_pretrained(tmp_path)
    loaded = FbankFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert loaded.window_type == "povey"
    loaded.dither = extractor.dither = 0.0
    assert torch.equal(loaded(noise(8000))["input_features"], extractor(noise(8000))["input_features"])
    assert not torch.equal(
        loaded.fbank(noise(8000)),
        FbankFeatureExtractor(feature_size=40, frame_length=20, waveform_scale=1.0).fbank(noise(8000)),
    )


@pytest.mark.parametrize("level", [1e-4, 0.1, 1.0])
def test_float16_suffices_for_stored_features(level):
    """Log-mel energies of 16-bit samples are between -16 and 32: rounding errors (at most 2^-7) are below dither."""
    extractor = FbankFeatureExtractor()
    features = cacheable_features(extractor, noise(32000) * level)
    assert np.abs(features).max() < 32
    assert np.abs(features.astype(np.float16).astype(np.float32) - features).max() <= 2**-7


def test_stored_features_become_the_input_of_the_encoder():
    extractor = FbankFeatureExtractor()
    waveform = noise(12345)
    stored = cacheable_features(extractor, waveform)
    assert stored.dtype == np.float32 and stored.shape[1] == 80
    expected = extractor(waveform)["input_features"][0]
    found = encoder_input(extractor, torch.from_numpy(stored))
    assert torch.equal(found, expected)
    assert num_encoder_input_frames(extractor, len(stored)) == len(expected)


@pytest.mark.parametrize("samples", [1, 1600, 1601, 1759, 16000, 479_601, 479_999, 480_000])
def test_stored_whisper_features_exclude_the_padding(samples):
    extractor = WhisperFeatureExtractor()
    waveform = noise(samples)
    stored = cacheable_features(extractor, waveform)
    full = extractor(waveform, sampling_rate=16000, return_tensors="np")["input_features"][0]
    assert full.shape == (80, 3000)
    assert stored.dtype == np.float32
    assert len(stored) == -(-samples // 160)
    np.testing.assert_array_equal(stored, full[:, : len(stored)].T)
    features = torch.from_numpy(stored)
    assert encoder_input(extractor, features) is features
    assert num_encoder_input_frames(extractor, len(stored)) == len(stored)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "padding_value": 0.1
        },  # louder than the recording: the maximum, and so the floor of all frames, is in padding
        {"n_fft": 160, "hop_length": 320},  # windows with gaps: a window of silence may not reach the last frame
        {"n_fft": 160, "hop_length": 160},
        {"n_fft": 512, "hop_length": 160, "feature_size": 40},
        {"n_fft": 400, "hop_length": 80, "feature_size": 128},
        {"n_fft": 1600, "hop_length": 40},  # windows longer than the silence of the fast path
    ],
)
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_stored_whisper_features_are_those_of_the_extractor_for_all_settings(settings):
    extractor = WhisperFeatureExtractor(**settings)
    for samples in (1, 100, 1600, 1601, 1759, 16001, 479_999):
        waveform = noise(samples) * 0.01
        own = extractor(waveform, sampling_rate=16000, return_attention_mask=True, return_tensors="np")
        valid = own["input_features"][0][:, own["attention_mask"][0].astype(bool)]
        np.testing.assert_array_equal(cacheable_features(extractor, waveform), valid.T)


def test_whisper_extractors_that_draw_random_numbers_pad_by_themselves():
    extractor = WhisperFeatureExtractor(dither=0.01)
    waveform = noise(1600)
    torch.manual_seed(0)
    full = extractor(waveform, sampling_rate=16000, return_tensors="np")["input_features"][0]
    torch.manual_seed(0)
    np.testing.assert_array_equal(cacheable_features(extractor, waveform), full[:, :10].T)


def test_training_dither_depends_on_the_row_and_decoding_has_none(tiny_model, make_wav):
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    path = str(make_wav(seconds=0.4))
    messages = transcription_messages(path, "P:", "one")
    row = {"messages": json.dumps(messages), "recordings": [path], "hotwords": []}
    train, evaluate = SpeechLLMCollator(processor, dither=1.0), SpeechLLMCollator(processor)
    state = torch.get_rng_state()

    def features(collator, seed):
        return collator([{**row, "seed": seed}])["input_features"]

    plain = features(evaluate, (0, 1))
    assert torch.equal(features(train, (0, 1)), features(train, (0, 1)))  # a resumed run gets the same features
    assert not torch.equal(features(train, (0, 1)), features(train, (0, 2)))
    assert not torch.equal(features(train, (0, 1)), plain)
    assert torch.equal(features(evaluate, (0, 2)), plain)
    assert processor.feature_extractor.dither == 0
    assert torch.equal(torch.get_rng_state(), state)
    # Noise of one 16-bit step, as in Kaldi, changes a loud tone only a little.
    assert (features(train, (0, 1)) - plain).abs().median() < (
        features(SpeechLLMCollator(processor, dither=100.0), (0, 1)) - plain
    ).abs().median()
    processor.feature_extractor = WhisperFeatureExtractor()
    with pytest.raises(ValueError, match="--dither requires fbank features"):
        SpeechLLMCollator(processor, dither=1.0)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.lists(st.integers(32, 20_000), min_size=1, max_size=6),
    window=st.sampled_from(["hamming", "hanning", "povey", "rectangular"]),
    stacking=st.sampled_from([(7, 6), (1, 1), (5, 3)]),
    level=st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_batched_features_equal_features_of_single_recordings(samples, window, stacking, level):
    extractor = FbankFeatureExtractor(window_type=window, num_frames_lfr=stacking[0], stride_lfr=stacking[1])
    waveforms = [noise(number, seed) * 10 * level for seed, number in enumerate(samples)]
    for features, waveform in zip(extractor.extract(waveforms, "cpu"), waveforms, strict=True):
        torch.testing.assert_close(features, extractor.stack(extractor.fbank(waveform)), rtol=0, atol=1e-3)


def test_many_frames_are_computed_in_chunks(monkeypatch):
    extractor = FbankFeatureExtractor()
    waveforms = [noise(8000), noise(12345, 1)]
    whole = extractor.extract(waveforms, "cpu")
    monkeypatch.setattr("hf_speechllm.audio.fbank.FRAMES_AT_ONCE", 7)
    for expected, features in zip(whole, extractor.extract(waveforms, "cpu"), strict=True):
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
