"""The plan of a run: its numbers are those of the real run; the configuration fits data and machine."""

import json
import logging
import math
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from hf_speechllm.cli import plan as cli_plan
from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.cli.plan import apply_plan, given_options, parse_planned, split_own_options
from hf_speechllm.data.sampler import BudgetBatchSampler
from hf_speechllm.diagnosis import curve, plan, probe
from hf_speechllm.diagnosis.isolation import ProbeError, run_isolated
from hf_speechllm.diagnosis.plan import VALIDATION, format_time, make_plan, planned_options
from hf_speechllm.diagnosis.probe import Measurement
from hf_speechllm.diagnosis.recommendations import RECOMMENDATIONS, markdown_table, recommend
from hf_speechllm.diagnosis.sampling import FIRST_BATCHES, ChosenBatches, Work, representative_batches
from hf_speechllm.diagnosis.schedule import Schedule
from hf_speechllm.training.arguments import batch_seconds
from hf_speechllm.training.checkpointing.manifest import checkpoint_folders

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "recipes/configs"
ALL = [item.name for item in RECOMMENDATIONS]


# Recommendations


@pytest.mark.parametrize(
    ("hours", "name"),
    [(0.1, "few_hours"), (9.9, "few_hours"), (10, "lora"), (999, "lora"), (1000, "encoder_adaptor"), (10_000, "all")],
)
def test_amount_of_data_decides(hours, name):
    assert recommend(hours, ALL).name == name


def test_what_does_not_fit_is_replaced_by_the_next_smaller_configuration():
    assert recommend(20_000, ["adaptor_only", "lora", "encoder_adaptor"]).name == "encoder_adaptor"
    assert recommend(5, ["adaptor_only", "lora", "all"]).name == "adaptor_only"
    assert recommend(5, ["lora", "all"]) is None  # more capacity does not help


