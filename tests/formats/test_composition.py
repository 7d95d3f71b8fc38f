"""Models from parts: pretrained weights and tokens come in unchanged, what is missing is added."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    Wav2Vec2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.formats.checkpoint import Checkpoint, CheckpointError
from hf_speechllm.formats.composition import PAD_TOKEN, SPECIAL_TOKENS, compose, train_tokenizer
from hf_speechllm.formats.saving import write_checkpoint
from hf_speechllm.hub.upload import is_exportable
from hf_speechllm.model import chat
from hf_speechllm.model.chat_layout import CHATML


@pytest.fixture
def plain_tokenizer(tokenizer):
    """A tokenizer of an LLM that knows no dialogues, without padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["hello world"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture
def config(make_model):
    """Sizes of a tiny model."""
    return {**make_model()[0].config.to_dict(), "feature_extractor": {"window_type": "povey"}}


def test_trained_tokenizer_knows_dialogues_and_gives_every_text_back():
    tokenizer = train_tokenizer(["hello world"] * 50, 280)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (chat.TURN_END, PAD_TOKEN)
    assert 260 < len(tokenizer) <= 280
    for text in ("hello world", "几点了？ ünïcode", " a  b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    long = train_tokenizer([], 400)
    prompt = chat.transcription_prompt()
    assert len(long.encode(prompt, add_special_tokens=False)) < len(prompt.encode()) / 2  # the prompts are learned


def test_tokens_that_dialogues_need_are_added(plain_tokenizer, config, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path)
    before = len(plain_tokenizer)
    model, processor = compose(config, str(tmp_path))
    tokenizer = processor.tokenizer
    assert len(tokenizer) == before + 3 == model.get_input_embeddings().num_embeddings
    assert (tokenizer.eos_token, tokenizer.pad_token) == (chat.TURN_END, "</s>")
    assert model.config.audio_token_id == processor.audio_token_id == tokenizer.convert_tokens_to_ids(chat.AUDIO_TOKEN)
    for settings in (model.generation_config, model.llm.generation_config):
        ids = settings.eos_token_id, settings.pad_token_id, settings.bos_token_id
        assert ids == (tokenizer.eos_token_id, tokenizer.pad_token_id, None)
    assert processor.feature_extractor.window_type == "povey"
    assert config["feature_extractor"] and {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_pretrained_llm_keeps_its_weights_and_gets_rows_for_new_tokens(plain_tokenizer, config, tmp_path):
    llm = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(plain_tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    llm.to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    model, processor = compose(config, plain_tokenizer, llm=str(tmp_path / "llm"))
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer) > llm.config.vocab_size
    for name, tensor in llm.state_dict().items():
        assert torch.equal(model.llm.state_dict()[name][: len(tensor)], tensor.float()), name
    roomy = Qwen3Config(**{**llm.config.to_dict(), "vocab_size": 400})
    AutoModelForCausalLM.from_config(roomy).save_pretrained(tmp_path / "roomy")
    model, _ = compose(config, plain_tokenizer, llm=str(tmp_path / "roomy"))
    assert model.get_input_embeddings().num_embeddings == 400  # rows to spare stay


def test_pretrained_encoders_keep_their_weights(tokenizer, config, make_model, tmp_path):
    encoder = make_model(seed=5)[0].audio_encoder
    AutoModel.from_config(encoder.config)  # as it is published
    encoder.save_pretrained(tmp_path / "sanm")
    model, _ = compose(config, tokenizer, audio_encoder=str(tmp_path / "sanm"))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.audio_encoder.state_dict()[name], tensor), name

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = WhisperModel(
        WhisperConfig(
            d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=20, vocab_size=100, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, **sizes,
        )
    )  # fmt: skip
    whisper.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(feature_size=20).save_pretrained(tmp_path / "whisper")
    model, processor = compose(config, tokenizer, audio_encoder=str(tmp_path / "whisper"))
    for name, tensor in whisper.encoder.state_dict().items():
        assert torch.equal(model.audio_encoder.state_dict()[name], tensor), name
    assert isinstance(processor.feature_extractor, WhisperFeatureExtractor)
    assert processor.encoder_downsample_rate == 2
    assert model.config.fixed_seconds == 30.0
    for window, message in (
        (31, "encoder_window is 31; it must be between 0.02 and 30 seconds"),
        (0, "is 0; it must"),
    ):
        with pytest.raises(ValueError, match=message):
            compose({**config, "encoder_window": window}, tokenizer, audio_encoder=str(tmp_path / "whisper"))
    model, _ = compose({**config, "encoder_window": 5}, tokenizer, audio_encoder=str(tmp_path / "whisper"))
    model.save_pretrained(tmp_path / "windows")
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "windows")
    assert loaded.config.audio_encoder_config.window_seconds == loaded.audio_encoder.config.window_seconds == 5.0
    assert loaded.config.fixed_seconds == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_encode_config": {}}, "audio_encode_config: SpeechLLMConfig has no such setting; did you mean"),
        ({"llm_config": {"num_hiden_layers": 2}}, "llm_config.num_hiden_layers: Qwen3Config has no such setting; did"),
        ({"feature_extractor": {"qqq": 2}}, "feature_extractor.qqq: FbankFeatureExtractor has no such setting; leave"),
        ({"audio_encoder_config": "whisper"}, "audio_encoder_config must be `key: value` lines; name pre"),
        ({"llm_config": 5}, "llm_config must be `key: value` lines"),
        ({"llm_config": {"rms_norm_eps": "1e-6"}}, "the configuration of the model cannot be used .*rms_norm_eps"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        compose(settings, tokenizer)


def test_old_names_of_settings_are_known_and_others_warned_of(tokenizer, config, caplog):
    llm = {**config["llm_config"], "rope_theta": 5000.0, "n_embd": 32}
    del llm["rope_parameters"]
    encoder = {**config["audio_encoder_config"], "initializer_range": 0.2}
    model, _ = compose({**config, "audio_encoder_config": encoder, "llm_config": llm}, tokenizer)
    assert [record.message for record in caplog.records] == [
        "llm_config.n_embd: Qwen3Config has no such setting; without effect, unless the model reads it"
    ]
    assert model.config.llm_config.rope_parameters["rope_theta"] == 5000.0
    weights = next(value for name, value in model.audio_encoder.named_parameters() if name.endswith("fc1.weight"))
    assert 0.15 < weights.std() < 0.25  # transformers reads a setting that the config class does not declare


def test_windows_are_refused_for_encoders_without_a_fixed_length(tokenizer, config):
    with pytest.raises(ValueError, match="fun_asr_nano_encoder encoders have no windows; leave it out"):
        compose({**config, "encoder_window": 5}, tokenizer)


def test_the_encoder_of_a_larger_model_is_taken_without_random_skips(tokenizer, config, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {**sizes, "layerdrop": 0.1, "subsampling_conv_channels": 4, "num_mel_bins": 40}
    published = ParakeetForCTC(ParakeetCTCConfig(encoder_config=encoder, vocab_size=20))
    published.save_pretrained(tmp_path / "parakeet")
    ParakeetFeatureExtractor(feature_size=40).save_pretrained(tmp_path / "parakeet")
    model, processor = compose(config, tokenizer, audio_encoder=str(tmp_path / "parakeet"))
    for name, tensor in published.encoder.state_dict().items():
        assert torch.equal(model.audio_encoder.state_dict()[name], tensor), name
    assert isinstance(processor.feature_extractor, ParakeetFeatureExtractor)
    assert processor.encoder_convolutions == [[3, 2, 1]] * 3
    assert model.audio_encoder.layerdrop == 0

    for part in (model, processor):  # the encoder of a composed model again
        part.save_pretrained(tmp_path / "ours")
    again, _ = compose(config, tokenizer, audio_encoder=str(tmp_path / "ours"))
    for name, tensor in published.encoder.state_dict().items():
        assert torch.equal(again.audio_encoder.state_dict()[name], tensor), name


def test_the_encoder_of_a_speech_encoder_decoder_is_taken(tokenizer, config, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": [8], "conv_kernel": [10], "conv_stride": [5], "num_conv_pos_embedding_groups": 2}
    encoder = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=8)
    decoder = BertConfig(**sizes, vocab_size=20, is_decoder=True, add_cross_attention=True)
    published = SpeechEncoderDecoderModel(SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    published.save_pretrained(tmp_path)
    model, _ = compose(config, tokenizer, audio_encoder=str(tmp_path))
    for name, tensor in model.audio_encoder.state_dict().items():
        assert torch.equal(published.encoder.state_dict()[name], tensor), name


def test_a_composed_model_can_be_trained_on_recordings_of_any_length(tokenizer, config):
    """With 0.5 s, this encoder takes the positions that it cached when `compose` ran it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": [8], "conv_kernel": [10], "conv_stride": [320], "conv_depthwise_kernel_size": 5}
    encoder = {"model_type": "wav2vec2-conformer", "position_embeddings_type": "rotary", **sizes, **convolutions}
    encoder |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    model, processor = compose({**config, "audio_encoder_config": encoder}, tokenizer)
    content = [{"type": "audio", "audio": np.ones(8000, np.float32)}]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": content}, {"role": "assistant", "content": "one"}]]
    )
    model.train()(**batch).loss.backward()
    assert model.audio_encoder.encoder.layers[0].self_attn.linear_q.weight.grad.abs().sum() > 0


def test_the_llm_of_a_multimodal_model_is_taken(plain_tokenizer, config, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(plain_tokenizer)}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    ids = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}
    published = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    )
    published.save_pretrained(tmp_path)
    model, _ = compose(config, plain_tokenizer, llm=str(tmp_path))
    assert model.llm.config.model_type == "gemma3_text"
    for name, tensor in published.get_decoder().state_dict().items():
        assert torch.equal(model.llm.get_decoder().state_dict()[name][: len(tensor)], tensor), name


def test_models_without_a_known_encoder_are_refused(tokenizer, config, tmp_path):
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qwen3 model; encoders that are supported: fun_asr_nano_encoder, whi"):
        compose(config, tokenizer, audio_encoder=str(tmp_path))


def test_other_formats_refuse_the_chat_template_of_another_llm(make_model, tmp_path):
    model, processor = make_model(adaptor={"use_low_frame_rate": False})
    processor.chat_layout = CHATML.to_dict()
    checkpoint = Checkpoint.of(model)
    for layout in ("native", "funasr"):
        with pytest.raises(CheckpointError, match="the chat template of another LLM"):
            write_checkpoint(checkpoint, processor, tmp_path / layout, layout, force=True)
    assert is_exportable(model.config) and not is_exportable(model.config, processor)


def test_a_gguf_file_is_a_language_model(config, monkeypatch):
    calls = []

    def read(name, **options):
        calls.append((name, options))
        raise OSError("stop")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    for name in ("folder/llm.Q4_1.gguf", "user/llm"):
        with pytest.raises(OSError, match="stop"):
            compose(config, name, llm=name)
    assert calls == [("folder", {"gguf_file": "llm.Q4_1.gguf"}), ("user/llm", {})]
