"""Word times: alignment, files, `decode --word_times`, `align`."""

import itertools
import json
import sys
from dataclasses import replace

import pytest
import soundfile
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.audio.vad import VoiceDetector
from hf_speechllm.cli.main import main
from hf_speechllm.inference.aligning import Aligner
from hf_speechllm.inference.alignment import Word, align, split_words
from hf_speechllm.inference.journal import Journal
from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.segments import Segment
from hf_speechllm.inference.word_files import MAX_CUE_SECONDS, MAX_LINE, MAX_LINES, ctm, cues, textgrid
from hf_speechllm.inference.writers import srt, write_results
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_vocabulary import CTCVocabulary, character_config

TEXTS = ["one two three four five six seven eight nine zero 五六七八 几点了"]


@pytest.fixture(scope="module")
def vocabulary():
    return CTCVocabulary(character_config(TEXTS))


def frames_of(vocabulary, path, probability=0.9):
    """Log-probabilities that prefer one character in each frame; `_` is the blank."""
    ids = [0 if item == "_" else 1 if item == " " else vocabulary.encode(item)[0] for item in path]
    size = 40
    result = torch.full((len(ids), size), (1 - probability) / (size - 1))
    result[range(len(ids)), ids] = probability
    return result.log()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello, world - it's 25%!", ["hello,", "world", "it's", "25%!"]),
        ("我用Python写 code。好", ["我", "用", "Python", "写", "code。", "好"]),
        ('(well) "quoted" 「你好」', ["(well)", '"quoted"', "「你", "好」"]),
        ("안녕 여러분", ["안녕", "여러분"]),
        (" -- ... ", []),
        ("हिन्दी में ❤\ufe0f!", ["हिन्दी", "में"]),
        ("ไทยนี้ ok", ["ไ", "ท", "ย", "นี้", "ok"]),
    ],
)
def test_words_of_a_text(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


def test_times_follow_the_peaks(vocabulary):
    path = "____o_n_e_____ _____t_w_o____________"
    words = align(frames_of(vocabulary, path), "One, two!", vocabulary, 0.02, start=10.0)
    assert [word.text for word in words] == ["One,", "two!"]
    first, second = 0.02 * path.index("o"), 0.02 * path.index("t")
    assert first - 0.041 <= words[0].start - 10 <= first and second - 0.041 <= words[1].start - 10 <= second
    end = 0.02 * (path.index("e") + 1)
    assert end <= words[0].end - 10 <= end + 0.061 and words[0].end <= words[1].start
    assert words[1].end <= 10 + 0.02 * len(path)
    assert all(word.confidence == pytest.approx(0.9, abs=0.01) for word in words)


def test_words_that_the_probabilities_contradict_have_low_confidence(vocabulary):
    words = align(frames_of(vocabulary, "__o_n_e__ ________"), "one four", vocabulary, 0.02)
    assert words[0].confidence > 0.8 and words[1].confidence < 0.05
    short = align(frames_of(vocabulary, "_o_"), "one two three", vocabulary, 0.02)
    assert [word.confidence for word in short] == [0, 0, 0] and short[-1].end == pytest.approx(0.06)


def test_a_head_without_finite_probabilities_gives_no_confidence(vocabulary):
    words = align(torch.full((30, 40), float("nan")), "one two", vocabulary, 0.02)
    assert [word.confidence for word in words] == [0, 0] and words[-1].end <= 0.6


def test_words_outside_the_vocabulary_are_interpolated(vocabulary):
    words = align(frames_of(vocabulary, "__o_n_e__ ________t_w_o__"), "one 25 36 two", vocabulary, 0.02)
    assert [word.confidence is None for word in words] == [False, True, True, False]
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and words[1].end > words[1].start
    assert all(word.confidence is None for word in align(frames_of(vocabulary, "__"), "25 36", vocabulary, 0.02))
    assert align(frames_of(vocabulary, "__"), "...", vocabulary, 0.02) == ()


@pytest.mark.parametrize(
    "text", ["one 25", "one 25 36", "25 one", "25 36 one two", "one 25 36 two", "one 25 two 36", "25 36"]
)
def test_words_without_a_gap_share_the_time_of_a_neighbour(vocabulary, text):
    path = "".join("_".join(part) for part in text.split() if part.isalpha()).center(2, "_")
    words = align(frames_of(vocabulary, path), text, vocabulary, 0.04)
    assert [one.text for one in words] == text.split()
    assert all(one.end - one.start > 0.005 for one in words)
    assert all(left.end <= right.start + 1e-9 for left, right in itertools.pairwise(words))
    assert words[0].start >= 0 and words[-1].end <= 0.04 * len(path)
    assert all(cue.end > cue.start for one in words for cue in cues([one]))


def test_characters_are_words_without_spaces(vocabulary):
    words = align(frames_of(vocabulary, "__几____点____了__"), "几点了？", vocabulary, 0.06)
    assert [word.text for word in words] == ["几", "点", "了？"]
    assert [word.spaced for word in words] == [False, False, False]


class HalvedWords:
    """A vocabulary with tokens of three characters, which join words."""

    blank = 0

    def encode_with_spans(self, text):
        spans = [(at, min(at + 3, len(text))) for at in range(0, len(text), 3)]
        return list(range(1, len(spans) + 1)), spans


def test_token_of_two_words_is_shared():
    path = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 2, 2, 0])
    scores = torch.nn.functional.one_hot(path, 3).float().clamp(1e-6).log()
    words = align(scores, "几点了好", HalvedWords(), 0.06)
    assert [round(word.end - word.start, 2) for word in words[:3]] == [0.18, 0.12, 0.14]
    assert words[0].end == words[1].start


