"""Transcription: batches have the same texts as single recordings, prefetching, and an error for every failure."""

import copy
import os
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig

from hf_speechllm.audio.vad import VoiceDetector
from hf_speechllm.audio.waveform import AudioError, load_audio
from hf_speechllm.cli.hotwords import read_hotwords
from hf_speechllm.fast.attention import disable_host_syncs
from hf_speechllm.inference.batches import default_batch_seconds
from hf_speechllm.inference.finite import LogitsCheck
from hf_speechllm.inference.prefetch import measure_seconds, prefetch
from hf_speechllm.inference.segments import Segment
from hf_speechllm.inference.transcriber import Request, Transcriber
from hf_speechllm.model.chat import clean_answer, transcription_messages, transcription_prompt
from hf_speechllm.model.generation import REPLACED

pytestmark = pytest.mark.core


class Spans:
    """A detector that returns given segments."""

    def __init__(self, spans, max_seconds=2.0):
        self.spans = spans
        self.max_seconds = max_seconds

    def segments(self, waveform):
        return [(int(start * 16000), int(end * 16000)) for start, end in self.spans]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_has_the_same_texts_as_single_recordings(parts, waveforms, num_beams):
    options = {"max_new_tokens": 24, "num_beams": num_beams}
    hotwords = [(), ("one",), (), ("two", "three"), (), (), ()]  # prompts of many lengths are padded, too
    requests = [
        Request(str(i), transcription_messages(waveform, transcription_prompt()), words)
        for i, (waveform, words) in enumerate(zip(waveforms, hotwords, strict=True))
    ]
    together = {item.index: item.text for item in Transcriber(*parts, **options)(requests)}
    alone = [next(iter(Transcriber(*parts, **options)([request]))).text for request in requests]
    assert [together[index] for index in range(len(requests))] == alone
    assert len(set(alone)) > 3


