"""Training: frozen and trained weights, learning rates, interruption, the log, validation losses."""

import json
import re
import time
from pathlib import Path

import datasets
import matplotlib.image
import numpy as np
import pytest
import torch
from datasets.arrow_dataset import Column
from safetensors.torch import load_file, save_file

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows, row_seconds
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.sampler import ROW_COST, BudgetBatchSampler
from hf_speechllm.formats.checkpoint import CheckpointError
from hf_speechllm.model.modeling import PARTS
from hf_speechllm.training.checkpointing.weights import load_weights
from hf_speechllm.training.checkpointing.writer import CheckpointWriter
from hf_speechllm.training.flops import FlopCounter
from hf_speechllm.training.freezing import count_parameters, freeze_parameters, freeze_parts, part_of
from hf_speechllm.training.lora import add_lora
from hf_speechllm.training.run import find_checkpoint, save_final
from hf_speechllm.training.trainer import SpeechLLMTrainer
from hf_speechllm.training.validation import Validator

pytestmark = pytest.mark.core

FREEZES = [
    (),
    ("audio_encoder",),
    ("audio_encoder", "llm"),
    ("audio_encoder", "audio_adaptor"),
    ("audio_adaptor", "llm"),
    ("llm",),
]
LORA_TARGETS = ["q_proj", "v_proj", "down_proj"]


def flags(frozen):
    return {f"freeze_{part}": part in frozen for part in PARTS}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def optimizer_settings(trainer):
    """Returns learning rate and weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture
def logits(tiny_rows, tiny_model):
    """Computes logits of a model on a batch of the corpus."""
    batch = SpeechLLMCollator(SpeechLLMProcessor.from_pretrained(tiny_model))([tiny_rows[index] for index in range(6)])

    def compute(model):
        model.eval()
        with torch.no_grad():
            return model(**batch, return_logits=True).logits

    return compute


def test_every_part_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(
        learning_rate=0.1, audio_encoder_learning_rate=0.2, llm_learning_rate=0.3, weight_decay=0.05
    )
    trainer.create_optimizer()
    rates = optimizer_settings(trainer)
    assert rates.keys() == dict(trainer.model.named_parameters()).keys()
    expected = {"audio_encoder": 0.2, "audio_adaptor": 0.1, "llm": 0.3}
    for name, (rate, decay) in rates.items():
        assert rate == expected[name.split(".")[0]], name
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.05), name


def test_learning_rate_of_zero_is_not_none(make_trainer):
    trainer = make_trainer(learning_rate=0.1, audio_adaptor_learning_rate=0.0)
    trainer.create_optimizer()
    rates = {name.split(".")[0]: rate for name, (rate, _) in optimizer_settings(trainer).items()}
    assert rates == {"audio_encoder": 0.1, "audio_adaptor": 0.0, "llm": 0.1}


def test_adapters_train_at_the_rate_of_the_llm(make_trainer):
    trainer = make_trainer(
        use_lora=True, freeze_audio_encoder=True, learning_rate=0.1, audio_adaptor_learning_rate=0.2,
        llm_learning_rate=0.3,
    )  # fmt: skip
    trainer.create_optimizer()
    rates = optimizer_settings(trainer)
    assert {rate for name, (rate, _) in rates.items() if "lora_" in name} == {0.3}
    assert {rate for name, (rate, _) in rates.items() if "lora_" not in name} == {0.2}


@pytest.mark.parametrize("frozen", FREEZES, ids="+".join)
def test_frozen_weights_stay_bit_identical_and_trained_weights_change(make_trainer, frozen):
    trainer = make_trainer(**flags(frozen), weight_decay=0.1, max_steps=3)
    before = weights_of(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        same = torch.equal(parameter, before[name])
        # The encoder's last layers serve timestamps in the original; here, the output goes through all of them.
        assert same == (name.split(".")[0] in frozen), name
    trained = {id(p) for name, p in trainer.model.named_parameters() if name.split(".")[0] not in frozen}
    assert {id(parameter) for parameter in trainer.optimizer.state} == trained
    assert optimizer_settings(trainer).keys() == {name for name in before if name.split(".")[0] not in frozen}
    assert all(parameter.grad is None for parameter in trainer.model.parameters() if id(parameter) not in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_parameters_are_frozen_by_the_start_of_their_names(make_trainer, lora):
    """By ours and FunASR's, whose encoders0.0 is our layers.0; whole components, so that layers.1 is not layers.10."""
    prefixes = ["audio_encoder.layers.1", "audio_encoder.encoders0", "audio_adaptor.linear1", "llm.model.norm.weight"]
    trainer = make_trainer(freeze_param=prefixes, use_lora=lora, weight_decay=0.1, max_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    same = {name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])}
    frozen = r"audio_encoder\.\S*layers\.[01]\.|audio_adaptor\.(\S*\.)?linear1\.|llm\.model\.norm\."
    for name in before:
        left = lora and (".original_module." in name or (part_of(name) == "llm" and "lora_" not in name))
        assert (name in same) == (bool(re.search(frozen, name)) or left), name
    with pytest.raises(ValueError, match="--freeze_param: no parameter name starts with audio_enc, x"):
        freeze_parameters(trainer.model, ["audio_enc", "llm", "x"])
    with pytest.raises(ValueError, match="--freeze_param and the other options freeze all parameters"):
        freeze_parameters(trainer.model, PARTS)


