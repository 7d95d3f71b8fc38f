import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_speechllm.files import file_digest, record_path
from hf_speechllm.model.chat import transcription_messages, transcription_prompt

REFERENCES = {"a": "今天天气很好。", "b": "Turn on the light!", "c": "打开 radio", "d": "350"}
HYPOTHESES = {"d": "三百五十", "b": "turn the light", "a": "今天田气很好", "c": "打开 radio 吧"}


@pytest.fixture
def write(tmp_path):
    """Writes lists: `write(name, {ID: text})` returns the path."""

    def make(name, texts, separator=" "):
        path = tmp_path / name
        path.write_text("".join(f"{id_}{separator}{text}\n" for id_, text in texts.items()), encoding="utf-8")
        return path

    return make


@pytest.fixture
def score(write, run_recipe, tmp_path):
    """Scores texts with options; returns the content of score.json, or the error message of the recipe."""

    def run(references, hypotheses, *options):
        files = [
            texts if isinstance(texts, Path) else write(name, texts, separator)
            for name, texts, separator in (("ref", references, " "), ("hyp", hypotheses, "\t"))
        ]
        failure = run_recipe("score.py", *files, "--output_dir", tmp_path / "out", *options)
        return failure or json.loads((tmp_path / "out" / "score.json").read_text(encoding="utf-8"))

    return run


def test_three_files_are_written(score, tmp_path):
    result = score(REFERENCES, HYPOTHESES)
    assert [result[key] for key in ("metric", "substitutions", "deletions", "insertions")] == ["MER", 1, 1, 1]
    assert result["rate"] == 3 / 16
    low, high = result["interval_95"]
    assert 0 <= low < result["rate"] < high
    assert {name: part["metric"] for name, part in result["languages"].items()} == {
        "zh": "CER",
        "en": "WER",
        "zh+en": "MER",
        "none": "WER",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cer.txt", "report.html", "score.json"]
    tail = (tmp_path / "out" / "cer.txt").read_text(encoding="utf-8").splitlines()[-7:]
    assert tail == [
        "=" * 75,
        "Overall -> 18.75 % N=16 Cor=14 Sub=1 Del=1 Ins=1",
        "Chinese -> 25.00 % N=8 Cor=7 Sub=1 Del=0 Ins=1",
        "English -> 20.00 % N=5 Cor=4 Sub=0 Del=1 Ins=0",
        "Number -> 0.00 % N=3 Cor=3 Sub=0 Del=0 Ins=0",
        "SER -> 75.00 % N=4 Cor=1 Err=3 ML=0 MH=0",
        "=" * 75,
    ]


def test_different_ids_are_listed_and_missing_hypotheses_are_deletions(score, tmp_path, caplog):
    result = score({"a": "one two", "b": "three four five", "c": "six"}, {"a": "one two", "x": "six"})
    assert (result["deletions"], result["reference_tokens"], result["insertions"]) == (4, 6, 0)
    assert (result["missing_hypotheses"], result["extra_hypotheses"]) == (["b", "c"], ["x"])
    assert "without a hypothesis, counted as deletions: 2: b, c" in caplog.text
    assert "without a reference, not scored: 1: x" in caplog.text
    assert "ML=1 MH=2" in (tmp_path / "out" / "cer.txt").read_text(encoding="utf-8")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<code dir="auto">b</code>' in page and '<code dir="auto">x</code>' in page


@pytest.mark.parametrize("hypotheses", [{"a": ""}, {"a": "", "b": ""}, {"a": "", "x": "one"}])
def test_no_recognised_word_at_all_is_an_error_rate_of_one(score, hypotheses):
    result = score({"a": "one two", "b": "three"}, hypotheses)
    assert (result["rate"], result["deletions"], result["empty_hypotheses"]) == (1.0, 3, ["a", "b"])


@pytest.mark.parametrize("hypotheses", [{}, {"x": "one"}])
def test_lists_without_a_common_id_are_an_error(score, hypotheses):
    error = score({"a": "one two", "b": "three"}, hypotheses)
    assert isinstance(error, str) and "hyp" in error


def test_words_in_silence_are_insertions(score, caplog):
    result = score({"a": "", "b": "one two"}, {"a": "thank you", "b": "one two"})
    assert (result["rate"], result["insertions"], result["empty_references"]) == (1.0, 2, ["a"])
    assert "empty references, for which every word is an insertion: 1: a" in caplog.text


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        ("a 好\nb 坏".encode() + "坏\n".encode("gb18030"), 2, "not UTF-8"),
        ("a 好\n".encode("utf-16"), 1, "not UTF-8"),
        ("a good\n".encode("utf-16-le"), 1, "UTF-16"),
        (b"a one\nb two\na one\n", 3, 'duplicate ID: "a" is in line 1'),
    ],
)
@pytest.mark.parametrize("which", ["reference", "hypothesis"])
def test_bad_lists_are_errors_that_name_file_and_line(score, tmp_path, which, content, place, words):
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    message = score(bad, {"a": "one"}) if which == "reference" else score({"a": "one"}, bad)
    assert f"{bad}:{place}: " in message and words in message
    assert not (tmp_path / "out").exists()