def test_batches_that_do_not_fit_into_memory_are_split(parts, waveforms, monkeypatch, caplog):
    prompt = transcription_prompt()
    dialogues = [transcription_messages(waveform, prompt) for waveform in waveforms]
    dialogues[2:4] = [[*dialogues[2], {"role": "assistant", "content": "one"}, dialogues[3][-1]]]  # two recordings
    requests = [Request(str(i), dialogue) for i, dialogue in enumerate(dialogues)]
    transcriber = Transcriber(*parts, max_new_tokens=16)
    expected = {item.index: item.text for item in transcriber(requests)}
    generate, sizes = transcriber.generate, []

    def generate_little(inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(inputs)

    monkeypatch.setattr(transcriber, "generate", generate_little)
    assert {item.index: item.text for item in transcriber(requests)} == expected
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    assert "6 rows do not fit into memory" in caplog.text
    monkeypatch.setattr(transcriber, "generate", lambda inputs: generate_little({"input_ids": [0] * 3}))
    with pytest.raises(torch.OutOfMemoryError):
        list(transcriber(requests[:1]))


def test_beams_find_the_texts_of_transformers_beam_search_which_are_not_those_of_greedy_search(parts, waveforms):
    model, processor = parts
    greedy, beams = (
        Transcriber(*parts, max_new_tokens=24, num_beams=number).transcribe(waveforms) for number in (1, 4)
    )
    expected = []
    for waveform in waveforms:
        inputs = processor.apply_transcription_request(waveform)
        found = model.generate(**inputs, max_new_tokens=24, num_beams=4, do_sample=False)
        text = processor.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(clean_answer(text))
    assert beams == expected
    assert greedy != beams


def test_all_beams_hear_the_recordings_of_their_own_dialogue_which_are_encoded_once(parts, waveforms):
    model, processor = parts
    messages = [transcription_messages(waveform, transcription_prompt()) for waveform in waveforms[:4]]
    answer = {"role": "assistant", "content": "one"}
    inputs = processor.apply_chat_template([[*messages[0], answer, messages[1][-1]], messages[2], messages[3]])
    heard, encoded = [], []
    handles = [
        model.llm.get_decoder().register_forward_pre_hook(
            lambda module, arguments, options: heard.append(options["inputs_embeds"]), with_kwargs=True
        ),
        model.audio_adaptor.register_forward_pre_hook(lambda module, arguments: encoded.append(len(arguments[0]))),
    ]
    for num_beams in (1, 3):
        Transcriber(*parts, max_new_tokens=1, num_beams=num_beams).generate(inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(heard[1], heard[0].repeat_interleave(3, 0))
    assert encoded == [4, 4]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_nothing_is_sampled_where_the_checkpoint_would(parts, waveforms, monkeypatch, num_beams):
    transcriber = Transcriber(*parts, max_new_tokens=12, num_beams=num_beams)
    expected = transcriber.transcribe(waveforms[:3])
    sampling = copy.deepcopy(parts[0].generation_config)
    sampling.update(do_sample=True, temperature=50.0, top_k=0, num_beams=2)
    monkeypatch.setattr(parts[0], "generation_config", sampling)
    assert transcriber.transcribe(waveforms[:3]) == expected


def test_next_batches_are_prepared_while_the_model_computes(parts, waveforms, monkeypatch):
    transcriber = Transcriber(*parts, batch_seconds=1, num_workers=2)
    batch, threads, counts, in_time = parts[1].batch, set(), {"prepared": 0, "decoded": 0}, []
    changed = threading.Condition()

    def watched_batch(dialogues, *args, **options):
        threads.add(threading.current_thread())
        result = batch(dialogues, *args, **options)
        with changed:
            counts["prepared"] += len(dialogues)
            changed.notify()
        return result

    def waiting_model(inputs):
        counts["decoded"] += len(inputs["input_ids"])
        if counts["decoded"] < len(waveforms):
            with changed:
                in_time.append(changed.wait_for(lambda: counts["prepared"] > counts["decoded"], timeout=20))
        return ["text"] * len(inputs["input_ids"])

    monkeypatch.setattr(parts[1], "batch", watched_batch)
    monkeypatch.setattr(transcriber, "generate", waiting_model)
    assert transcriber.transcribe(waveforms) == ["text"] * len(waveforms)
    assert len(in_time) > 2 and all(in_time)
    assert threading.main_thread() not in threads


def test_prefetching_keeps_the_order_and_the_limit():
    from concurrent.futures import ThreadPoolExecutor

    begun = []
    with ThreadPoolExecutor(2) as pool:
        results = prefetch(pool, lambda item: begun.append(item) or item, ((i, 2.0) for i in range(20)), 6.0)
        assert next(results) == 0
        assert len(begun) <= 4
        assert list(results) == list(range(1, 20))


def test_segments_are_joined_in_their_order_with_their_times(parts, waveforms, monkeypatch):
    transcriber = Transcriber(*parts, batch_seconds=1, vad=Spans([(0.0, 0.5), (0.6, 2.0), (2.1, 2.3)]))
    lengths = []

    def name_the_length(inputs):
        frames = inputs["input_features_mask"].sum(-1).tolist()
        lengths.extend(frames)
        return [f"{count} frames" for count in frames]

    monkeypatch.setattr(transcriber, "generate", name_the_length)
    (result,) = transcriber.transcripts(waveforms[1:2])
    texts = [f"{frames} frames" for frames in (8, 23, 3)]
    assert lengths[0] == 23  # the longest first
    assert result.segments == (
        Segment(0.0, 0.5, texts[0]), Segment(0.6, 2.0, texts[1]), Segment(2.1, 2.3, texts[2])
    )  # fmt: skip
    assert result.text == " ".join(texts)
    assert result.seconds == pytest.approx(3.1)


def test_segment_is_decoded_like_a_recording(parts, waveforms):
    spans = [(0.1, 0.9), (1.0, 2.9)]
    (result,) = Transcriber(*parts, max_new_tokens=16, vad=Spans(spans)).transcripts(waveforms[1:2])
    stretches = [waveforms[1][int(start * 16000) : int(end * 16000)] for start, end in spans]
    assert [item.text for item in result.segments] == Transcriber(*parts, max_new_tokens=16).transcribe(stretches)


def test_without_speech_there_is_no_text(parts, waveforms):
    (result,) = Transcriber(*parts, vad=Spans([])).transcripts(waveforms[:1])
    assert (result.text, result.segments, result.error) == ("", (), None)
    assert result.seconds == pytest.approx(0.9)


def test_recordings_too_long_for_the_encoder_are_refused_without_vad(parts, waveforms):
    model, processor = parts
    transcriber = Transcriber(model, processor, max_new_tokens=2)
    transcriber.meter.max_seconds = 3.0
    with pytest.raises(AudioError, match=r"3\.1 s; the encoder accepts at most 3\.0 s; use --vad, "):
        transcriber.transcribe(waveforms)
    transcriber = Transcriber(model, processor, max_new_tokens=2, vad=Spans([(0.0, 1.0)]))
    transcriber.meter.max_seconds = 3.0
    assert len(transcriber.transcribe(waveforms)) == len(waveforms)
    with pytest.raises(ValueError, match="lower --vad_max_seconds"):
        Transcriber(model, processor, vad=Spans([], max_seconds=1e6))


def test_prompts_too_long_for_the_llm_are_refused(parts, waveforms):
    words = [f"word{number}" for number in range(10_000)]
    (result,) = Transcriber(*parts)(
        [Request("a", transcription_messages(waveforms[0], transcription_prompt(hotwords=words)))]
    )
    assert "the LLM accepts fewer than 32768; use fewer hotwords" in result.error


def test_hotwords_come_from_a_list_or_a_file_and_are_limited(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffQwen, the model\n\n开放时间 \nQwen, the model\n", encoding="utf-8")
    assert read_hotwords(str(path)) == ["Qwen, the model", "开放时间"]
    assert read_hotwords("Qwen,开放时间， x") == ["Qwen", "开放时间", "x"]
    assert read_hotwords(None) == []
    path.write_text("\n".join(map(str, range(10_000))))
    with pytest.raises(ValueError, match=f"{path}: 10000 hotwords; the maximum is 1000"):
        read_hotwords(str(path))
    with pytest.raises(ValueError, match="--hotwords: 10000 hotwords"):
        read_hotwords(",".join(map(str, range(10_000))))
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_hotwords(str(path))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_a_surround_recording_is_decoded_as_its_mixdown(parts, tmp_path, name):
    rng = np.random.default_rng(0)
    time = np.arange(2 * 44100) / 44100
    channels = np.stack([0.2 * np.sin(2 * np.pi * 150 * (k + 1) * time) for k in range(6)], axis=1)
    channels += 0.01 * rng.standard_normal(channels.shape)
    soundfile.write(tmp_path / name, channels, 44100)
    soundfile.write(tmp_path / "mono.wav", channels.mean(axis=1), 44100, subtype="FLOAT")
    mixed, mono = load_audio(tmp_path / name), load_audio(tmp_path / "mono.wav")
    assert measure_seconds(tmp_path / name, 16000) == pytest.approx(2.0)
    assert len(mixed) == len(mono) == 32000
    assert np.abs(mixed - mono).max() < (0.1 if name == "a.ogg" else 1e-3)
    if name != "a.ogg":
        texts = Transcriber(*parts, max_new_tokens=16).transcribe([str(tmp_path / name), str(tmp_path / "mono.wav")])
        assert texts[0] == texts[1] != ""


def test_lengths_come_from_headers_and_damage_is_found_on_loading(parts, make_wav):
    whole, cut = make_wav("whole.flac", seconds=2), make_wav("cut.flac", seconds=2)
    cut.write_bytes(cut.read_bytes()[:-500])
    empty = make_wav("empty.wav")
    empty.write_bytes(b"")
    requests = [
        Request(path.name, transcription_messages(str(path), transcription_prompt())) for path in (whole, cut, empty)
    ]
    transcriber = Transcriber(*parts, max_new_tokens=2)
    lengths = transcriber.measure(requests)
    assert lengths[:2] == [2.0, 2.0] and "empty.wav: the file is empty" in lengths[2]
    errors = {item.index: item.error for item in transcriber(requests, lengths)}
    assert errors[0] is None
    assert "cut.flac: truncated" in errors[1]
    assert "the file is empty" in errors[2]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"vad": Spans([(0.0, 0.1), (0.1, 0.2)])}])
