"""Scoring: counts are compared with compute-wer, statistics with simulations of known results."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import compute_wer
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_speechllm.evaluation import METRIC_FOLDER, ErrorCounts, count_errors, normalize_text
from hf_speechllm.evaluation.hotword_scores import HotwordCounts, count_hotwords
from hf_speechllm.evaluation.scoring import (
    align,
    describe_line,
    metric_of,
    rules_for,
    score_utterances,
    summarize,
    tokenize,
    tokenize_all,
)
from hf_speechllm.evaluation.statistics import compare_systems, rate_interval

ROOT = Path(__file__).resolve().parents[2]
TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)
PHRASES = [
    "turn on",
    "the 空调",
    "三百",
    "二十 people",
    "It's",
    "ありがとう",
    "カタカナ",
    "안녕",
    "groß",
    "Übung",
    "über",
]
PHRASES += ["3.5万", "100%", "$5", "don't", "да", "été", "GROSS", "ﬁne", "你好。", "!", "uh", "seven", "o'clock"]
TEXTS = st.lists(st.sampled_from(PHRASES), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("今天天气很好。", "今天田气好", ErrorCounts(1, 1, 0, 6)),
        ("The colour is red.", "the color is is bed", ErrorCounts(1, 0, 1, 4)),
        ("turn on the 空调", "turn on 空条", ErrorCounts(1, 1, 0, 5)),
        ("三百五十元", "350元", ErrorCounts(0, 0, 0, 4)),
        ("a b", "", ErrorCounts(0, 2, 0, 2)),
        ("", "a b", ErrorCounts(0, 0, 2, 0)),
        ("", "", ErrorCounts()),
    ],
)
def test_characters_and_words_are_counted(reference, hypothesis, counts):
    assert count_errors(reference, hypothesis) == counts


def test_tokens_of_texts_as_they_are_keep_their_case_and_punctuation():
    assert tokenize("Hello, World 你好", normalize=False) == ["Hello", ",", "World", "你", "好"]


def test_counts_add_up_to_the_rate_of_all():
    total = sum([count_errors("a b c", "a x c"), count_errors("d", "")], ErrorCounts())
    assert (total, total.errors, total.rate) == (ErrorCounts(1, 1, 0, 4), 2, 0.5)


def test_rate_of_an_empty_reference_is_finite_and_grows_with_the_insertions():
    assert [count_errors("", text).rate for text in ("", "a", "a b")] == [0.0, 1.0, 2.0]


def edit_distance(left, right):
    row = list(range(len(right) + 1))
    for index, token in enumerate(left, start=1):
        previous, row[0] = row[0], index
        for column, other in enumerate(right, start=1):
            previous, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, previous + (token != other))
    return row[-1]


@given(TOKENS, TOKENS)
def test_errors_are_the_edit_distance_and_the_alignment_shows_them(reference, hypothesis):
    counts = count_errors(" ".join(reference), " ".join(hypothesis))
    assert counts.errors == edit_distance(reference, hypothesis)
    assert counts.reference_tokens + counts.insertions - counts.deletions == len(hypothesis)
    pairs = align(reference, hypothesis)
    operations = [pair.operation for pair in pairs]
    assert counts == ErrorCounts(*map(operations.count, ("replace", "delete", "insert")), len(reference))
    assert [pair.reference for pair in pairs if pair.reference] == reference
    assert [pair.hypothesis for pair in pairs if pair.hypothesis] == hypothesis
    assert all((pair.reference == pair.hypothesis) == (pair.operation == "equal") for pair in pairs)


def as_compute_wer(reference, hypothesis):
    wer = compute_wer.wer(reference, hypothesis, remove_tag=True)
    return ErrorCounts(wer.replace, wer.delete, wer.insert, wer.all)


@given(TEXTS, TEXTS)
@example("groß", "gross")
@settings(max_examples=200, deadline=None)
def test_counts_equal_compute_wer(reference, hypothesis):
    rules = rules_for(reference)
    normalized = normalize_text(reference, rules), normalize_text(hypothesis, rules)
    assert count_errors(reference, hypothesis) == as_compute_wer(*normalized)
    assert count_errors(reference, hypothesis, normalize=False) == as_compute_wer(reference, hypothesis)


def test_combining_marks_that_compute_wer_drops_count():
    assert count_errors("कि", "की") == ErrorCounts(1, 0, 0, 1)
    assert as_compute_wer("कि", "की") == ErrorCounts(0, 0, 0, 1)


@pytest.mark.parametrize("folder", ["kathleen_en/test", "aishell_sample_zh/test", "asterisk_en", "longform"])
def test_real_transcripts_get_the_rate_of_the_compute_wer_command_to_the_last_digit(folder, shared, tmp_path):
    rng = random.Random(0)
    lines = (shared / "data" / folder / "text").read_text(encoding="utf-8").splitlines()
    references = dict(line.split(maxsplit=1) for line in lines)
    hypotheses = {}
    for id_, text in references.items():
        characters = [rng.choice(text) if rng.random() < 0.05 else c for c in text if rng.random() > 0.03]
        hypotheses[id_] = "".join(characters)
    for name, texts in (("ref", references), ("hyp", hypotheses)):
        rows = [f"{id_}\t{normalize_text(text)}\n" for id_, text in texts.items()]
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
    files = [tmp_path / name for name in ("ref", "hyp", "cer.txt")]
    command = Path(sys.executable).with_name("compute-wer")
    subprocess.run([command, *files], check=True, capture_output=True)
    overall = next(line for line in files[2].read_text("utf-8").splitlines() if line.startswith("Overall"))

    score = summarize(score_utterances(references, hypotheses))
    correct = score["reference_tokens"] - score["substitutions"] - score["deletions"]
    assert overall == (
        f"Overall -> {100 * score['rate']:4.2f} % N={score['reference_tokens']} Cor={correct} "
        f"Sub={score['substitutions']} Del={score['deletions']} Ins={score['insertions']}"
    )
    assert 0.05 < score["rate"] < 0.9


@pytest.mark.parametrize(
    ("text", "metric", "language"),
    [
        ("今天天气很好", "CER", "zh"),
        ("三百五十", "CER", "zh"),
        ("turn on the light", "WER", "en"),
        ("Seven!", "WER", "en"),
        ("turn on the 空调", "MER", "zh+en"),
        ("<noise> 你好", "CER", "zh"),
        ("きょうは いい 天気です", "CER", "ja"),
        ("안녕하세요 여러분", "CER", "ko"),
        ("das ist nicht der Hund", "WER", "other"),
        ("สวัสดี", "CER", "other"),
        ("350", "", "none"),
        ("", "", "none"),
    ],
)
def test_metric_and_language_follow_the_script(text, metric, language):
    assert describe_line(tokenize(text), text) == (metric, language)


@pytest.mark.parametrize(
    ("texts", "metric"),
    [
        (["你好", "再见", "110"], "CER"),
        (["hello", "7", ""], "WER"),
        (["7"], "WER"),
        (["你好", "hello"], "MER"),
        (["hello 你好"], "MER"),
    ],
)
def test_metric_of_a_set(texts, metric):
    assert metric_of(score_utterances(dict(zip("abc", texts, strict=False)), {})) == metric


def test_several_processes_return_the_same_tokens():
    # The first chunk takes longest, so that it is the last to be done.
    texts = [f"你好 {index}" * (40 if index < 500 else 1) for index in range(6000)]
    languages = ["en" if index % 2 else "" for index in range(6000)]
    expected = [tokenize(text, language=language) for text, language in zip(texts, languages, strict=True)]
    assert tokenize_all(texts, num_workers=2, languages=languages) == expected


def simulated(rng, rate, num_utterances=200):
    """Returns error counts of utterances of different length and difficulty."""
    tokens = rng.integers(1, 30, num_utterances)
    return rng.binomial(tokens, rate * rng.uniform(0.2, 1.8, num_utterances)), tokens


def test_bootstrap_intervals_contain_the_true_rate_in_95_percent_of_cases():
    rng = np.random.default_rng(0)
    intervals = [rate_interval(*simulated(rng, 0.2), num_resamples=300) for _ in range(300)]
    assert 0.91 < np.mean([low <= 0.2 <= high for low, high in intervals]) < 0.98


def test_bootstrap_interval_equals_drawing_single_utterances():
    rng = np.random.default_rng(1)
    errors, tokens = simulated(rng, 0.1)
    drawn = rng.integers(0, len(tokens), (10_000, len(tokens)))
    expected = np.percentile(errors[drawn].sum(1) / tokens[drawn].sum(1), (2.5, 97.5))
    assert rate_interval(errors, tokens) == pytest.approx(expected, abs=0.001)
    assert rate_interval(errors, tokens, seed=5) == rate_interval(errors, tokens, seed=5)


def test_comparison_finds_better_systems_and_rarely_rejects_equal_ones():
    rng = np.random.default_rng(2)
    p_values, found = [], []
    for _ in range(200):
        difficulty, tokens = simulated(rng, 0.3)
        first, second = rng.binomial(tokens, 0.2), rng.binomial(tokens, 0.2)
        p_values.append(compare_systems(first, second, tokens, num_resamples=300).p_value)
        comparison = compare_systems(rng.binomial(first, 0.7), second, tokens, num_resamples=300)
        found.append(comparison.significant and comparison.difference < 0)
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.08
    assert np.mean(found) > 0.95


def test_comparison_of_few_utterances_is_not_certain():
    comparison = compare_systems([0, 0, 0, 4, 4], [2, 1, 3, 4, 4], [10] * 5)
    assert comparison.difference == pytest.approx(-6 / 50)
    assert (comparison.better, comparison.worse) == (3, 0)
    assert comparison.p_value == pytest.approx(0.25, abs=0.02)  # 2 of 8 choices of signs are as extreme
    assert not comparison.significant


def test_comparison_with_itself_and_in_reverse():
    errors, tokens = simulated(np.random.default_rng(3), 0.2)
    same = compare_systems(errors, errors, tokens)
    assert (same.difference, same.low, same.high, same.p_value, same.significant) == (0, 0, 0, 1, False)
    there, back = compare_systems(errors, errors + 1, tokens), compare_systems(errors + 1, errors, tokens)
    assert (there.difference, there.low) == (-back.difference, -back.high)
    assert there.significant and there.p_value == pytest.approx(1 / 10_001)


def test_hotwords_are_counted_as_runs_of_tokens():
    utterances = score_utterances(
        {
            "a": "Ask Anna Karenina, Anna!",
            "b": "annals of time",
            "c": "打开通义千问",
            "d": "iPhone 15",
            "e": "fly to Zürich",
            "f": "東京駅でガス",
        },
        {
            "a": "ask anna carina",
            "b": "Anna of time",
            "c": "打开通义千问千问",
            "d": "iphone fifteen",
            "e": "fly to Zurich",
            "f": "東京駅でカス",
        },
    )
    words = ["Anna Karenina", "Anna", "通义千问", "千问", "iPhone十五", "Zürich", "東京駅", "ガス", "never", "!"]
    counted = {word.hotword: (word.said, word.written, word.found) for word in count_hotwords(utterances, words)}
    assert counted == {
        "Anna Karenina": (1, 0, 0),
        "Anna": (2, 2, 1),
        "通义千问": (1, 1, 1),
        "千问": (1, 2, 1),
        "iPhone十五": (1, 1, 1),
        "Zürich": (1, 1, 1),
        "東京駅": (1, 1, 1),
        "ガス": (1, 0, 0),
        "never": (0, 0, 0),
    }


def test_hotwords_of_a_row_count_in_that_row_only():
    utterances = score_utterances({"a": "red fox", "b": "red fox"}, {"a": "red fox", "b": "red box"})
    counted = count_hotwords(utterances, ["red"], {"b": ["fox"]})
    assert counted == [HotwordCounts("red", 2, 2, 2), HotwordCounts("fox", 1, 0, 0)]
    assert (counted[1].recall, counted[1].precision) == (0.0, None)


def test_ten_thousand_hotwords_take_seconds():
    words = [f"name{index}" for index in range(10_000)]
    texts = {str(index): f"call name{index} name{index + 1} now please" for index in range(2000)}
    utterances = score_utterances(texts, texts, normalize=False)
    start = time.process_time()
    counted = count_hotwords(utterances, words, normalize=False)
    assert time.process_time() - start < 5
    total = sum(counted, HotwordCounts())
    assert (len(counted), total.said, total.found) == (10_000, 4000, 4000)


EVALUATE = f"""
import evaluate
texts = dict(references=["turn on the 空调", "三百"], predictions=["turn on 空条", "300"])
print(evaluate.load({METRIC_FOLDER!r}).compute(**texts))
print(evaluate.combine({{"ours": {METRIC_FOLDER!r}, "again": {METRIC_FOLDER!r}}}).compute(**texts))
"""


def test_evaluate_loads_and_combines_the_metric_offline(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["http_proxy"] = environment["https_proxy"] = "http://127.0.0.1:9"
    command = [sys.executable, "-c", EVALUATE]
    output = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    expected = dict(mixed_error_rate=0.25, substitutions=1, deletions=1, insertions=0, reference_tokens=8)
    alone, both = map(eval, output.splitlines()[-2:])
    assert alone == expected
    assert both == {f"{name}_{key}": value for name in ("ours", "again") for key, value in expected.items()}


def test_metric_and_page_are_shipped(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path / "hf_speechllm" / "evaluation"
    assert (folder / "mixed_error_rate" / "mixed_error_rate.py").is_file()
    assert (folder / "report.html").is_file()
