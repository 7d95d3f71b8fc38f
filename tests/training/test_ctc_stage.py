"""Training of a CTC head."""

import dataclasses
import json

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.evaluation.validation_metrics import set_names
from hf_speechllm.training.cache_stage import choose_cache_level
from hf_speechllm.training.ctc_stage import prepare_ctc_head
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.options import TrainedPartsOptions

ALONE = {"ctc_head": "sanm", "freeze_audio_encoder": True, "freeze_audio_adaptor": True, "freeze_llm": True}
TRAINER = {"learning_rate": 3e-3, "max_steps": 30, "eval_strategy": "steps", "eval_steps": 30}


@pytest.fixture
def make_ctc_trainer(tiny_model, tiny_rows, make_trainer):
    """Builds a trainer of a CTC head, as `finetune` does."""

    def make(parts, rows=tiny_rows, **options):
        torch.manual_seed(0)
        model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
        freeze_parts(model, parts.freeze_audio_encoder, parts.freeze_audio_adaptor, parts.freeze_llm)
        processor = SpeechLLMProcessor.from_pretrained(tiny_model)
        vocabulary = prepare_ctc_head(model, processor, rows, parts)
        trainer = make_trainer(model=model, train_dataset=rows, eval_dataset=tiny_rows, **options)
        trainer.data_collator.ctc_vocabulary = trainer.validator.collator.ctc_vocabulary = vocabulary
        return trainer

    return make


def test_head_alone_learns_from_the_encoder_cache(make_ctc_trainer, tiny_model, tiny_rows, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    rows = add_encoded(tiny_rows, model, processor, "encoder", str(tmp_path / "cache"), show_progress=False)
    parts = TrainedPartsOptions(**ALONE)
    trainer = make_ctc_trainer(parts, rows, save_strategy="steps", save_steps=15, **TRAINER)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved and all(name.startswith("ctc_head.") for name in moved)
    last = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    assert last["eval_loss"] < 0.7 * first and "eval_token_accuracy" not in last
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-15")
    assert loaded.config.ctc_head_config.upsample_rate == 3  # 20 ms from 60 ms
    resumed = make_ctc_trainer(parts, rows, **TRAINER)
    resumed.train(str(tmp_path / "run" / "checkpoint-15"))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name


def test_head_beside_the_llm_over_its_tokens(make_ctc_trainer):
    parts = TrainedPartsOptions(ctc_head="linear", ctc_vocabulary="llm", freeze_audio_encoder=True)
    trainer = make_ctc_trainer(parts, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    training = next(entry for entry in trainer.state.log_history if "loss" in entry)
    validation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert training["ctc_loss"] > 0 and training["token_accuracy"] >= 0
    assert validation["eval_loss"] > 0.3 * validation["eval_loss_ctc"] > 0
    assert set_names(validation) == [""]  # the table of evaluations has a row per name


def test_silence_marks_are_no_labels_of_the_head(make_ctc_trainer, tiny_rows):
    rows = tiny_rows.select(range(2)).with_format(None)
    quiet = []
    for row, text in zip(rows, ("/sil", "one /sil two"), strict=True):
        turns = json.loads(row["messages"])[:-1]
        quiet.append({**row, "seed": 0, "messages": json.dumps([*turns, {"role": "assistant", "content": text}])})
    trainer = make_ctc_trainer(TrainedPartsOptions(**ALONE))
    lengths = trainer.data_collator(quiet)["ctc_target_lengths"]
    assert lengths.tolist() == [0, len("one two")]


def test_a_head_without_the_option_is_frozen(make_ctc_trainer, tiny_model, tiny_rows):
    trainer = make_ctc_trainer(TrainedPartsOptions(**ALONE))
    model = trainer.model.requires_grad_(True)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    assert prepare_ctc_head(model, processor, tiny_rows, TrainedPartsOptions()) is None
    assert not any(parameter.requires_grad for parameter in model.ctc_head.parameters())
    with pytest.raises(ValueError, match="--ctc_head linear: the model has a CTC head of sanm"):
        prepare_ctc_head(model, processor, tiny_rows, TrainedPartsOptions(ctc_head="linear"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctc_head": "lstm"}, "choose auto, sanm or linear"),
        ({"ctc_head": "sanm", "ctc_vocabulary": "phones"}, "choose auto, characters or llm"),
        ({"ctc_head": "sanm", "ctc_weight": 0.0}, "--ctc_weight is 0"),
        ({"ctc_weight": 0.5}, "--ctc_weight without --ctc_head has no effect"),
        ({"ctc_head_learning_rate": 1e-3}, "--ctc_head_learning_rate without --ctc_head has no effect"),
        ({"ctc_head": "sanm", "use_lora": True}, "--ctc_head is not supported with --use_lora"),
        ({**ALONE, "cache_level": "adaptor"}, "the CTC head needs the encoder's output"),
        ({**ALONE, "eval_cer": True, "validation_file": ["dev.jsonl"]}, "--eval_cer has no effect"),
    ],
)
def test_wrong_options(make_options, options, message):
    with pytest.raises(ValueError, match=message):
        make_options(**options)


def test_cache_stage_of_the_head_is_the_encoder(split_options):
    _, data, parts, args = split_options(**ALONE, max_steps=-1, num_train_epochs=2)
    assert choose_cache_level(data, parts, args) == "encoder"
    assert choose_cache_level(data, dataclasses.replace(parts, ctc_head=None), args) == "adaptor"