def test_documents_have_the_table_and_every_configuration_exists():
    assert markdown_table() in (REPOSITORY / "docs/guides/choosing.md").read_text(encoding="utf-8")
    for name in ("README.md", "README_zh.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert all(f"| `{configuration}` |" in text for configuration in ALL)
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")} - {"quickstart"}
    assert shipped == {*ALL}


@pytest.mark.parametrize("name", ALL)
def test_schedules_of_the_configurations_are_shares(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    for has_validation in (False, True):
        options = planned_options(config, (), has_validation, 8)
        assert 0 < options["save_steps"] < 1
        assert (options.get("eval_steps") == options["save_steps"]) == has_validation
        assert bool(options.get("load_best_model_at_end")) == has_validation


def test_options_of_the_user_replace_those_of_the_plan():
    config = {"learning_rate": 1.0, "num_train_epochs": 3, "dataloader_num_workers": 4}
    assert planned_options(config, (), True, 2)["dataloader_num_workers"] == 2  # not more than cores
    assert "learning_rate" not in planned_options(config, {"learning_rate"}, True, 8)
    assert not {*VALIDATION} & {*planned_options(config, {"eval_strategy"}, True, 8)}
    assert planned_options({**config, "eval_strategy": "epoch"}, (), True, 8)["eval_strategy"] == "epoch"


# Samples and schedules


def test_probe_starts_with_the_largest_batches_and_then_spreads_over_the_lengths():
    seconds = np.random.default_rng(0).lognormal(1.5, 0.6, 3000)
    batches = BudgetBatchSampler(seconds, 60.0, row_cost=1.5).batches(0)
    chosen = representative_batches(seconds, batches, FIRST_BATCHES + 16)
    assert max(seconds[chosen[1]]) == max(seconds)
    assert len(chosen[2]) == max(map(len, batches))
    for number in (4, 8, 16):
        costs = [[seconds[batch].sum(), len(batch)] for batch in chosen[FIRST_BATCHES : FIRST_BATCHES + number]]
        everything = [[seconds[batch].sum(), len(batch)] for batch in batches]
        assert np.mean(costs, axis=0) == pytest.approx(np.mean(everything, axis=0), rel=0.15)
    few = representative_batches(seconds, batches[:2], 10)
    assert len(few) == 10 and {id(batch) for batch in few} == {id(batch) for batch in batches[:2]}
    sampler = ChosenBatches(seconds, chosen, seed=0)
    assert [*sampler] == [batch.tolist() for batch in chosen] and len(sampler) == len(chosen)


def test_start_of_processes_counts_once_per_set():
    work = Work([100.0, 1100.0], [3.0, 13.0])  # 2 s, and 1 s per 100 s of audio
    assert work.total(10_000.0) == pytest.approx(102.0)
    assert work.total(10_000.0, 500.0) == pytest.approx(109.0)
    noisy = Work([100.0, 1100.0], [14.0, 13.0])  # the first part must not make the rate negative
    assert 0.25 * 13 / 1100 * 1e6 < noisy.total(1e6) <= 13 / 1100 * 1e6


def make_schedule(**options):
    defaults = dict(max_steps=-1, num_epochs=3.0, accumulation=1, eval_strategy="no", save_strategy="steps",
                    eval_steps=500, save_steps=0.1, eval_on_start=False, has_validation=True)  # fmt: skip
    return Schedule(**{**defaults, **options})


def test_steps_evaluations_and_checkpoints():
    assert make_schedule(accumulation=4, num_epochs=2.5).steps(10) == (3, 8)
    assert make_schedule(max_steps=7).steps(10) == (10, 7)
    assert make_schedule().checkpoints(95) == 10  # every 10 steps, and at the end
    assert make_schedule(save_strategy="no").checkpoints(95) == 0
    assert make_schedule().evaluations(95) == 1  # of the final weights
    assert make_schedule(eval_strategy="steps", eval_steps=0.25, eval_on_start=True).evaluations(95) == 5
    assert make_schedule(eval_strategy="epoch").evaluations(95) == 3
    assert make_schedule(has_validation=False).evaluations(95) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (125, "2 min 5 s"), (2 * 3600 + 1800, "2 h 30 min"), (86400 * 3, "3.0 days")]
)
def test_times_have_two_units(seconds, text):
    assert format_time(seconds) == text


# Separate processes


def test_errors_of_a_separate_process_are_one_line_and_lack_of_memory_is_told_apart():
    with pytest.raises(ProbeError, match="^ZeroDivisionError: integer division or modulo by zero$"):
        run_isolated(divmod, 1, 0)
    with pytest.raises(MemoryError):  # the system kills a process without an answer
        run_isolated(signal.raise_signal, signal.SIGKILL)


def test_separate_process_is_no_rank_of_the_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU")
    value, seconds = run_isolated(eval, f"[__import__('os').environ.get(name) for name in {names}]")
    assert value == [None, None, None, "true"] and seconds >= 0
    assert os.environ["RANK"] == "7"


def test_bars_of_a_separate_process_do_not_fill_log_files(capfd):
    run_isolated(exec, r"import sys; sys.stderr.write('\rlengths: 50%'); sys.stderr.write('a line\n')")
    assert capfd.readouterr().err == "a line\n"


def test_separate_process_starts_its_own_processes_like_the_run():
    found, _ = run_isolated(eval, "__import__('multiprocessing').get_start_method()")
    assert found == multiprocessing.get_start_method()


# Plans with invented measurements


