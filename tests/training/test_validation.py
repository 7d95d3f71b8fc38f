"""Validation by decoding, best checkpoints, early stopping, retention guard, averaging."""

import json
import shutil
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.prompt_collator import PromptCollator
from hf_speechllm.data.sampler import KeyedRows
from hf_speechllm.evaluation.scoring import ErrorCounts, count_errors
from hf_speechllm.evaluation.validation_metrics import COUNTS
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.training import callbacks
from hf_speechllm.training.callbacks import draw_curve
from hf_speechllm.training.checkpointing.selection import RetentionError
from hf_speechllm.training.run import find_checkpoint, save_final
from hf_speechllm.training.trainer import SpeechLLMTrainer
from hf_speechllm.training.validation import Validator, spread_rows

REPOSITORY = Path(__file__).resolve().parents[2]
DECODING = {"eval_cer": True, "validation_file": ["dev.jsonl"], "eval_max_new_tokens": 6}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
QUICK = {"freeze_audio_encoder": True, "freeze_llm": True}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Disables drawing, which takes longer than training, except in tests of the curve."""
    if "curve" not in request.node.name:
        monkeypatch.setattr(callbacks, "draw_curve", lambda *_: None)


@pytest.fixture(scope="module")
def talkative_model(compose_tiny, tmp_path_factory):
    """Folder of a random model that decodes different texts for different recordings."""
    folder = tmp_path_factory.mktemp("talkative")
    model, processor = compose_tiny(seed=3)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.mul_(1.6 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sets(tiny_rows):
    """Validation sets of 3 and 2 rows, and general speech of 4 rows."""
    return {
        "near": tiny_rows.select(range(3)),
        "far": tiny_rows.select(range(3, 5)),
        "retention": tiny_rows.select(range(5, 9)),
    }


@pytest.fixture
def scripted(monkeypatch):
    """Replaces decoding by CERs in percent: `{rows of the set: {step: CER}}`."""

    def script(by_size, averaged=None):
        trainers, score = [], SpeechLLMTrainer.score

        def noted(trainer, *args, **options):
            trainers.append(trainer)
            return score(trainer, *args, **options)

        def decode(validator, engine, rows, title):
            trainer = trainers[-1]
            if averaged is not None and not trainer.is_in_train:
                percent = averaged[len(rows)]
            else:
                percent = by_size[len(rows)][trainer.state.global_step]
            return ErrorCounts(substitutions=percent, reference_tokens=100), []

        monkeypatch.setattr(SpeechLLMTrainer, "score", noted)
        monkeypatch.setattr(Validator, "decode", decode)

    return script


def cers_of(trainer, key="eval_cer"):
    return {entry["step"]: round(100 * entry[key]) for entry in trainer.state.log_history if key in entry}


def steps_kept(trainer):
    return sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def same_weights(trainer, folder, file="model.safetensors"):
    stored = load_file(Path(folder) / file)
    return all(torch.equal(tensor, trainer.model.get_parameter(name)) for name, tensor in stored.items())


# Decoding


def full_precision(folder):
    return DataOptions(feature_cache="float32", cache_dir=str(folder / "cache"), preprocessing_num_workers=1)


def test_cer_equals_that_of_decoded_recordings(make_trainer, tiny_corpus, talkative_model, tmp_path):
    processor = SpeechLLMProcessor.from_pretrained(talkative_model)
    rows = prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, full_precision(tmp_path))[0]
    options = {"model_name_or_path": talkative_model, "per_device_eval_batch_seconds": 4.0}
    metrics = make_trainer(eval_dataset=rows, **options, **DECODING).evaluate()

    model = SpeechLLMForConditionalGeneration.from_pretrained(talkative_model)
    lines = [line.split(maxsplit=1) for line in tiny_corpus.text.read_text(encoding="utf-8").splitlines()]
    recordings = [str(tiny_corpus.folder / f"{name}.wav") for name, _ in lines]
    hypotheses = Transcriber(model, processor, max_new_tokens=6).transcribe(recordings)
    expected = sum((count_errors(text, hyp) for (_, text), hyp in zip(lines, hypotheses, strict=True)), ErrorCounts())
    assert len(set(hypotheses)) > 3
    assert [metrics[f"eval_{name}"] for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    assert metrics["eval_cer"] == pytest.approx(expected.rate)


def test_gradient_checkpointing_and_adapters_do_not_change_the_cer(make_trainer, sets, talkative_model):
    options = {"eval_dataset": sets["near"], "model_name_or_path": talkative_model, **DECODING}
    plain = make_trainer(**options).evaluate()
    other = make_trainer(gradient_checkpointing=True, use_lora=True, lora_dropout=0.5, **options)
    other.model.train()
    assert plain["eval_insertions"] > 0
    assert [other.evaluate()[f"eval_{name}"] for name in COUNTS] == [plain[f"eval_{name}"] for name in COUNTS]


def test_decoding_is_greedy_where_the_checkpoint_would_sample(make_trainer, sets, talkative_model, tmp_path):
    shutil.copytree(talkative_model, tmp_path / "sampling")
    file = tmp_path / "sampling" / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 50.0, "top_k": 0, "num_beams": 2}
    file.write_text(json.dumps({**json.loads(file.read_text()), **sampling}))
    samples = []
    for name in (talkative_model, str(tmp_path / "sampling")):
        trainer = make_trainer(
            eval_dataset=sets["near"], model_name_or_path=name, output_dir=str(tmp_path / "run"), **DECODING
        )
        trainer.evaluate()
        samples.append((tmp_path / "run" / "validation_samples" / "step-0.txt").read_text(encoding="utf-8"))
    assert trainer.model.generation_config.do_sample and trainer.model.generation_config.num_beams == 2
    assert samples[0] == samples[1] and samples[0].count("\nhyp: ") == 3


def test_last_answer_is_decoded_with_the_previous_dialogue(tiny_corpus, tiny_model, tmp_path):
    turns = [json.loads(line) for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()[:3]]
    messages = turns[0]["messages"] + turns[1]["messages"][1:]
    rows = [{"messages": messages, "hotwords": ["Qwen"]}, {"messages": turns[2]["messages"]}]
    jsonl = tmp_path / "dialogues.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    prepared = KeyedRows(prepare_rows([str(jsonl)], processor, 2048, full_precision(tmp_path))[0])

    batch = PromptCollator(SpeechLLMCollator(processor))(prepared.__getitems__([0, 1]))
    expected = [
        processor.apply_chat_template(messages[:-1], hotwords=["Qwen"]),
        processor.apply_chat_template(turns[2]["messages"][:-1]),
    ]
    inputs = batch["inputs"]
    for ids, mask, single in zip(inputs["input_ids"], inputs["attention_mask"], expected, strict=True):
        assert ids[mask.bool()].tolist() == single["input_ids"][0].tolist()
        assert mask.tolist() == sorted(mask.tolist())  # padded on the left
    assert len(inputs["input_features"]) == 3
    frames = int(inputs["input_features_mask"][2].sum())
    torch.testing.assert_close(inputs["input_features"][2, :frames], expected[1]["input_features"][0])
    assert batch["references"] == [messages[-1]["content"], turns[2]["messages"][-1]["content"]]
    assert batch["names"] == ["dialogues.jsonl:1", "dialogues.jsonl:2"]
    assert batch["positions"] == [0, 1] and batch["counted"] == [True, True]
    assert PromptCollator(SpeechLLMCollator(processor))(prepared.__getitems__([-1]))["counted"] == [False]


@pytest.mark.parametrize(("rows", "number"), [(24, 5), (1000, 10), (7, 6), (5, 5), (5, 9), (5, None), (3, 1)])
def test_sample_is_fixed_and_spread_over_the_set(rows, number):
    chosen = spread_rows(rows, number)
    assert np.array_equal(chosen, spread_rows(rows, number))
    if number is None or number >= rows:
        assert chosen.tolist() == list(range(rows))
    else:
        assert len(set(chosen.tolist())) == number and chosen.min() >= 0 and chosen.max() < rows
        assert [int(index * number / rows) for index in chosen] == pytest.approx(range(number), abs=1)


def test_only_the_sample_is_decoded(make_trainer, tiny_rows):
    trainer = make_trainer(eval_dataset=tiny_rows, eval_cer_samples=4, **DECODING)
    metrics = trainer.evaluate()
    chosen = [json.loads(tiny_rows[int(index)]["messages"])[-1]["content"] for index in spread_rows(24, 4)]
    assert metrics["eval_reference_tokens"] == sum(count_errors(text, "").reference_tokens for text in chosen)
    whole = make_trainer(eval_dataset=tiny_rows).evaluate()
    assert metrics["eval_loss"] == whole["eval_loss"] and "eval_cer" not in whole


# Effects on training


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_decoding_does_not_change_training(make_trainer, compose_tiny, tiny_config, sets, tmp_path, lora):
    config = tiny_config()
    config["llm_config"]["attention_dropout"] = 0.2  # makes the random state matter
    for part in compose_tiny(config):
        part.save_pretrained(tmp_path / "model")
    options = {
        "model_name_or_path": str(tmp_path / "model"), "use_lora": lora, "max_steps": 3, "spec_augment": True,
        "freeze_audio_encoder": True, "gradient_checkpointing": True,
    }  # fmt: skip
    without = make_trainer(output_dir=str(tmp_path / "without"), **options)
    without.train()
    decoding = make_trainer(
        eval_dataset=sets["near"], output_dir=str(tmp_path / "with"), eval_strategy="steps", eval_steps=1,
        **DECODING, **options,
    )  # fmt: skip
    decoding.train()
    assert list(cers_of(decoding)) == [0, 1, 2, 3]
    for (name, expected), found in zip(without.model.named_parameters(), decoding.model.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_resumed_run_has_the_same_weights_and_the_same_log(make_trainer, sets, tmp_path, interrupt):
    sets.pop("far")
    options = {**DECODING, **EVERY_STEP, "save_steps": 2, "retention_file": "general.jsonl", "max_steps": 4,
               "early_stopping_patience": 3, "max_retention_loss": 500.0, "retention_action": "stop"}  # fmt: skip
    whole = make_trainer(eval_dataset=sets, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    options["output_dir"] = str(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(3)], eval_dataset=sets, **options).train()
    resumed = make_trainer(eval_dataset=sets, resume_from_checkpoint="true", **options)
    resumed.train(resume_from_checkpoint=find_checkpoint(resumed.args))
    assert same_weights(resumed, tmp_path / "whole" / "checkpoint-4")
    for key in ("eval_cer", "eval_retention_cer", "eval_loss"):
        expected = [(entry["step"], entry[key]) for entry in whole.state.log_history if key in entry]
        assert [step for step, _ in expected] == [0, 1, 2, 3, 4]
        assert [(entry["step"], entry[key]) for entry in resumed.state.log_history if key in entry] == expected
    tables = [(tmp_path / run / "validation.tsv").read_text() for run in ("whole", "resumed")]
    assert tables[0] == tables[1]


# Results


def test_scores_of_all_sets_are_in_log_table_and_curve(make_trainer, sets):
    trainer = make_trainer(
        eval_dataset=sets, retention_file="data/general.jsonl", max_retention_loss=900.0, max_steps=2,
        eval_strategy="steps", eval_steps=2, **DECODING, **QUICK,
    )  # fmt: skip
    result = trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_cer" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2]
    for entry in evaluations:
        for measure in ("loss", "token_accuracy", "cer"):
            pair = [entry[f"eval_{name}_{measure}"] for name in ("near", "far")]
            assert entry[f"eval_{measure}"] == pytest.approx(sum(pair) / 2)
            assert f"eval_retention_{measure}" in entry
        errors = sum(entry[f"eval_far_{name}"] for name in COUNTS[:3])
        assert entry["eval_far_cer"] == errors / entry["eval_far_reference_tokens"]

    save_final(trainer, result)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_cer" in entry] == [0, 2]  # no third one
    folder = Path(trainer.args.output_dir)
    lines = [line.split("\t") for line in (folder / "validation.tsv").read_text().splitlines()]
    assert lines[0] == ["step", "set", "loss", "token_accuracy", "cer_percent", *COUNTS]
    assert [line[:2] for line in lines[1:]] == [[step, name] for step in "02" for name in sets]
    assert float(lines[5][4]) == pytest.approx(100 * evaluations[1]["eval_far_cer"], abs=1e-3)
    assert [int(cell) for cell in lines[5][5:]] == [evaluations[1][f"eval_far_{name}"] for name in COUNTS]
    samples = (folder / "validation_samples" / "step-2.txt").read_text(encoding="utf-8")
    assert samples.count("\nref: ") == samples.count("\nhyp: ") == 9
    assert (
        "# retention" in samples
        and "train.jsonl:4: " in samples
        and (folder / "validation_samples/step-0.txt").exists()
    )
    saved = json.loads((folder / "eval_results.json").read_text())
    assert saved["eval_near_cer"] == evaluations[1]["eval_near_cer"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "error rate before training | error rate after training" in card
    before, after = (f"{100 * evaluations[number]['eval_near_cer']:.2f} %" for number in (0, 1))
    name = trainer.validator.rate_names["near"]
    assert name in ("CER", "WER", "MER") and f"| {name} {before} | {name} {after} |" in card
    assert matplotlib.image.imread(folder / "training_curve.png").shape[:2] == (960, 1200)  # four panels


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws the curve of a log; returns a dict of lines by label for each panel, by title."""
    figures = []

    def draw(log_history, **options):
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        draw_curve(log_history, tmp_path / "new" / "curve.png", **options)
        return {axes.get_title(): {line.get_label(): line for line in axes.lines} for axes in figures[-1].axes}

    return draw


