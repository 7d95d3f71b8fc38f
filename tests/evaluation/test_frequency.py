"""Errors by training frequency, counted by hand and compared with the totals of the score."""

import random

import pytest

from hf_speechllm.evaluation.frequency import RANGES, count_occurrences, describe, summarize
from hf_speechllm.evaluation.scoring import score_set, score_utterances, tokenize_all

TEXTS = {
    "en": ["Mr. Smith paid $20, twenty-one at most.", "It's the colour of café walls", "we won't go"],
    "zh": ["今天天氣很好。", "一共三百五十塊", "打開燈 50%"],
    "mixed": ["打开 the radio 吧", "我買了 iPhone 十五", "naïve groß STRASSE"],
}


def by_frequency(references, hypotheses, training, normalize=True, languages=None):
    """Scores texts; returns the score and the errors by training frequency."""
    utterances = score_utterances(references, hypotheses, normalize, languages)
    occurrences, _ = count_occurrences(training, {utterance.rules for utterance in utterances}, normalize)
    return score_set(utterances, 100), summarize(utterances, occurrences)


def damaged(text, rng):
    """Returns a text with some substituted, deleted and inserted words or characters."""
    parts = [part for word in text.split() for part in (word if ord(word[0]) > 0x2000 else [f" {word} "])]
    return "".join(rng.choice([part, part, "", " x ", part + " y "]) for part in parts)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", [*TEXTS, "all"])
def test_ranges_add_up_to_the_totals_of_the_score(kind, normalize):
    rng = random.Random(kind)
    texts = sum(TEXTS.values(), []) if kind == "all" else TEXTS[kind]
    references = {str(index): rng.choice(texts) for index in range(60)}
    hypotheses = {id_: damaged(text, rng) for id_, text in references.items()}
    training = [damaged(rng.choice(texts), rng) for _ in range(40)]
    score, found = by_frequency(references, hypotheses, training, normalize)
    assert list(found["ranges"]) == list(RANGES) and score["insertions"] and score["deletions"]
    for name in ("reference_tokens", "substitutions", "deletions"):
        assert sum(row[name] for row in found["ranges"].values()) == score[name]
    errors = score["substitutions"] + score["deletions"] + score["insertions"]
    shares = sum(row["share_of_errors"] for row in found["ranges"].values())
    assert shares + score["insertions"] / errors == pytest.approx(1)


def test_each_token_is_in_the_range_of_its_occurrences():
    words, numbers = "ant bee cat dog eel fox gnu hen owl pig", (0, 1, 5, 6, 20, 21, 100, 101, 1000, 1001)
    training = [word for word, number in zip(words.split(), numbers, strict=True) for _ in range(number)]
    _, found = by_frequency({"a": words}, {"a": "ant bees cat dogs eel gnu hens owl pig"}, training)
    assert [row["reference_tokens"] for row in found["ranges"].values()] == [1, 2, 2, 2, 2, 1]
    assert [row["rate"] for row in found["ranges"].values()] == [0, 0.5, 0.5, 0.5, 0.5, 0]
    assert found["unseen_words"] == []


def test_training_on_the_references_leaves_no_unseen_words():
    """Transcripts are normalised as references, also if a list of languages decides the rules of the references."""
    texts = [text for group in TEXTS.values() for text in group] + ["Schöne Grüße, Mr. Maier", "fünf € 12,50"]
    references = {str(index): text for index, text in enumerate(texts)}
    for languages in ({}, dict.fromkeys(references, "de"), dict.fromkeys(references, "ja")):
        _, found = by_frequency(references, {}, texts, languages=languages)
        assert found["ranges"]["0"]["reference_tokens"] == 0 and found["unseen_words"] == []
    _, found = by_frequency(references, {}, [text.upper() for text in texts], normalize=False)
    assert found["ranges"]["0"]["reference_tokens"] == 0


def test_spellings_of_a_word_are_one_word():
    references = {"a": "Mister Smith's colour is 20 %", "b": "一共三百五十块"}
    _, found = by_frequency(references, {}, ["mr. smith's color is twenty percent", "一共350塊"])
    assert found["unseen_words"] == []


def test_unseen_words_are_wrong_words_with_most_errors_first():
    references = {"a": "zebra yak yak okapi", "b": "yak zebra ibex, zebra!", "c": "5 % of gnus"}
    hypotheses = {"a": "cobra yak okapi", "b": "yak cobra ibex cobra", "c": "of news"}
    _, found = by_frequency(references, hypotheses, ["of 7"])
    assert [tuple(word.values()) for word in found["unseen_words"]] == [
        ("zebra", 3, 3), ("yak", 1, 3), ("5", 1, 1), ("gnus", 1, 1),
    ]  # fmt: skip
    _, found = by_frequency({"a": "Zebra zebra , okay"}, {"a": "x x y"}, ["z"], normalize=False)
    assert [tuple(word.values()) for word in found["unseen_words"]] == [("Zebra", 2, 2), ("okay", 1, 1)]


def test_repeated_transcripts_are_normalised_once(monkeypatch):
    calls = []
    monkeypatch.setattr("hf_speechllm.evaluation.frequency.BATCH", 4)
    monkeypatch.setattr(
        "hf_speechllm.evaluation.frequency.tokenize_all",
        lambda texts, *options: calls.append(list(texts)) or tokenize_all(texts, *options),
    )
    occurrences, total = count_occurrences(iter(["a b", "a", "a b", "a b", "b"]), ["en"])
    assert (occurrences, total) == ({"en": {"A": 4, "B": 4}}, 5)
    assert calls == [["a b", "a"], ["b"]]


@pytest.mark.parametrize(
    ("references", "hypotheses", "training", "lines", "advice"),
    [
        (
            {"a": "zebra yak ibex of"},
            {"a": "cobra yuck"},
            ["yak"] + 6 * ["of"],
            ["words    wrong  of all errors", "    2  100.0 %         50.0 %", "    1  100.0 %         25.0 %"],
            "3 of 4 errors are words with at most 5 occurrences in training, 2 of them with none; add recordings or "
            "synthetic speech with the words in DIR/unseen_words.txt",
        ),
        (
            {"a": "今天"},
            {"a": "今田"},
            ["今天"],
            [
                "characters    wrong  of all errors",
                "         0        -          0.0 %",
                "         2   50.0 %        100.0 %",
            ],
            "1 of 1 errors are characters with at most 5 occurrences in training",
        ),
    ],
)  # fmt: skip
def test_console_shows_a_table_and_what_to_do(references, hypotheses, training, lines, advice):
    score, found = by_frequency(references, hypotheses, training)
    shown = describe(score | {"training_frequency": found}, "DIR/unseen_words.txt")
    assert list(shown) == ["in training", *(f"{name} times" for name in RANGES), "inserted", "rare"]
    assert list(shown.values())[:3] == lines and shown["rare"] == advice
