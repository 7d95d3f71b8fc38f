"""Measured error rates in the card of a published model, from files that exist and belong to the model."""

import json
import shutil
import sys

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.cli.main import main
from hf_speechllm.files import read_record, record_path
from hf_speechllm.hub.publishing import CardOptions, complete_card, publish, rename_card
from hf_speechllm.hub.results import eval_entries, read_result, read_results
from hf_speechllm.hub.upload import usage


@pytest.fixture
def run(monkeypatch):
    """Runs a verb; returns the exit code or the error message."""

    def run_verb(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-speechllm", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code
        return None

    return run_verb


@pytest.fixture(scope="module")
def scored(tiny_model, tiny_corpus, tmp_path_factory):
    """A folder with a model (`model`), its texts (`hyp.txt`), texts of another program (`other.txt`), and scores of
    both (`exp/score`, `exp/unknown`)."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copy(tiny_corpus.text, folder / "ref")
    lines = [line.split(" ", 1) for line in (folder / "ref").read_text(encoding="utf-8").splitlines()]
    (folder / "other.txt").write_text("".join(f"{id_}\t{text} x\n" for id_, text in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            f"decode --model_name_or_path model --scp_file {tiny_corpus.scp} --output_file hyp.txt --max_new_tokens 9 "
            "--language en --hotwords Secret",
            f"score ref hyp.txt --compare other.txt --output_dir exp/score --scp_file {tiny_corpus.scp} --no_audio "
            "--num_resamples 100 --num_workers 1",
            "score ref other.txt --output_dir exp/unknown --num_resamples 100 --num_workers 1",
        ):
            patch.setattr(sys, "argv", ["hf-speechllm", *command.split()])
            main()
    return folder


@pytest.fixture
def work(scored, tmp_path, monkeypatch):
    """A copy of `scored`, as working folder."""
    shutil.copytree(scored, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def edit(path, **changes):
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_decode_records_how_texts_were_made(scored):
    record = read_record(scored / "hyp.txt")
    assert record_path(scored / "hyp.txt").name == "hyp.decoding.json"
    assert record["model"] == "model" and (record["device"], record["processes"]) == ("CPU", 1)
    assert (record["texts"], record["failed"]) == (24, 0) and record["decoded_seconds"] > 10
    assert record["settings"]["max_new_tokens"] == 9 and len(record["settings"]["weights"]) == 16
    score = json.loads((scored / "exp/score/score.json").read_text(encoding="utf-8"))
    assert score["decoding"] == record and score["comparison"]["decoding"] is None
    assert score["seconds"] == pytest.approx(record["decoded_seconds"], abs=0.01)


def test_push_writes_results_in_both_forms_of_the_hub(work, hub, run):
    assert not run(
        "push", "--input", "model", "--hub_model_id", "user/tuned", "--license", "apache-2.0",
        "--datasets", "org/speech", "--score", "org/speech:clean:test=exp/score", "own=exp/unknown",
    )  # fmt: skip
    files = hub.repositories["user/tuned"].files()
    text = files["README.md"].content.decode()
    data = ModelCard(text).data
    score = json.loads((work / "exp/score/score.json").read_text(encoding="utf-8"))
    assert (data.license, data.datasets, data.model_name) == ("apache-2.0", ["org/speech"], "tuned")
    assert data.language == [name for name in ("en", "zh") if any(name in key for key in score["languages"])]
    first, second = data.eval_results
    assert (first.task_type, first.dataset_type) == ("automatic-speech-recognition", "org/speech")
    assert (first.dataset_config, first.dataset_split, second.dataset_type) == ("clean", "test", "own")
    assert first.metric_type == score["metric"].lower()
    assert first.metric_value == pytest.approx(100 * score["rate"], abs=0.005)
    details = first.metric_args
    assert details["normaliser"].startswith("hf_speechllm.normalize_text 0.")
    assert details["decoding"] == {
        "search": "greedy", "max_new_tokens": 9, "dtype": "float32", "language": "en", "hotwords": True,
    }  # fmt: skip
    assert details["hardware"] == "1 x CPU" and details["rtfx"] > 0 and details["hours"] > 0
    assert details["compared_with"] == {"value": pytest.approx(100 * score["comparison"]["rate"], abs=0.005)}
    assert "decoding" not in second.metric_args

    assert [name for name in files if name.startswith(".eval_results/")] == [".eval_results/org--speech.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/org--speech.yaml"].content))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/speech", "clean", first.metric_value)
    assert entry.date == score["decoding"]["date"] and "search: greedy; max_new_tokens: 9" in entry.notes

    body = ModelCard(text).text
    assert f"| `org/speech:clean:test` | {score['metric']} | **{first.metric_value:.2f} %** |" in body
    assert body.index("## Results") < body.index("## Parts") < body.index("## Use")
    assert "- `own`: " in body and "no record says which model" in body
    for file in files.values():
        assert str(work).encode() not in file.content and b"Secret" not in file.content


def test_base_model_of_the_comparison_is_named(work):
    score = json.loads((work / "exp/score/score.json").read_text(encoding="utf-8"))
    score["comparison"]["decoding"] = {
        **score["decoding"],
        "model": "org/base",
        "sha256": score["comparison"]["sha256"],
    }
    (work / "exp/score/score.json").write_text(json.dumps(score), encoding="utf-8")
    options = CardOptions([read_result("t=exp/score")], licence="mit")
    card = complete_card(
        "---\nbase_model: org/base\nlicense: cc0-1.0\ntags:\n- speech_llm\n---\n\n# x\n", "u/x", options
    )
    assert "% (base model)" in card and ModelCard(card).data.license == "mit"
    assert ModelCard(card).data.eval_results[0].metric_args["compared_with"]["model"] == "org/base"
    assert eval_entries(options.results) == {}  # `t` is no data set on the Hub


def spoil_hypothesis(work):
    (work / "hyp.txt").write_text("a\tone\n", encoding="utf-8")


def remove_reference(work):
    (work / "ref").unlink()


def edit_rate(work):
    edit(work / "exp/score/score.json", rate=0.01)


def edit_all_counts(work):
    counts = dict.fromkeys(("substitutions", "deletions", "insertions"), 0)
    edit(work / "exp/score/score.json", rate=0.0, interval_95=[0.0, 0.0], **counts)


def edit_settings(work):
    score = json.loads((work / "exp/score/score.json").read_text(encoding="utf-8"))
    score["decoding"]["settings"]["num_beams"] = 8
    edit(work / "exp/score/score.json", decoding=score["decoding"])


def score_edited_texts(work):
    lines = (work / "ref").read_text(encoding="utf-8").replace(" ", "\t", 1)
    (work / "hyp.txt").write_text(lines, encoding="utf-8")
    sys.argv = [
        "hf-speechllm",
        "score",
        "ref",
        "hyp.txt",
        "--output_dir",
        "exp/score",
        "--overwrite",
        "--num_workers",
        "1",
    ]
    main()


def use_an_old_score(work):
    score = json.loads((work / "exp/score/score.json").read_text(encoding="utf-8"))
    del score["sha256"]
    (work / "exp/score/score.json").write_text(json.dumps(score), encoding="utf-8")


def change_the_model(work):
    model = SpeechLLMForConditionalGeneration.from_pretrained(work / "model")
    next(model.parameters()).data.view(-1)[0] += 1
    processor = SpeechLLMProcessor.from_pretrained(work / "model")
    for item in (model, processor):
        item.save_pretrained(work / "model")


def write_a_model_index(work):
    index = "model-index:\n- name: x\n  results:\n  - task: {type: a}\n    dataset: {name: b, type: b}\n"
    index += "    metrics:\n    - {type: wer, value: 1.0}\n"
    (work / "model" / "README.md").write_text(f"---\ntags:\n- speech_llm\n{index}---\n# x\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_hypothesis, "hyp.txt has changed since it was scored"),
        (remove_reference, "no file behind them: ref is missing"),
        (edit_rate, "rate: not the figures of the files"),
        (edit_all_counts, "rate, interval_95: not the figures of the files"),
        (edit_settings, "`decoding` differs from hyp.decoding.json"),
        (score_edited_texts, "does not contain the texts that hf-speechllm decode wrote"),
        (use_an_old_score, "not a score of this release"),
        (change_the_model, "come from another model (model; weights differ)"),
        (write_a_model_index, "the files behind its figures are unknown"),
        (lambda work: shutil.rmtree(work / "exp"), "no score.json"),
    ],
)
def test_figures_without_their_files_are_refused(work, hub, run, monkeypatch, spoil, message):
    monkeypatch.setattr(sys, "argv", sys.argv)
    spoil(work)
    assert message in run("push", "--input", "model", "--hub_model_id", "user/x", "--score", "exp/score")
    assert not hub.repositories


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "WER"},
        {"utterances": 23},
        {"reference_tokens": 10**6},
        {"interval_95": [-0.1, 9.0]},
        {"interval_95": [0.0, 0.0]},
        {"missing_hypotheses": ["a"]},
        {"languages": {"en+ja": {}}},
        {"comparison": {"rate": 0.25}},
    ],
)
def test_each_edited_figure_is_refused(work, changes):
    (name, value), path = *changes.items(), work / "exp/score/score.json"
    score = json.loads(path.read_text(encoding="utf-8"))
    assert read_result("exp/score").score == score and score[name] != value
    edit(path, **{name: {**score[name], **value} if name == "comparison" else value})
    with pytest.raises(ValueError, match=f"{name}.*: not the figures of the files"):
        read_result("exp/score")


def test_figures_with_given_languages_are_counted_with_these(work, run):
    (work / "ref").write_text("a 350\n", encoding="utf-8")
    (work / "hyp2.txt").write_text("a\tthree hundred fifty\n", encoding="utf-8")
    (work / "utt2lang").write_text("a en\n", encoding="utf-8")
    options = ("--num_resamples", 100, "--num_workers", 1, "--overwrite", "--output_dir", "exp/score")
    assert not run("score", "ref", "hyp2.txt", "--utt2lang", "utt2lang", *options)
    assert read_result("exp/score").languages == ["en"]
    (work / "utt2lang").write_text("a zh\n", encoding="utf-8")
    with pytest.raises(ValueError, match="utt2lang has changed since it was scored"):
        read_result("exp/score")


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def with_settings(score, settings):
    return score | {"decoding": score["decoding"] | {"settings": settings}}


@pytest.mark.parametrize(
    "damage",
    [
        lambda score: [],
        lambda score: score | {"files": []},
        lambda score: score | {"files": without(score["files"], "hypothesis")},
        lambda score: without(score, "missing_hypotheses"),
        lambda score: without(score, "languages"),
        lambda score: score | {"metric": "BLEU"},
        lambda score: score | {"seconds": "3"},
        lambda score: score | {"rate": float("nan")},
        lambda score: score | {"comparison": "other.txt"},
        lambda score: score | {"decoding": without(score["decoding"], "settings")},
        lambda score: score | {"decoding": without(score["decoding"], "model")},
        lambda score: with_settings(score, without(score["decoding"]["settings"], "dtype")),
        lambda score: with_settings(score, score["decoding"]["settings"] | {"dtype": "float8"}),
    ],
)
def test_damaged_score_is_reported_in_one_line(work, hub, run, damage):
    path = work / "exp/score/score.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    message = run("push", "--input", "model", "--hub_model_id", "user/x", "--score", "exp/score")
    assert message.endswith("score.json: not a score of this release; run hf-speechllm score again")
    assert len(message.splitlines()) == 1 and not hub.repositories


def test_folders_may_contain_equals_signs(work):
    shutil.copytree(work / "exp/score", work / "lr=1e-4/a=b")
    for argument, name in (("lr=1e-4/a=b", "a=b"), ("test=lr=1e-4/a=b", "test"), ("x=y=lr=1e-4/a=b", "x=y")):
        assert read_result(argument).name == name
    with pytest.raises(ValueError, match=r"no score.json in none; pass"):
        read_result("test=none")


def test_scores_with_the_same_name_are_refused(work, hub, run):
    shutil.copytree(work / "exp/score", work / "exp2/score")
    message = run("push", "--input", "model", "--hub_model_id", "user/x", "--score", "exp/score", "exp2/score")
    assert "have the same name, score; pass NAME=DIR" in message and not hub.repositories
    assert [result.name for result in read_results(["exp/score", "b=exp2/score"])] == ["score", "b"]


def test_the_scored_file_is_preferred_to_another_file_of_the_same_name(work, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/hyp.txt").write_text("a\tanother\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_result(str(work / "exp/score")).dataset == "score"


def test_files_are_found_from_another_working_folder(work, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_result(str(work / "exp/score")).dataset == "score"


def test_card_has_the_name_of_the_repository(tiny_model, hub, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    start = "---\ntags:\n- speech_llm\n---\n\n"
    (folder / "README.md").write_text(f"{start}# run\n\nMine: `run`.\n\n{usage('run')}\n", encoding="utf-8")
    publish(folder, "user/other")
    card = hub.repositories["user/other"].files()["README.md"].content.decode()
    assert "\n# other\n" in card and "Mine: `run`." in card
    assert usage("user/other") in card and 'from_pretrained("run")' not in card
    changed = f"{start}# My title\n\n{usage('run')} and more\n"
    assert rename_card(changed, "user/other") == changed.replace(usage("run"), usage("user/other"))
    assert rename_card(start, "user/other") == start