def test_curve_has_a_panel_for_each_quantity_in_the_log(tmp_path, drawn):
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}]
    draw_curve(history, tmp_path / "new" / "curve.png")
    assert matplotlib.image.imread(tmp_path / "new" / "curve.png").shape[:2] == (480, 600)
    assert {title: list(lines) for title, lines in drawn(history).items()} == {
        "Loss per supervised token": ["training", "validation"]
    }


@pytest.fixture
def fonts(monkeypatch):
    """Limits the installed fonts to those that matplotlib brings along; returns the letters of a font by its name."""
    manager = font_manager.fontManager
    bundled = [font for font in manager.ttflist if Path(font.fname).is_relative_to(matplotlib.get_data_path())]
    monkeypatch.setattr(manager, "ttflist", bundled)
    callbacks._fonts_and_names.cache_clear()
    yield lambda name: set(FT2Font(font_manager.findfont(name)).get_charmap())
    callbacks._fonts_and_names.cache_clear()


@pytest.mark.filterwarnings("error:Glyph")
def test_curve_takes_a_font_that_has_the_letters_of_a_set(fonts, drawn, tmp_path, caplog):
    letter = chr(min(code for code in fonts("STIXGeneral") - fonts("DejaVu Sans") if chr(code).isalpha()))
    history = [{"step": 1, "loss": 2.0}, {"step": 1, f"eval_{letter}_loss": 2.0}, {"step": 1, "eval_dev_loss": 1.0}]
    draw_curve(history, tmp_path / "curve.png")
    assert [*drawn(history)["Loss per supervised token"]] == ["training", "dev", letter]
    assert not caplog.records