def test_no_references_are_an_error(score, tmp_path):
    assert f"{tmp_path / 'ref'}: no transcripts" in score({}, {"a": "one"})


def test_byte_order_mark_and_windows_line_ends_are_ignored(score, tmp_path):
    path = tmp_path / "windows"
    path.write_bytes("\ufeffa\tone\r\n\r\nb two\r\n".encode())
    assert score(path, {"a": "one", "b": "two"}, "--no_normalize")["rate"] == 0


def test_results_are_replaced_only_with_overwrite(score, capsys):
    first = score({"a": "one"}, {"a": "two"})
    assert score({"a": "one"}, {"a": "one"}) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (first["rate"], score({"a": "one"}, {"a": "one"}, "--overwrite")["rate"]) == (1.0, 0.0)


def test_without_normalisation_spelling_and_punctuation_count(score):
    texts = {"a": "Twenty, please"}, {"a": "20 please"}
    assert score(*texts)["rate"] == 0
    result = score(*texts, "--no_normalize", "--overwrite")
    assert (result["substitutions"], result["deletions"], result["reference_tokens"]) == (1, 1, 3)


def test_comparison_with_a_second_file(score, write, tmp_path, capsys):
    references = {str(index): "red green blue grey" for index in range(30)}
    good = {id_: "red green blue grey" for id_ in references}
    bad = {id_: "red green blue" if int(id_) % 3 else "red" for id_ in references}
    comparison = score(references, good, "--compare", write("other", bad))["comparison"]
    assert comparison["difference"] == -comparison["rate"] == pytest.approx(-50 / 120)
    assert comparison["low"] < comparison["difference"] < comparison["high"] < 0
    assert comparison["p_value"] < 0.001 and (comparison["better"], comparison["worse"]) == (30, 0)
    assert "compared  -41.67 points (95 %:" in capsys.readouterr().out
    assert "Fewer errors" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_data_sets_and_languages_are_scored_separately(score, write, caplog):
    datasets = write("utt2dataset", {"a": "home", "b": "street", "c": "home"})
    languages = write("utt2lang", {"b": "fr"})
    result = score(REFERENCES, HYPOTHESES, "--utt2dataset", datasets, "--utt2lang", languages)
    assert {name: part["utterances"] for name, part in result["datasets"].items()} == {"": 1, "home": 2, "street": 1}
    assert set(result["languages"]) == {"zh", "fr", "zh+en", "none"}
    assert f"IDs not in {datasets}: 1: d" in caplog.text


