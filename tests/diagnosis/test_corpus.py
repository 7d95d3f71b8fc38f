"""Checks that compare rows, and reading of rows from different sources."""

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_speechllm.diagnosis.corpus_checks import Corpus, check_corpus, fit_line
from hf_speechllm.diagnosis.measurement import Measurement, measure_recording
from hf_speechllm.diagnosis.model_checks import high_losses
from hf_speechllm.diagnosis.rows import DataRow, Problem, read_rows
from hf_speechllm.diagnosis.shifted_transcripts import shifted_transcripts

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart_data"

WORDS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
COUNTER = itertools.count()


def make_row(text="one two three", split="train", **others):
    number = next(COUNTER)
    values = {
        "id": f"u{number}", "file": f"{split}.jsonl", "line": number, "split": split, "recordings": [f"/{number}.wav"],
        "answers": [text], "prompt": "\nWrite:", "has_id": True, "language": None, "speaker": None,
        "speech_length": None, "text_length": None, "record": {},
    }  # fmt: skip
    return DataRow(**{**values, **others})


def found(rows, seconds=None, **measured):
    """Kinds and numbers of rows that the checks of rows with each other report."""
    lengths = [1.0] * len(rows) if seconds is None else seconds
    measurements = [
        [Measurement(row.recordings[0], length, 16000, 1, f"{row.line}", 0.5, active_seconds=length, **measured)]
        for row, length in zip(rows, lengths, strict=True)
    ]
    result = {}
    corpus = Corpus(rows, measurements)
    for index, kind, _ in (*check_corpus(corpus), *shifted_transcripts(corpus)):
        result.setdefault(kind, []).append(index)
    return result


def sentences(number, rng):
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(number)]
    seconds = [0.2 + 0.3 * len(text.split()) * rng.uniform(0.9, 1.1) for text in texts]
    return texts, seconds


def test_ids_and_speakers():
    rows = [make_row(speaker="anna"), make_row(speaker="bob"), make_row(speaker="ANNA "), make_row(speaker="anna")]
    rows += [make_row(), make_row(split="test", speaker="bob"), make_row(id=rows[1].id, speaker="bob")]
    assert found(rows) == {
        "duplicate-id": [6], "speaker-in-two-splits": [1], "speaker-spelling": [2], "missing-speaker": [4],
    }  # fmt: skip
    one = [make_row(speaker="anna"), make_row(split="test", speaker="anna")]
    assert found(one) == {}  # no other division is possible


def test_texts_in_two_splits_must_be_long():
    long, chinese = "the weather in the mountains is fine", "今天山上的天气非常好"
    rows = [make_row("yes"), make_row("yes", "test"), make_row(long), make_row(long.upper() + ".", "test")]
    assert found([*rows, make_row(chinese), make_row(chinese, "dev")]) == {"text-in-two-splits": [2, 4]}


def test_parts_of_a_file():
    rows = [make_row(recordings=[f"/a.flac#t={start}"]) for start in ("0,2", "1.5,3", "3.05,5")]
    assert found([*rows, make_row("one", "test", recordings=["/a.flac#t=6"])]) == {
        "overlapping-parts": [1], "file-in-two-splits": [0, 1, 2],
    }  # fmt: skip


def test_styles_that_are_rare():
    texts = [f"this is the sentence that has number {WORDS[i % 11]} and {WORDS[i // 11 % 11]}." for i in range(96)]
    texts += [
        "THIS IS ALL IN CAPITALS.",
        "打开客厅的灯和空调。",
        "das ist nicht der richtige text und auch nicht gut.",
    ]
    texts += ["this is the sentence without a mark"]
    result = found([make_row(text) for text in texts])
    assert result == {
        "unusual-case": [96], "unusual-script": [97], "unusual-language": [98], "unusual-punctuation": [99],
    }  # fmt: skip
    # In a set without a usual style, no style is unusual.
    assert found([make_row(text) for text in texts[90:]]) == {}


def test_text_that_many_rows_repeat():
    rng = np.random.default_rng(0)
    texts = [f"sentence {number} of the list" for number in range(90)] + ["default text"] * 10
    assert found([make_row(text) for text in rng.permutation(texts)], [3.0] * 100).keys() == {"repeated-text"}
    assert found([make_row(WORDS[number % 10]) for number in range(100)]) == {}  # a small vocabulary


