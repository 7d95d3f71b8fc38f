"""Reports: the text file is compared with compute-wer; the page is parsed and opened in a browser."""

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_speechllm.evaluation import normalize_text, report
from hf_speechllm.evaluation.charts import MAX_TICKS, NUM_DOTS, Axis, duration_chart
from hf_speechllm.evaluation.frequency import count_occurrences
from hf_speechllm.evaluation.frequency import summarize as summarize_frequency
from hf_speechllm.evaluation.hotword_scores import count_hotwords, summarize
from hf_speechllm.evaluation.report import (
    align_columns,
    choose_examples,
    frequent_confusions,
    html_report,
    worst_utterances,
    write_compute_wer,
)
from hf_speechllm.evaluation.report_audio import MAX_SOUND_SECONDS, embed_sound, measure_durations
from hf_speechllm.evaluation.scoring import rescore, rules_for, score_set, score_utterances
from hf_speechllm.evaluation.statistics import compare_systems

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
LONG = "pneumonoultramicroscopicsilicovolcanoconiosis"
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def random_texts(seed, number=60):
    rng = random.Random(seed)
    words = ["hello", "世", "界", "二十", "it's", "こ", "ど", "안", "$5", "7th", "groß", "да"]
    return {f"utt-{index:02d}": " ".join(rng.choices(words, k=rng.randint(0, 9))) for index in range(number)}


def test_text_file_equals_the_output_of_compute_wer(tmp_path):
    references, hypotheses = random_texts(0), {**random_texts(1), "utt-without-reference": "hello"}
    for name, texts in (("ref", references), ("hyp", hypotheses)):
        rules = {id_: rules_for(references.get(id_, "")) for id_ in texts}
        rows = [f"{id_}\t{normalize_text(text, rules[id_])}\n" for id_, text in texts.items()]
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
    files = [tmp_path / name for name in ("ref", "hyp", "theirs.txt")]
    command = Path(sys.executable).with_name("compute-wer")
    subprocess.run([command, "--sort", "utt", *files], check=True, capture_output=True)

    file = io.StringIO()
    write_compute_wer(score_utterances(references, hypotheses), 0, 1, file)
    ours, theirs = file.getvalue().splitlines(), files[2].read_text(encoding="utf-8").splitlines()
    start = theirs.index(report.RULE)
    # Our file lists scripts in the order of occurrence, compute-wer in any order.
    assert ours[: start + 2] == theirs[: start + 2]
    assert sorted(ours[start + 2 : -2]) == sorted(theirs[start + 2 : -2])
    assert ours[-2:] == theirs[-2:] and ours[-2].startswith("SER -> ") and ours[-2].endswith(" ML=1 MH=0")
    # The command takes a missing hypothesis for an empty one, and always writes MH=0.
    write_compute_wer(score_utterances(references, hypotheses), 2, 1, file := io.StringIO())
    assert file.getvalue().splitlines()[-2].endswith(" ML=1 MH=2")


def make_page(references, hypotheses, sources=None, hotwords=(), datasets=None, others=None, training=()):
    utterances = score_utterances(references, hypotheses, datasets=datasets)
    score = score_set(utterances, 200)
    score["files"] = {"reference": f"{HOSTILE}/ref", "hypothesis": f"{HOSTILE}/hyp"}
    score["normalized"] = True
    score["missing_hypotheses"] = [id_ for id_ in references if id_ not in hypotheses]
    score["extra_hypotheses"] = [id_ for id_ in hypotheses if id_ not in references]
    counted = count_hotwords(utterances, hotwords)
    if hotwords:
        score["hotwords"] = summarize(counted)
    comparison, before, absent = None, [], []
    if others:
        before = rescore(utterances, others)
        absent = [id_ for id_ in references if id_ not in others]
        errors, other_errors = ([utterance.counts.errors for utterance in scored] for scored in (utterances, before))
        tokens = [utterance.counts.reference_tokens for utterance in utterances]
        comparison = compare_systems(errors, other_errors, tokens)
        score["comparison"] = {"file": f"{HOSTILE}/other", "rate": 0.5}
    if training:
        occurrences, total = count_occurrences(training, {utterance.rules for utterance in utterances})
        score["training_frequency"] = {
            "files": [f"{HOSTILE}/train"], "texts": total, **summarize_frequency(utterances, occurrences),
        }  # fmt: skip
        if others:
            score["comparison"]["training_frequency"] = summarize_frequency(before, occurrences)
    examples = choose_examples(utterances, 10, score["missing_hypotheses"], before, absent)
    durations, _ = measure_durations(sources or {})
    sounds = {id_: embed_sound(sources[id_]) for id_ in examples.ids()} if sources else {}
    return html_report(
        score, utterances, references, hypotheses, examples, durations, sounds, counted, comparison, before, others
    )