@pytest.fixture
def machine(monkeypatch):
    """A machine of 10 GB on which a batch needs 10 GB per 100 s, times the number of trained parts of the options."""
    measured = []

    def run(function, parse, argv, options, *rest):
        if function is plan.describe_data:
            return {"rows": 500, "hours": 20.0, "longest_seconds": 20.0, "validation_rows": 40,
                    "validation_hours": 0.1, "cores": 4, "unsupported": ["spec_augment"]}, 0.0  # fmt: skip
        measured.append({**options})
        budget = batch_seconds(options.get("per_device_train_batch_seconds", 60.0))
        if options.get("broken"):
            raise ProbeError("broken")
        used = budget * 1e8 * options.get("size", 1)
        if used > 4e10:
            raise MemoryError("killed")
        accumulation = options.get("gradient_accumulation_steps", 1)
        return Measurement(budget, accumulation, 100, 300, 3.0, 2, 10, {"training": 90.0, "end": 1.0}, 0.3, 2.0,
                           int(used), int(1e10), 80.0, used <= 1e10, "CPU", 16), 0.5  # fmt: skip

    monkeypatch.setattr(plan, "run_isolated", run)
    return measured


def test_batch_is_halved_until_it_fits_and_the_effective_batch_stays(machine):
    found = make_plan(None, [], {"lora": {"per_device_train_batch_seconds": 240}}, ())
    assert [item["per_device_train_batch_seconds"] for item in machine] == [240, 120, 60]
    assert found.chosen.options["gradient_accumulation_steps"] == 4
    assert found.chosen.measurement.seconds["end"] == 1.5
    given = {"per_device_train_batch_seconds"}
    found = make_plan(None, [], {"lora": {"per_device_train_batch_seconds": 240}}, given)  # the user's value stays
    assert found.configuration == "lora"  # 60 s is the default of the machine
    found = make_plan(None, [], {"lora": {"per_device_train_batch_seconds": "auto"}}, ())
    assert found.configuration == "lora" and machine[-1]["per_device_train_batch_seconds"] == "auto"
    found = make_plan(None, [], {"lora": {"per_device_train_batch_seconds": 240, "size": 9}}, ())
    assert found.configuration is None and "does not fit into memory" in found.candidates[0].problem
    with pytest.raises(ValueError, match="lora: does not fit into memory"):
        _ = found.chosen


def test_auto_measures_only_what_it_takes_and_falls_back(machine):
    configurations = {name: {"name": name, "spec_augment": True} for name in ALL}
    found = make_plan(None, [], configurations, (), only_recommended=True)
    assert "spec_augment" not in found.chosen.options
    assert [item["name"] for item in machine] == ["lora"] == [item.name for item in found.candidates]
    machine.clear()
    configurations["lora"]["broken"] = True
    found = make_plan(None, [], configurations, (), only_recommended=True)
    assert [item["name"] for item in machine] == ["lora", "few_hours"]
    assert found.configuration == "few_hours" and "lora is not usable" in found.reason


def test_table_names_the_recommended_configuration_and_problems(machine, tmp_path):
    configurations = {name: {"name": name} for name in ALL}
    configurations["all"]["broken"] = True
    found = make_plan(None, [], configurations, ())
    lines = plan.format_plan(found).splitlines()
    assert lines[0] == "data: 500 rows, 20.00 h of audio; validation: 40 rows, 0.10 h"
    table = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in ALL}
    assert {*table} == {*ALL}
    assert " ".join(table["lora"].split()) == "lora 60 s 3 300 1 min 32 s 6.0 GB <- recommended"
    assert table["all"].endswith("not usable: broken")
    assert any(line.startswith("recommended: lora. 20 h of audio") for line in lines)
    found.save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert stored["configuration"] == "lora" and stored["options"] == found.chosen.options


def test_own_options_are_separated():
    own, rest = split_own_options(["lora", "--json", "a", "--learning_rate", "1", "--curve", "--num_processes", "8"])
    assert (own.json, own.curve, own.num_processes) == ("a", True, 8)
    assert rest == ["lora", "--learning_rate", "1"]


# Real runs