def test_non_finite_logits_are_an_error(parts, waveforms, options):
    model = copy.deepcopy(parts[0])
    transcriber = Transcriber(model, parts[1], max_new_tokens=8, **options)
    expected = transcriber.transcribe(waveforms)
    for value in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            model.llm.get_output_embeddings().weight[7] = value
        results = list(transcriber([request(item) for item in waveforms]))
        assert sorted(item.index for item in results) == list(range(len(waveforms)))
        assert all("logits are not finite" in item.error and not item.text for item in results)
        with pytest.raises(AudioError, match="recording 0: the model's logits are not finite"):
            transcriber.transcribe(waveforms)
    assert len(expected) == len(waveforms)


def request(item):
    return Request("a", transcription_messages(item, transcription_prompt()))


def test_non_finite_logits_of_one_recording_do_not_affect_others(parts, waveforms, monkeypatch):
    expected = Transcriber(*parts, max_new_tokens=8).transcribe(waveforms)
    longest = max(len(waveform) for waveform in waveforms)
    encode = parts[0].encode_audio

    def damage(features, mask, *args):
        states, mask = encode(features, mask, *args)
        return states.masked_fill((mask.sum(1) == mask.sum(1).max())[:, None, None], float("nan")), mask

    monkeypatch.setattr(parts[0], "encode_audio", damage)
    results = sorted(
        Transcriber(*parts, max_new_tokens=8)([request(item) for item in waveforms]), key=lambda item: item.index
    )
    for waveform, result, text in zip(waveforms, results, expected, strict=True):
        assert (result.error is not None) == (len(waveform) == longest)
        assert result.text == ("" if result.error else text)


