"""Lines of a run on the console, and values for TensorBoard, W&B and trackio."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback

from hf_speechllm.model.chat import transcription_messages
from hf_speechllm.training import callbacks, progress_lines, trackers, validation
from hf_speechllm.training.progress_lines import learning_rates, training_line, validation_lines
from hf_speechllm.training.run import save_final
from hf_speechllm.training.trackers import markdown_table, part_gradient_norms, send_samples, tracker_values
from hf_speechllm.training.validation import rate_name


class Logs(TrainerCallback):
    """Keeps what a user's callback gets."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.entries.append(dict(logs))


@pytest.fixture
def trained(make_trainer, tiny_rows, tmp_path, monkeypatch):
    """Returns a trainer after 4 steps with three evaluations, its result, and the entries of a user's callback."""
    monkeypatch.setattr(callbacks, "draw_curve", lambda *_: None)
    logs = Logs()
    trainer = make_trainer(
        callbacks=[logs], eval_dataset={"near": tiny_rows.select(range(2))}, report_to=["tensorboard"], max_steps=4,
        logging_steps=2, eval_strategy="steps", eval_steps=2, eval_cer=True, validation_file=["near.jsonl"],
        eval_max_new_tokens=3, llm_learning_rate=1e-4, learning_rate=1e-3, max_grad_norm=0.01, save_strategy="no",
        disable_tqdm=False,
    )  # fmt: skip
    return lambda: (trainer, trainer.train(), logs.entries)


def test_a_run_prints_one_line_per_entry_and_a_summary(trained, capfd, tmp_path):
    trainer, result, entries = trained()
    save_final(trainer, result, {"near": "data/near.jsonl"})
    output = capfd.readouterr()
    lines = output.out.splitlines()
    number = r"-?\d+(\.\d+)?"
    step = rf"\d\d:\d\d:\d\d step [24]/4  loss {number}  acc {number} %  lr encoder\+adaptor {number}e-\d+, "
    steps = [line for line in lines if re.match(step + rf"llm {number}e-\d+  \d+ audio s/s  ETA \d:\d\d:\d\d$", line)]
    assert len(steps) == 2, output.out
    name = trainer.validator.rate_names["near"]
    scores = [line for line in lines if re.search(rf"step \d/4  near  loss .* {name} {number} %", line)]
    assert [re.search(r"step (\d)", line)[1] for line in scores] == ["0", "2", "4"]
    assert "before:" not in scores[0] and all("(before: " in line for line in scores[1:])
    assert not [line for line in lines if "{'" in line or "*****" in line]

    summary = lines[lines.index(next(line for line in lines if line.startswith("trained"))) :]
    assert [line.split()[0] for line in summary] == [
        "trained",
        "score",
        "model",
        "curve",
        "table",
        "next",
        "hf-speechllm",
    ]
    folder = trainer.args.output_dir
    assert summary[-2].endswith(
        f"--model_name_or_path {folder} --jsonl_file data/near.jsonl --output_file {folder}/near.txt"
    )

    # A user's callback and the state have the names of the trainer, with rates as fractions.
    evaluated = [entry for entry in entries if "eval_loss" in entry]
    assert len(evaluated) == 3 and all("eval_near_cer" in entry for entry in evaluated)
    assert all("eval_near_cer" in entry for entry in trainer.state.log_history if "eval_near_loss" in entry)


def test_tensorboard_gets_rates_parts_throughput_and_transcripts(trained):
    trainer, _, _ = trained()
    (folder,) = Path(trainer.args.output_dir).glob("runs/*")
    events = EventAccumulator(str(folder))
    events.Reload()
    name = trainer.validator.rate_names["near"].lower()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = [entry["eval_near_cer"] for entry in trainer.state.log_history if "eval_near_cer" in entry]
    assert scalars[f"eval/near_{name}"] == pytest.approx([100 * value for value in expected])
    assert "eval/near_cer" not in scalars or name == "cer"
    assert {"train/audio_seconds_per_second", "train/tokens_per_second", "train/loss"} <= scalars.keys()
    parts = ("audio_encoder", "audio_adaptor", "llm")
    for index, total in enumerate(scalars["train/grad_norm"]):
        squares = sum(scalars[f"train/{part}_grad_norm"][index] ** 2 for part in parts)
        assert squares**0.5 == pytest.approx(total, rel=1e-3)  # before the clipping to 0.01
    rates = [scalars[f"train/{part}_learning_rate"][0] for part in parts]
    assert rates[0] == rates[1] == pytest.approx(10 * rates[2]) == pytest.approx(scalars["train/learning_rate"][0])
    samples = events.Tensors("eval/near_samples/text_summary")
    assert len(samples) == 3 and samples[0].tensor_proto.string_val[0].decode().startswith("| row | reference |")