@pytest.fixture
def in_process(monkeypatch):
    """Runs probes in this process, which saves the time of imports."""
    calls = []

    def run(function, *args):
        calls.append(function.__name__)
        return function(*args), 0.0

    for module in (plan, curve):
        monkeypatch.setattr(module, "run_isolated", run)
    for module in (probe, curve):
        monkeypatch.setattr(module, "silence", lambda: None)
    yield calls
    datasets.enable_caching()


@pytest.fixture
def arguments(tiny_model, tiny_corpus, tmp_path):
    """Options of a short run."""
    return [
        "--model_name_or_path", str(tiny_model), "--train_file", str(tiny_corpus.jsonl), "--validation_file",
        f"dev={tiny_corpus.jsonl}", "--use_cpu", "--report_to", "none", "--cache_dir", str(tmp_path / "cache"),
        "--preprocessing_num_workers", "1", "--per_device_train_batch_seconds", "4", "--num_train_epochs", "2",
        "--eval_max_new_tokens", "3", "--dataloader_num_workers", "0", "--disable_tqdm", "true",
    ]  # fmt: skip


def finetune(monkeypatch, *arguments):
    import sys

    from hf_speechllm.cli import finetune

    monkeypatch.setattr(sys, "argv", ["/bin/hf-speechllm", "finetune", *map(str, arguments)])
    try:
        finetune.main()
    except SystemExit as end:
        return end.code
    return None


def test_auto_takes_the_plan_and_a_resumed_run_takes_the_stored_plan(
    in_process, arguments, tmp_path, monkeypatch, capsys, caplog
):
    output = tmp_path / "run"
    arguments += ["--output_dir", output]
    assert finetune(monkeypatch, "--auto", *arguments, "--lora_r", 4) is None
    assert in_process == ["describe_data", "measure"]
    assert "recommended: few_hours" in capsys.readouterr().out
    stored = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert stored["configuration"] == "few_hours" and "lora_r" not in stored["options"]
    measured = stored["candidates"][0]["measurement"]
    assert measured["memory_bytes"] > 1e8 and measured["measured_steps"] > 0
    assert 0 < measured["cpu_seconds"] < 2 * sum(measured["seconds"].values())
    assert all(measured["seconds"][stage] > 0 for stage in ("start", "features", "training", "validation", "end"))
    # The real run has the size of the plan.
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["max_steps"] == measured["steps"] == math.ceil(2 * measured["steps_per_epoch"])
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_cer" in entry]
    every = math.ceil(0.1 * state["max_steps"])
    assert evaluated == [0, *range(every, evaluated[-1] + 1, every)] and len(evaluated) <= measured["evaluations"]
    assert (output / "training_args.bin").is_file() and (output / "adapter_config.json").is_file()
    adapter = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 16)  # of the user, of the plan
    assert not [*tmp_path.glob("plan-*")]  # temporary checkpoints

    in_process.clear()
    (output / "finished.json").unlink()
    with caplog.at_level(logging.INFO, "hf_speechllm"):
        code = finetune(monkeypatch, "--auto", *arguments, "--lora_r", 4, "--resume_from_checkpoint", "auto")
    assert code is None and in_process == []
    assert "the stored plan is used (few_hours)" in caplog.text
    assert "plan for few_hours, not for all" in finetune(monkeypatch, "all", "--auto", *arguments)
    (output / "plan.json").unlink()
    assert checkpoint_folders(output)
    assert "of a run without a plan" in finetune(monkeypatch, "--auto", *arguments)


def test_configuration_names_the_data_and_trains_only_a_ctc_head(in_process, arguments):
    config = {f"freeze_{part}": True for part in ("audio_encoder", "audio_adaptor", "llm")}
    config |= {"ctc_head": "linear", "num_train_epochs": 1}
    place = arguments.index("--train_file")
    config["train_file"] = str(arguments[place + 1])
    arguments = [*arguments[:place], *arguments[place + 2 :]]
    found = make_plan(parse_planned, arguments, {"mine": config}, given_options(arguments), seconds=0.1)
    assert found.chosen.problem is None and "eval_cer" not in found.chosen.options
    assert found.chosen.options["load_best_model_at_end"]


