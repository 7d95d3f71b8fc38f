"""The recordings that ship with the quickstart, and the script that synthesised them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPES = Path(__file__).parents[2] / "recipes"
DATA = RECIPES / "quickstart_data"
SPLITS = ("train", "test")


def read_list(split: str, name: str) -> dict[str, str]:
    lines = (DATA / split / name).read_text(encoding="utf-8").splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert len(rows) == len(lines), "an ID occurs twice"
    return rows


@pytest.mark.parametrize("split", SPLITS)
def test_lists_of_a_split_have_the_same_sorted_ids(split):
    ids = list(read_list(split, "wav.scp"))
    assert ids == sorted(ids)
    assert ids == list(read_list(split, "text")) == list(read_list(split, "utt2spk"))


@pytest.mark.parametrize("split", SPLITS)
def test_recordings_are_16_khz_mono_of_usable_length(split):
    for path in read_list(split, "wav.scp").values():
        info = soundfile.info(DATA / split / path)
        assert (info.samplerate, info.channels) == (16000, 1), path
        assert 0.25 < info.duration < 3, path


def test_every_recording_is_listed_once():
    listed = [(DATA / split / path).resolve() for split in SPLITS for path in read_list(split, "wav.scp").values()]
    assert sorted(listed) == sorted(path.resolve() for path in (DATA / "audio").iterdir())


def test_nothing_of_test_occurs_in_train():
    assert read_list("test", "text").keys().isdisjoint(read_list("train", "text"))
    assert set(read_list("test", "text").values()).isdisjoint(read_list("train", "text").values())


def test_speakers_and_symbols_of_test_all_occur_in_train():
    def symbols(split: str) -> set[str]:
        transcripts = read_list(split, "text").values()
        return {symbol for text in transcripts for symbol in (text.split() if text.isascii() else text)}

    assert symbols("test") <= symbols("train")
    assert set(read_list("test", "utt2spk").values()) == set(read_list("train", "utt2spk").values())


def test_corpus_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 4_000_000


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return pytest.importorskip("make_quickstart_data", reason="torchaudio is not installed", exc_type=ImportError)


def test_script_plans_the_shipped_transcripts(script):
    planned = script.plan(script.random.Random(0))
    for split in SPLITS:
        assert sorted(text for _, text in planned[split]) == sorted(read_list(split, "text").values())


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize(("language", "text"), [("en", "three seven one"), ("zh", "打开客厅的灯")])
def test_script_synthesises_trimmed_speech(script, tmp_path, language, text):
    voice = script.VOICES[language][-1]
    waveform = script.synthesize(text, voice, words_per_minute=190, pitch=50)
    assert np.array_equal(waveform, script.synthesize(text, voice, words_per_minute=190, pitch=50))
    assert not waveform[: script.MARGIN].any() and not waveform[-script.MARGIN :].any()
    path = tmp_path / "speech.ogg"
    script.write_audio(path, waveform)
    decoded, rate = soundfile.read(path, dtype="float32")
    assert rate == script.SAMPLE_RATE and decoded.shape == waveform.shape
    assert np.corrcoef(decoded, waveform)[0, 1] > 0.8  # lossy, yet aligned in time


def test_script_says_how_to_install_espeak(script, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        script.synthesize("one", "en-us", words_per_minute=190, pitch=50)
