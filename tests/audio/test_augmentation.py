"""The measured effect of each transform of waveforms."""

import logging

import numpy as np
import pytest
import soundfile

from hf_speechllm.audio import noise as noise_module
from hf_speechllm.audio.augmentation import (
    AddNoise,
    AddReverb,
    ChangeGain,
    ChangeSpeed,
    CompressWithCodec,
    LimitToTelephoneBand,
    WaveformAugmentation,
)
from hf_speechllm.audio.codecs import round_trip
from hf_speechllm.audio.noise import (
    Babble,
    RecordingFolder,
    SimulatedRooms,
    excerpt,
    pink_noise,
    simulate_room,
    white_noise,
)

RATE = 16000


@pytest.fixture(scope="module")
def speech():
    """A signal with the properties of speech that matter here: most power below 1 kHz, with pauses, 2.3 s."""
    spectrum = np.fft.rfft(np.random.default_rng(5).standard_normal(36_800))
    frequencies = np.fft.rfftfreq(36_800, 1 / RATE)
    samples = np.fft.irfft(spectrum / (1 + (frequencies / 500) ** 2), 36_800)
    envelope = np.clip(np.sin(2 * np.pi * 3 * np.arange(36_800) / RATE), 0, 1)
    return (0.2 * samples * envelope / np.abs(samples).max()).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def decibels(ratio):
    return 10 * np.log10(ratio)


def power(samples):
    return float(np.square(samples, dtype=np.float64).mean())


def lag(first, second):
    """The delay of the second signal, in samples, as the maximum of the cross-correlation."""
    size = 2 * len(first)
    correlation = np.fft.irfft(np.fft.rfft(second, size) * np.conj(np.fft.rfft(first, size)))
    index = int(correlation.argmax())
    return index if index < len(first) else index - size


def band_power(samples, low, high):
    spectrum = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    frequencies = np.fft.rfftfreq(len(samples), 1 / RATE)
    return float(spectrum[(frequencies >= low) & (frequencies < high)].sum())


@pytest.fixture
def folder(tmp_path):
    """A folder with a noise of 0.3 s at 8 kHz in its second subfolder."""
    (tmp_path / "noise" / "b").mkdir(parents=True)
    soundfile.write(tmp_path / "noise" / "b" / "short.wav", 0.1 * white_noise(2400, rng(1)), 8000)
    return tmp_path / "noise"


def babble(rows):
    return Babble(RATE, lambda index: [rows[index]], len(rows))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
@pytest.mark.parametrize("kind", ["white", "pink", "babble", "folder"])
def test_noise_has_the_requested_signal_to_noise_ratio(kind, snr, speech, folder):
    sources = {"white": white_noise, "pink": pink_noise, "babble": babble([speech[::-1].copy(), speech[7000:]])}
    source = sources[kind] if kind != "folder" else RecordingFolder(str(folder), RATE)
    noisy = AddNoise([source], (snr, snr))(speech, rng())
    added = noisy - speech
    assert noisy.dtype == np.float32 and len(noisy) == len(speech)
    assert decibels(power(speech) / power(added)) == pytest.approx(snr, abs=0.1)


def test_the_ratio_is_uniform_in_its_range(speech):
    transform = AddNoise([white_noise], (5.0, 20.0))
    ratios = [decibels(power(speech) / power(transform(speech, rng(seed)) - speech)) for seed in range(100)]
    assert 5 <= min(ratios) < 7 and 18 < max(ratios) <= 20.1
    assert np.mean(ratios) == pytest.approx(12.5, abs=1.5)


def test_white_noise_is_flat_and_pink_noise_has_equal_power_per_octave():
    octaves = [(250 * 2**number, 500 * 2**number) for number in range(5)]
    levels = {
        make: decibels(np.array([band_power(make(160_000, rng()), *octave) for octave in octaves]))
        for make in (white_noise, pink_noise)
    }
    assert np.diff(levels[white_noise]) == pytest.approx(np.full(4, 3.0), abs=0.3)
    assert np.diff(levels[pink_noise]) == pytest.approx(np.zeros(4), abs=0.3)


