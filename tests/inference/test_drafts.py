"""Drafts of the CTC head that the LLM verifies."""

import pytest
import torch

from hf_speechllm import Transcriber
from hf_speechllm.inference.drafts import text_probabilities
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig
from hf_speechllm.model.ctc_vocabulary import character_config


@pytest.fixture(scope="module")
def with_head(compose_tiny):
    model, processor = compose_tiny(seed=2)
    size = len(processor.tokenizer)
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_attention_heads": 2}
    config = CTCHeadConfig(head_type="linear", vocabulary="llm", vocab_size=size + 1, blank_id=size, **options)
    add_ctc_head(model, config)
    return model.eval(), processor


class Steps:
    """Counts the forward passes of the LLM."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.llm.get_decoder().register_forward_hook(self.step)

    def step(self, *arguments):
        self.count += 1


@pytest.mark.parametrize("change", ["none", "first", "middle", "missing", "all", "empty"])
def test_tokens_are_those_of_greedy_search(with_head, waveforms, change):
    model, processor = with_head
    plain = Transcriber(model, processor, max_new_tokens=12, word_times=True)
    seen = []
    plain.reader.notice = lambda tokens, scores: seen.append((tokens, scores))
    inputs = processor.apply_transcription_request(waveforms)
    texts = plain.generate(inputs)
    tokens, scores = seen[0]
    ends = [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]
    truth = [[token for token in row if token not in ends] for row in tokens]
    drafts = {
        "none": truth,
        "first": [[299, *row[1:]] for row in truth],
        "middle": [[*row[: len(row) // 2], 299, *row[len(row) // 2 + 1 :]] for row in truth],
        "missing": [row[: len(row) // 2] for row in truth],
        "all": [[299] * 40 for row in truth],
        "empty": [[] for row in truth],
    }[change]

    transcriber = Transcriber(model, processor, max_new_tokens=12, ctc_draft=True)
    left = list(drafts)
    transcriber.reader.vocabulary.greedy = lambda log_probabilities: left.pop(0)
    transcriber.reader.notice = lambda tokens, scores: seen.append((tokens, scores))
    counted, greedy_steps = Steps(model), max(map(len, truth)) + 1
    assert transcriber.generate(inputs) == texts
    counted.handle.remove()
    drafted, drafted_scores = seen[1]
    for row, length in enumerate(map(len, truth)):
        assert drafted[row][:length] == truth[row]
        assert drafted_scores[row][:length] == pytest.approx(scores[row][:length], abs=1e-4)
    if change == "none":
        assert counted.count == 1 < greedy_steps
    if change == "middle":
        assert counted.count < greedy_steps


@pytest.mark.parametrize("drafted", [True, False])
def test_placeholders_of_audio_tokens_in_texts_and_drafts_change_nothing(with_head, waveforms, drafted):
    model, processor = with_head
    audio = processor.audio_token_id

    def prefer_audio(head, inputs, logits):
        best = logits.max(-1)
        logits[..., audio] = torch.where(best.indices % 3 == 0, best.values + 1, logits[..., audio])

    handle = model.get_output_embeddings().register_forward_hook(prefer_audio)
    try:
        inputs = processor.apply_transcription_request(waveforms)
        truth = [
            row.tolist() for row in model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
        ]
        assert any(audio in row for row in truth)
        left = [row if drafted else [token for token in row if token != audio] for row in truth]
        transcriber = Transcriber(model, processor, max_new_tokens=12, ctc_draft=True)
        transcriber.reader.vocabulary.greedy = lambda log_probabilities: left.pop(0)
        texts = Transcriber(model, processor, max_new_tokens=12).generate(inputs)
        assert transcriber.generate(inputs) == texts
    finally:
        handle.remove()


def test_words_of_drafts_equal_those_of_greedy_search(with_head, waveforms):
    plain, drafted = (
        Transcriber(*with_head, max_new_tokens=8, word_times=True, ctc_draft=ctc_draft).transcripts(waveforms)
        for ctc_draft in (False, True)
    )
    for left, right in zip(plain, drafted, strict=True):
        assert left.text == right.text
        for one, two in zip(left.words, right.words, strict=True):
            assert (one.text, one.start, one.ctc) == (two.text, two.start, two.ctc)
            assert (one.llm is None) == (two.llm is None) and (one.llm is None or one.llm == pytest.approx(two.llm))


def test_dialogues_with_several_recordings_are_decoded_without_drafts(with_head, waveforms):
    model, processor = with_head
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": waveforms[0]}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "audio", "audio": waveforms[1]}]},
    ]
    inputs = processor.apply_chat_template([messages])
    texts = [
        Transcriber(model, processor, max_new_tokens=6, ctc_draft=ctc_draft).generate(inputs)
        for ctc_draft in (False, True)
    ]
    assert texts[0] == texts[1]


def test_other_vocabularies_are_refused(compose_tiny):
    model, processor = compose_tiny(seed=2)
    add_ctc_head(model, character_config(["one"], hidden_size=32))
    with pytest.raises(ValueError, match="--ctc_draft requires a CTC head over the LLM's tokens"):
        Transcriber(model, processor, ctc_draft=True)


def test_verified_texts_end_at_the_end_token(with_head, waveforms, monkeypatch):
    model, processor = with_head
    inputs = processor.apply_transcription_request(waveforms)
    plain = Transcriber(model, processor, max_new_tokens=12, word_times=True)
    seen = []
    plain.reader.notice = lambda tokens, scores: seen.append(tokens)
    plain.generate(inputs)
    end = seen[0][0][5]  # a token in the middle of a text becomes an end token
    monkeypatch.setattr(model.generation_config, "eos_token_id", [processor.tokenizer.eos_token_id, end])
    expected = plain.generate(inputs)
    drafted = Transcriber(model, processor, max_new_tokens=12, ctc_draft=True)
    for drafts in ([row[: row.index(end)] if end in row else row for row in seen[0]], seen[0]):
        left = list(drafts)
        drafted.reader.vocabulary.greedy = lambda log_probabilities, left=left: left.pop(0)
        assert drafted.generate(inputs) == expected


def test_probability_of_a_text_is_the_sum_over_its_alignments():
    probabilities = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]], [[0.9, 0.05, 0.05]] * 3])
    texts = [[1], []]
    paths = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]
    expected = sum(
        float(torch.stack([probabilities[0, at, id_] for at, id_ in enumerate(path)]).prod()) for path in paths
    )
    found = text_probabilities(probabilities.log(), torch.tensor([3, 2]), texts, blank=0)
    assert found == pytest.approx([expected, 0.9**2])


def test_encoder_and_adaptor_run_once_per_batch(with_head, waveforms):
    model, processor = with_head
    transcriber = Transcriber(model, processor, max_new_tokens=8, ctc_draft=True)
    parts, passes = (model.audio_encoder, model.audio_adaptor), []
    handles = [part.register_forward_hook(lambda module, *_: passes.append(module)) for part in parts]
    counted = Steps(model)
    transcriber.generate(processor.apply_transcription_request(waveforms))
    for handle in (*handles, counted.handle):
        handle.remove()
    assert passes == [*parts] and counted.count > 2  # greedy search completes some texts


def test_drafts_above_the_threshold_are_not_verified(with_head, waveforms, monkeypatch):
    model, processor = with_head
    inputs = processor.apply_transcription_request(waveforms)
    greedy = Transcriber(model, processor, max_new_tokens=8).transcribe(waveforms)
    probabilities = {0: 0.95}  # the other drafts are less probable than the threshold
    monkeypatch.setattr(
        "hf_speechllm.inference.drafts.text_probabilities",
        lambda _, lengths, *rest: [probabilities.get(row, 0.1) for row in range(len(lengths))],
    )
    options = {"max_new_tokens": 8, "word_times": True, "ctc_draft": True, "ctc_draft_threshold": 0.9}
    transcriber = Transcriber(model, processor, **options)
    draft = processor.tokenizer.encode("one", add_special_tokens=False)
    transcriber.reader.vocabulary.greedy = lambda log_probabilities: draft
    texts = transcriber.generate(inputs)
    assert texts == ["one", *greedy[1:]]

    probabilities.update({row: 0.9 for row in range(len(waveforms))})
    counted = Steps(model)
    found = transcriber.transcripts(waveforms)
    counted.handle.remove()
    assert counted.count == 0  # not even the adaptor runs
    for item in found:
        assert item.text == "one" and [word.text for word in item.words] == ["one"]
        assert item.words[0].ctc is not None and item.words[0].llm is None