@pytest.mark.parametrize("as_file", [True, False])
def test_hotwords(score, tmp_path, as_file):
    hotwords = "Zürich,通义"
    if as_file:
        path = tmp_path / "hotwords.txt"
        path.write_text(hotwords.replace(",", "\n\n"), encoding="utf-8")
        hotwords = path
    texts = {"a": "from Zürich to 通义", "b": "Zürich"}, {"a": "from zurich to 通一", "b": "Zürich 通义"}
    result = score(*texts, "--hotwords", hotwords)["hotwords"]
    assert (result["said"], result["written"], result["found"]) == (3, 3, 2)
    assert (result["recall"], result["precision"]) == (2 / 3, 2 / 3)


def test_missing_list_of_hotwords_is_an_error(score):
    assert "words.txt: no such file" in score({"a": "one"}, {"a": "one"}, "--hotwords", "words.txt")


@pytest.fixture
def training(tmp_path, make_wav):
    """Writes the same rows as JSONL, as a tar file and as a Kaldi folder; returns the paths by kind."""
    texts = {"one": "the zebra sleeps", "two": "The yak sleeps!"}
    turns = [*transcription_messages("one.wav", "Write:", "the zebra sleeps"),
             *transcription_messages("two.wav", "Write:", "The yak sleeps!")[1:]]  # fmt: skip
    paths = {"jsonl": tmp_path / "r&d.jsonl", "tar": tmp_path / "shard-*.tar", "kaldi": tmp_path / "kaldi"}
    paths["jsonl"].write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    paths["kaldi"].mkdir()
    for index, (id_, text) in enumerate(texts.items()):
        with tarfile.open(tmp_path / f"shard-{index}.tar", "w") as tar:
            for suffix, content in (("wav", b"not decoded"), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{id_}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    lists = {"text": texts, "wav.scp": {id_: f"{id_}.wav" for id_ in texts}}
    for name, values in lists.items():
        lines = "".join(f"{id_} {value}\n" for id_, value in values.items())
        (paths["kaldi"] / name).write_text(lines, encoding="utf-8")
    return paths


@pytest.mark.parametrize("kind", ["jsonl", "tar", "kaldi"])
def test_errors_by_training_frequency(score, training, tmp_path, capsys, kind):
    references = {"a": "The zebra sleeps.", "b": "the ibex and the okapi sleep, ibex!"}
    hypotheses = {"a": "the cobra sleeps", "b": "the eye and okay the sleep"}
    result = score(references, hypotheses, "--train_file", training[kind])
    found = result["training_frequency"]
    assert (found["files"], found["texts"], found["bad_rows"]) == ([str(training[kind])], 2, 0)
    assert found["ranges"]["1-5"] == {
        "reference_tokens": 5, "substitutions": 1, "deletions": 0, "rate": 0.2, "share_of_errors": 0.2,
    }  # fmt: skip
    assert found["ranges"]["0"] | {"share_of_errors": 0} == {
        "reference_tokens": 5, "substitutions": 1, "deletions": 2, "rate": 0.6, "share_of_errors": 0,
    }  # fmt: skip
    assert found["unseen_words"][0] == {"word": "ibex", "errors": 2, "reference_tokens": 2}
    file = tmp_path / "out" / "unseen_words.txt"
    assert file.read_text(encoding="utf-8") == "ibex\nokapi\n"
    out = capsys.readouterr().out
    assert re.search(
        r"^in training +words +wrong +of all errors\n0 times +5 +60\.0 % +60\.0 %\n1-5 times +5 ", out, re.M
    )
    assert re.search(
        rf"^rare +4 of 5 errors are words .* 3 of them with none; .* words in {re.escape(str(file))}$", out, re.M
    )
    assert out.rstrip().endswith(str(file))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Errors by training frequency" in page and "ibex" in page and ("r&amp;d.jsonl" in page) == (kind == "jsonl")


def test_parts_and_other_hypotheses_have_their_errors_by_training_frequency(score, write, training, tmp_path):
    datasets = write("utt2dataset", {"a": "zoo", "b": "park"})
    references = {"a": "zebra ibex", "b": "zebra"}
    result = score(
        references, {"a": "zebra", "b": "cobra"}, "--train_file", training["jsonl"], "--utt2dataset", datasets,
        "--compare", write("other", {"a": "ibex", "b": "zebra"}),
    )  # fmt: skip
    parts = [result, *result["datasets"].values(), result["comparison"]]
    rates = [[part["training_frequency"]["ranges"][name]["rate"] for name in ("0", "1-5")] for part in parts]
    assert rates == [[1, 0.5], [None, 1], [1, 0], [0, 0.5]]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<table class="ranges">') == 3 and page.count("<th>wrong before</th>") == 1


def test_nothing_about_training_without_training_files(score, tmp_path, capsys):
    result = score(REFERENCES, HYPOTHESES)
    assert "training_frequency" not in json.dumps(result) and "in training" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "unseen_words.txt").exists()
    assert 'id="frequency"' not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_bad_training_rows_are_skipped_with_one_warning(score, training, tmp_path, caplog):
    with open(training["jsonl"], "a", encoding="utf-8") as file:
        file.write('{"messages": 1}\n{\n')
    found = score({"a": "zebra"}, {"a": "zebra"}, "--train_file", training["jsonl"])["training_frequency"]
    assert (found["texts"], found["bad_rows"]) == (2, 2)
    (warning,) = [record.getMessage() for record in caplog.records if "bad rows" in record.getMessage()]
    assert f"2 bad rows are skipped, for example {training['jsonl']}:2: " in warning and "\n" not in warning

    training["jsonl"].write_text("{\n", encoding="utf-8")
    options = ("--overwrite", "--train_file", training["jsonl"])
    assert f"no row is usable, for example {training['jsonl']}:1: not JSON" in score({"a": "a"}, {"a": "a"}, *options)
    assert "no.jsonl: no such file" in score({"a": "a"}, {"a": "a"}, "--overwrite", "--train_file", "no.jsonl")


