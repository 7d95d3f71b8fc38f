"""Training under every engine of accelerate_configs, in two processes on the CPU: the same losses and weights as one
process with gradient accumulation."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = ["multi_gpu", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]
WRAPPERS = {
    "one": "SpeechLLMForConditionalGeneration",
    "multi_gpu": "DistributedDataParallel",
    "deepspeed_zero1": "DeepSpeedEngine",
    "deepspeed_zero2": "DeepSpeedEngine",
    "deepspeed_zero3": "DeepSpeedEngine",
    "deepspeed_zero3_offload": "DeepSpeedEngine",
}

# recipes/finetune.py; each rank also writes settings of the engine.
SCRIPT = """
import json, os, runpy, sys
import torch

note, engine, recipe = sys.argv[1:4]
sys.argv = [recipe, *sys.argv[4:]]
if engine == "fsdp2":
    sys.path.append(os.path.join(os.path.dirname(recipe), "../tests"))
    import fsdp_on_cpu
if engine.startswith("deepspeed_zero3"):  # otherwise every rank keeps every parameter of the tiny model
    from hf_speechllm.fast import deepspeed

    deepspeed.PERSISTENT_SIZE = 64

from hf_speechllm.training.checkpointing import verification
from hf_speechllm.training.trainer import SpeechLLMTrainer