def test_prompts():
    rows = [make_row() for _ in range(150)]
    rows += [make_row(prompt="\nWritte:"), make_row(split="dev", prompt="\nTranscribe:")]
    assert found(rows) == {"prompt-mismatch": [151], "rare-prompt": [150, 151]}


def test_sampling_rates():
    rows = [make_row() for _ in range(100)]
    measured = [[Measurement(row.recordings[0], 1.0, 16000, 1, row.id, 0.5)] for row in rows]
    measured[7][0].rate = 8000
    assert [(i, kind) for i, kind, _ in check_corpus(Corpus(rows, measured))] == [(7, "unusual-sampling-rate")]
    for one in measured:
        one[0].rate = 8000
    assert [(i, kind) for i, kind, _ in check_corpus(Corpus(rows, measured))] == [(0, "low-sampling-rate")]


def test_recordings_that_are_cut_inside_a_word_are_rare():
    rows = [make_row() for _ in range(100)]

    def kinds(level, edges, rest=(-60.0, -55.0), others=()):
        measured = [[Measurement(row.recordings[0], 1.0, 16000, 1, row.id, 0.5, level=level)] for row in rows]
        for index, one in enumerate(measured):
            one[0].quiet_level, one[0].edge_levels = -60.0, edges if index in (7, *others) else rest
        return [(i, detail) for i, kind, detail in check_corpus(Corpus(rows, measured)) if kind == "cut-speech"]

    ending = "in the middle of speech, unlike nearly all other recordings"
    assert kinds(-20.0, (-55.0, -30.0)) == [(7, f"ends {ending}")]
    assert kinds(-20.0, (-30.0, -30.0)) == [(7, f"starts and ends {ending}")]
    assert kinds(-20.0, (-33.0, -60.0)) == []
    assert kinds(-55.0, (-55.0, -55.0)) == []  # noise is as loud
    assert kinds(-20.0, (-30.0, -30.0), others=(8, 9)) == []  # many recordings are cut tightly
    assert kinds(-20.0, (-60.0, -60.0), rest=(-30.0, -30.0)) == []


def test_pace_of_each_row():
    texts, seconds = sentences(200, np.random.default_rng(0))
    assert found(list(map(make_row, texts)), seconds) == {}
    longest = max(range(200), key=lambda index: seconds[index])
    seconds[longest] /= 2
    assert found(list(map(make_row, texts)), seconds) == {"unusual-pace": [longest]}


@pytest.mark.parametrize(
    "move, start, stop", [(1, 40, 80), (-1, 100, 130), (1, 0, 200), (-1, 90, 200), (2, 60, 85), (1, 150, 162)]
)
def test_shifted_transcripts(move, start, stop):
    texts, seconds = sentences(200, np.random.default_rng(0))
    texts[start:stop] = np.roll(texts[start:stop], move).tolist()
    result = found(list(map(make_row, texts)), seconds)["shifted-transcripts"]
    assert set(result) <= set(range(start, stop)) and len(result) > 0.8 * (stop - start)


@pytest.mark.parametrize("seed", [11, 97])
def test_wrong_texts_near_each_other_are_not_shifted(seed):
    texts, seconds = sentences(200, np.random.default_rng(0))
    rng = np.random.default_rng(seed)  # seeds with which another text fits less badly in most of the rows
    wrong = rng.choice(len(texts), 8)
    for place, index in zip(100 + np.sort(rng.choice(12, 8, replace=False)), wrong, strict=True):
        texts[place] = texts[index]
    assert "shifted-transcripts" not in found(list(map(make_row, texts)), seconds)


def test_durations_without_relation_to_the_text_are_not_shifted():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        texts, seconds = sentences(100, rng)
        assert "shifted-transcripts" not in found(list(map(make_row, texts)), rng.permutation(seconds).tolist())


def test_line_is_fitted_in_spite_of_outliers():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 20, 200)
    y = 0.3 + 0.25 * x
    y[:30] *= 10
    x[30], y[30] = 500, 1.0
    assert fit_line(x, y)[31:] == pytest.approx(0.3 + 0.25 * x[31:], rel=0.05)


def test_high_losses():
    rows = [make_row(" ".join(["word"] * 20)) for _ in range(50)]
    losses = {index: 0.2 + 0.002 * index for index in range(50)}
    counts = [20] * 50
    corpus = Corpus(rows, [])
    assert list(high_losses(corpus, losses, counts)) == []
    losses[3] = 4.0
    assert [(index, kind) for index, kind, _ in high_losses(corpus, losses, counts)] == [(3, "high-loss")]
    assert list(high_losses(corpus, {3: 4.0}, counts)) == []  # no median


