"""Hypotheses of beam search that the CTC head rescores."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig

from hf_speechllm import Transcriber
from hf_speechllm.inference.alignment import split_words
from hf_speechllm.inference.ctc_reader import CTCReader
from hf_speechllm.inference.rescoring import BeamScores, Rescorer
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig
from hf_speechllm.model.ctc_vocabulary import character_config
from hf_speechllm.model.generation import transcribing

pytestmark = pytest.mark.core
BEAMS, TOKENS = 4, 6


@pytest.fixture(scope="module", params=["llm", "characters"])
def with_head(compose_tiny, request):
    model, processor = compose_tiny(seed=2)
    size = len(processor.tokenizer)
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_attention_heads": 2, "head_type": "linear", "upsample_rate": 4}
    if request.param == "llm":
        config = CTCHeadConfig(vocabulary="llm", vocab_size=size + 1, blank_id=size, **options)
    else:
        config = character_config(["abcdefghijklmnopqrstuvwxyz0123456789"], **options)
    add_ctc_head(model, config)
    return model.eval(), processor


def n_best(model, processor, waveform):
    """Texts of beam search for the largest sums for one recording, and their log-probabilities by transformers."""
    inputs = processor.apply_transcription_request(waveform)
    with transcribing(model, max_new_tokens=TOKENS, num_beams=BEAMS, num_return_sequences=BEAMS) as config:
        config.update(return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
        output = model.generate(**inputs, generation_config=config)
    texts = processor.transcripts(output.sequences[:, inputs["input_ids"].shape[1] :])
    return texts, output.sequences_scores.tolist(), inputs


def plain_rescoring(model, processor, waveform, weight):
    """The text with the best sum of both scores; a plain loop over the hypotheses of one recording."""
    texts, sums, inputs = n_best(model, processor, waveform)
    vocabulary = CTCReader(model, processor).vocabulary
    states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    log_probabilities, length = model.ctc_head(states, mask)
    best, best_score = texts[0], -math.inf
    for text, llm in zip(texts, sums, strict=True):
        ids = torch.tensor([vocabulary.encode(text)], dtype=torch.long)
        loss = functional.ctc_loss(
            log_probabilities.transpose(0, 1), ids, length, torch.tensor([ids.shape[1]]), vocabulary.blank,
            reduction="sum",
        )  # fmt: skip
        score = (1 - weight) * llm - weight * float(loss)
        if score > best_score:
            best, best_score = text, score
    return best


@torch.inference_mode()
@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_texts_are_those_of_a_plain_loop_over_the_hypotheses(with_head, waveforms, weight):
    rescored, beams = (
        Transcriber(*with_head, max_new_tokens=TOKENS, num_beams=BEAMS, ctc_weight=value).transcribe(waveforms)
        for value in (weight, 0.0)
    )
    assert rescored == [plain_rescoring(*with_head, waveform, weight) for waveform in waveforms]
    assert weight < 0.5 or rescored != beams


def test_search_for_rescoring_maximizes_sums_and_not_means(with_head, waveforms, monkeypatch):
    model, generate, penalties = with_head[0], with_head[0].generate, []

    def spy(**options):
        penalties.append(options["generation_config"].length_penalty)
        return generate(**options)

    monkeypatch.setattr(model, "generate", spy)
    for weight in (0.5, 0.0):
        Transcriber(*with_head, max_new_tokens=TOKENS, num_beams=2, ctc_weight=weight).transcribe(waveforms[0])
    assert penalties == [0.0, model.generation_config.length_penalty]


@torch.inference_mode()
def test_bfloat16_rescores_like_the_plain_loop(with_head, waveforms):
    model, processor = copy.deepcopy(with_head[0]).bfloat16(), with_head[1]
    transcriber = Transcriber(model, processor, max_new_tokens=TOKENS, num_beams=BEAMS, ctc_weight=0.9)
    for waveform in waveforms[:3]:  # one by one: rounding depends on the padding
        assert transcriber.transcribe(waveform) == plain_rescoring(model, processor, waveform, 0.9)


@torch.inference_mode()
def test_log_probabilities_are_those_of_transformers(with_head, waveforms, monkeypatch):
    model, processor = with_head
    inputs = processor.apply_transcription_request(waveforms)
    start = inputs["input_ids"].shape[1]
    second = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, start + 1].item()
    ends = [processor.tokenizer.eos_token_id, second]  # texts have several lengths
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    options = {"max_new_tokens": 12, "num_beams": 8, "num_return_sequences": 8, "length_penalty": 0.0}
    with transcribing(model, **options, return_dict_in_generate=True, output_scores=True) as config:
        kept = BeamScores(config)
        output = model.generate(**inputs, generation_config=config, logits_processor=[kept])
    assert len(set((output.beam_indices >= 0).sum(1).tolist())) > 1
    torch.testing.assert_close(kept.sums(output.sequences[:, start:], output.beam_indices), output.sequences_scores)


def test_tokens_that_are_tied_with_the_last_candidate_have_its_score():
    kept = BeamScores(GenerationConfig(num_beams=2, eos_token_id=0))
    scores = torch.full((2, 9), 1 / 9).log()
    assert kept(None, scores) is scores
    tokens, beams = torch.arange(9)[:, None], torch.ones(9, 1, dtype=torch.int32)
    torch.testing.assert_close(kept.sums(tokens, beams), scores[0])
    assert kept.sums(tokens, -beams).tolist() == [-math.inf] * 9  # no text


def chosen(with_head, texts, llm, heard, weight):
    """Index of the best of hypotheses with log-probabilities of the LLM, for frames in which a text is heard."""
    model, processor = with_head
    reader = CTCReader(model, processor)
    ids = reader.vocabulary.encode(heard)
    frames = [part for id_ in ids for part in (id_, reader.vocabulary.blank)]
    probabilities = torch.full((1, len(frames), model.ctc_head.config.vocab_size), 0.01)
    probabilities[0, range(len(frames)), frames] = 1.0

    class Head:
        def __call__(self, states, mask):
            return (probabilities / probabilities.sum(-1, keepdim=True)).log(), torch.tensor([len(frames)])

    reader.model = SimpleNamespace(ctc_head=Head(), config=model.config)
    tokens = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    prompt = torch.tensor([[1, *[model.config.audio_token_id] * 3, 2]])
    rescorer = Rescorer(reader, processor, weight, num_beams=len(texts))
    return rescorer.best(prompt, torch.zeros(1, 1, 1), torch.ones(1, 1), tokens, torch.tensor(llm))[0]


def test_the_weight_decides_where_the_head_and_the_llm_disagree(with_head):
    texts, llm = ["one two three", "one too three"], [-1.0, -2.0]
    reader = CTCReader(*with_head)
    assert chosen(with_head, texts, llm, "one two three", 0.01) == chosen(with_head, texts, llm, texts[0], 0.99) == 0
    assert chosen(with_head, texts, llm, texts[1], 0.01) == 0
    assert chosen(with_head, texts, llm, texts[1], 0.99) == 1
    assert reader.vocabulary.encode(texts[0]) != reader.vocabulary.encode(texts[1])


def test_texts_that_do_not_fit_into_the_frames_lose(with_head):
    long = "three three three three three three three three"
    assert chosen(with_head, [long, "one"], [-1.0, -50.0], "two", 0.01) == 1
    assert chosen(with_head, [long, f"{long} {long}"], [-1.0, -0.5], "two", 0.5) == 0  # all lose: the first of the LLM


@torch.inference_mode()
def test_rows_with_several_recordings_keep_the_text_of_the_llm(with_head, waveforms):
    model, processor = with_head
    prompt = transcription_prompt()
    single = [transcription_messages(waveform, prompt) for waveform in waveforms]
    double = [*single[0], {"role": "assistant", "content": "one"}, single[1][-1]]
    inputs = processor.apply_chat_template([double, *single, double])
    rescored, beams = (
        Transcriber(model, processor, max_new_tokens=TOKENS, num_beams=BEAMS, ctc_weight=weight).generate(inputs)
        for weight in (0.9, 0.0)
    )
    assert (rescored[0], rescored[-1]) == (beams[0], beams[-1])
    assert rescored[1:-1] == [plain_rescoring(model, processor, waveform, 0.9) for waveform in waveforms]


def test_rescored_texts_have_word_times(with_head, waveforms):
    options = {"max_new_tokens": TOKENS, "num_beams": BEAMS, "ctc_weight": 0.9}
    found = Transcriber(*with_head, word_times=True, **options).transcripts(waveforms)
    assert [item.text for item in found] == Transcriber(*with_head, **options).transcribe(waveforms)
    for item in found:
        assert [word.text for word in item.words] == [item.text[start:end] for start, end in split_words(item.text)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctc_weight": 0.3}, "ctc_weight requires num_beams above 1"),
        ({"ctc_weight": 1.0, "num_beams": 2}, "ctc_weight is 1.0; it must be at least 0 and below 1"),
        ({"ctc_weight": -0.1, "num_beams": 2}, "ctc_weight is -0.1; it must be at least 0 and below 1"),
    ],
)
def test_wrong_options_are_refused(with_head, compose_tiny, options, message):
    with pytest.raises(ValueError, match=message):
        Transcriber(*with_head, **options)
    with pytest.raises(ValueError, match="the model has no CTC head, which word times and all --ctc_"):
        Transcriber(*compose_tiny(seed=2), ctc_weight=0.3, num_beams=2)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "ctc_weight": 0.5}])
def test_drafts_are_refused_together_with_beams(with_head, options):
    with pytest.raises(ValueError, match="ctc_draft is not supported with num_beams and ctc_weight"):
        Transcriber(*with_head, ctc_draft=True, **options)
