"""Families of encoders: lengths, padding, gradients and saving are right for every family in the table."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.front_ends import cacheable_features, num_encoder_input_frames, stored_width
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.fast.compilation import compile_layers
from hf_speechllm.model.chat import parse_messages, transcription_messages, transcription_prompt
from hf_speechllm.model.encoders import FAMILIES
from hf_speechllm.training.speed import check_encoder_passes

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
CONVOLUTIONS = {
    "conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
NO_DROPOUT = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "dropout": 0.0, "layerdrop": 0.0, "conformer_conv_dropout": 0.0,
}  # fmt: skip
WAVEFORMS = {**LAYERS, **CONVOLUTIONS, **NO_DROPOUT}
# Every family, and variants that compute differently.
ENCODERS = {
    "fun_asr_nano_encoder": {**LAYERS, **NO_DROPOUT, "num_timestamp_prediction_layers": 1},
    "whisper": {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 1,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_mel_bins": 20, "vocab_size": 50, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
    },
    "whisper in windows": {"window_seconds": 1.0},
    "wav2vec2-bert": {**LAYERS, **NO_DROPOUT, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5},
    "parakeet_encoder": {**LAYERS, **NO_DROPOUT, "num_mel_bins": 80, "subsampling_conv_channels": 4},
    "qwen3_asr_encoder": {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 20,
        "downsample_hidden_size": 4, "n_window_infer": 200,
    },
    "moonshine": {
        "hidden_size": 16, "intermediate_size": 24, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 2, "vocab_size": 50,
    },
    "hubert": WAVEFORMS,  # with group norm
    "wavlm": {**WAVEFORMS, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_buckets": 8},
    "wav2vec2": {**WAVEFORMS, "feat_extract_norm": "layer"},
    "wav2vec2-conformer": {**WAVEFORMS, "feat_extract_norm": "layer"},
    "data2vec-audio": {**WAVEFORMS, "feat_extract_norm": "layer", "conv_pos_kernel_size": 3},
    "sew": WAVEFORMS,
    "sew-d": {**WAVEFORMS, "position_buckets": 8},
    "unispeech-sat": {**WAVEFORMS, "feat_extract_norm": "layer"},
}  # fmt: skip
ENCODERS["whisper in windows"] |= ENCODERS["whisper"]


def waveform(seconds, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
    return (0.3 * tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="module", params=ENCODERS)
def pair(request, compose_tiny, tiny_config):
    encoder = {"model_type": request.param.partition(" ")[0], **ENCODERS[request.param]}
    config = {**tiny_config(adaptor_type="linear", downsample_rate=2), "audio_encoder_config": encoder}
    return compose_tiny(config, seed=1)


def examples(processor, seconds):
    dialogues = [
        parse_messages(transcription_messages(b"", transcription_prompt(), f"one two {number}"))
        for number in range(len(seconds))
    ]
    waves = [waveform(length, number) for number, length in enumerate(seconds)]
    return [
        processor.batch(dialogues[rows], waves[rows], True)
        for rows in (slice(None), *(slice(row, row + 1) for row in range(len(seconds))))
    ]


def test_every_family_is_tested():
    assert {*FAMILIES} == {name.partition(" ")[0] for name in ENCODERS} | {"unispeech"}
    assert FAMILIES["unispeech"] == FAMILIES["wav2vec2"] == FAMILIES["hubert"]


def test_the_model_fills_as_many_rows_as_the_processor_counts(pair):
    model, processor = pair
    waves = [waveform(seconds) for seconds in (0.03, 0.1, 0.113, 0.5, 0.997, 1.0, 1.001, 1.6, 2.05, 2.6)]
    features = processor.extract_features(waves)
    for wave, item in zip(waves, features, strict=True):
        stored = cacheable_features(processor.feature_extractor, wave)
        assert stored.shape[1] == stored_width(processor.feature_extractor)
        assert len(item) == num_encoder_input_frames(processor.feature_extractor, len(stored))
        with torch.no_grad():
            states, mask = model.encode_audio(item.unsqueeze(0), torch.ones(1, len(item), dtype=torch.long))
            tokens, counts = model.get_audio_features(item.unsqueeze(0), torch.ones(1, len(item), dtype=torch.long))
        assert states.shape[1] == mask.shape[1] == int(mask.sum()), len(wave)
        assert tokens.shape[1] == int(counts) == processor.num_audio_tokens(len(item)) > 0
        assert processor.num_audio_tokens(states.shape[1], encoded=True) == int(counts)


@pytest.mark.parametrize(("window", "frames"), [(None, [1500]), (1.0, [50, 150]), (30, [1500])])
def test_windows_of_whisper_are_the_smallest_multiples_that_hold_a_recording(
    compose_tiny, tiny_config, window, frames
):
    encoder = {"model_type": "whisper", **ENCODERS["whisper"], **({"window_seconds": window} if window else {})}
    config = {**tiny_config(adaptor_type="linear", downsample_rate=2), "audio_encoder_config": encoder}
    model, processor = compose_tiny(config, seed=1)
    seen = []
    model.audio_encoder.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(**examples(processor, (0.4, 2.1, 1.0))[0])
    assert seen == frames
    assert (
        model.audio_encoder.config.max_source_positions == model.audio_encoder.embed_positions.num_embeddings == 1500
    )


def test_threads_share_an_encoder_with_windows(compose_tiny, tiny_config):
    encoder = {"model_type": "whisper", **ENCODERS["whisper"], "window_seconds": 0.5}
    config = {**tiny_config(adaptor_type="linear", downsample_rate=2), "audio_encoder_config": encoder}
    model, processor = compose_tiny(config, seed=1)
    batches = [examples(processor, (seconds, 0.3))[0] for seconds in (0.4, 1.2, 2.1, 4.0)]

    def states(batch):
        with torch.no_grad():
            return model.encode_audio(batch["input_features"], batch["input_features_mask"])[0]

    expected = [states(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(states, batches * 8), expected * 8, strict=True):
            torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("window", ["5", [1], True, -5, 1e9])
def test_checkpoints_with_unusable_windows_are_refused(tiny_config, window):
    encoder = {"model_type": "whisper", **ENCODERS["whisper"], "window_seconds": window}
    with pytest.raises(ValueError, match="encoder_window is "):
        SpeechLLMConfig(**{**tiny_config(), "audio_encoder_config": encoder})


def test_encoders_with_several_passes_are_refused_if_the_engine_gathers_parameters(pair):
    def accelerator(kind, stage=None):
        plugin = SimpleNamespace(zero_stage=stage) if stage else None
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))

    model = pair[0]
    config = model.config.audio_encoder_config
    several = bool(getattr(config, "window_seconds", 0)) or config.model_type in (
        "hubert", "moonshine", "wav2vec2-conformer", "data2vec-audio", "sew", "sew-d",
    )  # fmt: skip
    for engine in (accelerator(DistributedType.FSDP), accelerator(DistributedType.DEEPSPEED, 3)):
        with pytest.raises(ValueError, match="use DDP or ZeRO-2") if several else nullcontext():
            check_encoder_passes(model, engine)
    for engine in (accelerator(DistributedType.MULTI_GPU), accelerator(DistributedType.DEEPSPEED, 2)):
        check_encoder_passes(model, engine)


def test_a_padded_batch_equals_its_examples(pair):
    model, processor = pair
    batch, *single = examples(processor, (1.3, 0.4, 2.1, 0.4))
    losses = []
    gradients = []
    for inputs in ([batch], single):
        model.zero_grad()
        total = sum(model(**item, num_items_in_batch=1).loss for item in inputs)
        total.backward()
        losses.append(total.item())
        gradients.append({name: item.grad for name, item in model.named_parameters() if item.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    unused = [name for name, gradient in gradients[0].items() if gradient is None]
    assert unused == []  # DDP would fail
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)
    model.zero_grad()


def test_gradient_checkpointing_changes_no_gradients(pair):
    model, processor = copy.deepcopy(pair[0]).train(), pair[1]
    batch = examples(processor, (0.6, 0.3))[0]
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: item.grad for name, item in model.named_parameters() if item.requires_grad})
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_decoding_in_a_batch_equals_one_by_one(pair):
    model, processor = pair
    waves = [waveform(seconds, seed) for seed, seconds in enumerate((1.3, 0.4, 2.1))]
    options = {"max_new_tokens": 6, "do_sample": False}
    inputs = processor.apply_transcription_request(waves)
    together = processor.batch_decode(model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])
    for wave, text in zip(waves, together, strict=True):
        alone = processor.apply_transcription_request([wave])
        ids = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert processor.batch_decode(ids)[0] == text


def test_saved_models_compute_the_same(pair, tmp_path):
    model, processor = pair
    for part in pair:
        part.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = SpeechLLMProcessor.from_pretrained(tmp_path)
    batch = examples(processor, (0.7, 0.3))[0]
    reread = examples(again, (0.7, 0.3))[0]
    with torch.no_grad():
        expected, found = model(**batch, return_logits=True), loaded(**reread, return_logits=True)
    assert torch.equal(expected.logits, found.logits)


def test_cached_states_and_tokens_replace_the_features(pair):
    model, processor = pair
    batch = examples(processor, (1.3, 0.4))[0]
    with torch.no_grad():
        expected = model(**batch).loss.item()
        states, mask = model.encode_audio(batch["input_features"], batch["input_features_mask"])
        tokens, counts = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
        text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        cached = model(**text, encoder_states=states, input_features_mask=mask).loss.item()
        assert cached == pytest.approx(expected, rel=1e-5)
        audio = torch.cat([row[: int(count)] for row, count in zip(tokens, counts, strict=True)])
        assert model(**text, audio_tokens=audio).loss.item() == pytest.approx(expected, rel=1e-5)


def test_layers_that_return_tuples_are_not_compiled(pair):
    model = copy.deepcopy(pair[0])
    stacks = [module for module in model.audio_encoder.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [stack for stack in stacks if isinstance(stack[0], GradientCheckpointingLayer)][-1]
    with torch.no_grad():
        returned: list = []
        layers[0].register_forward_hook(lambda layer, inputs, output: returned.append(type(output)))
        model(**examples(pair[1], (0.6, 0.3))[0])
    compile_layers(model, "eager")
    assert ("forward" in vars(layers[0])) == (returned[0] is torch.Tensor)


def test_unknown_encoders_are_refused():
    with pytest.raises(ValueError, match=r"is a vit model; .*whisper, wav2vec2-bert"):
        SpeechLLMForConditionalGeneration(SpeechLLMConfig(audio_encoder_config=AutoConfig.for_model("vit")))


def test_augmentation_of_spectrograms_is_refused_for_waveforms(pair):
    _, processor = pair
    if "input_values" in processor.feature_extractor.model_input_names:
        with pytest.raises(ValueError, match="reads waveforms"):
            SpeechLLMCollator(processor, [lambda features, rng: features])
    else:
        SpeechLLMCollator(processor, [lambda features, rng: features])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_convolutions": [[3, 0, 1]]}, "encoder_convolutions"),
        ({"encoder_convolutions": "3"}, "encoder_convolutions"),
        ({"encoder_convolutions": [[3, 2]]}, "encoder_convolutions"),
        ({"encoder_window": -1}, "encoder_window"),
        ({"chat_layout": {"start": ""}}, "chat_layout"),
    ],
)
def test_damaged_settings_of_a_processor_are_refused(parts, change, message):
    processor = copy.copy(parts[1])
    with pytest.raises(ValueError, match=message):
        SpeechLLMProcessor(processor.feature_extractor, processor.tokenizer, **change)