@pytest.mark.parametrize("frozen", [(), ("audio_encoder",), ("audio_encoder", "audio_adaptor")], ids="+".join)
def test_lora_changes_only_adapters_and_unfrozen_parts(make_trainer, frozen):
    trainer = make_trainer(
        **flags(frozen), use_lora=True, lora_target_modules=LORA_TARGETS, weight_decay=0.1, max_steps=3
    )
    before = weights_of(trainer.model)
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    for name in before:
        expected = "lora_" in name or ("modules_to_save" in name and part_of(name) not in frozen)
        assert (name in moved) == expected, name
    assert {part_of(name) for name in moved} == {*PARTS, "llm"} - set(frozen)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in moved if "lora_" in name}
    assert layers == set(LORA_TARGETS)
    assert all(part_of(name) == "llm" for name in moved if "lora_" in name)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert {names[id(parameter)] for parameter in trainer.optimizer.state} == moved


def test_parameters_of_every_part_are_counted(compose_tiny):
    model, _ = compose_tiny()
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}
    assert count_parameters(model) == {part: (size, size) for part, size in sizes.items()}
    freeze_parts(model, audio_encoder=True, llm=True)
    model = add_lora(model, r=2, target_modules=("q_proj",))
    counts = count_parameters(model)
    assert counts["audio_encoder"][0] == 0
    assert counts["audio_adaptor"][0] == sizes["audio_adaptor"]
    assert counts["llm"][0] == 2 * 2 * (32 + 32)  # layers, rank, in + out


