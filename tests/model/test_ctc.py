"""The CTC head: probabilities, loss, vocabulary."""

import base64
import json

import pytest
import torch
from torch.nn import functional
from transformers.utils.generic import find_labels

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.model.ctc import add_ctc_head, pad_ctc_targets, train_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig
from hf_speechllm.model.ctc_vocabulary import CTCVocabulary, character_config
from hf_speechllm.training.out_of_memory import split_batch

HEADS = ("linear", "sanm", "transformer")


@pytest.fixture
def with_head(compose_tiny):
    """A tiny model with a head over characters, without dropout; the head is not trained."""

    def make(head_type="sanm", **options):
        model, processor = compose_tiny(seed=4)
        config = character_config(
            ["one two three four 五六七八"], head_type=head_type, hidden_size=32, hidden_dropout=0.0,
            attention_dropout=0.0, upsample_rate=2, **options,
        )  # fmt: skip
        add_ctc_head(model, config)
        return model.eval(), processor

    return make


def test_without_a_head_nothing_is_stored(tiny_config, tiny_model):
    config = SpeechLLMConfig(**tiny_config())
    assert "ctc_head_config" not in config.to_dict()
    assert "ctc" not in (tiny_model / "config.json").read_text()
    assert not (tiny_model / "ctc.safetensors").exists()