def test_report_lists_unusable_recordings(score, write, make_wav, tmp_path, caplog):
    soundfile.write(tmp_path / "hour.flac", np.zeros(3600 * 8000, dtype=np.int16), 8000)
    (tmp_path / "empty.wav").write_bytes(b"")
    sources = {"surround": make_wav("six.wav", rate=44100, channels=6), "hour": "hour.flac", "empty": "empty.wav"}
    texts = dict.fromkeys(sources, "red green")
    result = score(texts, dict.fromkeys(sources, "red"), "--scp_file", write("wav.scp", sources))
    assert result["rate"] == 0.5
    assert "empty.wav: the file is empty" in caplog.text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 2 and "first 120 s of 3600 s" in page
    assert "3600.0 s" in page and "the file is empty" in page


def test_ten_thousand_hotwords(score, tmp_path):
    hotwords = tmp_path / "hotwords.txt"
    hotwords.write_text("".join(f"通{index}\n" for index in range(10_000)), encoding="utf-8")
    texts = {str(index): f"打开通{index}吧" for index in range(100)}
    result = score(texts, texts, "--hotwords", hotwords)["hotwords"]
    assert (result["hotwords"], result["recall"], result["precision"]) == (10_000, 1.0, 1.0)
    assert result["said"] == 190  # 通10 contains 通1


def test_training_rows_as_references_provide_recordings_and_hotwords(score, make_wav, tmp_path):
    rows = []
    for name, answer, words in (("a", "call Anna", ["Anna"]), ("b", "call Bob", ["Bob"])):
        messages = transcription_messages(str(make_wav(f"{name}.wav")), transcription_prompt(), answer)
        rows.append({"messages": messages, "hotwords": words})
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = score(path, {"a": "call Anna", "b": "call Rob"})
    assert (result["substitutions"], result["hotwords"]["recall"]) == (1, 0.5)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 1 and "<svg" in page