def test_dropout_stands_before_the_adapters_and_is_on_in_training_alone(compose_tiny, tiny_rows):
    model, processor = compose_tiny()
    model = add_lora(model, r=4, dropout=0.4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would hide what stands before them
            torch.nn.init.normal_(parameter, std=0.3)
    batch = SpeechLLMCollator(processor)([tiny_rows[0]])
    with torch.no_grad():
        training = {model.train()(**batch).loss.item() for _ in range(3)}
        assert len(training) == 3
        assert len({model.eval()(**batch).loss.item() for _ in range(3)}) == 1
    dropouts = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert len(dropouts) == 4 and {module.p for module in dropouts} == {0.4}


def test_lora_is_added_without_a_warning(compose_tiny, recwarn):
    add_lora(compose_tiny()[0], target_modules=("q_proj",))
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


def test_unknown_lora_layers_are_named(compose_tiny):
    model, _ = compose_tiny()
    with pytest.raises(ValueError, match="--lora_target_modules.*q_prj"):
        add_lora(model, target_modules=("q_prj", "v_proj"))


def test_lora_layers_of_gpt2_and_its_shared_embeddings_are_named(compose_tiny, tiny_config):
    llm = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model, _ = compose_tiny({**tiny_config(), "llm_config": llm})
    with pytest.raises(ValueError, match="no layers named q_proj; choose from c_attn, c_fc, c_proj, lm_head"):
        add_lora(model, target_modules=("q_proj",))
    with pytest.raises(ValueError, match="cannot be merged; leave out wte and lm_head"):
        add_lora(model, target_modules=("c_attn", "wte"))


@pytest.mark.parametrize("frozen", [("audio_encoder",), ("audio_encoder", "audio_adaptor"), ()], ids="+".join)
def test_saved_lora_loads_with_peft_and_merges_to_the_same_logits(
    make_trainer, logits, tiny_model, tmp_path, run_recipe, frozen
):
    from peft import PeftModel

    trainer = make_trainer(
        **flags(frozen), use_lora=True, lora_target_modules=LORA_TARGETS, learning_rate=0.02, max_steps=3
    )
    untrained = logits(SpeechLLMForConditionalGeneration.from_pretrained(tiny_model))
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    trained = logits(trainer.model)
    assert (trained - untrained).abs().max() > 0.1

    base = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    stock = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(stock), trained)
    torch.testing.assert_close(logits(stock.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)

    loaded = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    run_recipe("merge_lora.py", "--input", folder, "--output", tmp_path / "merged")
    merged = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_trained_model_is_saved_with_its_processor_and_loads_with_the_same_logits(make_trainer, logits):
    trainer = make_trainer(max_steps=2)
    result = trainer.train()
    save_final(trainer, result)
    folder = Path(trainer.args.output_dir)
    assert torch.equal(logits(SpeechLLMForConditionalGeneration.from_pretrained(folder)), logits(trainer.model))
    assert SpeechLLMProcessor.from_pretrained(folder).tokenizer.eos_token == "<|im_end|>"
    assert json.loads((folder / "train_results.json").read_text())["train_loss"] > 0


@pytest.mark.parametrize(
    ("checkpoint", "lora", "workers"),
    [(3, False, 0), (6, False, 0), (6, True, 0), (4, False, 0), (6, False, 1)],
    ids=["first-epoch", "second-epoch", "second-epoch-lora", "between-epochs", "second-epoch-workers"],
)
def test_resumed_training_has_the_same_weights(
    make_trainer, compose_tiny, tiny_config, tmp_path, checkpoint, lora, workers, interrupt
):
    config = tiny_config()
    config["llm_config"]["attention_dropout"] = 0.2  # makes the random state matter
    model, processor = compose_tiny(config)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "use_lora": lora,
        "per_device_train_batch_seconds": 4.5,  # 7 batches; the last step of an epoch has a single batch
        "gradient_accumulation_steps": 2,
        "spec_augment": True,
        "tempo_perturb": 0.1,
        "max_steps": 9,
        "dataloader_num_workers": workers,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    whole.save_model()
    assert len(whole.get_train_dataloader()) == 7

    options.update(output_dir=str(tmp_path / "resumed"), save_strategy="steps", save_steps=checkpoint)
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(checkpoint + 1)], **options).train()
    resumed = make_trainer(**options, resume_from_checkpoint="true")
    folder = find_checkpoint(resumed.args)
    assert folder == str(tmp_path / "resumed" / f"checkpoint-{checkpoint}")
    resumed.train(resume_from_checkpoint=folder)
    resumed.save_model()

    file = "adapter_model.safetensors" if lora else "model.safetensors"
    expected, found = (load_file(tmp_path / run / file) for run in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    losses = [
        [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_missing_weights_are_an_error_and_tied_weights_are_not(make_trainer, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *args, **kwargs: warnings.append(text))
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(max_steps=1, **options).train()
    trainer = make_trainer(max_steps=2, **options)
    trainer.train(resume_from_checkpoint=True)
    assert not any("missing keys" in text for text in warnings)
    file = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    weights = load_file(file)
    del weights["audio_adaptor.linear1.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="missing audio_adaptor.linear1.weight"):
        load_weights(trainer.model, tmp_path / "run" / "checkpoint-1")


def test_earlier_checkpoints_are_not_overwritten_without_a_request(make_trainer, make_arguments, tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint"):
        find_checkpoint(make_arguments(resume_from_checkpoint="true"))
    make_trainer(save_strategy="steps", save_steps=1, max_steps=2, freeze_audio_encoder=True, freeze_llm=True).train()
    with pytest.raises(ValueError, match="--resume_from_checkpoint auto, or choose another --output_dir"):
        find_checkpoint(make_arguments())
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        find_checkpoint(make_arguments(resume_from_checkpoint=str(tmp_path)))
    first = str(tmp_path / "run" / "checkpoint-1")
    frozen = {"freeze_audio_encoder": True, "freeze_llm": True}
    assert find_checkpoint(make_arguments(**frozen, resume_from_checkpoint=first)) == first


def test_log_lines_have_loss_accuracy_throughput_and_padding(make_trainer, tiny_rows):
    budget = 4.0
    trainer = make_trainer(max_steps=3, per_device_train_batch_seconds=budget, learning_rate=0.0)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["step"] for line in lines] == [1, 2, 3]
    sampler = BudgetBatchSampler(row_seconds(tiny_rows), budget, seed=trainer.args.seed, row_cost=ROW_COST)
    counter, rows, operations = FlopCounter(trainer.model), 0, 0.0
    for line, indices in zip(lines, sampler.batches(0), strict=False):
        batch = trainer.data_collator([{**tiny_rows[int(index)], "seed": 0} for index in indices])
        with torch.no_grad():
            output = trainer.model.eval()(**batch)
        mask = batch["input_features_mask"]
        assert line["loss"] == pytest.approx(output.loss.item(), abs=1e-4)
        assert line["token_accuracy"] == pytest.approx(output.token_accuracy.item(), abs=1e-4)
        assert line["padding_share"] == pytest.approx(1 - mask.sum().item() / mask.numel(), abs=1e-4)
        assert line["audio_seconds_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert {"learning_rate", "grad_norm", "epoch"} <= line.keys()
        rows += len(indices)
        operations += counter.count(mask.sum(-1), batch["attention_mask"].sum(-1), len(batch["positions"]["labels"]))
    end = trainer.state.log_history[-1]
    assert end["train_samples_per_second"] * end["train_runtime"] == pytest.approx(rows, rel=0.01)
    assert end["total_flos"] == pytest.approx(operations)


def test_throughput_excludes_validation_and_saving(make_trainer, tiny_rows, monkeypatch):
    clock, hours = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(hours))
    monkeypatch.setattr(CheckpointWriter, "save", lambda writer: hours.append("saving"))
    monkeypatch.setattr(Validator, "score", lambda *args: hours.append("validation") or {"eval_loss": 1.0})
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(max_steps=3, eval_dataset=tiny_rows.select([0]), **options)
    trainer.train()
    assert hours[:4] == ["validation", "saving"] * 2
    speeds = [entry["audio_seconds_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(speeds) * 3600 > 10 * sum(row_seconds(tiny_rows))


def test_loss_is_learned(make_trainer):
    trainer = make_trainer(max_steps=40, learning_rate=5e-3, logging_steps=5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_loss_with_gradient_accumulation_is_weighted_by_tokens(make_trainer):
    """Two batches of different sizes in one step have the gradient of one batch with the same rows."""
    gradients = []
    for budget, accumulation in ((100.0, 1), (4.0, 100)):
        trainer = make_trainer(
            per_device_train_batch_seconds=budget, gradient_accumulation_steps=accumulation, max_steps=1,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        gradients.append({name: before[name] - after[name] for name in before})
    together, accumulated = gradients
    for name in together:
        scale = max(together[name].abs().max().item(), 1e-2)
        torch.testing.assert_close(accumulated[name], together[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_accuracy_under_accumulation_is_the_share_of_all_tokens(make_trainer, tiny_rows, monkeypatch):
    trainer = make_trainer(gradient_accumulation_steps=3, max_steps=1, per_device_train_batch_seconds=2.0)
    shares, counts, compute = iter((0.5, 0.25, 1.0)), [], trainer.model.forward

    def forward(**inputs):
        output = compute(**inputs)
        output.token_accuracy = torch.tensor(next(shares))
        counts.append(int(output.num_label_tokens))
        return output

    monkeypatch.setattr(trainer.model, "forward", forward)
    trainer.train()
    (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    correct = 0.5 * counts[0] + 0.25 * counts[1] + counts[2]
    assert len(set(counts)) > 1
    assert line["token_accuracy"] == pytest.approx(correct / sum(counts), abs=1e-4)


@pytest.mark.parametrize("frozen", FREEZES, ids="+".join)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_gradient_checkpointing_has_the_same_gradients(make_trainer, frozen, lora):
    if lora and "llm" in frozen:
        pytest.skip("peft freezes the LLM")
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            **flags(frozen), use_lora=lora, lora_dropout=0.0, gradient_checkpointing=checkpointing, max_steps=2
        )
        trainer.train()
        weights.append(weights_of(trainer.model))
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@pytest.mark.parametrize("part", PARTS)
def test_gradient_checkpointing_recomputes_every_part_that_is_trained(make_trainer, part, monkeypatch):
    layer = {
        "audio_encoder": "audio_encoder.layers.1",
        "audio_adaptor": "audio_adaptor.blocks.0",
        "llm": "llm.model.layers.0",
    }[part]
    runs = []
    trainer = make_trainer(gradient_checkpointing=True, max_steps=1)
    inner = trainer.model.get_submodule(layer).self_attn
    inner.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    trainer.train()
    assert len(runs) == 2


def test_gradient_checkpointing_recomputes_a_frozen_llm_behind_a_trained_adaptor(make_trainer):
    runs = []
    trainer = make_trainer(gradient_checkpointing=True, max_steps=1, freeze_audio_encoder=True, freeze_llm=True)
    attention = trainer.model.llm.model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: runs.append(attention.training))
    trainer.train()
    assert runs == [False, False]


@pytest.mark.parametrize("budget", [1.6, 3.0, 100.0])
def test_validation_loss_does_not_depend_on_the_batches(make_trainer, tiny_rows, budget):
    trainer = make_trainer(eval_dataset=tiny_rows, per_device_eval_batch_seconds=budget)
    metrics = trainer.evaluate()
    collator = trainer.validator.collator
    sums = np.zeros(3)
    for row in tiny_rows:
        with torch.no_grad():
            output = trainer.model.eval()(**collator([row]))
        count = int(output.num_label_tokens)
        sums += [output.loss.item() * count, output.token_accuracy.item() * count, count]
    assert metrics["eval_loss"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
    assert metrics["eval_token_accuracy"] == pytest.approx(sums[1] / sums[2], rel=1e-5)
    assert metrics["eval_runtime"] > 0


def test_validation_accepts_rows_longer_than_the_budget(make_trainer, tiny_rows):
    trainer = make_trainer(eval_dataset=tiny_rows, per_device_eval_batch_seconds=0.5)
    wide = make_trainer(eval_dataset=tiny_rows, per_device_eval_batch_seconds=50.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wide.evaluate()["eval_loss"], rel=1e-5)


def test_validation_sets_are_reported_by_name_and_do_not_change_training(make_trainer, tiny_rows, tmp_path):
    sets = {"near": tiny_rows.select(range(8)), "far": tiny_rows.select(range(8, 16))}
    options = {"max_steps": 4, "freeze_audio_encoder": True}
    with_sets = make_trainer(
        eval_dataset=sets, eval_strategy="steps", eval_steps=2, output_dir=str(tmp_path / "a"), **options
    )
    with_sets.train()
    without = make_trainer(output_dir=str(tmp_path / "b"), **options)
    without.train()
    evaluations = [entry for entry in with_sets.state.log_history if "eval_near_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    assert all(
        {"eval_far_loss", "eval_far_token_accuracy"} <= entry.keys()
        for entry in with_sets.state.log_history
        if "eval_far_loss" in entry
    )
    assert any("eval_far_loss" in entry for entry in with_sets.state.log_history)
    for name, weight in weights_of(without.model).items():
        assert torch.equal(weight, with_sets.model.get_parameter(name)), name


def test_validation_has_no_augmentation_and_no_dropout(make_trainer, tiny_rows):
    options = {"eval_dataset": tiny_rows, "use_lora": True, "lora_dropout": 0.5, "tempo_perturb": 0.1}
    trainer = make_trainer(spec_augment=True, **options)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zeros would hide the dropout
            torch.nn.init.normal_(parameter, std=0.3)
    model = trainer.model.train()
    found = trainer.evaluate()["eval_loss"]
    collator, sums = SpeechLLMCollator(trainer.processing_class), np.zeros(2)
    with torch.no_grad():
        for row in tiny_rows:
            output = model.eval()(**collator([row]))
            sums += [output.loss.item() * int(output.num_label_tokens), int(output.num_label_tokens)]
        batch = collator([tiny_rows[0]])
        assert model.train()(**batch).loss != model(**batch).loss  # the dropout does something
    assert found == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_training_curve_is_drawn(make_trainer, tiny_rows):
    trainer = make_trainer(eval_dataset=tiny_rows, eval_strategy="steps", eval_steps=2)
    trainer.train()
    picture = matplotlib.image.imread(Path(trainer.args.output_dir) / "training_curve.png")
    assert picture.shape[0] >= 300 and picture.shape[1] >= 800
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10  # not blank


def test_trainer_is_a_transformers_trainer(make_trainer):
    from transformers import Trainer

    assert issubclass(SpeechLLMTrainer, Trainer)
    trainer = make_trainer(max_steps=-1, num_train_epochs=2)
    steps = len(trainer.get_train_dataloader())
    result = trainer.train()
    assert result.global_step == 2 * steps
    assert trainer.state.epoch == 2


def test_the_number_of_reads_does_not_grow_with_the_rows(make_trainer, tiny_corpus, tiny_model, tmp_path, monkeypatch):
    reads = 0
    read, iterate = datasets.Dataset.__getitem__, Column.__iter__

    def counted_read(self, key):
        nonlocal reads
        reads += 1
        return read(self, key)

    def counted_iterate(self):
        nonlocal reads
        for value in iterate(self):
            reads += 1
            yield value

    monkeypatch.setattr(datasets.Dataset, "__getitem__", counted_read)
    monkeypatch.setattr(Column, "__iter__", counted_iterate)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    numbers = []
    for copies in (1, 20):
        folder = tmp_path / str(copies)
        folder.mkdir()
        (folder / "data.jsonl").write_text(tiny_corpus.jsonl.read_text() * copies)
        options = DataOptions(cache_dir=str(folder), preprocessing_num_workers=1, audio_root=str(tiny_corpus.folder))
        reads = 0
        rows, _ = prepare_rows([str(folder / "data.jsonl")], processor, 2048, options, weights=[1.0])
        trainer = make_trainer(train_dataset=rows, max_steps=1, output_dir=str(folder / "run"))
        trainer.train()
        numbers.append(reads)
    assert numbers[1] <= numbers[0] + 5, numbers