def word(text, start, end, spaced=True):
    return Word(text, start, end, 0.5, spaced, 0.5)


def test_cues_are_short():
    words = [word(f"word{index}", 0.3 * index, 0.3 * index + 0.25) for index in range(60)]
    words += [word("x" * 100, 30.0, 40.0), word("End.", 40.5, 41.0), word("Next", 41.1, 41.4)]
    shown = cues(words)
    assert all(cue.end - cue.start <= MAX_CUE_SECONDS for cue in shown)
    lines = [cue.text.split("\n") for cue in shown]
    assert all(len(item) <= MAX_LINES and max(map(len, item)) <= MAX_LINE for item in lines)
    assert [cue.text.replace("\n", "") for cue in shown[-2:]] == ["x" * 84, f"{'x' * 16} End. Next"]
    assert " ".join(" ".join(item) for item in lines).split()[:60] == [f"word{index}" for index in range(60)]
    assert "1\n00:00:00,000 -->" in srt(shown, keep_lines=True) and "\nword" in srt(shown, keep_lines=True)
    assert cues([]) == []
    chinese = [word(character, index, index + 0.5, spaced=False) for index, character in enumerate("几点了五")]
    assert [cue.text for cue in cues(chinese)] == ["几点了五"]


def test_ctm_and_textgrid():
    words = (word("one", 0.5, 0.75), word('t"wo', 0.75, 1.0))
    assert list(ctm("a b", words)) == ["a_b 1 0.500 0.250 one 0.500\n", 'a_b 1 0.750 0.250 t"wo 0.500\n']
    grid = textgrid(words, 2.0)
    assert "intervals: size = 4" in grid and 'text = "t""wo"' in grid and "xmax = 2.000" in grid
    assert "intervals: size = 1" in textgrid((), 1.0)
    assert "intervals: size = 2" in textgrid((word("no", 0.5, 0.5), word("one", 0.5, 1.0)), 1.0)


@pytest.mark.parametrize(
    ("texts", "expected"), [(["hello there", "world"], "hello there world"), (["你好", "再见"], "你好再见")]
)
def test_words_of_segments_are_joined_as_their_texts(texts, expected):
    segments = []
    for index, text in enumerate(texts):
        places = [text[start:end] for start, end in split_words(text)]
        words = tuple(
            word(part, index, index, spaced=number > 0 and " " in text) for number, part in enumerate(places)
        )
        segments.append(Segment(index, index + 1, text, words=words))
    assert [cue.text for cue in cues(Transcript(0, "", 2.0, segments=tuple(segments)).words)] == [expected]


def test_files(tmp_path):
    segments = (Segment(0, 2, "one two", words=(word("one", 0.5, 0.75), word("two", 0.75, 1.0))),)
    write_results(tmp_path / "hyp.txt", [("a/1", Transcript(0, "one two", 2.0, segments=segments))], words=True)
    row = json.loads((tmp_path / "hyp.words.jsonl").read_text())
    assert row["words"][1] == {"word": "two", "start": 0.75, "end": 1.0, "confidence": 0.5, "ctc": 0.5, "llm": 0.5}
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"hyp.txt", "hyp.words.jsonl", "hyp.ctm", "hyp.textgrids/a%2F1.TextGrid"}


def test_journal_keeps_words(tmp_path):
    transcript = Transcript(0, "one", 2.0, segments=(Segment(0, 2, "one", words=(word("one", 0.5, 0.75),)),))
    journal = Journal(tmp_path / "hyp.txt", {})
    journal.open()
    journal.add("key", transcript)
    assert Journal(tmp_path / "hyp.txt", {}).read()["key"].words == transcript.words


# With a model


@pytest.fixture(scope="module")
def head_model(compose_tiny, tmp_path_factory):
    """Folder of a tiny model with a random CTC head."""
    model, processor = compose_tiny(seed=2)
    torch.manual_seed(0)
    characters = [chr(code) for code in range(ord("!"), 256)]  # a random LLM writes any character
    add_ctc_head(model, character_config([*TEXTS, "".join(characters)], hidden_size=32, upsample_rate=3))
    folder = tmp_path_factory.mktemp("head")
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(head_model):
    model = SpeechLLMForConditionalGeneration.from_pretrained(head_model)
    return model, SpeechLLMProcessor.from_pretrained(head_model)


