"""Segments of long recordings contain all speech, are not too long, and are cut at quiet points."""

import time

import numpy as np
import pytest
import torch

from hf_speechllm.audio.vad import VoiceDetector, merge, pad, quietest_point, split
from hf_speechllm.audio.waveform import load_audio

pytestmark = pytest.mark.core

SECOND = 16000


@pytest.fixture(scope="module")
def detector():
    return VoiceDetector()


def longform(shared):
    paths = sorted((shared / "data/longform/audio").glob("*.flac"))
    if not paths:
        pytest.skip("no ../shared/data/longform")
    return {path.stem: load_audio(path) for path in paths}


@pytest.mark.parametrize("max_seconds", [30, 5])
def test_no_speech_is_lost_between_the_segments_of_real_recordings(shared, max_seconds):
    from silero_vad import get_speech_timestamps, load_silero_vad

    detector, streaming = VoiceDetector(max_seconds), load_silero_vad()
    cuts_in_speech = 0
    for name, waveform in longform(shared).items():
        segments = detector.segments(waveform)
        assert all(end - start <= max_seconds * SECOND for start, end in segments), name
        assert all(end <= start for (_, end), (start, _) in zip(segments, segments[1:], strict=False)), name
        assert segments[0][0] >= 0 and segments[-1][1] <= len(waveform)
        covered = np.zeros(len(waveform), dtype=bool)
        for start, end in segments:
            covered[start:end] = True
        # Reference: silero-vad's streaming implementation, with different padding.
        for region in get_speech_timestamps(torch.from_numpy(waveform), streaming):
            assert covered[region["start"] : region["end"]].all(), (name, region)

        speech = detector.speech_regions(waveform)
        cuts = [(end, *span) for _, end in segments[:-1] for span in speech if span[0] < end < span[1]]
        cuts_in_speech += len(cuts)
        for cut, first, last in cuts:
            energies = np.square(waveform[first:last])[: (last - first) // 800 * 800].reshape(-1, 800).mean(1)
            at_cut = np.square(waveform[cut - 400 : cut + 400]).mean()
            assert at_cut < np.quantile(energies, 0.25), (name, cut / SECOND)
    # In this data, no speaker reads for 30 s without a pause, but some read for 5 s.
    assert (cuts_in_speech == 0) if max_seconds == 30 else (cuts_in_speech > 5)


def test_short_regions_are_merged_in_real_recordings(shared):
    detector = VoiceDetector(30)
    for name, waveform in longform(shared).items():
        segments, speech = detector.segments(waveform), detector.speech_regions(waveform)
        assert len(segments) <= 4 < 10 <= len(speech), name


def test_silence_noise_and_hum_contain_no_speech(detector):
    rng = np.random.default_rng(0)
    time_ = np.arange(20 * SECOND) / SECOND
    brown = np.cumsum(rng.standard_normal(len(time_)))
    brown -= np.convolve(brown, np.ones(801) / 801, "same")
    for waveform in (
        0.3 * rng.standard_normal(len(time_)),
        0.01 * rng.standard_normal(len(time_)),
        0.2 * brown / np.abs(brown).max(),
        0.2 * np.sin(2 * np.pi * 50 * time_),
    ):
        assert detector.segments(waveform.astype(np.float32)) == []


def test_five_minutes_of_silence_are_processed_quickly(detector):
    started = time.process_time()
    assert detector.segments(np.zeros(300 * SECOND, dtype=np.float32)) == []
    assert time.process_time() - started < 30  # ten times faster than real time, on any machine


def test_recordings_shorter_than_a_window_are_accepted(detector):
    assert detector.segments(np.zeros(100, dtype=np.float32)) == []


def test_loading_the_detector_does_not_change_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        VoiceDetector()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_long_region_is_cut_at_the_quietest_point():
    rng = np.random.default_rng(0)
    waveform = 0.5 * rng.standard_normal(60 * SECOND).astype(np.float32)
    waveform[17 * SECOND : 17 * SECOND + 3200] *= 0.01
    assert abs(quietest_point(waveform, 10 * SECOND, 20 * SECOND) - (17 * SECOND + 1600)) <= 800
    parts = split(waveform, (SECOND, 59 * SECOND), 20 * SECOND)
    assert parts[0][0] == SECOND and parts[-1][1] == 59 * SECOND
    assert abs(parts[0][1] - (17 * SECOND + 1600)) <= 800
    assert [end for _, end in parts[:-1]] == [start for start, _ in parts[1:]]
    assert all(3 * SECOND < end - start <= 20 * SECOND for start, end in parts)
    assert split(waveform, (0, 20 * SECOND), 20 * SECOND) == [(0, 20 * SECOND)]


def test_regions_are_merged_up_to_the_limit_and_separated_at_the_longest_pause():
    assert merge([], 100, 10) == []
    assert merge([(0, 10), (12, 20), (22, 30)], 100, 10) == [(0, 30)]
    assert merge([(0, 10), (31, 40)], 100, 20) == [(0, 10), (31, 40)]  # the pause is too long
    assert merge([(0, 30), (31, 55), (65, 80), (81, 99), (100, 130)], 100, 20) == [(0, 55), (65, 130)]
    assert merge([(0, 90), (95, 180)], 100, 20) == [(0, 90), (95, 180)]


def test_padding_meets_in_the_middle_of_short_pauses():
    assert pad([(10, 50), (54, 80), (200, 230)], 5, 232) == [(5, 52), (52, 85), (195, 232)]
    assert pad([(2, 50), (50, 60)], 5, 100) == [(0, 50), (50, 65)]  # cut within speech: no sample is in two segments


def test_speech_begins_at_the_threshold(monkeypatch):
    class Scripted:
        """Gives a second of silence, a second of what may be speech, and a second of what is, by windows of 32 ms."""

        def audio_forward(self, waveform):
            return torch.tensor([0.0] * 31 + [0.6] * 31 + [0.9] * 31)

    starts = {}
    for threshold in (0.5, 0.8, 0.95):
        detector = VoiceDetector(threshold=threshold)
        monkeypatch.setattr(detector, "_model", Scripted())
        starts[threshold] = [start // 512 for start, _ in detector.speech_regions(np.zeros(93 * 512, np.float32))]
    assert starts == {0.5: [31], 0.8: [62], 0.95: []}


def test_segments_shorter_than_a_second_are_refused():
    with pytest.raises(ValueError, match="at least 1 s"):
        VoiceDetector(max_seconds=0.2)