class Watched(SpeechLLMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        rows.append(inputs["input_ids"].shape[0])
        record.update(
            wrapper=type(model).__name__, world_size=self.args.world_size,
            zero_stage=model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
            sharded=any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()),
            units=[name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")],
            persistent=len(getattr(getattr(model, "optimizer", None), "persistent_parameters", ())),
            parameters=sum(1 for _ in model.parameters()),
            gathered=sorted({type(item).__name__ for item in model.modules() if getattr(item, "_z3_leaf", False)}),
            overlapped=getattr(getattr(model, "optimizer", None), "overlap_comm", None),
            copied=not getattr(model, "gradient_as_bucket_view", True),
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def _save(self, output_dir=None, state_dict=None):
        if state_dict and "SAVE_WRONGLY" in os.environ:
            state_dict = {name: tensor * 2 if "mlp" in name else tensor for name, tensor in state_dict.items()}
        super()._save(output_dir, state_dict)

if "--compile_layers" in sys.argv:  # traced without code generation, which takes minutes
    from hf_speechllm.fast.compilation import LayerGroup

    init = LayerGroup.__init__
    LayerGroup.__init__ = lambda self, layers, backend: init(self, layers, "aot_eager")

def compare(*args):
    record["differs"] = compared(*args)
    return record["differs"]

record, rows = {}, []
compared = verification.CheckpointVerifier._compare
verification.CheckpointVerifier._compare = compare
import hf_speechllm.training.trainer as module
module.SpeechLLMTrainer = Watched
runpy.run_path(recipe, run_name="__main__")
with open(f"{note}.{os.environ.get('RANK', 0)}", "w") as file:
    json.dump({**record, "rows": rows}, file)
"""


@pytest.fixture(scope="module")
def train(tiny_corpus, tiny_model, tmp_path_factory, launch):
    """Trains under an engine; returns settings of the engine by rank, the log, and the output folder."""
    root = tmp_path_factory.mktemp("engines")
    script = root / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def run(engine, *options, num_processes=2, accumulation=1, folder=None):
        folder = folder or Path(tempfile.mkdtemp(dir=root)) / engine
        setup = None
        if engine != "one":
            config = yaml.safe_load((REPOSITORY / f"accelerate_configs/{engine}.yaml").read_text())
            config = {**config, "use_cpu": True, "num_processes": num_processes}
            config.pop("gpu_ids", None)
            setup = folder.with_suffix(".yaml")
            setup.write_text(yaml.safe_dump(config))
        result = launch(
            script, folder, engine, REPOSITORY / "recipes/finetune.py",
            "--model_name_or_path", tiny_model, "--train_file", tiny_corpus.jsonl, "--output_dir", folder,
            "--validation_file", tiny_corpus.jsonl, "--max_steps", 4, "--gradient_accumulation_steps", accumulation,
            "--learning_rate", "3e-3", "--warmup_steps", 0, "--per_device_train_batch_seconds", 4.1,
            "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true",
            "--adam_epsilon", "1e-3",  # far above rounding noise, which Adam would scale up
            "--cache_dir", root / "cache", "--preprocessing_num_workers", 1, "--disable_tqdm", "true",
            *options, config=setup,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-9000:]
        notes = [json.loads(path.read_text()) for path in sorted(folder.parent.glob(f"{folder.name}.[0-9]"))]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        log.append(json.loads((folder / "eval_results.json").read_text()))
        return notes, log, folder

    return run


@pytest.fixture(scope="module")
def one_process(train):
    """Result of one process with two batches per step."""
    return train("one", accumulation=2)


def check_engine(engine, notes, num_processes=2, model="SpeechLLMForConditionalGeneration"):
    assert [(note["world_size"], note["wrapper"]) for note in notes] == [
        (num_processes, WRAPPERS.get(engine, f"FSDP{model}"))
    ] * num_processes
    if engine.startswith("deepspeed"):
        assert [note["zero_stage"] for note in notes] == [int(engine.removesuffix("_offload")[-1])] * num_processes
    assert [note["sharded"] for note in notes] == [engine == "fsdp2"] * num_processes
    assert [note["copied"] for note in notes] == [False] * num_processes
    for note in notes:
        assert (0 < note["persistent"] < note["parameters"]) is engine.startswith("deepspeed_zero3")
        assert note["overlapped"] is (True if engine in ("deepspeed_zero1", "deepspeed_zero2") else None)
        assert note["gathered"] == (
            ["FunAsrNanoEncoderLayer", "Qwen3DecoderLayer"] if engine.startswith("deepspeed_zero3") else []
        )
        # FSDP shards the encoder as a whole, or peft's copies of the encoder.
        units = {name.partition("audio_encoder")[2] for name in note["units"] if "audio_encoder" in name}
        assert units <= {"", ".original_module", ".modules_to_save.default"} and bool(units) is (engine == "fsdp2")


def check_log(log, expected, but=None):
    tolerances = {"loss": 1e-5, "token_accuracy": 1e-4, "padding_share": 1e-4, "grad_norm": 1e-3}
    for key, tolerance in tolerances.items():
        if key == but:
            continue
        values = [[line[key] for line in lines if key in line] for lines in (log, expected)]
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=tolerance), key
        assert len(values[0]) == 4
    losses = [
        [line[key] for line in lines for key in sorted(line) if "eval" in key and "loss" in key]
        for lines in (log, expected)
    ]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def check_weights(folder, expected, file="model.safetensors"):
    saved, reference = load_file(folder / file), load_file(expected / file)
    assert saved.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(
            saved[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.core
@pytest.mark.parametrize("engine", [*ENGINES, pytest.param("deepspeed_zero3_offload", marks=pytest.mark.slow)])
def test_two_processes_equal_one_process_with_accumulation(engine, train, one_process):
    (one,), expected, reference = one_process
    two, log, folder = train(engine)

    check_engine(engine, two)
    # The ranks share one order of batches. The number of batches is even, so that no batch is split.
    assert two[0]["rows"] == one["rows"][::2] and two[1]["rows"] == one["rows"][1::2]
    check_log(log, expected)
    check_weights(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        ["--freeze_audio_encoder", "true", "--freeze_audio_adaptor", "true"],
        ["--freeze_audio_encoder", "true", "--freeze_llm", "true"],
        ["--freeze_llm", "true"],
        ["--use_lora", "true", "--lora_dropout", 0, "--freeze_audio_encoder", 1, "--freeze_audio_adaptor", 1],
        ["--use_lora", "true", "--lora_dropout", 0, "--freeze_audio_encoder", 1],
        ["--gradient_checkpointing", "true"],
        ["--gradient_checkpointing", "true", "--padding_free", "true"],
    ],
    ids=["llm_only", "adaptor_only", "encoder_adaptor", "lora", "lora_adaptor", "checkpointing", "packed"],
)  # fmt: skip
def test_four_processes_train_every_combination_of_parts(engine, options, train):
    notes, log, folder = train(engine, *options, num_processes=4)
    _, expected, reference = train("one", *options, accumulation=4)

    wrapped = {"model": "PeftModel"} if "--use_lora" in options else {}
    check_engine(engine, notes, num_processes=4, **wrapped)
    check_log(log, expected)
    check_weights(folder, reference, "adapter_model.safetensors" if "--use_lora" in options else "model.safetensors")


@pytest.mark.parametrize(
    "engine", [ENGINES[0], *(pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--use_lora", "true", "--lora_dropout", 0], marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_padding_free_batches_equal_padded_batches(engine, options, train):
    notes, log, folder = train(engine, *options, "--padding_free", "true")
    _, expected, reference = train("one", *options, accumulation=2)
    check_engine(engine, notes, **({"model": "PeftModel"} if options else {}))
    for line in log:
        assert line.pop("padding_share", 0.0) == 0.0
    check_log(log, expected, but="padding_share")
    check_weights(folder, reference, "adapter_model.safetensors" if options else "model.safetensors")


@pytest.mark.parametrize(
    "engine", [ENGINES[0], *(pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
@pytest.mark.parametrize(
    "way",
    [[], pytest.param(["--use_lora", "true", "--lora_dropout", 0], marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_bfloat16_run_is_close_to_float32_and_resumes(engine, way, train):
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    options = [*way, *saving, "--bf16", "true", "--padding_free", "true"]
    notes, log, folder = train(engine, *options)
    _, reference, _ = train("one", *way, accumulation=2)
    check_engine(engine, notes, **({"model": "PeftModel"} if way else {}))
    assert [note.get("differs", "not read back") for note in notes] == [None, "not read back"]
    losses, expected = ([line["loss"] for line in lines if "loss" in line] for lines in (log, reference))
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses != torch.tensor(losses).bfloat16().tolist()
    file = "adapter_model.safetensors" if way else "model.safetensors"
    weights = load_file(folder / file)
    # Accelerate makes DeepSpeed save the bfloat16 copies; DeepSpeed's own files contain the float32 weights.
    kept = torch.bfloat16 if engine.startswith("deepspeed") else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {kept}

    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    notes, log, _ = train(engine, *options, "--resume_from_checkpoint", "auto", folder=folder)
    assert [len(note["rows"]) for note in notes] == [2, 2]
    assert [line["loss"] for line in log if "loss" in line] == losses
    again = load_file(folder / file)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("level", ["encoder", "adaptor"])
def test_cached_outputs_are_the_same_with_sharded_weights(level, train, tmp_path):
    options = ["--freeze_audio_encoder", "true", "--freeze_audio_adaptor", level == "adaptor", "--cache_level", level]
    notes, log, _ = train("deepspeed_zero3", *options, "--cache_dir", tmp_path / "spread")
    _, expected, _ = train("one", *options, "--cache_dir", tmp_path / "whole", accumulation=2)
    check_engine("deepspeed_zero3", notes)
    check_log(log, expected)
    folders = (tmp_path / "spread", tmp_path / "whole")
    files = [{file.relative_to(folder) for file in folder.glob("encoded/*/*.arrow")} for folder in folders]
    assert files[0] == files[1] and files[0]  # names of the folders depend on the weights


@pytest.mark.slow
@pytest.mark.parametrize("bf16", ["true", "false"])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_wrong_checkpoint_of_an_engine_ends_the_run(engine, bf16, train, monkeypatch):
    monkeypatch.setenv("SAVE_WRONGLY", "1")
    with pytest.raises(AssertionError, match="is not the model in memory: logits differ by up to"):
        train(engine, "--bf16", bf16, "--save_strategy", "steps", "--save_steps", 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "deepspeed_zero3"])
def test_compiled_layers_equal_one_process(engine, train, one_process):
    _, expected, reference = one_process
    notes, log, folder = train(engine, "--compile_layers", "true")
    check_engine(engine, notes)
    check_log(log, expected)
    check_weights(folder, reference)


@pytest.mark.slow
def test_layers_are_not_compiled_for_zero_3(train):
    with pytest.raises(AssertionError, match="--compile_layers is not supported with ZeRO-3"):
        train("deepspeed_zero3", "--compile_layers", "true")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_run_equals_an_uninterrupted_run(engine, train):
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    notes, log, folder = train(engine, *saving)
    check_engine(engine, notes)
    resumed = folder.parent / "resumed"
    resumed.mkdir()
    shutil.copytree(folder / "checkpoint-2", resumed / "checkpoint-2")
    _, resumed_log, _ = train(engine, *saving, "--resume_from_checkpoint", "true", folder=resumed)
    check_log(resumed_log, log)
    check_weights(resumed, folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["multi_gpu", "fsdp2"])
def test_run_resumes_with_twice_the_processes(engine, train):
    saving = [
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
    ]  # at the end of an epoch, so that the next epoch has the same batches
    notes, log, folder = train(engine, *saving, accumulation=2)
    check_engine(engine, notes)
    resumed = folder.parent / "resumed"
    resumed.mkdir()
    shutil.copytree(folder / "checkpoint-2", resumed / "checkpoint-2")
    notes, resumed_log, _ = train(engine, *saving, "--resume_from_checkpoint", "true", num_processes=4, folder=resumed)
    check_engine(engine, notes, num_processes=4)
    check_log(resumed_log, log)
    check_weights(resumed, folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_validation_by_decoding_has_the_same_error_rates(engine, train):
    options = ["--eval_cer", "true", "--eval_strategy", "steps", "--eval_steps", 2, "--eval_max_new_tokens", 8]
    notes, log, _ = train(engine, *options)
    _, expected, _ = train("one", *options, accumulation=2)
    check_engine(engine, notes)
    rates = [
        [(line["step"], line["eval_cer"]) for line in lines if "step" in line and "eval_cer" in line]
        for lines in (log, expected)
    ]
    assert [step for step, _ in rates[0]][:3] == [0, 2, 4]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("engine", "alone"),
    [
        ("deepspeed_zero3", True),
        ("fsdp2", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("deepspeed_zero1", True),
                ("deepspeed_zero1", False),
                ("deepspeed_zero3", False),
                ("fsdp2", True),
            ]
        ),
    ],
)
def test_ctc_head_is_trained_saved_resumed_and_decodes(engine, alone, train, model_with_head, tiny_corpus):
    options = ["--model_name_or_path", model_with_head, "--ctc_head", "auto"]
    frozen = [f"--freeze_{part}" for part in ("audio_encoder", "audio_adaptor", "llm")]
    options += [item for option in (frozen if alone else frozen[:1]) for item in (option, "true")]
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    notes, log, folder = train(engine, *options, *saving)
    _, expected, reference = train("one", *options, accumulation=2)
    check_engine(engine, notes)
    for key in ("loss", "grad_norm", *(() if alone else ("ctc_loss", "token_accuracy"))):
        values = [[line[key] for line in lines if key in line] for lines in (log, expected)]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], rel=1e-3 if key == "grad_norm" else 1e-5)
    check_weights(folder, reference)
    before, after = (load_file(place / "model.safetensors") for place in (model_with_head, folder))
    moved = {name.partition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == ({"ctc_head"} if alone else {"ctc_head", "audio_adaptor", "llm"})

    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    notes, resumed_log, _ = train(engine, *options, *saving, "--resume_from_checkpoint", "auto", folder=folder)
    check_engine(engine, notes)
    assert [len(note["rows"]) for note in notes] == [2, 2]
    assert [line["loss"] for line in resumed_log if "loss" in line] == [line["loss"] for line in log if "loss" in line]
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(folder / "model.safetensors").items())

    texts, words = [], []
    for place in (folder, reference):
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(place), SpeechLLMProcessor.from_pretrained(place)
        transcriber = Transcriber(*loaded, max_new_tokens=8, word_times=True, ctc_draft=True)
        found = transcriber.transcripts(sorted(map(str, tiny_corpus.jsonl.parent.glob("*.wav"))))
        texts.append([item.text for item in found])
        words.append([(word.text, word.start, word.end) for item in found for word in item.words])
    assert texts[0] == texts[1] and words[0] == words[1] and any(texts[0])
