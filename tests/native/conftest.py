"""Tiny random native speech LLMs of transformers, one per family, with processors and chat templates."""

import base64
import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from transformers.utils import is_mistral_common_available

from hf_speechllm.formats.composition import train_tokenizer

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'audio' -%}AUDIO"
    "{%- elif part['type'] == 'keywords' -%}{{ part['keywords'] | join(', ') }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "<|im_end|>\n{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
TEXTS = ["one two three", "四五六", "seven eight nine"]
WHISPER = {"feature_size": 16, "chunk_length": 30}
LLM = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TOWER = {
    "num_mel_bins": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_source_positions": 1500,
}  # fmt: skip
OLD_TOWER = {
    "num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip


def tokenizer_with(*tokens: str, **named: str):
    """Returns a tokenizer with ChatML tokens and more special tokens; `named` become attributes."""
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    if named:
        tokenizer = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token=tokenizer.pad_token,
            extra_special_tokens=named,
        )  # fmt: skip
    return tokenizer


def qwen3_asr():
    names = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = tokenizer_with("<asr_text>", **names)
    tokenizer.add_tokens(["<asr_text>"])
    processor = tf.Qwen3ASRProcessor(
        tf.Qwen3ASRFeatureExtractor(feature_size=16),
        tokenizer,
        chat_template=CHATML.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>"),
    )
    config = tf.Qwen3ASRConfig(
        audio_config={**OLD_TOWER, "output_dim": 32, "downsample_hidden_size": 8},
        text_config={"model_type": "qwen3", **LLM},
    )
    return config, processor


def glmasr():
    tokenizer = tokenizer_with("<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>")
    template = CHATML.replace("AUDIO", "<|begin_of_audio|><|pad|><|end_of_audio|>")
    processor = tf.GlmAsrProcessor(tf.WhisperFeatureExtractor(**WHISPER), tokenizer, chat_template=template)
    audio = {key: value for key, value in TOWER.items() if key != "max_source_positions"}
    audio |= {"intermediate_size": 128}  # four merged frames
    return tf.GlmAsrConfig(audio_config=audio, text_config={"model_type": "llama", **LLM}), processor


def audioflamingo3():
    tokenizer = tokenizer_with("<sound>")
    processor = tf.AudioFlamingo3Processor(
        tf.WhisperFeatureExtractor(**WHISPER), tokenizer, chat_template=CHATML.replace("AUDIO", "<sound>")
    )
    return tf.AudioFlamingo3Config(audio_config=TOWER, text_config={"model_type": "qwen2", **LLM}), processor


def qwen2_audio():
    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    processor = tf.Qwen2AudioProcessor(
        tf.WhisperFeatureExtractor(**WHISPER),
        tokenizer_with(**names),
        chat_template=CHATML.replace("AUDIO", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"),
    )
    return tf.Qwen2AudioConfig(audio_config=OLD_TOWER, text_config={"model_type": "qwen2", **LLM}), processor


def granite_speech():
    template = CHATML.replace("AUDIO", "<|audio|>")
    processor = tf.GraniteSpeechProcessor(
        tf.GraniteSpeechFeatureExtractor(n_mels=80), tokenizer_with("<|audio|>"), chat_template=template
    )
    config = tf.GraniteSpeechConfig(
        encoder_config={"input_dim": 160, "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "dim_head": 16,
                        "output_dim": 10, "context_size": 20, "dropout": 0.0},
        projector_config={"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "intermediate_size": 48, "encoder_hidden_size": 32,
                          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "granite", **LLM, "logits_scaling": 2.0}, has_lora_adapter=False,
    )  # fmt: skip
    return config, processor


def vibevoice_asr():
    tokenizer = tokenizer_with("<|box_start|>", "<|object_ref_start|>", "<|object_ref_end|>")
    template = CHATML.replace("AUDIO", "<|object_ref_start|><|box_start|><|object_ref_end|> <|AUDIO_DURATION|> s")
    processor = tf.VibeVoiceAsrProcessor(
        tf.VibeVoiceAcousticTokenizerFeatureExtractor(), tokenizer, chat_template=template
    )
    encoder = {"model_type": "vibevoice_acoustic_tokenizer_encoder", "num_filters": 2, "hidden_size": 8,
               "depths": [1, 1, 1, 1, 1, 1, 1]}  # fmt: skip
    config = tf.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=encoder, semantic_tokenizer_encoder_config=encoder,
        text_config={"model_type": "qwen2", **LLM},
    )  # fmt: skip
    return config, processor


def moss_transcribe_diarize():
    tokenizer = tokenizer_with("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
    processor = tf.MossTranscribeDiarizeProcessor(
        tf.MossTranscribeDiarizeFeatureExtractor(feature_size=16),
        tokenizer,
        chat_template=CHATML.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>"),
    )
    return tf.MossTranscribeDiarizeConfig(audio_config=TOWER, text_config={"model_type": "qwen3", **LLM}), processor


def voxtral():
    """Needs mistral-common, whose tokenizer has one token per byte here."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokens = {
        0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]", 6: "[/AVAILABLE_TOOLS]",
        7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]",
        13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]",
        18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]",
    }  # fmt: skip
    audio = {"num_mel_bins": 16, "hop_length": 160, "window_size": 400}
    content = {
        "config": {
            "pattern": r"[^\s]+|\s+", "num_vocab_tokens": 256, "default_vocab_size": 296, "version": "v7",
            "default_num_special_tokens": 40,
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": tokens.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(40)
        ],
        "audio": {"sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": audio, "chunk_length_s": 30.0},
    }  # fmt: skip
    path = Path(tempfile.mkdtemp(), "tekken.json")  # `save_pretrained` copies this file
    path.write_text(json.dumps(content))
    processor = tf.VoxtralProcessor(
        tf.WhisperFeatureExtractor(**WHISPER), MistralCommonBackend(tokenizer_path=str(path))
    )
    encoder = TOWER | {"intermediate_size": 128}  # four merged frames
    return tf.VoxtralConfig(audio_config=encoder, text_config={"model_type": "llama", **LLM}), processor


BUILDERS = {
    builder.__name__: builder
    for builder in (
        qwen3_asr, glmasr, audioflamingo3, qwen2_audio, granite_speech, vibevoice_asr, moss_transcribe_diarize,
        *([voxtral] if is_mistral_common_available() else []),
    )
}  # fmt: skip


def save_native(model_type: str, folder: Path) -> Path:
    """Saves a tiny random model and its processor in the layout of transformers."""
    torch.manual_seed(0)
    config, processor = BUILDERS[model_type]()
    tokenizer = processor.tokenizer
    config.text_config.vocab_size = len(tokenizer)
    audio = tokenizer.convert_tokens_to_ids(processor.audio_token)
    for name in ("audio_token_id", "audio_token_index"):
        if name in config.to_dict():
            setattr(config, name, audio)
    model = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)](config)
    model.generation_config = tf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    return folder


@pytest.fixture(scope="session")
def native_folders(tmp_path_factory):
    """Folders with a tiny native speech LLM of each family, by model type."""
    return {model_type: save_native(model_type, tmp_path_factory.mktemp(model_type)) for model_type in BUILDERS}


@pytest.fixture(scope="session", params=list(BUILDERS))
def native_folder(request, native_folders):
    """Folder with a tiny native speech LLM; tests run for each family."""
    return native_folders[request.param]