@pytest.mark.filterwarnings("error:Glyph")
def test_curve_names_a_set_by_number_if_no_font_has_its_letters(fonts, drawn, tmp_path, caplog):
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_验证_loss": 2.0, "eval_dev_loss": 1.0, "eval_验证_cer": 0.5},
    ]
    draw_curve(history, tmp_path / "curve.png")
    panels = drawn(history, rate_names={"验证": "CER"})
    assert [*panels["Loss per supervised token"]] == ["training", "dev", "set 2"]
    assert [*panels["Error rate of decoded validation sets, %"]] == ["set 2: CER 50.00"]
    assert [record.getMessage() for record in caplog.records] == [
        "no installed font has the letters of 验证: the training curve shows the name set 2; install a font such as "
        "Noto Sans CJK"
    ]


def test_curve_shows_the_base_model_and_sets_apart_from_their_mean(drawn):
    history = [
        {"step": step, "eval_near_cer": rate, "eval_far_cer": 3 * rate, "eval_cer": 2 * rate}
        for step, rate in ((0, 0.4), (9, 0.1))
    ]
    lines = drawn(history, rate_names={"near": "WER", "far": "CER"})["Error rate of decoded validation sets, %"]
    near, far, mean = "near: WER 40.00 to 10.00", "far: CER 120.00 to 30.00", "mean of the sets: 80.00 to 20.00"
    assert {near, far, mean, "base model"} <= set(lines)
    assert len({lines[label].get_color() for label in (near, far, mean)}) == 3
    assert [lines[label].get_linestyle() for label in (near, far, mean)] == ["-", "-", "--"]
    base = [line for label, line in lines.items() if label.startswith("_")]
    # The hollow diamonds; the axis ends at 105 %.
    assert sorted((*line.get_xdata(), *line.get_ydata()) for line in base) == [(0, 40), (0, 80), (0, 105)]