def test_recordings_add_a_chart_and_players_for_the_worst_utterances(score, write, make_wav, tmp_path, caplog):
    sources = {name: make_wav(f"{name}.wav", seconds=1 + index) for index, name in enumerate("abc")}
    scp = write("wav.scp", {**sources, "d": "missing.wav"})
    score(REFERENCES, HYPOTHESES, "--scp_file", scp, "--num_worst", 2)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 2 and page.count("<article") == 2 and page.count("<svg") == 1
    assert "unreadable recordings: 1" in caplog.text and "missing.wav" in caplog.text

    durations = write("utt2dur", {"a": "2.5", "b": "3"})
    score(REFERENCES, HYPOTHESES, "--scp_file", scp, "--no_audio", "--utt2dur", durations, "--overwrite")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 0 and page.count("<svg") == 1


@pytest.mark.parametrize("value", ["", "long", "-1", "0", "nan"])
def test_durations_must_be_seconds(score, write, value):
    durations = write("utt2dur", {"a": value})
    message = score(REFERENCES, HYPOTHESES, "--utt2dur", durations)
    assert str(durations) in message and '"a" has no' in message


def test_record_of_other_texts_is_left_out(score, write, caplog):
    hypotheses = write("hyp", HYPOTHESES, "\t")
    record = {"sha256": file_digest(hypotheses), "settings": {"weights": "w"}}
    record_path(hypotheses).write_text(json.dumps(record), encoding="utf-8")
    assert score(REFERENCES, hypotheses)["decoding"] == record
    record_path(hypotheses).write_text(json.dumps(record | {"sha256": "0"}), encoding="utf-8")
    assert score(REFERENCES, hypotheses, "--overwrite", "--compare", hypotheses)["decoding"] is None
    assert "hyp.decoding.json is about other texts" in caplog.text


def test_ids_with_spaces_are_read_from_decoding_output(score, write):
    references = write("ref", {"meeting 1": "one two", "meeting 2": "five"}, "\t")
    result = score(references, {"meeting 1": "one two", "meeting 2": ""})
    assert (result["deletions"], result["reference_tokens"], result["empty_hypotheses"]) == (1, 3, ["meeting 2"])


def test_ids_with_unicode_spaces_are_read_back(decode_rows, run_recipe, tmp_path):
    """Scoring and normalising find the IDs that decoding writes for a JSONL, with spaces at both ends of the name."""
    names = [
        "\ufeffmark",
        " before",
        "behind ",
        "a b",
        "no\u00a0break",
        "line\u2028end",
        "wide\u3000",
        "v\x0bt",
        "n\x85",
    ]
    jsonl, output = decode_rows([*names, "tab\there", "line\nend", " "])
    assert len(output.read_text(encoding="utf-8").split("\n")) == len(names) + 1
    assert run_recipe("score.py", jsonl, output, "--output_dir", tmp_path / "score", "--num_resamples", 100) is None
    result = json.loads((tmp_path / "score" / "score.json").read_text(encoding="utf-8"))
    assert result["extra_hypotheses"] == []
    assert result["missing_hypotheses"] == ["tab\there", "line\nend", ""]
    assert run_recipe("whisper_mix_normalize.py", output, tmp_path / "normalized") == 0
    ids = [line.split("\t")[0] for line in (tmp_path / "normalized").read_text(encoding="utf-8").split("\n")[:-1]]
    assert ids == [name.strip(" \ufeff") for name in names]


@pytest.fixture
def decode_rows(make_wav, run_recipe, tiny_model, tmp_path):
    """Decodes recordings with given names, as rows of a JSONL; returns the JSONL and the texts."""

    def decode(names):
        rows = []
        for name in names:
            path = make_wav(f"{name}.wav", 0.1)
            rows.append({"messages": transcription_messages(str(path), "Write:", "one")})
        jsonl, output = tmp_path / "rows.jsonl", tmp_path / "hyp.txt"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = ["--jsonl_file", jsonl, "--output_file", output, "--device", "cpu", "--max_new_tokens", 2]
        run_recipe("decode.py", "--model_name_or_path", tiny_model, *options)
        return jsonl, output

    return decode
