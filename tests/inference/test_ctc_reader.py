"""Confidence of words, and texts that the CTC head contradicts."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.inference.alignment import Word
from hf_speechllm.inference.ctc_reader import CTCReader, Evidence, is_contradicted, mean_confidence, token_spans
from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.segments import Segment
from hf_speechllm.inference.writers import write_results
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_vocabulary import character_config


@pytest.fixture(scope="module")
def with_head(compose_tiny):
    model, processor = compose_tiny(seed=2)
    torch.manual_seed(0)
    add_ctc_head(model, character_config(["one two three four 五六七八"], hidden_size=32, upsample_rate=3))
    return model.eval(), processor


def evidence(reader, path, text="", probability=0.9):
    """Evidence whose CTC head hears a character in each frame (`_`: the blank), and whose LLM is sure with 80 %."""
    ids = [0 if item == "_" else 1 if item == " " else reader.vocabulary.encode(item)[0] for item in path]
    size = reader.model.config.ctc_head_config.vocab_size
    frames = torch.full((len(ids), size), (1 - probability) / (size - 1))
    frames[range(len(ids)), ids] = probability
    tokens = reader.tokenizer.encode(text, add_special_tokens=False)
    return Evidence(frames.log(), tokens, [math.log(0.8)] * len(tokens))


def segment(text, path):
    return Segment(5.0, 5.06 + 0.02 * len(path), text)


def test_confidence_is_that_of_both(with_head):
    reader = CTCReader(*with_head)
    path = "__o_n_e__ __t_w_o__"
    found = reader.segment(segment("one two", path), evidence(reader, path, "one two"))
    assert [word.ctc for word in found.words] == pytest.approx([0.9, 0.9], abs=0.01)
    assert [word.llm for word in found.words] == pytest.approx([0.8, 0.8])
    assert found.confidence == pytest.approx(math.sqrt(0.9 * 0.8), abs=0.01)
    assert found.text == "one two" and not found.contradicted


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize(
    ("text", "path", "heard"),
    [
        ("three four three four", "____________________________", ""),  # words over silence
        ("one " * 30 + "one", "__o_n_e__ __t_w_o____________", "one two"),  # a loop
        ("four four", "__o_n_e__ __t_w_o____________", "one two"),
    ],
)
def test_invented_text_is_flagged_or_replaced(with_head, text, path, heard, guard):
    reader = CTCReader(*with_head, guard=guard)
    found = reader.segment(segment(text, path), evidence(reader, path, text))
    assert found.contradicted
    assert found.text == (heard if guard else text)
    assert " ".join(word.text for word in found.words) == found.text


def test_true_text_is_kept(with_head):
    reader = CTCReader(*with_head, guard=True)
    path = "__o_n_e__ __t_w_o____________"
    for text in ("one two", "One, two!", "one three", "one two 25", "25", ""):
        found = reader.segment(segment(text, path), evidence(reader, path, text))
        assert found.text == text and not found.contradicted, text


def test_words_without_probabilities_do_not_count():
    unknown, heard, unheard = Word("25", 0, 1), Word("a", 0, 1, 0.9), Word("b", 0, 1, 0.001)
    assert is_contradicted([unknown, unheard]) and not is_contradicted([unknown, unknown, heard, unheard])
    assert not is_contradicted([]) and mean_confidence([unknown]) is None
    assert mean_confidence([unknown, heard, Word("c", 0, 1, 0.4)]) == pytest.approx(0.6)


def test_tokens_of_a_text(with_head):
    tokenizer = with_head[1].tokenizer
    tokens = tokenizer.encode("one 五六 x", add_special_tokens=False)
    spans = token_spans(tokenizer, [*tokens, tokenizer.eos_token_id], "one 五六 x")
    assert spans[0][0] == 0 and spans[-1] == (8, 8) and spans[-2] == (7, 8)
    assert token_spans(tokenizer, tokens, "two") == []


def test_probabilities_of_generated_tokens(with_head, waveforms):
    model, processor = with_head
    transcriber = Transcriber(model, processor, word_times=True, max_new_tokens=6)
    seen = []
    transcriber.reader.notice = lambda tokens, scores: seen.append((tokens, scores))
    inputs = processor.apply_transcription_request(waveforms[:2])
    transcriber.generate(inputs)
    (tokens, scores), start = seen[0], inputs["input_ids"].shape[1]
    for row, (ids, values) in enumerate(zip(tokens, scores, strict=True)):
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor(tokens)], 1)}
        whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, len(ids)), value=1)
        logits = model(**whole).logits[row, start - 1 : -1].log_softmax(-1)
        end = ids.index(processor.tokenizer.eos_token_id) + 1 if processor.tokenizer.eos_token_id in ids else len(ids)
        expected = logits[range(end), ids[:end]].tolist()
        assert values[:end] == pytest.approx(expected, abs=1e-4)


def test_threads_share_a_transcriber_with_word_times(with_head, waveforms):
    transcriber = Transcriber(*with_head, word_times=True, max_new_tokens=6)
    expected = [transcriber.transcripts(waveform) for waveform in waveforms]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(transcriber.transcripts, waveforms)) == expected


def test_flags_are_written(tmp_path):
    segments = (Segment(0, 2, "one", confidence=0.25, contradicted=True),)
    results = [("a", Transcript(0, "one", 2.0, segments=segments))]
    write_results(tmp_path / "hyp.txt", results, segments=True, checked=True)
    row = json.loads((tmp_path / "hyp.segments.jsonl").read_text())
    assert row["contradicted"] and row["confidence"] == 0.25


def test_models_without_a_head_are_refused(tiny_model):
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="the model has no CTC head"):
        Transcriber(model, SpeechLLMProcessor.from_pretrained(tiny_model), ctc_guard=True)