def test_babble_mixes_three_to_seven_talkers_at_equal_levels():
    tones = [10.0**-index * np.sin(2 * np.pi * 500 * (index + 1) * np.arange(RATE) / RATE) for index in range(4)]
    mixtures = [
        babble([tone.astype(np.float32) for tone in tones])(RATE, rng(seed)) for seed in range(20)
    ]  # of an integer number of periods
    powers = np.array([[band_power(item, 500 * k - 5, 500 * k + 5) for k in range(1, 5)] for item in mixtures])
    counts = powers / powers[powers > powers.max() * 1e-6].min()  # two talkers of one row add up by their phases
    assert {3, 4, 5, 6, 7} >= {int((row > 0.01).sum()) for row in counts} - {1, 2}
    assert max(np.abs(item).max() for item in mixtures) <= 7 * np.sqrt(2) + 0.01
    assert powers.max() / np.median(powers[powers > powers.max() * 1e-6]) < 60  # the levels differed by 60 dB


def test_babble_leaves_out_silent_and_unreadable_recordings(speech, tmp_path):
    missing = str(tmp_path / "missing.wav")
    silence = np.zeros(RATE, np.float32)
    assert babble([missing, silence])(8000, rng()) is None
    mixed = babble([missing, speech, silence, speech])(8000, rng(2))
    assert mixed.any() and np.isfinite(mixed).all()
    with pytest.raises(ValueError, match="use_training_rows"):
        Babble(RATE)(8000, rng())


def test_a_short_noise_is_repeated_from_a_random_start():
    ramp = np.arange(10, dtype=np.float32)
    starts = set()
    for seed in range(50):
        part = excerpt(ramp, 25, rng(seed))
        assert len(part) == 25 and set(np.diff(part)) == {1.0, -9.0}  # repeated without a gap
        starts.add(part[0])
    assert starts == set(range(10))
    assert {excerpt(ramp, 8, rng(seed))[0] for seed in range(50)} == {0, 1, 2}
    assert list(excerpt(ramp, 10, rng())) == list(ramp)


def test_noise_at_another_rate_is_resampled(tmp_path):
    time = np.arange(4 * 44_100) / 44_100
    stereo = np.stack([0.3 * np.sin(2 * np.pi * 1000 * time), 0.3 * np.sin(2 * np.pi * 3000 * time)], 1)
    soundfile.write(tmp_path / "tone.flac", stereo, 44_100)
    part = RecordingFolder(str(tmp_path), RATE)(RATE, rng())
    assert band_power(part, 990, 1010) / band_power(part, 0, 8000) > 0.99  # 1 kHz, and only the first channel


def test_unreadable_noises_are_reported_once_and_replaced(folder, caplog):
    (folder / "a.wav").write_bytes(b"no audio")
    (folder / "notes.txt").write_text("no audio")
    with caplog.at_level(logging.WARNING):
        source = RecordingFolder(str(folder), RATE)
        parts = [source(100, rng(seed)) for seed in range(20)]
    assert all(part.any() for part in parts)
    assert [record.getMessage() for record in caplog.records if "a.wav" in record.getMessage()] == [
        message for message in caplog.messages
    ]
    assert len(caplog.messages) == 1 and "leaves out a recording" in caplog.messages[0]


def test_folders_without_readable_recordings_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        RecordingFolder(str(tmp_path / "missing"), RATE)
    with pytest.raises(ValueError, match="no readable recordings"):
        RecordingFolder(str(tmp_path), RATE)
    (tmp_path / "a.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "b.wav", np.zeros((100, 2)) + [0, 0.1], RATE)  # silence in the channel that is used
    with pytest.raises(ValueError, match="no readable recordings"):
        RecordingFolder(str(tmp_path), RATE)


def test_decoded_noises_take_limited_memory(tmp_path, monkeypatch):
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1000, 0.1 * (number + 1)), RATE)
    monkeypatch.setattr(noise_module, "CACHE_BYTES", 3 * 4000)
    source = RecordingFolder(str(tmp_path), RATE)
    levels = [round(float(source(10, rng(seed))[0]), 2) for seed in range(60)]
    assert sorted(set(levels)) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert sum(item.nbytes for item in source._kept.values()) <= 3 * 4000


