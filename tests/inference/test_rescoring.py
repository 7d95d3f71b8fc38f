"""Hypotheses of beam search that the CTC head rescores."""

import math

import pytest
import torch
from torch.nn import functional

from hf_speechllm import Transcriber
from hf_speechllm.inference.ctc_reader import CTCReader
from hf_speechllm.model.chat import clean_answer
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig
from hf_speechllm.model.ctc_vocabulary import character_config
from hf_speechllm.model.generation import transcribing

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
    """Texts of beam search for one recording, and their log-probabilities by transformers."""
    inputs = processor.apply_transcription_request(waveform)
    with transcribing(model, max_new_tokens=TOKENS, num_beams=BEAMS, num_return_sequences=BEAMS) as config:
        config.update(return_dict_in_generate=True, output_scores=True)
        output = model.generate(**inputs, generation_config=config)
    parts = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    sums = parts.sum(1)
    lengths = (output.beam_indices >= 0).sum(1)
    assert torch.allclose(output.sequences_scores * lengths, sums, atol=1e-4)
    texts = processor.tokenizer.batch_decode(
        output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [clean_answer(text) for text in texts], sums.tolist(), output, inputs


def plain_rescoring(model, processor, waveform, weight):
    """The text with the best sum of both scores; a plain loop over the hypotheses of one recording."""
    texts, sums, _, inputs = n_best(model, processor, waveform)
    vocabulary = CTCReader(model, processor).vocabulary
    states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    log_probabilities, length = model.ctc_head(states, mask)
    best, best_score = texts[0], -math.inf
    for text, llm in zip(texts, sums, strict=True):
        ids = torch.tensor([vocabulary.encode(text)], dtype=torch.long)
        loss = functional.ctc_loss(
            log_probabilities.transpose(0, 1), ids, length, torch.tensor([ids.shape[1]]), model.ctc_head.config.blank_id,
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
    if weight == 0.9:
        assert rescored != beams
