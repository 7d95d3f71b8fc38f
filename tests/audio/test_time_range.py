import tarfile

import numpy as np
import pytest
import soundfile

from hf_speechllm.audio import decoders, waveform
from hf_speechllm.audio.archives import tar_member
from hf_speechllm.audio.time_range import TimeRange, add_time_range, split_time_range
from hf_speechllm.audio.waveform import AudioError, check_root, load_audio, local_path, probe_audio, source_stamp
from hf_speechllm.data.jsonl import recording_id

RATE = 16000


@pytest.fixture
def noise():
    return np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)


def write(folder, name, samples, **options):
    soundfile.write(folder / name, samples, RATE, **options)
    return str(folder / name)


@pytest.mark.parametrize("start, end, address", [(1.5, 2.25, "a.wav#t=1.5,2.25"), (0, None, "a.wav#t=0")])
def test_times_are_added_to_the_address(start, end, address):
    assert add_time_range("a.wav", start, end) == address
    assert split_time_range(address) == ("a.wav", TimeRange(start, end))
    assert recording_id(f"/b/{address}") == address.replace("a.wav", "a")


@pytest.mark.parametrize("source", ["a.wav", "a#t=x.wav", "a.wav#t=-1,2", "http://h/a.wav#t=", "a#t=1,2.wav"])
def test_other_addresses_are_whole_recordings(source):
    assert split_time_range(source) == (source, None)


def test_a_missing_file_whose_name_looks_like_a_part_is_explained(tmp_path):
    with pytest.raises(AudioError, match="talk.wav#t=abc: no such file; #t=abc is not a part of a recording"):
        load_audio(str(tmp_path / "talk.wav#t=abc"))
    write(tmp_path, "real#t=x.wav", np.zeros(RATE, np.float32))
    assert len(load_audio(str(tmp_path / "real#t=x.wav")))  # an existing file with such a name is read


@pytest.mark.parametrize("start, end", [(-1, 2), (2, 2), (2, 1), (float("nan"), 1), (0, float("inf"))])
def test_invalid_times_are_refused(start, end):
    with pytest.raises(AudioError, match="a.wav: from .* is not a part"):
        add_time_range("a.wav", start, end)


def test_a_part_of_a_part_is_refused():
    with pytest.raises(AudioError, match="a part of a recording already"):
        add_time_range("a.wav#t=0,5", 1, 2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.w64"])
@pytest.mark.parametrize("start, end", [(0, 0.5), (1.23456, 2.5), (2, None), (2, 3.05)])
def test_part_equals_the_samples_of_the_whole_recording(tmp_path, noise, name, start, end):
    whole = write(tmp_path, name, noise)
    part = add_time_range(whole, start, end)
    expected = load_audio(whole)[round(start * RATE) : round((end or 3) * RATE)]
    np.testing.assert_array_equal(load_audio(part), expected)
    assert probe_audio(part) == (len(expected), RATE)
    np.testing.assert_array_equal(waveform.read_audio(part)[0][:, 0], expected)


def test_part_is_cut_from_formats_that_only_ffmpeg_reads(tmp_path, noise, monkeypatch):
    whole = write(tmp_path, "a.wav", noise)
    monkeypatch.setattr(decoders, "FORMATS", ())
    monkeypatch.setattr(decoders, "BLOCK_LENGTH", 5000)
    for start, end in [(0, 0.1), (0.9, 2.1), (2, None)]:
        expected = noise[round(start * RATE) : round((end or 3) * RATE)]
        np.testing.assert_allclose(load_audio(add_time_range(whole, start, end)), expected, atol=1e-4)
    with pytest.raises(AudioError, match="outside the recording, which has 3.00 s"):
        load_audio(f"{whole}#t=1,4")


def test_only_the_part_is_read(tmp_path, noise, monkeypatch):
    whole = write(tmp_path, "a.flac", noise)
    read, read_of_soundfile = [], soundfile.SoundFile.read

    def count(file, frames, **options):
        read.append(frames)
        return read_of_soundfile(file, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    load_audio(f"{whole}#t=2,2.5")
    assert sum(read) == RATE // 2


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("times", ["3,4", "2.5,3.2", "5"])
def test_a_part_outside_the_recording_is_refused(tmp_path, noise, name, times):
    part = write(tmp_path, name, noise) + f"#t={times}"
    for read in (load_audio, probe_audio):
        with pytest.raises(AudioError, match=f"{name}#t={times}: outside the recording, which has 3.00 s"):
            read(part)


def test_maximum_length_applies_to_the_part(tmp_path, noise):
    whole = write(tmp_path, "a.wav", noise)
    assert len(load_audio(f"{whole}#t=1,1.5", max_seconds=0.6)) == RATE // 2
    with pytest.raises(AudioError, match="the maximum is 0.4"):
        load_audio(f"{whole}#t=1,1.5", max_seconds=0.4)


def test_every_part_of_a_truncated_recording_is_refused(tmp_path, noise):
    path = write(tmp_path, "a.wav", noise)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-1000])
    with pytest.raises(AudioError, match="truncated"):
        probe_audio(f"{path}#t=0,1")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_times_in_joined_recordings_start_at_the_first_recording(tmp_path, noise, suffix):
    one, two = (write(tmp_path, f"{name}.{suffix}", noise[name * RATE :]) for name in (0, 1))
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(b"".join((tmp_path / path).read_bytes() for path in (one, two)))
    np.testing.assert_array_equal(
        load_audio(f"{joined}#t=2.5,3.5", max_seconds=1.0), load_audio(str(joined))[40000:56000]
    )


def test_parts_of_archive_members_and_urls_are_read(tmp_path, noise, serve):
    whole = write(tmp_path, "a.wav", noise)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(whole, "a.wav")
    with tarfile.open(path := tmp_path / "a.tar") as tar:
        [info] = tar.getmembers()
    member = tar_member(str(path), "a.wav", info.offset_data, info.size)
    for source in (member, f"{serve(tmp_path)}/a.wav"):
        np.testing.assert_array_equal(load_audio(f"{source}#t=1,2"), load_audio(source)[RATE : 2 * RATE])
    assert local_path(f"{member}#t=1,2") == str(path)


def test_stamp_and_path_of_a_part_are_those_of_the_file(tmp_path, noise):
    path = write(tmp_path, "a.wav", noise)
    assert source_stamp(f"{path}#t=1,2") == source_stamp(path) != ""
    check_root(f"{path}#t=1,2", str(tmp_path))


@pytest.mark.parametrize("times", ["9" * 400, "0," + "9" * 400])
def test_times_of_hundreds_of_digits_are_outside(make_wav, times):
    with pytest.raises(AudioError, match="outside the recording"):
        load_audio(f"{make_wav()}#t={times}")