def test_reverberation_equals_a_convolution_aligned_at_the_direct_sound(speech, tmp_path):
    response = np.zeros(3000)
    response[[40, 700, 1500, 2999]] = 0.9, -0.5, 0.3, 0.1
    soundfile.write(tmp_path / "room.wav", response, RATE, subtype="FLOAT")
    wet = AddReverb([RecordingFolder(str(tmp_path), RATE)])(speech, rng())
    expected = np.convolve(speech.astype(np.float64), response)[40 : 40 + len(speech)]
    expected *= np.sqrt(power(speech) / power(expected))
    assert wet.dtype == np.float32
    assert wet == pytest.approx(expected, abs=1e-5)
    assert power(wet) == pytest.approx(power(speech), rel=1e-4)
    assert lag(speech, wet) == 0


def test_simulated_rooms_have_the_requested_reverberation_time():
    measure_rt60 = pytest.importorskip("pyroomacoustics").experimental.measure_rt60
    for seconds in (0.2, 0.5):
        measured = []
        for number in range(4):
            simulate_room.cache_clear()
            response = simulate_room(number, seconds, seconds, RATE)
            again = SimulatedRooms((seconds, seconds), RATE).random_recording
            assert response.dtype == np.float32 and response.any()
            measured.append(measure_rt60(response, fs=RATE, decay_db=20))
        assert np.mean(measured) == pytest.approx(seconds, rel=0.3), seconds
        assert again(rng(1)) is again(rng(1))  # simulated once
    first, other = simulate_room(0, 0.2, 0.2, RATE), simulate_room(1, 0.2, 0.2, RATE)
    assert first.shape != other.shape or not np.array_equal(first, other)
    simulate_room.cache_clear()
    assert np.array_equal(simulate_room(0, 0.2, 0.2, RATE), first)


def test_gain_has_the_requested_decibels(speech):
    louder = ChangeGain((6.0, 6.0))(speech, rng())
    assert decibels(power(louder) / power(speech)) == pytest.approx(6.0, abs=0.01)
    levels = [decibels(power(ChangeGain((-18.0, 6.0))(speech, rng(seed))) / power(speech)) for seed in range(50)]
    assert -18 <= min(levels) < -15 and 3 < max(levels) <= 6


def test_the_telephone_band_ends_at_4_khz(speech):
    narrow = LimitToTelephoneBand(RATE)(speech, rng())
    assert len(narrow) == len(speech) and narrow.dtype == np.float32
    assert decibels(band_power(narrow, 0, 100) / band_power(speech, 0, 100)) < -12
    assert decibels(band_power(narrow, 500, 3000) / band_power(speech, 500, 3000)) == pytest.approx(0, abs=0.5)
    assert abs(lag(speech, narrow)) <= 4  # 0.25 ms, from the phase of the filters
    noise = 0.1 * white_noise(4 * RATE, rng())
    narrow = LimitToTelephoneBand(RATE)(noise, rng())
    assert decibels(band_power(narrow, 4000, 8001) / band_power(noise, 4000, 8001)) < -30


@pytest.mark.parametrize("encoder", ["pcm_mulaw", "pcm_alaw"])
def test_g711_has_256_levels(encoder, speech):
    coded = round_trip(speech[::2], 8000, encoder)
    assert 100 < len(np.unique(coded)) <= 256
    assert decibels(power(speech[::2]) / power(coded - speech[::2])) > 30


def test_both_laws_of_g711_are_used(speech):
    assert len({LimitToTelephoneBand(RATE)(speech, rng(seed)).tobytes() for seed in range(10)}) == 2


