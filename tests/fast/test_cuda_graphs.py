"""Decoding with a preallocated cache: the same texts as with the cache of transformers, for every growth."""

import copy

import numpy as np
import pytest
import torch

from hf_speechllm.fast import cuda_graphs
from hf_speechllm.fast.cuda_graphs import CudaGraphDecoder, supports_cuda_graphs
from hf_speechllm.inference.requests import Request
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.model.kv_cache import CACHE


@pytest.fixture(scope="module")
def requests(waveforms):
    prompt = transcription_prompt()
    words = [(), ("one",), (), ("two", "three"), (), (), ()]  # prompts of many lengths are padded
    return [
        Request(str(i), transcription_messages(waveform, prompt), words[i]) for i, waveform in enumerate(waveforms)
    ]


def texts(transcriber, requests):
    return [item.text for item in sorted(transcriber(requests), key=lambda item: item.index)]


@pytest.mark.parametrize("growth", [1, 3, 48])
def test_preallocated_cache_decodes_the_same_texts(parts, requests, monkeypatch, growth):
    monkeypatch.setattr(cuda_graphs, "GROWTH", growth)
    monkeypatch.setattr(cuda_graphs, "ALIGNMENT", 4)
    expected = texts(Transcriber(*parts, max_new_tokens=40), requests)
    transcriber = Transcriber(*parts, max_new_tokens=40)
    transcriber.greedy_decoder = CudaGraphDecoder(parts[0].llm.get_decoder(), graphs=False)
    assert texts(transcriber, requests) == expected
    assert len(set(expected)) > 2 and max(map(len, expected)) > 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_decode_the_same_texts(parts, requests):
    model, processor = copy.deepcopy(parts[0]).to("cuda"), parts[1]
    captured = Transcriber(model, processor, max_new_tokens=100)
    expected = texts(Transcriber(model, processor, max_new_tokens=100, cuda_graphs=False), requests)
    assert texts(captured, requests) == expected
    assert captured.greedy_decoder.graphs and captured.greedy_decoder.graph is not None


def damaged(parts):
    """A model whose logits become NaN in the fourth step, in every second row."""
    model = copy.deepcopy(parts[0])
    decoder, forward, steps_done = model.llm.get_decoder(), model.llm.get_decoder().layers[0].forward, []

    def damage(hidden_states, *args, **kwargs):
        steps_done.append(1)
        result = forward(hidden_states, *args, **kwargs)
        if hidden_states.shape[1] > 1:
            steps_done.clear()
        if len(steps_done) != 3:
            return result
        result = result.clone()
        result[::2] = float("nan")
        return result

    decoder.layers[0].forward = damage
    return model


def test_nan_logits_of_a_step_are_found(parts, waveforms):
    model = damaged(parts)
    transcriber = Transcriber(model, parts[1], max_new_tokens=20, batch_seconds=1000)
    transcriber.greedy_decoder = CudaGraphDecoder(model.llm.get_decoder(), graphs=False)
    sound = Transcriber(*parts, max_new_tokens=20, batch_seconds=1000).transcribe(waveforms)
    prompt = transcription_prompt()
    requests = [Request(str(i), transcription_messages(item, prompt)) for i, item in enumerate(waveforms)]
    results = sorted(transcriber(requests), key=lambda item: item.index)
    failed = [item.index for item in results if item.error]
    assert 2 <= len(failed) < len(waveforms) and all("not finite" in results[index].error for index in failed)
    assert all(item.error or item.text == text for item, text in zip(results, sound, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nan_logits_of_a_captured_step_are_found(parts, requests):
    model, processor = copy.deepcopy(parts[0]).to("cuda"), parts[1]
    transcriber = Transcriber(model, processor, max_new_tokens=100)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert all(item.error is None for item in transcriber(requests))
    model.llm.get_decoder().norm.weight.data[0] = float("nan")
    assert all("not finite" in item.error for item in transcriber(requests))
    assert transcriber.greedy_decoder.graph is not None and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_recordings_of_one_length_need_no_mask(parts):
    waveforms = [np.random.default_rng(i).standard_normal(16000).astype(np.float32) * 0.1 for i in range(3)]
    transcriber = Transcriber(*parts, max_new_tokens=20)
    expected = transcriber.transcribe(waveforms)
    transcriber.greedy_decoder = CudaGraphDecoder(parts[0].llm.get_decoder(), graphs=False)
    assert transcriber.transcribe(waveforms) == expected


def test_hidden_states_of_a_step_equal_the_original_forward_pass(parts):
    decoder = parts[0].llm.get_decoder()
    embeds = torch.randn(3, 9, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        with CudaGraphDecoder(decoder, graphs=False) as replacement:
            cache = replacement.new_cache()
            for start, end in [(0, 6), (6, 7), (7, 8), (8, 9)]:
                result = decoder(
                    inputs_embeds=embeds[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    **{CACHE: cache},
                ).last_hidden_state
                seen = mask[:, start:end].bool()
                torch.testing.assert_close(result[seen], expected[:, start:end][seen], atol=1e-5, rtol=1e-4)
        assert cache.get_seq_length() == 9


def test_forward_pass_of_the_llm_is_restored(parts, requests):
    decoder = parts[0].llm.get_decoder()
    with pytest.raises(ZeroDivisionError), CudaGraphDecoder(decoder, graphs=False):
        raise ZeroDivisionError
    assert "forward" not in vars(decoder)
    assert texts(Transcriber(*parts, max_new_tokens=4), requests)


def test_unsupported_llms_are_recognized(parts):
    decoder = parts[0].llm.get_decoder()
    assert supports_cuda_graphs(decoder)
    config = decoder.config.to_dict()
    for change in (
        {"_attn_implementation": "eager"},
        {"sliding_window": 16},
        {"num_experts": 8},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
    ):
        other = torch.nn.Module()
        other.config = type("Config", (), {**config, "_attn_implementation": "sdpa", **change})
        assert not supports_cuda_graphs(other), change