def test_curve_shows_the_learning_rates_of_the_parts(drawn):
    history = [{"step": step, "loss": 1.0, "learning_rate": 2e-5 * step} for step in (1, 2)]
    assert list(drawn(history)["Learning rate"]) == ["training"]
    parts = [{**entry, "audio_adaptor_learning_rate": 1e-4, "llm_learning_rate": 2e-5} for entry in history]
    assert list(drawn(parts)["Learning rate"]) == ["audio_adaptor", "llm"]


# Selection of checkpoints


def test_best_checkpoint_is_the_one_with_the_lowest_mean_cer(make_trainer, sets, scripted):
    scripted({3: {0: 90, 1: 40, 2: 10, 3: 30}, 2: {0: 90, 1: 40, 2: 20, 3: 5}})  # means 90, 40, 15, 17.5
    sets.pop("retention")
    options = {**DECODING, **EVERY_STEP, **QUICK, "load_best_model_at_end": True, "max_steps": 3}
    trainer = make_trainer(eval_dataset=sets, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same_weights(trainer, trainer.state.best_model_checkpoint)
    assert trainer.current_scores["eval_near_cer"] == 0.1


def test_best_checkpoint_may_be_selected_by_one_set_or_another_metric(make_arguments, make_trainer, sets, scripted):
    scripted({3: {0: 90, 1: 40, 2: 10}, 2: {0: 90, 1: 5, 2: 20}})
    sets.pop("retention")
    options = {**DECODING, **EVERY_STEP, **QUICK, "max_steps": 2, "validation_file": ["near=a.jsonl", "far=b.jsonl"]}
    trainer = make_trainer(eval_dataset=sets, metric_for_best_model="eval_far_cer", **options)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (1, 0.05)
    assert make_arguments(**options).metric_for_best_model == "cer"
    assert not make_arguments(**options).greater_is_better
    assert make_arguments(**options, metric_for_best_model="near_token_accuracy").greater_is_better


def test_early_stopping_keeps_the_count_after_an_interruption(make_trainer, sets, scripted, tmp_path, interrupt):
    scripted({3: {0: 90, 1: 40, 2: 50, 3: 60, 4: 1}})
    options = {**DECODING, **EVERY_STEP, **QUICK, "early_stopping_patience": 2, "max_steps": 4}
    trainer = make_trainer(eval_dataset={"near": sets["near"]}, **options)
    trainer.train()
    assert cers_of(trainer) == {0: 90, 1: 40, 2: 50, 3: 60}

    options["output_dir"] = str(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(3)], eval_dataset={"near": sets["near"]}, **options).train()
    resumed = make_trainer(eval_dataset={"near": sets["near"]}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert cers_of(resumed) == cers_of(trainer)


# Retention guard


RETENTION = {"retention_file": "general.jsonl", "max_retention_loss": 2.0}


def test_retention_guard_warns(make_trainer, sets, scripted, caplog):
    scripted({3: {0: 50, 1: 40, 2: 30}, 4: {0: 10, 1: 12, 2: 13}})
    sets.pop("far")
    trainer = make_trainer(eval_dataset=sets, max_steps=2, **DECODING, **EVERY_STEP, **QUICK, **RETENTION)
    trainer.train()
    warnings = [record.message for record in caplog.records if record.message.startswith("retention: ")]
    assert len(warnings) == 1
    assert "at step 2 the CER of general.jsonl is 13.00 %, 3.00 points above the base model's" in warnings[0]
    assert trainer.state.global_step == 2 and trainer.state.best_global_step == 2


@pytest.mark.parametrize(
    ("options", "expected", "kept", "cer"),
    [
        # The best good checkpoint is step 2, although step 3 has a lower CER.
        ({"load_best_model_at_end": True}, 2, [1, 2], 40),
        ({}, 2, [1, 2], 40),
        ({"save_total_limit": 2}, 2, [1, 2], 40),
        # Saved between evaluations: the latest checkpoint before a good evaluation, scored at the end.
        ({"eval_steps": 3, "save_steps": 2}, 2, [2, 4], 44),
        # Neither the best (step 2) nor the latest: --save_total_limit keeps the last good checkpoint.
        ({"eval_steps": 2, "save_total_limit": 2}, 4, [2, 4, 5], 45),
    ],
    ids=["best", "last", "limit", "between", "often"],
)
def test_training_above_the_retention_limit_returns_to_the_last_good_checkpoint(
    make_trainer, sets, scripted, caplog, options, expected, kept, cer
):
    sets.pop("far")
    forgets_at = 6 if "eval_steps" in options else 3
    general = {step: 10 if step == 0 else 11 if step < forgets_at else 15 for step in range(7)}
    scripted({3: dict(enumerate((50, 45, 40, 5 if forgets_at == 3 else 42, 45, 5, 5))), 4: general})
    options = {**DECODING, **EVERY_STEP, **QUICK, **RETENTION, **options}
    trainer = make_trainer(eval_dataset=sets, max_steps=8, retention_action="stop", **options)
    result = trainer.train()
    assert trainer.state.global_step == forgets_at
    assert steps_kept(trainer) == kept
    assert trainer.state.best_metric in (0.4, 0.42)  # not the metric of the last evaluation
    assert same_weights(trainer, Path(trainer.args.output_dir) / f"checkpoint-{expected}")
    assert "training ends" in caplog.text
    assert f"the final weights are those of {trainer.args.output_dir}/checkpoint-{expected}" in caplog.text
    scripted({3: {forgets_at: 44}, 4: {forgets_at: 11}})  # for a final checkpoint without scores
    save_final(trainer, result)
    assert same_weights(trainer, trainer.args.output_dir)
    folder = Path(trainer.args.output_dir)
    assert round(100 * json.loads((folder / "eval_results.json").read_text())["eval_cer"]) == cer
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"checkpoint-{expected}, because later ones exceed the limit" in card


def test_training_above_the_retention_limit_from_the_start_saves_nothing(make_trainer, sets, scripted):
    scripted({3: {0: 50, 1: 4}, 4: {0: 10, 1: 50}})
    sets.pop("far")
    trainer = make_trainer(
        eval_dataset=sets, max_steps=2, retention_action="stop", **DECODING, **EVERY_STEP, **QUICK, **RETENTION
    )
    with pytest.raises(RetentionError, match="ended at step 1, before a checkpoint within.*remains the best model"):
        trainer.train()
    assert steps_kept(trainer) == []


def test_resumed_run_keeps_the_retention_limit_of_the_base_model(make_trainer, sets, scripted, tmp_path, interrupt):
    scripted({3: dict.fromkeys(range(5), 20), 4: {0: 10, 1: 12, 2: 12, 3: 14, 4: 14}})
    sets.pop("far")
    options = {**DECODING, **EVERY_STEP, **QUICK, "max_steps": 4, "eval_dataset": sets}
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(3)], retention_action="stop", **options, **RETENTION).train()
    resumed = make_trainer(retention_action="stop", resume_from_checkpoint="true", **options, **RETENTION)
    resumed.train(resume_from_checkpoint=find_checkpoint(resumed.args))
    assert resumed.state.global_step == 3  # 2 points above the checkpoint's, 4 above the base model's
    assert same_weights(resumed, tmp_path / "run" / "checkpoint-2")


