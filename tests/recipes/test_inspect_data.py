"""Ids, labels, losses, prompts and texts of the recipes: compared with the original's golden vectors, and on a tiny
model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.model.chat import IGNORE_INDEX, transcription_messages, transcription_prompt

TOLERANCE = 1e-4


@pytest.fixture
def golden(shared):
    folder = shared / "golden" / "funasr_tiny"
    if not folder.is_dir():
        pytest.skip("the golden vectors are not here")
    return folder


@pytest.fixture
def inspect(run_recipe, capsys):
    """Runs the recipe and returns the JSON lines."""

    def run(*arguments, code=0):
        capsys.readouterr()  # of other recipes
        assert run_recipe("inspect_data.py", "--json", *arguments) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def name_of(row):
    """Returns the name of a row of the golden JSONL in the golden vectors."""
    texts = [message["content"] for message in row["messages"] if message["role"] == "user"]
    if len(texts) > 1:
        return "multiturn"
    return Path(texts[0].partition("!")[2].removesuffix("<|endofspeech|>")).stem


def without_placeholders(ids, processor):
    return [0 if token == processor.audio_token_id else token for token in ids]


def options_of(setting):
    return [
        *(["--language", setting["language"]] if setting["language"] else []),
        *([] if setting["itn"] else ["--no_itn"]),
        *(["--hotwords", ",".join(setting["hotwords"])] if setting["hotwords"] else []),
    ]


def test_ids_labels_and_losses_equal_the_original(golden, inspect):
    records = inspect("--model_name_or_path", golden / "model", "--jsonl_file", golden / "data.jsonl", "--loss")
    expected, processor = (
        load_file(golden / "golden.safetensors"),
        SpeechLLMProcessor.from_pretrained(golden / "model"),
    )
    rows = [json.loads(line) for line in (golden / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["index"] for record in records] == list(range(len(rows)))
    for row, record in zip(rows, records, strict=True):
        name = name_of(row)
        assert without_placeholders(record["input_ids"], processor) == expected[f"{name}.input_ids"].tolist()
        assert record["labels"] == expected[f"{name}.labels"].tolist()
        assert record["loss"] == pytest.approx(expected[f"{name}.loss"].item(), abs=TOLERANCE)
        assert record["num_audio_tokens"] == int(expected[f"{name}.fake_token_len"].sum())
        if name != "multiturn":
            assert record["num_frames"] == len(expected[f"{name}.lfr"])


def test_prompts_and_texts_equal_the_original(golden, inspect, run_recipe, tmp_path):
    processor = SpeechLLMProcessor.from_pretrained(golden / "model")
    for setting in json.loads((golden / "inference.json").read_text(encoding="utf-8")):
        audio = golden / "audio" / f"{setting['id']}.wav"
        row = {"messages": transcription_messages(str(audio), transcription_prompt())}
        (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        (tmp_path / "one.scp").write_text(f"{setting['id']} {audio}\n", encoding="utf-8")
        model, options = ["--model_name_or_path", golden / "model"], options_of(setting)
        (record,) = inspect(*model, "--jsonl_file", tmp_path / "one.jsonl", "--inference", *options)
        assert without_placeholders(record["input_ids"], processor) == setting["source_ids"]
        assert "labels" not in record

        output = tmp_path / f"{setting['id']}.txt"
        arguments = ["--scp_file", tmp_path / "one.scp", "--output_file", output, "--max_new_tokens", 12, *options]
        assert not run_recipe("decode.py", *model, *arguments)
        text = processor.tokenizer.decode(setting["generated_ids"], skip_special_tokens=True)
        assert output.read_text(encoding="utf-8") == f"{setting['id']}\t{' '.join(text.split())}\n"


def test_json_row_is_the_input_of_the_model(tiny_model, tiny_corpus, inspect):
    arguments = ["--model_name_or_path", tiny_model, "--jsonl_file", tiny_corpus.jsonl, "--num_rows", 4, "--loss"]
    records = inspect(*arguments)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()][:4]
    for row, record in zip(rows, records, strict=True):
        batch = processor.apply_chat_template(row["messages"])
        assert record["input_ids"] == batch["input_ids"][0].tolist()
        assert record["labels"] == batch["labels"][0].tolist()
        assert record["num_audio_tokens"] == record["input_ids"].count(processor.audio_token_id)
        assert record["num_frames"] == batch["input_features"].shape[1]
        with torch.no_grad():
            assert record["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_readable_output_marks_supervised_tokens(tiny_model, tiny_corpus, run_recipe, capsys):
    arguments = ["--model_name_or_path", tiny_model, "--jsonl_file", tiny_corpus.jsonl, "--num_rows", 2]
    assert run_recipe("inspect_data.py", *arguments) == 0
    output = capsys.readouterr().out
    assert output.count("<|im_start|>assistant\n[[") == 2 and output.count("<|im_end|>]]") == 2
    assert "audio tokens>" in output and "row 1:" in output


def test_prompt_of_a_row_is_kept_without_prompt_options(tiny_model, tiny_corpus, inspect):
    arguments = ["--model_name_or_path", tiny_model, "--jsonl_file", tiny_corpus.jsonl, "--num_rows", 1]
    (trained,), (asked,) = inspect(*arguments), inspect(*arguments, "--inference")
    (english,) = inspect(*arguments, "--inference", "--language", "en")
    answer = next(i for i, label in enumerate(trained["labels"]) if label != IGNORE_INDEX)
    assert asked["input_ids"] == trained["input_ids"][:answer]
    assert english["input_ids"] != asked["input_ids"]


def test_errors_are_reported_in_one_line(tiny_model, tiny_corpus, inspect, run_recipe, tmp_path, capsys):
    model = ["--model_name_or_path", tiny_model]
    assert run_recipe("inspect_data.py", *model, "--jsonl_file", tmp_path / "none.jsonl") == 1
    message = capsys.readouterr().err
    assert message.startswith("inspect_data.py: error: ") and message.endswith("none.jsonl: no such file\n")
    message = run_recipe("inspect_data.py", "--model_name_or_path", tmp_path, "--jsonl_file", tiny_corpus.jsonl)
    assert "contains no model" in message
    arguments = ["--jsonl_file", tiny_corpus.jsonl, "--inference", "--language", "klingon"]
    assert "unknown language 'klingon'" in run_recipe("inspect_data.py", *model, *arguments)
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    capsys.readouterr()
    assert inspect(*model, "--jsonl_file", tmp_path / "bad.jsonl", code=1) == []