def test_stored_plan_is_made_again_if_the_data_changed(arguments, tiny_corpus, tmp_path, monkeypatch, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(tiny_corpus.jsonl.read_bytes())
    arguments[arguments.index("--train_file") + 1] = rows
    arguments = [*map(str, arguments), "--output_dir", str(tmp_path / "run")]
    measured = []

    def measure(*_, **__):
        measured.append(1)
        candidate = plan.Candidate("lora", options={"lora_r": 3})
        return plan.Plan({}, 1, [candidate], "lora")

    monkeypatch.setattr(cli_plan, "plan_run", measure)
    monkeypatch.setattr(plan, "format_plan", lambda found: "")
    caplog.set_level(logging.INFO, "hf_speechllm")

    def planned():
        caplog.clear()
        measured.clear()
        assert apply_plan(parse_arguments(arguments), arguments).parts.lora_r == 3
        return bool(measured), caplog.text

    assert planned() == (True, "")
    made, log = planned()
    assert not made and "the stored plan is used (lora)" in log and "changed" not in log
    rows.write_bytes(rows.read_bytes().replace(b"one", b"two"))  # of the same size
    made, log = planned()
    assert made and "the data have changed since this plan; planning again" in log
    (tmp_path / "run/checkpoint-1").mkdir()
    rows.write_bytes(tiny_corpus.jsonl.read_bytes())
    made, log = planned()
    assert not made and "the checkpoints of the run fix the plan" in log


@pytest.mark.parametrize("content", ["{", "[]", '{"configuration": null, "candidates": []}'])
def test_stored_plan_without_options_is_reported(content, arguments, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    end = finetune(monkeypatch, "--auto", *arguments, "--output_dir", tmp_path)
    assert f"{tmp_path}/plan.json is not a plan that can be used; delete it" in end


def test_a_curve_of_too_few_rows_is_refused_before_a_measurement(in_process, arguments, monkeypatch):
    from hf_speechllm.cli.plan import main

    monkeypatch.setattr("sys.argv", ["/bin/hf-speechllm", "plan", "few_hours", "--curve", *arguments])
    with pytest.raises(SystemExit, match="--curve requires at least 80 training rows; the data have"):
        main()
    assert in_process == ["describe_data"]


def test_learning_curve_of_nested_parts(in_process, arguments, tiny_corpus, tmp_path, monkeypatch):
    lines = tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines(keepends=True)
    many = tmp_path / "many.jsonl"
    many.write_text("".join(lines * 4), encoding="utf-8")
    arguments[arguments.index("--train_file") + 1] = str(many)
    monkeypatch.setattr(curve, "ROWS", 6)
    arguments += ["--save_strategy", "no"]
    found = make_plan(
        parse_planned, arguments, {"mine": {"learning_rate": 0.003}}, given_options(arguments), seconds=0.1
    )
    measured = found.chosen.measurement
    result = curve.learning_curve(parse_planned, arguments, found, minutes=5 * measured.step_seconds / 60)
    assert result.steps == 5
    assert [point.hours / found.data["hours"] for point in result.measured] == pytest.approx(
        [1 / 8, 1 / 4, 1 / 2], rel=0.1
    )
    assert [point.hours for point in result.expected] == [factor * found.data["hours"] for factor in (1, 2, 4)]
    for point in [*result.measured, *result.expected]:
        assert 0 <= point.low <= point.rate <= point.high
    assert result.base_rate > 0 and result.measured[0].epochs > result.measured[-1].epochs > 0
    rates = [point.rate for point in result.expected]
    assert rates == sorted(rates, reverse=True)
    found.data["validation_rows"] = 0
    with pytest.raises(ValueError, match="--curve requires a validation set"):
        curve.learning_curve(parse_planned, arguments, found, 1)