def test_run_without_the_base_models_score_cannot_resume_with_a_guard(make_trainer, make_arguments, sets, scripted):
    scripted({3: {0: 50, 1: 4}})
    make_trainer(eval_dataset={"near": sets["near"]}, max_steps=1, **DECODING, **EVERY_STEP, **QUICK).train()
    with pytest.raises(ValueError, match="started without --retention_file"):
        find_checkpoint(
            make_arguments(resume_from_checkpoint="true", max_steps=2, **DECODING, **EVERY_STEP, **QUICK, **RETENTION)
        )


def test_best_checkpoints_and_the_latest_are_kept(make_trainer, sets, scripted):
    scripted({3: dict(enumerate((90, 30, 10, 40, 20, 50)))})
    trainer = make_trainer(
        eval_dataset={"near": sets["near"]}, keep_best_checkpoints=2, save_total_limit=1, max_steps=5,
        **DECODING, **EVERY_STEP, **QUICK,
    )  # fmt: skip
    trainer.train()
    assert steps_kept(trainer) == [2, 4, 5]
    assert same_weights(trainer, Path(trainer.args.output_dir) / "checkpoint-2")


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("averaged", "won"), [(9, True), (10, False), (12, False)])
def test_mean_of_the_best_checkpoints_is_final_if_better(make_trainer, sets, scripted, averaged, won, lora):
    scripted({3: dict(enumerate((90, 30, 10, 20)))}, averaged={3: averaged})
    trainer = make_trainer(
        eval_dataset={"near": sets["near"]}, keep_best_checkpoints=2, average_best=True, max_steps=3, use_lora=lora,
        freeze_audio_encoder=True, **DECODING, **EVERY_STEP,
    )  # fmt: skip
    result = trainer.train()
    save_final(trainer, result)
    folder = Path(trainer.args.output_dir)
    assert not (folder / "averaged").exists()
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    saved, best, second = (load_file(folder / path / file) for path in ("", "checkpoint-2", "checkpoint-3"))
    assert saved.keys() == best.keys()
    for name, tensor in saved.items():
        mean = ((best[name].double() + second[name].double()) / 2).float()
        assert torch.equal(tensor, mean if won else best[name]), name
    results = json.loads((folder / "all_results.json").read_text())
    assert (results["best_cer"], results["averaged_cer"], results["averaged_remains"]) == (0.1, averaged / 100, won)
    assert results["eval_cer"] == (averaged / 100 if won else 0.1)
    assert [entry["averaged_near_cer"] for entry in trainer.state.log_history if "averaged_cer" in entry] == [
        averaged / 100
    ]
    assert "mean of the checkpoints of steps 2, 3" in (folder / "README.md").read_text(encoding="utf-8")