def test_steps_after_the_end_of_a_row_do_not_count():
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=[2, 3], pad_token_id=0))
    watch = LogitsCheck(model)
    watch._sums = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, float("nan"), 1.0]), torch.full((3,), np.inf)]
    tokens = torch.tensor([[5, 3, 0], [5, 2, 0], [5, 6, 7]])
    assert watch.finite(3, tokens) == [True, False, False]
    assert watch.finite(3) == [False, False, False]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_threads_share_a_model(parts, waveforms, options):
    model, config = parts[0], parts[0].generation_config
    transcribers = [Transcriber(*parts, max_new_tokens=8), Transcriber(*parts, max_new_tokens=12, **options)]
    jobs = [(transcriber, waveforms[: 1 + index % 3]) for index in range(8) for transcriber in transcribers]
    expected = [transcriber.transcribe(list(recordings)) for transcriber, recordings in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: job[0].transcribe(list(job[1])), jobs)) == expected
    assert model.generation_config is config


def test_transcriber_does_not_change_the_process(parts, waveforms, monkeypatch):
    seen, generate = [], parts[0].generate

    def look(**options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return generate(**options)

    monkeypatch.setattr(parts[0], "generate", look)
    before = process_state()
    transcriber = Transcriber(*parts, max_new_tokens=2, vad=VoiceDetector())
    assert process_state() == before
    transcriber.vad = Spans([(0.0, 0.1)])
    transcriber.transcribe(waveforms[0])
    assert process_state() == before and seen == [False]


def test_without_fast_paths_cudnn_attention_stays_and_texts_are_the_same(parts, waveforms, monkeypatch):
    seen, generate = [], parts[0].generate

    def look(**options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return generate(**options)

    monkeypatch.setattr(parts[0], "generate", look)
    fast, plain = (
        Transcriber(*parts, max_new_tokens=12, fast=fast).transcribe(waveforms[:2]) for fast in (True, False)
    )
    assert fast == plain and seen == [False, True]


def process_state():
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ),
    )  # fmt: skip


def test_all_kinds_of_recordings_have_the_same_text(parts, waveforms, tmp_path):
    transcriber = Transcriber(*parts, max_new_tokens=12)
    wave = waveforms[1]
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    expected = transcriber.transcribe([wave])
    ways = [
        str(path), path, path.read_bytes(), wave, torch.from_numpy(wave), (wave, 16000), wave.astype(np.float64),
        {"audio": {"array": wave, "sampling_rate": 16000}, "text": "one"}, {"path": str(path), "bytes": None},
    ]  # fmt: skip
    assert [transcriber.transcribe(way) for way in ways] == expected * len(ways)
    assert transcriber.transcribe(ways) == expected * len(ways)
    assert transcriber.transcribe(wave[::2].copy(), sampling_rate=8000) == transcriber.transcribe((wave[::2], 8000))
    with pytest.raises(AudioError, match="recording 1: the waveform: samples reach .*32768"):
        transcriber.transcribe([wave, wave * 32768])
    assert transcriber.transcribe([]) == []


