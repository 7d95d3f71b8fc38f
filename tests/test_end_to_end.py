"""All steps on a tiny model: composition, lists to JSONL, training, decoding, scores."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.model.modeling import PARTS

pytestmark = pytest.mark.core

REPOSITORY = Path(__file__).resolve().parents[1]


def read_table(path):
    return dict(line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines())


def test_from_lists_to_scores(tiny_corpus, tiny_config, tmp_path, run_recipe, launch):
    (tmp_path / "model.yaml").write_text(json.dumps(tiny_config()), encoding="utf-8")  # JSON is YAML
    model, trained = tmp_path / "init", tmp_path / "trained"
    assert not run_recipe(
        "compose_model.py", tmp_path / "model.yaml", "--transcripts", tiny_corpus.text, "--output_dir", model,
        "--vocab_size", 300,
    )  # fmt: skip
    jsonl = tmp_path / "train.jsonl"
    result = launch(  # a process of its own: transformers warns of configs that are not registered
        "recipes/scp2jsonl.py", "--scp_file", tiny_corpus.scp, "--transcript_file", tiny_corpus.text,
        "--jsonl_file", jsonl, "--model_name_or_path", model,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "You are using a model of type" not in result.stderr
    assert len(jsonl.read_text(encoding="utf-8").splitlines()) == 24

    result = launch(
        "recipes/finetune.py", REPOSITORY / "recipes/configs/all.yaml", "--model_name_or_path", model,
        "--train_file", jsonl, "--validation_file", jsonl, "--output_dir", trained, "--max_steps", 60,
        "--per_device_train_batch_seconds", 4,
        *(f"--{part}_learning_rate=1e-2" for part in PARTS), "--logging_steps", 15, "--save_steps", 30,
        "--dataloader_num_workers", 0, "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1,
        "--report_to", "none", "--use_cpu", "true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "parameters, trained with learning rate 0.01" in result.stderr
    assert re.search(f"^curve +{trained / 'training_curve.png'}$", result.stdout, re.MULTILINE)
    state = json.loads((trained / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [15, 30, 45, 60]
    assert losses[-1] < 0.6 * losses[0]
    assert {"checkpoint-30", "checkpoint-60", "training_curve.png", "model.safetensors", "eval_results.json"} <= {
        path.name for path in trained.iterdir()
    }

    hypotheses = tmp_path / "hyp.txt"
    assert not run_recipe(
        "decode.py", "--model_name_or_path", trained, "--scp_file", tiny_corpus.scp, "--output_file", hypotheses,
        "--max_new_tokens", 12, "--batch_seconds", 5,
    )  # fmt: skip
    expected = [line.split(maxsplit=1)[0] for line in tiny_corpus.scp.read_text().splitlines()]
    assert list(read_table(hypotheses)) == expected
    assert any(read_table(hypotheses).values())

    for source, target in ((tiny_corpus.text, "ref.norm"), (hypotheses, "hyp.norm")):
        assert not run_recipe("whisper_mix_normalize.py", source, tmp_path / target)
    scorer = shutil.which("compute-wer", path=os.path.dirname(sys.executable)) or shutil.which("compute-wer")
    files = [tmp_path / name for name in ("ref.norm", "hyp.norm", "cer.txt")]
    subprocess.run([scorer, *files], check=True, capture_output=True)
    tail = files[2].read_text(encoding="utf-8").splitlines()[-8:]
    assert any("%" in line for line in tail)


def test_data_errors_end_the_training_before_the_model_is_loaded(tiny_corpus, tiny_model, tmp_path, run_recipe):
    rows = [json.loads(line) for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()]
    rows[2]["messages"][1]["content"] = "语音转写：<|startofspeech|>!/no/such.wav<|endofspeech|>"
    rows[4]["messages"][1]["content"] = "语音转写：<|startofspeech|>a.wav<|endofspeech|>"
    jsonl = tmp_path / "bad.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    without_weights = tmp_path / "model"
    shutil.copytree(tiny_model, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))

    def run(*options):
        return run_recipe(
            "finetune.py", "--model_name_or_path", without_weights, "--train_file", jsonl,
            "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--use_cpu", "true",
            "--preprocessing_num_workers", 1, *options,
        )  # fmt: skip

    message = run()
    assert f"{jsonl}:5: " in message and "no '!'" in message and "--max_bad_fraction" in message
    message = run("--max_bad_fraction", "0.05")
    assert f"{jsonl}:3: " in message and "/no/such.wav: no such file" in message
    assert f"{jsonl}:5: " in message and "2 of 24 rows are bad" in message
    message = run("--max_bad_fraction", "0.1", "--per_device_train_batch_seconds", "0.5")
    assert "the batch budget is 0.5 s" in message


def test_decoding_lists_failed_recordings(tiny_corpus, tiny_model, tmp_path, run_recipe):
    lines = tiny_corpus.scp.read_text().splitlines()[:4]
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(Path(lines[0].split()[1]).read_bytes()[:5000])
    (tmp_path / "text.wav").write_text("no audio")
    scp = tmp_path / "wav.scp"
    scp.write_text("\n".join([lines[0], "gone /no/such.wav", lines[1], f"cut {damaged}", lines[2], "notes text.wav"]))
    output = tmp_path / "hyp.txt"
    message = run_recipe(
        "decode.py", "--model_name_or_path", tiny_model, "--scp_file", scp, "--output_file", output,
        "--max_new_tokens", 4,
    )  # fmt: skip
    # `sys.exit` with a message sets exit status 1.
    assert isinstance(message, str) and "3 failed" in message
    assert "gone: /no/such.wav: no such file" in message
    assert "cut: " in message and "truncated" in message
    assert "notes: " in message and "not audio" in message
    assert list(read_table(output)) == [line.split()[0] for line in lines[:3]]


def test_decoding_refuses_to_replace_output_without_overwrite(tiny_corpus, tiny_model, tmp_path, run_recipe):
    output = tmp_path / "hyp.txt"
    output.write_text("precious")
    options = ["--model_name_or_path", tiny_model, "--scp_file", tiny_corpus.scp, "--output_file", output]
    assert run_recipe("decode.py", *options) == 1
    assert output.read_text() == "precious"


def test_decoding_of_jsonl_rows_uses_prompts_of_rows_or_options(
    tiny_corpus, tiny_model, tmp_path, run_recipe, monkeypatch
):
    def say_the_prompt(transcriber, inputs):
        texts = transcriber.processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        return [text.split("user\n")[1].removesuffix("\nassistant\n") for text in texts]

    monkeypatch.setattr(Transcriber, "generate", say_the_prompt)
    rows = [json.loads(line) for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()[:3]]
    rows[1]["messages"][1]["content"] = rows[1]["messages"][1]["content"].replace("语音转写：", "Transcribe:")
    rows[2]["hotwords"] = "Qwen"
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def decode(*options):
        output = tmp_path / "hyp.txt"
        assert not run_recipe(
            "decode.py", "--model_name_or_path", tiny_model, "--jsonl_file", jsonl, "--output_file", output,
            "--overwrite", *options,
        )  # fmt: skip
        return read_table(output)

    own = decode()
    assert own["utt00"] == "语音转写："
    assert own["utt01"] == "Transcribe:"
    assert "热词列表：[Qwen]" in own["utt02"] and own["utt02"].endswith("语音转写：")
    assert set(decode("--language", "英文", "--no_itn").values()) == {"语音转写成英文，不进行文本规整："}
    assert set(decode("--prompt", "Speech transcription:").values()) == {"Speech transcription:"}