def test_mean_above_the_retention_limit_is_not_final(make_trainer, sets, scripted):
    scripted({3: dict(enumerate((90, 30, 20))), 4: dict.fromkeys(range(3), 10)}, averaged={3: 5, 4: 40})
    sets.pop("far")
    trainer = make_trainer(
        eval_dataset=sets, keep_best_checkpoints=2, average_best=True, max_steps=2, retention_action="stop",
        **DECODING, **EVERY_STEP, **QUICK, **RETENTION,
    )  # fmt: skip
    trainer.train()
    assert same_weights(trainer, Path(trainer.args.output_dir) / "checkpoint-2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": "on"}, "choose auto or off"),
        ({"eval_cer": True}, "--eval_cer requires validation sets; add --validation_file"),
        ({"eval_cer_samples": 3}, "add --eval_cer"),
        ({**DECODING, "eval_cer_samples": 0}, "must be at least 1"),
        ({"retention_file": "a.jsonl"}, "add --eval_cer"),
        ({**DECODING, "retention_file": "a.jsonl"}, "--eval_strategy steps"),
        ({**DECODING, **EVERY_STEP, "retention_file": "a.jsonl", "retention_action": "halt"}, "choose warn or stop"),
        ({**DECODING, **EVERY_STEP, **RETENTION, "retention_action": "stop", "save_total_limit": 1}, "at least 2"),
        ({**DECODING, "keep_best_checkpoints": 2}, "--eval_strategy steps"),
        ({**DECODING, **EVERY_STEP, "average_best": True}, "--keep_best_checkpoints with at least 2"),
        ({**DECODING, **EVERY_STEP, "metric_for_best_model": "wer"}, "choose one of loss, .*dev_cer"),
        ({"validation_file": ["dev.jsonl"], "metric_for_best_model": "cer"}, "require --eval_cer"),
        ({**DECODING, **EVERY_STEP, "save_steps": 3, "eval_steps": 2, "keep_best_checkpoints": 2}, "multiple"),
    ],
)  # fmt: skip
def test_contradictions_are_found_before_loading(make_options, options, message):
    with pytest.raises(ValueError, match=message):
        make_options(**options)