def test_progress_of_validation_is_shown_before_the_first_step(make_trainer, tiny_rows, monkeypatch):
    shown = []

    def bar(batches, desc, disable, **options):
        shown.append((desc, disable))
        return batches

    monkeypatch.setattr(validation, "progress_bar", bar)
    options = {"eval_cer": True, "validation_file": ["x"], "eval_max_new_tokens": 2, "disable_tqdm": False}
    make_trainer(eval_dataset={"near": tiny_rows.select(range(2))}, **options).evaluate()
    assert shown == [("validation near", False), ("decoding near", False)]


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["turn it on", "", "42"], "WER"),
        (["打开灯"], "CER"),
        (["打开 light"], "MER"),
        (["on", "打开"], "MER"),
        ([""], "WER"),
    ],
)
def test_name_of_the_rate_depends_on_the_transcripts(texts, name):
    rows = [{"messages": json.dumps(transcription_messages("a.wav", "p", text or "."))} for text in texts]
    assert rate_name(Dataset.from_list(rows)) == name


def test_line_of_a_step():
    entry = {
        "loss": 1.23456, "learning_rate": 1e-4, "token_accuracy": 0.4567, "audio_seconds_per_second": 1234.5,
        "data_wait_share": 0.35, "ctc_loss": 2.5, "bad_rows": 2, "bad_steps": 1,
    }  # fmt: skip
    assert training_line(entry) == (
        "loss 1.235  CTC loss 2.500  acc 45.7 %  lr 1.0e-04  1234 audio s/s  35 % waiting for data  2 bad rows  "
        "1 bad steps"
    )
    rates = {"audio_encoder_learning_rate": 1e-5, "audio_adaptor_learning_rate": 1e-4, "llm_learning_rate": 1e-5}
    assert learning_rates({"learning_rate": 1e-5, **rates}) == "encoder+llm 1.0e-05, adaptor 1.0e-04"
    assert learning_rates({"learning_rate": 1e-5, "llm_learning_rate": 1e-5}) == "1.0e-05"
    line = f"step 1200/12000  {training_line({**entry, 'data_wait_share': 0, 'bad_rows': 0})}"
    assert len(line.replace("CTC loss 2.500  ", "").partition("  0 bad")[0]) + len("  ETA 2:02:31") <= 80


def test_remaining_time_follows_the_recent_speed_and_includes_validation(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0, strftime=lambda form: "")
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(progress_lines, "time", clock)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True, log_history=[])
    lines = progress_lines.TrainingLines({})

    def remaining(steps, seconds, pause=0.0):
        """Trains steps, prints a line, and validates; returns the remaining seconds according to the line."""
        for _ in range(steps):
            lines.on_step_begin(None, state, None)
            clock.now += seconds
            state.global_step += 1
            lines.on_step_end(None, state, None)
        state.log_history.append({"loss": 1.0, "learning_rate": 1e-4, "step": state.global_step})
        lines.on_log(None, state, None)
        clock.now += pause
        if pause:
            lines.on_evaluate(None, state, None)
        hours, minutes, seconds = re.search(r"ETA (\d+):(\d+):(\d+)$", capsys.readouterr().out.strip()).groups()
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    clock.now = 50.0  # validation before the first step
    lines.on_evaluate(None, state, None)
    assert remaining(10, 20.0) == 990 * 20  # slow: kernels are chosen, files are read for the first time
    found = [remaining(10, 1.0) for _ in range(progress_lines.RECENT_LINES)]
    assert found[0] > 5 * 980 and found[-1] == 890
    assert remaining(10, 1.0, pause=240.0) == 880
    assert remaining(10, 1.0) == 870 + round(870 * 240 / 130)  # the next validations take as long