@pytest.mark.parametrize("rate", [16000, 22050])
@pytest.mark.parametrize("encoder", ["libopus", "libmp3lame"])
def test_codecs_change_samples_but_neither_length_nor_time(encoder, rate, speech):
    for samples in (len(speech), len(speech) - 777, 400):
        coded = round_trip(speech[:samples], rate, encoder, 16.0)
        assert len(coded) == samples and coded.dtype == np.float32
        error = decibels(power(speech[:samples]) / power(coded - speech[:samples]))
        assert 2 < error < 30
        assert lag(speech[:samples], coded) == 0


def test_a_lower_bit_rate_has_larger_errors(speech):
    for encoder in ("libopus", "libmp3lame"):
        errors = [power(round_trip(speech, RATE, encoder, kbps) - speech) for kbps in (8.0, 16.0, 64.0)]
        assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2]
    assert len({CompressWithCodec((12.0, 12.0), RATE)(speech, rng(seed)).tobytes() for seed in range(10)}) == 2


def test_speed_changes_length_and_pitch():
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    for factor in (0.9, 1.1):
        changed = ChangeSpeed([factor], RATE)(tone, rng())
        assert len(changed) == np.ceil(RATE * RATE / round(factor * RATE))
        assert np.abs(np.fft.rfft(changed[:8000])).argmax() * 2 == pytest.approx(1000 * factor, abs=2)
    lengths = {len(ChangeSpeed([0.9, 1.0, 1.1], RATE)(tone, rng(seed))) for seed in range(30)}
    assert lengths == {14546, 16000, 17778}
    assert ChangeSpeed([0.9], RATE, max_samples=17_000)(tone, rng()) is tone


def all_transforms(folder, speech):
    return [
        ChangeSpeed([0.9, 1.1], RATE),
        AddReverb([RecordingFolder(str(folder), RATE)]),
        AddNoise([white_noise, pink_noise, babble([speech])], (0.0, 0.0)),
        ChangeGain((20.0, 20.0)),
        LimitToTelephoneBand(RATE),
        CompressWithCodec((12.0, 32.0), RATE),
    ]


def test_no_transform_clips_changes_its_argument_or_fails_on_silence(speech, folder):
    for transform in all_transforms(folder, speech):
        augment = WaveformAugmentation([(1.0, transform)])
        for samples in (speech, speech / np.abs(speech).max(), speech[:400], np.zeros(8000, np.float32)):
            before = samples.copy()
            result = augment(samples, rng(3))
            assert np.array_equal(samples, before)
            assert result.dtype == np.float32 and np.isfinite(result).all()
            assert np.abs(result).max() <= 1
            if not samples.any():
                assert np.abs(result).max() < 1e-3  # A-law has no level for zero
    chain = WaveformAugmentation([(1.0, transform) for transform in all_transforms(folder, speech)])
    assert np.abs(chain(speech, rng(4))).max() <= 1


def test_a_loud_mixture_is_scaled_instead_of_clipped(speech):
    loud = (speech / np.abs(speech).max()).astype(np.float32)
    noisy = WaveformAugmentation([(1.0, AddNoise([white_noise], (0.0, 0.0)))])(loud, rng())
    unscaled = AddNoise([white_noise], (0.0, 0.0))(loud, generator_after_draw())
    assert np.abs(unscaled).max() > 1
    assert np.abs(noisy).max() == pytest.approx(1, abs=1e-6)
    assert noisy == pytest.approx(unscaled / np.abs(unscaled).max(), abs=1e-6)


def generator_after_draw():
    """A generator as a transform receives it: after the draw that decides about the transform."""
    generator = rng()
    generator.random()
    return generator


def test_transforms_are_applied_with_their_probability(speech):
    augment = WaveformAugmentation([(0.3, ChangeGain((-6.0, -6.0))), (0.0, ChangeGain((-60.0, -60.0)))])
    results = [augment(speech, rng(seed)) for seed in range(300)]
    changed = [not np.array_equal(result, speech) for result in results]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.08)
    assert all(result is speech for result, is_changed in zip(results, changed, strict=True) if not is_changed)
