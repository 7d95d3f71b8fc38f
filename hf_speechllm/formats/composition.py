"""Composition of new models from parts: randomly initialized from a config, or pretrained from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..audio.fbank import FbankFeatureExtractor
from ..model import chat
from ..model.configuration import SpeechLLMConfig
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor

PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = [PAD_TOKEN, chat.TURN_START, chat.TURN_END, chat.AUDIO_TOKEN]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with ChatML tokens, for models trained from scratch.

    Args:
        texts: transcripts. The prompts in `chat` are added to the training texts, so prompts need few tokens.
        vocab_size: maximum number of tokens; 256 bytes and four special tokens are always included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = list(texts)
    prompt = f"system\n{chat.DEFAULT_SYSTEM}\nuser\n{chat.transcription_prompt()}assistant\n"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[prompt] * max(2, len(texts) // 20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chat.TURN_END, pad_token=PAD_TOKEN)


def compose(
    config: dict,
    tokenizer: PreTrainedTokenizerBase | str,
    audio_encoder: str | None = None,
    llm: str | None = None,
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Builds a model and its processor.

    Args:
        config: fields of `SpeechLLMConfig`; settings of pretrained parts are ignored. The optional key
            `feature_extractor` contains options of `FbankFeatureExtractor`.
        tokenizer: tokenizer of the LLM, or its name. Missing ChatML tokens and the audio token are added.
        audio_encoder: folder or Hub id of a pretrained encoder; default: random weights.
        llm: folder or Hub id of a pretrained LLM; default: random weights.

    Returns:
        Model (float32) and processor. Save both to the same folder.
    """
    config = dict(config)
    feature_options = config.pop("feature_extractor", {})
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    missing = [token for token in SPECIAL_TOKENS[1:] if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = chat.TURN_END

    if audio_encoder is not None:
        config["audio_encoder_config"] = AutoConfig.from_pretrained(audio_encoder)
    if llm is not None:
        config["llm_config"] = AutoConfig.from_pretrained(llm)
    else:
        config["llm_config"] = {**config.get("llm_config", {}), "vocab_size": len(tokenizer)}
    config["audio_token_id"] = tokenizer.convert_tokens_to_ids(chat.AUDIO_TOKEN)
    config = SpeechLLMConfig(**config)
    model = SpeechLLMForConditionalGeneration(config).to(torch.float32)
    if audio_encoder is not None:
        encoder = AutoModel.from_pretrained(audio_encoder, dtype=torch.float32)
        is_whisper = config.audio_encoder_config.model_type == "whisper"
        model.audio_encoder.load_state_dict((encoder.encoder if is_whisper else encoder).state_dict())
    if llm is not None:
        model.llm.load_state_dict(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).state_dict())
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.llm.resize_token_embeddings(len(tokenizer))
    for settings in (model.generation_config, model.llm.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
        settings.bos_token_id = None

    if config.audio_encoder_config.model_type == "whisper":
        feature_extractor = AutoFeatureExtractor.from_pretrained(audio_encoder)
    else:
        feature_extractor = FbankFeatureExtractor(**feature_options)
    processor = SpeechLLMProcessor(
        feature_extractor,
        tokenizer,
        downsample_rate=config.downsample_rate,
        use_low_frame_rate=config.use_low_frame_rate,
        encoder_downsample_rate=config.encoder_downsample_rate,
    )
    return model, processor