def test_line_of_a_validation_set():
    before = [{"eval_a_cer": 0.5, "step": 0}]
    entry = {"eval_a_loss": 1.0, "eval_a_cer": 0.25, "eval_a_token_accuracy": 0.5, "eval_b_loss": 2.0, "step": 3}
    assert validation_lines(entry, {"a": "WER"}, before) == [
        "a  loss 1.000  acc 50.0 %  WER 25.00 % (before: 50.00 %)",
        "b  loss 2.000",
    ]


def test_names_for_trackers():
    logs = {"eval_a_cer": 0.1, "eval_b_cer": 0.2, "eval_cer": 0.15, "averaged_a_cer": 0.3, "token_accuracy": 0.5}
    assert tracker_values({**logs, "loss": 2.0}, {"a": "WER", "b": "CER"}) == pytest.approx(
        {
            "eval_a_wer": 10,
            "eval_b_cer": 20,
            "eval_mer": 15,
            "eval_averaged_a_wer": 30,
            "token_accuracy": 50,
            "loss": 2.0,
        }
    )
    assert tracker_values({"eval_cer": 0.5}, {"": "WER"}) == {"eval_wer": 50}


def test_gradient_norms_are_those_before_clipping(compose_tiny):
    model, _ = compose_tiny()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.audio_encoder.requires_grad_(False)
    for parameter in model.audio_encoder.parameters():
        parameter.grad = None
    expected = {
        part: torch.stack([item.grad.norm() for item in getattr(model, part).parameters()]).norm().item()
        for part in ("audio_adaptor", "llm")
    }
    for limit in (0.5, float("inf")):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        found = part_gradient_norms(model, norm, limit)
        assert {part: value.item() for part, value in found.items()} == pytest.approx(expected, rel=1e-4)
        expected = {part: value * min(1.0, limit / norm.item()) for part, value in expected.items()}


ROWS = [("dev.jsonl:1", "a|b", "c")]


def test_samples_for_wandb_and_trackio(monkeypatch):
    """The modules stand for the packages, at the boundary of their public API."""
    sent = []
    table = SimpleNamespace(log=sent.append, Table=lambda **values: values)
    monkeypatch.setitem(sys.modules, "wandb", table)
    monkeypatch.setitem(sys.modules, "trackio", table)
    send_samples(WandbCallback.__new__(WandbCallback), "eval/dev_samples", ROWS, 3)
    send_samples(TrackioCallback.__new__(TrackioCallback), "eval/dev_samples", ROWS, 3)
    send_samples(TrainerCallback(), "eval/dev_samples", ROWS, 3)
    first, second = sent
    assert first == {
        "eval/dev_samples": {"columns": ["row", "reference", "hypothesis"], "data": [list(ROWS[0])]},
        "train/global_step": 3,
    }
    assert second["eval/dev_samples"]["dataframe"].to_dict("records") == [
        {"row": "dev.jsonl:1", "reference": "a|b", "hypothesis": "c"}
    ]
    assert markdown_table(ROWS).splitlines()[-1] == "| dev.jsonl:1 | a\\|b | c |"


def test_trackers_get_their_names_and_later_callbacks_the_plain_ones():
    class Tracker(WandbCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.seen.append(dict(logs))

    first, tracker, last = Logs(), Tracker(), Logs()
    chain = [first, tracker, last]
    names = SimpleNamespace(rate_names={"": "WER"}, samples={})
    trackers.connect_trackers(chain, names)
    logs = {"eval_cer": 0.5}
    for callback in chain:
        callback.on_log(None, None, None, logs=logs)
    assert tracker.seen == [{"eval_wer": 50}] and first.entries == last.entries == [{"eval_cer": 0.5}]
    assert logs == {"eval_cer": 0.5}
    alone = [Logs()]
    trackers.connect_trackers(alone, names)
    assert len(alone) == 1  # without trackers, nothing is added