@pytest.mark.parametrize("name", ["en-gb-scotland-f4-train-0196", "en-us-train-0234", "cmn-train-0704"])
def test_padded_copies_have_the_same_fingerprint(name, tmp_path):
    source = str(QUICKSTART / "audio" / f"{name}.ogg")
    samples, rate = soundfile.read(source)
    original = measure_recording(source).fingerprint
    for before, after in ((3000, 3000), (1111, 0), (0, 777)):
        soundfile.write(tmp_path / "copy.wav", np.pad(0.5 * samples, (before, after)), rate)
        assert original @ measure_recording(str(tmp_path / "copy.wav")).fingerprint > 0.95


def test_copies_are_found_by_sound(speech, tmp_path, write_rows, examine):
    quieter = np.pad(0.5 * speech, 1000)
    for name, samples in (("a.wav", speech), ("b.flac", speech), ("c.ogg", quieter), ("d.wav", speech[::-1])):
        soundfile.write(tmp_path / name, (32767 * samples).astype(np.int16), 16000)
    texts = {"a.wav": "three one", "b.flac": "three one", "c.ogg": "three one", "d.wav": "three one"}
    path = write_rows([(tmp_path / name, text) for name, text in texts.items()])
    assert examine(path) == {
        ("train.jsonl", 2): ["duplicate-recording"], ("train.jsonl", 3): ["near-duplicate"],
    }  # fmt: skip
    other = write_rows([(tmp_path / "b.flac", "three")], "test.jsonl")
    result = examine(path, other)
    assert result["train.jsonl", 1] == ["recording-in-two-splits", "conflicting-transcripts"]
    assert result["test.jsonl", 1] == ["conflicting-transcripts"]
    assert examine(f"train={path}", f"train={other}")["test.jsonl", 1] == ["conflicting-transcripts"]


def test_synthetic_sentences_that_differ_in_one_word_are_no_copies(speech, tmp_path, write_rows, examine):
    other = speech.copy()
    other[8000:11200] = other[8000:11200][::-1]  # a synthetic voice says equal words with equal samples
    for name, samples in (("a.wav", speech), ("b.wav", other)):
        soundfile.write(tmp_path / name, (32767 * samples).astype(np.int16), 16000)
    assert examine(write_rows([(tmp_path / "a.wav", "three one"), (tmp_path / "b.wav", "three two")])) == {}


def test_rows_of_all_sources(speech, tmp_path, write_rows):
    soundfile.write(tmp_path / "a.wav", speech, 16000)
    (tmp_path / "kaldi" / "dev").mkdir(parents=True)
    for name, line in (("wav.scp", "rec ../../a.wav"), ("segments", "utt rec 0.1 0.9"), ("text", "utt one"),
                       ("utt2spk", "utt anna"), ("utt2lang", "utt en")):  # fmt: skip
        (tmp_path / "kaldi" / "dev" / name).write_text(line + "\n")
    with open(tmp_path / "kaldi" / "dev" / "text", "a") as file:
        file.write("other two\n")
    row, problem = read_rows([str(tmp_path / "kaldi" / "dev")])
    assert (row.id, row.split, row.speaker, row.language, row.text, row.line) == ("utt", "dev", "anna", "en", "one", 1)
    assert row.recordings == [f"{tmp_path}/a.wav#t=0.1,0.9"]
    assert isinstance(problem, Problem) and (problem.kind, problem.line) == ("unpaired-id", 2)

    with tarfile.open(tmp_path / "test-0.tar", "w") as tar:
        (tmp_path / "k.json").write_text(json.dumps({"text": "one", "text_length": 1}))
        tar.add(tmp_path / "a.wav", "k.wav")
        tar.add(tmp_path / "k.json", "k.json")
    (row,) = read_rows([str(tmp_path / "test-0.tar")])
    assert row.split == "test" and row.text_length == 1
    assert row.recordings[0] in row.record["messages"][1]["content"]

    path = write_rows([("a.wav", "one", {"key": "k", "spk": "s", "lang": "English", "hist_context": "before"})])
    (row,) = read_rows([str(path)])
    assert (row.id, row.speaker, row.language, row.split, row.prompt) == (
        "k", "s", "en", "train", "You are a helpful assistant.\n语音转写：",
    )  # fmt: skip
    assert [row.split for row in read_rows([f"test={path}", str(tmp_path / "kaldi")])[:2]] == ["test", "dev"]
