"""Hotwords of training rows: own hotwords stay, distractors are not spoken, dropout, and seeds."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.data.augmentation import augmentations
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.hotword_lists import (
    MINED_ROWS,
    HotwordSampler,
    contains_word,
    hotword_sampler,
    mine_words,
    parse_word_list,
    phrases,
    read_words,
)
from hf_speechllm.data.options import DataOptions
from hf_speechllm.model import chat

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "finetune.py"
NAMES = [f"Name{number}" for number in range(50)]
SEEDS = [(0, number) for number in range(400)]


@pytest.fixture
def make_options(tmp_path):
    """Returns data options."""
    return lambda **options: DataOptions(cache_dir=str(tmp_path / "cache"), preprocessing_num_workers=1, **options)


@pytest.fixture
def write_list(tmp_path):
    """Writes a list of words and returns its path."""

    def write(text, encoding="utf-8"):
        path = tmp_path / "words.txt"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


def dataset(*rows):
    """Builds rows from (answer, hotwords) pairs."""
    return Dataset.from_list(
        [
            {"messages": json.dumps(chat.transcription_messages("a.wav", "x", answer)), "hotwords": hotwords}
            for answer, hotwords in rows
        ]
    )


def test_own_hotwords_and_distractors_are_in_random_order():
    sampler = HotwordSampler(distractors=NAMES, num_distractors=5)
    drawn = [sampler(["Ann", "Bob"], ["Ann met Bob"], seed) for seed in SEEDS]
    assert all({"Ann", "Bob"} <= set(words) and len(words) == len(set(words)) for words in drawn)
    assert {len(words) - 2 for words in drawn} == set(range(6))
    assert {words.index("Ann") for words in drawn} == set(range(7))
    assert {word for words in drawn for word in words} == {"Ann", "Bob", *NAMES}


def test_no_distractor_is_spoken():
    sampler = HotwordSampler(distractors=["art", "Name1", "北京", "ann"], num_distractors=4)
    drawn = {word for seed in SEEDS for word in sampler(["Ann"], ["Ann's party in NAME1, 在北京"], seed)}
    assert drawn == {"Ann", "art"}


def test_an_option_gives_the_words_of_a_file_or_the_words_themselves(write_list, tmp_path):
    assert parse_word_list(write_list("Ann\nBob\nAnn\n")) == ["Ann", "Bob"]
    assert parse_word_list("Ann,Bob，Ann") == ["Ann", "Bob"]
    assert parse_word_list("words.txt,Ann") == ["words.txt", "Ann"]
    assert parse_word_list(None) == parse_word_list("") == []
    assert parse_word_list("a" * 10_000) == ["a" * 10_000]
    for name in ("none.txt", "none.list"):
        with pytest.raises(ValueError, match="no such file"):
            parse_word_list(str(tmp_path / name))


def test_dropout_removes_all_hotwords_of_a_share_of_rows():
    sampler = HotwordSampler(distractors=NAMES, num_distractors=5, dropout=0.3)
    empty = [not sampler(["Ann"], ["Ann"], seed) for seed in SEEDS]
    assert np.mean(empty) == pytest.approx(0.3, abs=0.07)
    assert sum(len(HotwordSampler(dropout=1.0)(["Ann"], ["Ann"], seed)) for seed in SEEDS) == 0


def test_rows_without_hotwords_get_a_phrase_of_their_own_transcript():
    sampler = HotwordSampler(distractors=NAMES, num_distractors=2, from_text=0.5)
    text = "Phil Steele came, then Gregson left"
    drawn = [[word for word in sampler([], [text], seed) if word not in NAMES] for seed in SEEDS]
    assert np.mean([len(words) for words in drawn]) == pytest.approx(0.5, abs=0.08)
    found = {word for words in drawn for word in words}
    assert found == set(phrases(text))
    # Nothing is added to a row with hotwords, or to a transcript without a phrase.
    assert HotwordSampler(from_text=1.0)(["Phil"], [text], (0, 1)) == ["Phil"]
    assert HotwordSampler(from_text=1.0)([], ["of"], (0, 1)) == []


def test_phrases_are_short_and_contain_no_punctuation():
    assert phrases("I met Phil. Go on") == ["I met", "I met Phil", "met Phil", "Phil", "Go on"]
    assert "don't know" in phrases("I don't know") and max(phrases("a b c d e f"), key=len) == "a b c d"
    assert phrases("去北京，好") == ["去北", "去北京", "北京"]
    assert phrases("听Let it") == ["听Let", "听Let it", "Let it"]
    assert phrases("आप कैसे हैं।") == ["आप कैसे", "आप कैसे हैं", "कैसे", "कैसे हैं"]  # vowel signs are parts of words
    assert phrases("4 5") == phrases("") == []


def test_parse_word_list_are_hotwords_of_rows_that_contain_them_and_distractors_of_others():
    words = ["Gregson", "art", "北京"]
    sampler = HotwordSampler(known=words, distractors=words, num_distractors=0)
    assert set(sampler([], ["In 北京, GREGSON's party"], (0, 1))) == {"Gregson", "北京"}
    assert sampler(["party"], ["In 北京, Gregson's party"], (0, 1)) == ["party"]
    sampler = HotwordSampler(known=words, distractors=words, num_distractors=3)
    assert {word for seed in SEEDS for word in sampler([], ["Nobody"], seed)} == set(words)


@pytest.mark.parametrize(
    ("text", "word", "said"),
    [("a party", "art", False), ("art!", "art", True), ("c++ code", "c++", True), ("在北京市", "北京", True),
     ("看art展", "art", True), ("a.i. lab", "a.i.", True), ("code", "art", False), ("smart art", "art", True),
     ("काम की", "का", False), ("काम की", "की", True)],
)  # fmt: skip
def test_only_whole_words_are_contained(text, word, said):
    assert contains_word(text, word) is said


def test_hotwords_depend_only_on_the_seed_of_the_row():
    sampler = HotwordSampler(NAMES[:3], NAMES, 5, 0.2, 0.5)
    drawn = [sampler([], ["Some words are here"], seed) for seed in SEEDS]
    copy = pickle.loads(pickle.dumps(sampler))  # as in a worker process
    assert [copy([], ["Some words are here"], seed) for seed in reversed(SEEDS)] == drawn[::-1]
    assert len({tuple(words) for words in drawn}) > 200
    assert [sampler([], ["Some words are here"], (1, number)) for _, number in SEEDS] != drawn


def test_prompts_of_batches_contain_hotwords_as_in_decoding(make_options, tiny_corpus, processor):
    rows = prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, make_options())[0]
    rows = [{**rows[number], "hotwords": ["Ann"], "seed": (0, number)} for number in range(8)]
    augment = augmentations(tempo_perturb=0.1, spec_augment=True)
    plain = SpeechLLMCollator(processor, augment)(rows)
    sampler = HotwordSampler(distractors=NAMES, num_distractors=3)
    batch = SpeechLLMCollator(processor, augment, hotwords=sampler)(rows)
    assert torch.equal(batch["input_features"], plain["input_features"])
    for number, row in enumerate(rows):
        answer = json.loads(row["messages"])[-1]["content"]
        words = sampler(["Ann"], [answer], row["seed"])
        text = processor.tokenizer.decode(batch["input_ids"][number])
        assert chat.hotword_context(words) in text
        labels = batch["labels"][number]
        assert labels[labels != -100].tolist() == plain["labels"][number][plain["labels"][number] != -100].tolist()


def test_rows_keep_their_own_hotwords_by_default(make_options, processor):
    options = make_options()
    assert hotword_sampler(options, dataset(("one two", ["one"]))) is None
    assert SpeechLLMCollator(processor).hotwords is None


def test_default_distractors_are_hotwords_and_phrases_of_other_rows(make_options, write_list):
    rows = dataset(("Jane came", ["Phil"]), ("Gregson left", []), ("of", None))
    options = make_options(hotword_distractors=3)
    assert hotword_sampler(options, rows) == HotwordSampler([], ["Phil"], 3)
    options = make_options(hotword_distractors=3, hotwords_from_text=0.5, hotword_dropout=0.1)
    sampler = hotword_sampler(options, rows)
    assert (sampler.num_distractors, sampler.dropout, sampler.from_text) == (3, 0.1, 0.5)
    first, second, third = sampler.distractors
    assert first == "Phil" and second in phrases("Jane came") and third in phrases("Gregson left")
    assert hotword_sampler(options, rows) == sampler  # the same on every rank
    options = make_options(hotword_distractors=3, hotword_file=write_list("\ufeffAnn\n\n Bob \nAnn\n"))
    assert hotword_sampler(options, rows) == HotwordSampler(["Ann", "Bob"], ["Ann", "Bob"], 3)
    with pytest.raises(ValueError, match='no row has "hotwords"; give --hotword_file'):
        hotword_sampler(make_options(hotword_distractors=1), dataset(("one two", [])))


def test_phrases_of_a_large_corpus_come_from_evenly_spaced_rows():
    rows = dataset(*[(f"word{number}", []) for number in range(MINED_ROWS + 5000)])
    words = mine_words(rows, with_phrases=True, seed=0)
    assert len(words) == MINED_ROWS
    assert words[-1] == f"word{MINED_ROWS + 4999}" and words[0] == "word0"


def test_unusable_lists_are_errors(make_options, write_list):
    with pytest.raises(ValueError, match="words.txt: not UTF-8; save the list as UTF-8"):
        read_words(write_list("北京\n", "gb18030"))
    with pytest.raises(ValueError, match=r"words.*: a hotword contains <\|im_end\|>"):
        read_words(write_list("北京\n上海<|im_end|>\n", "utf-8"))
    with pytest.raises(ValueError, match="words.txt: no words; write one word per line"):
        hotword_sampler(make_options(hotword_file=write_list("\n \n")), None)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        hotword_sampler(make_options(hotword_file="nowhere.txt"), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hotword_distractors", "-1"], "--hotword_distractors is -1; it must be at least 0"),
        (["--hotword_dropout", "1.5"], "--hotword_dropout is 1.5; it must be between 0 and 1"),
        (["--hotwords_from_text", "-0.1"], "--hotwords_from_text is -0.1; it must be between 0 and 1"),
        (["--hotword_distractors", "5", "--streaming", "true", "--max_steps", "3"], "give --hotword_file"),
    ],
)
def test_impossible_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--model_name_or_path", "model", "--train_file", "a.jsonl", "--use_cpu", "true", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_training_samples_and_validation_does_not(
    tiny_model, tiny_corpus, write_list, tmp_path, monkeypatch, streaming
):
    class Caught(Exception):
        pass

    def catch(**options):
        raise Caught(options)

    monkeypatch.setattr("hf_speechllm.training.trainer.SpeechLLMTrainer", catch)
    options = ["--streaming", "true", "--max_steps", "2"] if streaming else []
    argv = ["--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir", tmp_path / "run",
            "--cache_dir", tmp_path / "cache", "--hotword_file", write_list("Ann\nBob\n"), "--hotword_distractors", 2,
            "--preprocessing_num_workers", 1, "--use_cpu", "true", *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, argv)])
    with pytest.raises(Caught) as caught:
        runpy.run_path(str(RECIPE), run_name="__main__")
    (options,) = caught.value.args
    expected = HotwordSampler(["Ann", "Bob"], ["Ann", "Bob"], 2)
    assert options["data_collator"].hotwords == expected
    assert options["eval_collator"].hotwords is None
    if streaming:
        batch, _ = next(iter(options["train_dataset"]))
        texts = options["processing_class"].tokenizer.batch_decode(batch["input_ids"])
        assert any(chat.hotword_context(words) in text for text in texts for words in (["Ann"], ["Bob"]))