# Several processes

DISTRIBUTED_SCRIPT = """
import json, sys
from transformers import set_seed
from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.training import callbacks
from hf_speechllm.training.trainer import SpeechLLMTrainer

callbacks.draw_curve = lambda *_: None  # takes longer than training
options = parse_arguments(sys.argv[2:])
args, name = options.training, options.model.model_name_or_path
set_seed(args.seed)
processor = SpeechLLMProcessor.from_pretrained(name)
rows = prepare_rows(options.data.train_file, processor, 2048, options.data)[0]
trainer = SpeechLLMTrainer(
    model=SpeechLLMForConditionalGeneration.from_pretrained(name), args=args, train_dataset=rows,
    eval_dataset={"many": rows.select(range(3, 11)), "few": rows.select(range(3))},
    data_collator=SpeechLLMCollator(processor), processing_class=processor,
)
trainer.train()
with open(f"{sys.argv[1]}.{args.process_index}", "w") as file:
    json.dump({
        "world_size": args.world_size, "selection": trainer.selection,
        "log": [line for line in trainer.state.log_history if "eval_cer" in line or "averaged_cer" in line],
    }, file)
trainer.accelerator.end_training()
"""


def test_two_processes_count_the_same_errors_as_one(
    make_trainer, tiny_rows, tiny_corpus, talkative_model, tmp_path, launch
):
    options = {
        "model_name_or_path": talkative_model, "validation_file": ["many=a", "few=b"], "eval_max_new_tokens": 4,
        # Batches of one row. Of three rows, both processes get two: one row is repeated.
        "per_device_eval_batch_seconds": 0.1, "per_device_train_batch_seconds": 4.1, "learning_rate": 3e-3,
        "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "keep_best_checkpoints": 2, "max_steps": 2, "report_to": "none",
    }  # fmt: skip
    sets = {"many": tiny_rows.select(range(3, 11)), "few": tiny_rows.select(range(3))}
    one = make_trainer(
        eval_dataset=sets, eval_cer=True, average_best=True, output_dir=str(tmp_path / "one_run"),
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    one.train()

    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED_SCRIPT, encoding="utf-8")
    arguments = [
        script, tmp_path / "two", "--train_file", tiny_corpus.jsonl, "--eval_cer",
        "--average_best", "--output_dir", tmp_path / "two_run", "--cache_dir", tmp_path / "cache", "--use_cpu", "true",
        "--preprocessing_num_workers", 1, "--disable_tqdm", "true",
    ]  # fmt: skip
    for key, value in options.items():
        arguments += [f"--{key}", *(value if isinstance(value, list) else [value])]
    done = launch(*arguments, config=REPOSITORY / "accelerate_configs/cpu.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    two = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("two.[0-9]"))]

    assert [run["world_size"] for run in two] == [2, 2] and one.args.world_size == 1
    log = [line for line in one.state.log_history if "eval_cer" in line or "averaged_cer" in line]
    assert [line["step"] for line in log] == [0, 1, 2, 2]  # the last one is the mean
    keys = [f"{name}_{key}" for name in sets for key in ("cer", *COUNTS)]
    for run in two:
        assert [line["step"] for line in run["log"]] == [0, 1, 2, 2]
        for expected, found in zip(log, run["log"], strict=True):
            prefix = "averaged" if "averaged_cer" in expected else "eval"
            assert [found[f"{prefix}_{key}"] for key in keys] == [expected[f"{prefix}_{key}"] for key in keys]
        assert run["selection"] == one.selection
    samples = [(tmp_path / f"{run}_run" / "validation_samples" / "step-0.txt").read_text() for run in ("one", "two")]
    assert samples[0] == samples[1] and samples[0].count("\nref: ") == 11