def test_replaced_recording_has_the_new_duration(parts, waveforms, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, waveforms[0], 16000, subtype="FLOAT")
    transcriber = Transcriber(*parts, max_new_tokens=8)
    requests = [Request("a", transcription_messages(str(path), transcription_prompt()))]
    lengths = transcriber.measure(requests)
    soundfile.write(path, waveforms[1], 16000, subtype="FLOAT")
    (transcript,) = transcriber(requests, lengths)
    assert lengths == [0.9] and transcript.seconds == transcript.segments[0].end == 3.1


FOREIGN = [
    {"return_dict_in_generate": True, "output_scores": True}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 2},
    {"num_beams": 3}, {"max_length": 3}, {"min_new_tokens": 8}, {"stop_strings": ["a"]}, {"guidance_scale": 2.0},
    {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.5, "top_k": 4}, {"cache_implementation": "quantized"},
    {"watermarking_config": {"bias": 2.0}}, {"sequence_bias": [[[5], 9.0]]}, {"token_healing": True},
    {"prefill_chunk_size": 2}, {"dola_layers": "low"}, {"max_time": 1e-9}, {"num_return_sequences": 2, "num_beams": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", FOREIGN)
def test_texts_do_not_depend_on_the_generation_configuration(parts, waveforms, caplog, settings):
    model, processor = parts
    expected = Transcriber(model, processor, max_new_tokens=8).transcribe(waveforms[:3])
    assert not caplog.text
    own = model.generation_config
    try:
        model.generation_config = strangers = GenerationConfig(**{**own.to_dict(), **settings})
        transcriber = Transcriber(model, processor, max_new_tokens=8)
        assert transcriber.transcribe(waveforms[:3]) == expected
        assert model.generation_config is strangers
    finally:
        model.generation_config = own
    for name in settings.keys() - REPLACED:
        assert f"'{name}'" in caplog.text


def test_invalid_end_tokens_are_refused(parts):
    model, processor = parts
    own = model.generation_config
    try:
        for name, value in (("eos_token_id", 10**9), ("eos_token_id", [2, -5]), ("pad_token_id", 10**9)):
            model.generation_config = copy.deepcopy(own)
            setattr(model.generation_config, name, value)
            with pytest.raises(ValueError, match=f"generation_config.{name} is .* tokens are 0 to"):
                Transcriber(model, processor)
    finally:
        model.generation_config = own


def test_texts_do_not_depend_on_generation_settings_in_the_model_configuration(compose_tiny, waveforms):
    model, processor = compose_tiny(seed=3)
    expected = Transcriber(model, processor, max_new_tokens=8).transcribe(waveforms[:3])
    model.config.repetition_penalty = 5.0
    assert Transcriber(model, processor, max_new_tokens=8).transcribe(waveforms[:3]) == expected


def test_plain_transcriber_disables_fast_paths(compose_tiny, waveforms):
    model, processor = compose_tiny(seed=3)
    before = [type(module) for module in model.modules()]
    implementations = [part.config._attn_implementation for part in (model.audio_encoder, model.audio_adaptor)]
    disable_host_syncs(model)
    assert [type(module) for module in model.modules()] != before
    Transcriber(model, processor, fast=False)
    assert [type(module) for module in model.modules()] == before
    assert [p.config._attn_implementation for p in (model.audio_encoder, model.audio_adaptor)] == implementations


def test_the_default_batch_follows_the_free_memory_of_the_gpu(monkeypatch, parts):
    free = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 1 << 40))
    gpu = torch.device("cuda", 0)
    sizes = []
    for gigabytes, beams in ((0.5, 1), (10, 1), (10, 5), (139, 1)):
        free["bytes"] = int(gigabytes * 1e9)
        sizes.append(default_batch_seconds(gpu, beams))
    assert sizes == pytest.approx([240, 2000, 400, 8192])
    assert default_batch_seconds(torch.device("cpu")) == 240
    model, processor = parts
    assert Transcriber(model, processor).batch_seconds == 240
    assert Transcriber(model, processor, batch_seconds=7).batch_seconds == 7