class Reader(HTMLParser):
    """Collects elements with attributes, and all text outside of styles."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_every_text_in_the_page_is_escaped(tmp_path):
    references = {f"{HOSTILE}{number}": f"hello {HOSTILE} 你好" for number in range(3)}
    hypotheses = {f"{HOSTILE}1": f"{HOSTILE} goodbye", f"{HOSTILE}2": "", f"{HOSTILE}extra": "x"}
    sources = {id_: str(tmp_path / f"{HOSTILE}.wav") for id_ in references}
    datasets = {id_: f"{HOSTILE}{number}" for number, id_ in enumerate(references)}
    others = {id_: f"{HOSTILE} other" for id_ in references}
    page = make_page(references, hypotheses, sources, [f"hello {HOSTILE}"], datasets, others, [HOSTILE])
    reader = Reader(page)
    assert not {"script", "img"} & {tag for tag, _ in reader.elements}
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    # Title, file names, IDs, texts as written, data sets, hotwords, paths of unreadable recordings, other hypotheses,
    # training files.
    assert reader.text.count(HOSTILE) >= 2 * 5 + 10
    assert "no such file" in reader.text.lower()


def test_page_is_self_contained(make_wav):
    page = make_page({"a": "one two"}, {"a": "one"}, {"a": str(make_wav())})
    addresses = [
        value
        for _, attributes in Reader(page).elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "poster", "srcset")
    ]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", page)


def test_perfect_and_empty_results_make_a_page_too():
    assert "Utterances with most errors" not in make_page({"a": "one"}, {"a": "one"})
    assert "0.00\u00a0%" in make_page({"a": ""}, {"a": ""})
    assert "100.00\u00a0%" in make_page({"a": "", "b": "one"}, {"a": "noise"})


def test_missing_and_empty_hypotheses_are_listed_separately():
    page = make_page({"gone": "one", "silent": "two", "right": "three"}, {"silent": "", "right": "three"})
    missing, empty = re.findall("<details>(.*?)</details>", page, flags=re.DOTALL)[:2]
    assert "without a hypothesis" in missing and "gone" in missing and "silent" not in missing
    assert "Empty hypotheses" in empty and "silent" in empty and "gone" not in empty
    # The page shows no alignment with nothing, and the rate of the others.
    assert page.count("<article") == 1 and "1 of 3 references have no hypothesis" in page
    assert "WER of the others: 50.00\u00a0%" in page


def test_worst_utterances_have_most_errors_then_the_highest_rate():
    texts = {"a": "1 2 3 4", "b": "1 2", "c": "1 2 3 4 5", "d": "1"}
    utterances = score_utterances(texts, {"a": "1 2", "b": "", "c": "1 2", "d": "1"})
    assert [utterance.id for utterance in worst_utterances(utterances, 9)] == ["c", "b", "a"]
    assert [utterance.id for utterance in worst_utterances(utterances, 1)] == ["c"]


def test_examples_are_the_worst_and_the_most_changed_utterances_with_a_hypothesis():
    texts = {id_: "1 2 3 4" for id_ in "abcdef"}
    utterances = score_utterances(texts, {"a": "1 2 3 4", "b": "1 2", "c": "1", "d": "", "e": "1 2 3"})
    others = rescore(utterances, {"a": "1", "b": "1 2 3 4", "c": "1", "d": "1 2 3", "f": "1 2 3 4"})
    examples = choose_examples(utterances, 3, ["f"], others, ["e"])
    assert [[u.id for u in part] for part in (examples.worst, examples.better, examples.worse)] == [
        ["d", "c", "b"], ["a"], ["d", "b"],
    ]  # fmt: skip
    assert examples.ids() == ["d", "b", "a", "c"]
    assert choose_examples(utterances, 0, [], others).ids() == []


def test_columns_have_the_cells_of_both_hypotheses():
    columns = align_columns(["a", "b", "c"], ["x", "a", "c"], ["a", "y", "z", "b", "d"])
    assert [(column.reference, *column.cells) for column in columns] == [
        ("", ("insert", "x"), ("equal", "")),
        ("a", ("equal", "a"), ("equal", "a")),
        ("", ("equal", ""), ("insert", "y")),
        ("", ("equal", ""), ("insert", "z")),
        ("b", ("delete", ""), ("equal", "b")),
        ("c", ("equal", "c"), ("replace", "d")),
    ]
    assert align_columns([]) == align_columns([], [], []) == []


def test_confusions_of_both_systems_are_counted():
    references = {str(number): "a b c" for number in range(4)}
    utterances = score_utterances(references, dict.fromkeys(references, "x b c d"))
    others = rescore(utterances, dict.fromkeys("012", "a c") | {"3": "x b c"})
    assert frequent_confusions(utterances, others) == {
        "replace": [(("a", "x"), 4, 1)], "delete": [(("b", ""), 0, 3)], "insert": [(("", "d"), 4, 0)],
    }  # fmt: skip
    page = make_page(references, dict.fromkeys(references, "x b c d"), others=dict.fromkeys(references, "a c"))
    rows = re.findall("<tr><td class.*?</tr>", page)
    assert [re.findall("<td[^>]*>(.*?)</td>", row) for row in rows] == [
        ["a", "x", "4", "0"], ["b", "0", "4"], ["d", "4", "0"],
    ]  # fmt: skip


def test_both_hypotheses_are_shown_and_each_recording_once(make_wav):
    texts = {"a": "one two", "b": "three"}
    page = make_page(
        texts, {"a": "one", "b": "tree"}, dict.fromkeys(texts, str(make_wav())), others={"a": "one too", "b": "three"}
    )
    text = Reader(page).text
    assert page.count("<article") == page.count("<audio") == 2
    assert "More errors than before" in text and "Fewer errors than before" not in text
    assert re.search(r'<b>2</b><b class="delete"><s>2</s></b><b class="replace">too</b>', page)
    assert '<a href="#example-1" dir="auto">b</a>' in page and "shown above" in text


@pytest.mark.parametrize("number", [1, 3, 100, NUM_DOTS + 7])
def test_chart_has_a_dot_for_each_utterance_up_to_a_limit(number):
    texts = {str(index): "one two" for index in range(number)}
    utterances = score_utterances(texts, {"0": "one"})
    chart = duration_chart(utterances, {id_: 1 + int(id_) % 50 for id_ in texts}, {"0": "#example-1"})
    assert len(chart.dots) == min(number - 1, NUM_DOTS) and chart.sampled is (number > NUM_DOTS)
    assert [dot[2:] for dot in chart.linked] == [("0", "#example-1")]
    assert all(0 <= value <= 100 for dot in (*chart.dots, *chart.steps) for value in dot)
    assert 1 <= len(chart.x_ticks) <= MAX_TICKS


def test_missing_and_few_bad_utterances_do_not_flatten_the_chart():
    texts = {str(index): "one two three four five" for index in range(400)}
    right = dict(list(texts.items())[:300]) | {"0": "", "1": "one", "2": "one two three four"}
    utterances = score_utterances(texts, right)
    durations = {id_: 1 + int(id_) / 100 for id_ in texts}
    chart = duration_chart(utterances, durations, {}, [id_ for id_ in texts if id_ not in right])
    assert (chart.missing, chart.above, len(chart.dots)) == (100, 3, 300)
    assert max(float(label) for _, label in chart.y_ticks) <= 20
    assert max(rate for *_, rate, _, _ in chart.steps) > 25  # percent of the height
    assert duration_chart(utterances[300:], durations, {}, list(texts)) is None


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(0, 100), ["0", "20", "40", "60", "80", "100"]),
        (Axis(0.19, 1.16), ["0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis(0.5, 60, log=True), ["0.5", "1", "2", "5", "10", "20", "50"]),
        (Axis(0.5, 3000, log=True), ["1", "10", "100", "1000"]),
    ],
)
def test_ticks_are_round_and_few(axis, labels):
    places = [place for place, _ in axis.ticks()]
    assert [label for _, label in axis.ticks()] == labels
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 100
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == axis.place(2 * axis.high) == 100


def test_durations_come_from_headers_and_urls_are_skipped(make_wav, tmp_path):
    (tmp_path / "b.wav").write_bytes(b"no audio")
    sources = {"a": str(make_wav(seconds=0.75)), "b": str(tmp_path / "b.wav"), "c": "http://127.0.0.1:9/c.wav"}
    durations, reasons = measure_durations(sources)
    assert durations == {"a": pytest.approx(0.75)}
    assert list(reasons) == ["b"] and str(tmp_path / "b.wav") in reasons["b"]


def test_sound_is_small_and_the_same_recording(make_wav):
    path = make_wav(seconds=4, rate=44100, channels=6)
    sound = embed_sound(str(path))
    data = base64.b64decode(sound.uri.removeprefix("data:audio/ogg;base64,"))
    assert len(data) < 40_000 and sound.note == ""
    waveform, rate = soundfile.read(io.BytesIO(data))
    assert waveform.ndim == 1 and len(waveform) / rate == pytest.approx(4, abs=0.01)
    spectrum = np.abs(np.fft.rfft(waveform))
    assert np.argmax(spectrum) * rate / len(waveform) == pytest.approx(440, abs=2)


def test_sound_of_a_long_recording_is_cut_with_a_note(make_wav):
    sound = embed_sound(str(make_wav(seconds=MAX_SOUND_SECONDS + 5, rate=8000)))
    data = base64.b64decode(sound.uri.partition(",")[2])
    assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(MAX_SOUND_SECONDS, abs=0.01)
    assert sound.note == "first 120 s of 125 s"


def browse(path, folder):
    """Returns the HTML of a page after loading, and the lines of the console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    output = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=120)
    return output.stdout, [line for line in output.stderr.splitlines() if "CONSOLE" in line]