def test_words_of_a_batch_equal_those_of_single_recordings(loaded, waveforms):
    transcriber = Transcriber(*loaded, word_times=True, max_new_tokens=8)
    plain = Transcriber(*loaded, max_new_tokens=8)
    batch = transcriber.transcripts(waveforms)
    assert [item.text for item in batch] == plain.transcribe(waveforms)
    assert any(item.words for item in batch)
    for waveform, item in zip(waveforms, batch, strict=True):
        single = transcriber.transcripts([waveform])[0]
        assert [one.text for one in single.words] == [one.text for one in item.words]
        assert [one.start for one in single.words] == pytest.approx([one.start for one in item.words], abs=1e-3)
        assert all(0 <= one.start <= one.end <= item.seconds + 0.06 for one in item.words)


def test_words_of_beam_search(loaded, waveforms):
    options = {"word_times": True, "max_new_tokens": 4, "num_beams": 2}
    batch = Transcriber(*loaded, **options).transcripts(waveforms[:3])
    for waveform, item in zip(waveforms, batch, strict=False):
        single = Transcriber(*loaded, **options).transcripts([waveform])[0]
        assert [one.start for one in single.words] == pytest.approx([one.start for one in item.words], abs=1e-3)
        assert all(one.llm is None for one in item.words)
    heads = [Transcriber(*loaded, word_times=True, max_new_tokens=4, num_beams=beams) for beams in (1, 2)]
    inputs = loaded[1].apply_transcription_request(waveforms[:3])
    found = []
    for transcriber in heads:
        with transcriber.reader.listening():
            transcriber.generate(inputs)
        found.append([item.log_probabilities for item in transcriber.reader.evidence([1, 1, 1])])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


class TwoSegments(VoiceDetector):
    """Finds speech in two halves of a recording."""

    def __init__(self):
        self.max_seconds = 30.0

    def segments(self, waveform):
        return [(0, len(waveform) // 2), (len(waveform) // 2, len(waveform))]


def test_words_of_segments_have_times_in_the_recording(loaded, waveforms):
    transcriber = Transcriber(*loaded, word_times=True, max_new_tokens=8, vad=TwoSegments())
    item = transcriber.transcripts([waveforms[1]])[0]
    first, second = item.segments
    assert second.words and all(second.start <= one.start <= one.end <= second.end + 0.06 for one in second.words)
    assert [replace(one, spaced=False) for one in item.words] == [
        replace(one, spaced=False) for one in first.words + second.words
    ]


def test_long_recordings_are_encoded_in_windows(loaded, waveforms):
    aligner = Aligner(*loaded)
    long = torch.from_numpy(waveforms[1]).repeat(12).numpy()  # 37 s
    whole = aligner._encode([long])[0]
    windows = aligner.log_probabilities(long)
    assert abs(len(windows) - len(whole)) <= 3
    aligner.window = 60.0
    torch.testing.assert_close(aligner.log_probabilities(long), whole)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-speechllm", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return None


def test_commands(head_model, tiny_model, tiny_corpus, tmp_path, monkeypatch, capsys):
    model = ("--model_name_or_path", head_model)
    files = sorted(tiny_corpus.folder.glob("utt0[0-3].wav"))
    output = tmp_path / "hyp.txt"
    decode = ("decode", *files, "--output_file", output, "--word_times", "--max_new_tokens", 6)
    assert run(monkeypatch, *decode, *model) is None
    shown = capsys.readouterr().out
    assert all(f"{tmp_path}/hyp.{name}" in shown for name in ("txt", "words.jsonl", "ctm", "textgrids", "subtitles"))
    rows = [json.loads(line) for line in (tmp_path / "hyp.words.jsonl").read_text().splitlines()]
    texts = dict(line.split("\t") for line in output.read_text().splitlines())
    assert [row["id"] for row in rows] == list(texts) and (tmp_path / "hyp.subtitles" / "utt00.srt").exists()
    message = run(monkeypatch, *decode, "--overwrite", "--model_name_or_path", tiny_model)
    assert "the model has no CTC head" in message

    output = tmp_path / "aligned.txt"
    align_ = ("align", tiny_corpus.text, "--scp_file", tiny_corpus.scp, "--output_file", output, *model)
    assert run(monkeypatch, *align_) is None
    rows = [json.loads(line) for line in (tmp_path / "aligned.words.jsonl").read_text().splitlines()]
    expected = dict(line.split(maxsplit=1) for line in tiny_corpus.text.read_text().splitlines())
    for row in rows:
        words = expected[row["id"]].split()
        assert [item["word"] for item in row["words"]] == words
        seconds = soundfile.info(tiny_corpus.folder / f"{row['id']}.wav").duration
        assert row["words"][-1]["end"] <= seconds + 0.06
    assert len(rows) == len(expected)
    assert run(monkeypatch, *align_) == 1  # exists
    scp = tmp_path / "wav.scp"
    scp.write_text("utt00 /nowhere.wav\n" + tiny_corpus.scp.read_text().splitlines()[1] + "\n")
    again = run(monkeypatch, "align", tiny_corpus.text, "--scp_file", scp, "--output_file", tmp_path / "b", *model)
    assert "23 failed" in again and "/nowhere.wav" in again