@pytest.mark.parametrize("head_type", HEADS)
def test_a_row_does_not_depend_on_the_padding_of_its_batch(with_head, head_type):
    model, _ = with_head(head_type)
    states, mask = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    batch, lengths = model.ctc_head(states, mask)
    single, _ = model.ctc_head(states[1:, :13], mask[1:, :13])
    assert lengths.tolist() == [40, 26]
    torch.testing.assert_close(batch[1, :26], single[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.exp().sum(-1), torch.ones(2, 40))


def test_loss_of_one_recording_equals_that_of_torch(with_head):
    model, _ = with_head()
    states, mask = torch.randn(3, 20, 32), torch.ones(3, 20, dtype=torch.long)
    mask[1, 13:] = 0
    labels = pad_ctc_targets([[2, 3, 3], [4], None])
    log_probabilities, lengths = model.ctc_head(states, mask)
    single = [
        functional.ctc_loss(
            log_probabilities[row, : lengths[row]], torch.tensor(ids), lengths[row], torch.tensor(len(ids)),
            reduction="sum",
        )
        for row, ids in enumerate([[2, 3, 3], [4]])
    ]  # fmt: skip
    loss = model.ctc_head.loss(states, mask, *labels.values(), num_items=5)
    torch.testing.assert_close(loss, sum(single) / 5)


@pytest.fixture
def batch(tiny_rows):
    """A training batch with the labels of a CTC head."""

    def make(processor, vocabulary):
        rows = [{**tiny_rows[index], "seed": (0, index, 0)} for index in range(4)]
        return SpeechLLMCollator(processor, ctc_vocabulary=vocabulary)(rows)

    return make


def vocabulary_of(model, processor):
    return CTCVocabulary(model.config.ctc_head_config, processor.tokenizer, model.ctc_tensors)


def test_loss_is_added_to_that_of_the_llm_or_computed_alone(with_head, batch):
    model, processor = with_head()
    vocabulary = vocabulary_of(model, processor)
    inputs = batch(processor, vocabulary)
    plain = {name: value for name, value in inputs.items() if not name.startswith("ctc")}
    train_ctc_head(model, 0.5, alone=False)
    both = model(**inputs)
    torch.testing.assert_close(both.loss, model(**plain).loss + 0.5 * both.ctc_loss)
    train_ctc_head(model, 0.5, alone=True)
    alone = model(**inputs)
    assert alone.loss == both.ctc_loss and alone.logits is None
    states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    cached = {**inputs, "encoder_states": states, "input_features_mask": mask}
    torch.testing.assert_close(model(**cached).loss, alone.loss)
    halves = split_batch(inputs, processor)
    total = sum(model(**half, num_items_in_batch=len(inputs["positions"]["labels"])).loss for half in halves)
    torch.testing.assert_close(total, alone.loss)


def test_labels_are_the_transcripts(with_head, batch, tiny_rows):
    model, processor = with_head()
    vocabulary = vocabulary_of(model, processor)
    inputs = batch(processor, vocabulary)
    for index, (ids, length) in enumerate(zip(inputs["ctc_targets"], inputs["ctc_target_lengths"], strict=True)):
        text = json.loads(tiny_rows[index]["messages"])[-1]["content"]
        assert vocabulary.decode(ids[:length].tolist()) == text
    filler = SpeechLLMCollator(processor, ctc_vocabulary=vocabulary)(
        [{**tiny_rows[0], "seed": (0, 0, 0), "supervised": False}]
    )
    assert filler["ctc_target_lengths"].tolist() == [-1]


def test_characters_of_texts():
    config = character_config(["Hello, World!", "İs  it 5?", "你好。"])
    vocabulary = CTCVocabulary(config)
    assert config.characters[:2] == ["", " "] and not {",", "!", "。"} & {*config.characters}
    ids, spans = vocabulary.encode_with_spans("Fell, -- HELLO 你")
    assert vocabulary.decode(ids) == "ell hello 你"
    assert ["Fell, -- HELLO 你"[start:end] for start, end in spans] == list("ell HELLO 你")
    with pytest.raises(ValueError, match="no letters"):
        character_config(["...", ""])


def test_vowel_signs_are_characters():
    characters = character_config(["हिन्दी ไทยนี้ ❤\ufe0f"]).characters
    assert {"ि", "्", "ี", "้"} <= {*characters} and "\ufe0f" not in characters
    vocabulary = CTCVocabulary(character_config(["हिन्दी"]))
    assert vocabulary.decode(vocabulary.encode("हिन्दी")) == "हिन्दी"


def test_greedy_ids_leave_out_blanks_and_repetitions():
    vocabulary = CTCVocabulary(character_config(["ab"]))
    frames = functional.one_hot(torch.tensor([0, 2, 2, 0, 2, 3, 3, 0]), 4).float()
    assert vocabulary.decode(vocabulary.greedy(frames)) == "aab"


def test_token_file_of_funasr():
    tokens = [*(bytes([byte]) for byte in range(256)), b"on", b"one", b" t"]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    stored = {"file:multilingual.tiktoken": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
    config = CTCHeadConfig(vocabulary="tiktoken", vocab_size=300, blank_id=299)
    vocabulary = CTCVocabulary(config, None, stored)
    ids, spans = vocabulary.encode_with_spans("one two")
    assert ids == [257, 258, ord("w"), ord("o")] and spans[0] == (0, 3)
    assert vocabulary.decode(vocabulary.encode("几点了？ one")) == "几点了？ one"
    assert CTCVocabulary(config, None, _token_file(b"\nYQ== 0\n\nYg== 299\n")).encode("ab") == [0]  # 299: the blank
    for broken in (b"!", b"", b"YQ== 0\nYg== 0", b"YQ== -1", b"YQ== 99999999999"):
        with pytest.raises(ValueError, match="token file is damaged"):
            CTCVocabulary(config, None, _token_file(broken))
    with pytest.raises(ValueError, match="token file"):
        CTCVocabulary(config, None, {})


def _token_file(content):
    return {"file:a.tiktoken": torch.tensor(list(content), dtype=torch.uint8)}


def test_the_blank_is_no_label():
    config = CTCHeadConfig(vocabulary="characters", characters=["a", "b", ""], vocab_size=3, blank_id=0)
    assert CTCVocabulary(config).encode("a b") == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": "lstm"}, "head_type is 'lstm'"),
        ({"characters": ["", "a"], "vocab_size": 3}, "vocab_size entries"),
        ({"vocabulary": "llm", "vocab_size": 3, "blank_id": 3}, "blank_id is 3"),
        ({"vocabulary": "llm", "upsample_rate": 0}, "upsample_rate is 0"),
        ({"vocabulary": "llm", "num_attention_heads": 3}, "num_attention_heads is 3; it must divide 32"),
        ({"vocabulary": "llm", "hidden_dropout": 7}, "hidden_dropout is 7; it must be from 0 to 1"),
    ],
)
def test_invalid_configs(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        SpeechLLMConfig(**tiny_config(), ctc_head_config=fields)


def test_own_layout(with_head, tmp_path):
    model, _ = with_head()
    model.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.ctc_head_config.characters == model.config.ctc_head_config.characters
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in loaded.ctc_head.parameters())


def test_stock_trainer_takes_no_target_of_the_head_for_a_label():
    """A label that a batch lacks leaves the validation of transformers' own trainer without a loss."""
    assert find_labels(SpeechLLMForConditionalGeneration) == ["labels"]