PROBE = """<script>
const height = element => Math.round(element.getBoundingClientRect().height);
const result = {seconds: [...document.querySelectorAll("audio")].map(audio => audio.duration),
  chart: height(document.querySelector("#chart svg")), wide: document.documentElement.scrollWidth - innerWidth,
  width: innerWidth, column: document.querySelector("#hotwords td").getBoundingClientRect().width,
  font: parseFloat(getComputedStyle(document.querySelector("#chart text")).fontSize),
  colours: ["replace", "delete", "insert"].map(name =>
    getComputedStyle(document.querySelector(".alignment ." + name)).backgroundColor)};
parent.postMessage(JSON.stringify(result), "*");
</script>"""
# A browser's window cannot be as narrow as a phone, but a frame can.
FRAME = """<body><iframe src="report.html" width="390" height="800"></iframe>
<script>addEventListener("message", event => document.body.setAttribute("data-result", event.data))</script></body>"""


@needs_browser
def test_page_in_a_browser(tmp_path, make_wav):
    """No message, no horizontal scrolling at the width of a phone, three colours of errors, and playable sounds."""
    references = {"a": "one two three four", "b": "今天天气很好", "c": f"five {LONG} {HOSTILE}"}
    hypotheses = {"a": "one too three four five", "b": "今天气很好", "c": "five"}
    sources = {id_: str(make_wav(f"{id_}.wav", seconds)) for id_, seconds in (("a", 1), ("b", 2), ("c", 3))}
    page = make_page(
        references,
        hypotheses,
        sources,
        ["two", LONG],
        {"a": "first", "b": "second"},
        {"a": "x", "b": "今天"},
        [f"{LONG[:-1]} one"] + 1001 * ["今 three"],
    )
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    shown, messages = browse(path, tmp_path)
    assert messages == []
    reader = Reader(shown)
    names = [tag for tag, _ in reader.elements]
    assert names.count("article") == names.count("audio") == 3 and names.count("svg") == 1
    sections = [attributes.get("id") for tag, attributes in reader.elements if tag == "section"]
    assert sections == [
        "comparison", "datasets", "languages", "frequency", "hotwords", "confusions", "chart", "changes", "worst",
    ]  # fmt: skip

    # Only a script can measure the page, and the page forbids all scripts.
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page)
    waiting = PROBE.replace("<script>", '<script>addEventListener("load", () => {').replace("</script>", "})</script>")
    path.write_text(probed.replace("</body>", f"{waiting}</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME, encoding="utf-8")
    shown, messages = browse(tmp_path / "frame.html", tmp_path)
    assert messages == []
    body = next(attributes for tag, attributes in Reader(shown).elements if tag == "body")
    result = json.loads(body["data-result"])
    assert sorted(result["seconds"]) == pytest.approx([1, 2, 3], abs=0.05)
    assert result["width"] == 390 and result["wide"] <= 0 and result["column"] > 60
    assert result["chart"] > 100 and result["font"] >= 11
    assert len(set(result["colours"])) == 3

    path.write_text(page.replace("</body>", "<script>console.error(1)</script></body>"), encoding="utf-8")
    assert "Content Security Policy" in " ".join(browse(path, tmp_path)[1])
