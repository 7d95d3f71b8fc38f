"""Composition of new models from parts: randomly initialized from a config, or pretrained from a folder or the Hub."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..audio.fbank import FbankFeatureExtractor
from ..model import chat
from ..model.chat_layout import CHATML, ChatLayout, layout_of
from ..model.configuration import SpeechLLMConfig
from ..model.encoders import WITHOUT, encoder_family, find_encoder_config, set_window
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from .untrusted import reading

logger = logging.getLogger(__name__)

MISSPELT = 0.9  # similarity (`difflib`) of a misspelt name to the right one
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

    Prompts and answers use the chat template of the tokenizer, or ChatML if there is no template. The encoder keeps
    its dropout; layer dropping, masking at random and strided adapters are turned off, see `encoders.WITHOUT`.

    Args:
        config: fields of `SpeechLLMConfig`; settings of pretrained parts are ignored. Optional keys:
            `feature_extractor`, options of `FbankFeatureExtractor`, and `encoder_window`, see `encoders.set_window`.
        tokenizer: tokenizer of the LLM, or its name. Missing tokens of the chat format are added.
        audio_encoder: folder or Hub id of a pretrained encoder, or of a model with an encoder (encoder-decoder, CTC);
            default: random weights.
        llm: folder or Hub id of a pretrained LLM (of a multimodal model, the LLM is used), or a GGUF file; default:
            random weights.

    Returns:
        Model (float32) and processor. Save both to the same folder.

    Raises:
        ValueError: if a setting is unknown, the encoder is of no known family, or a checkpoint lacks weights.
    """
    if not isinstance(config, Mapping):
        raise ValueError("the configuration of the model must be `key: value` lines")
    for part in {"feature_extractor", *SpeechLLMConfig.sub_configs} & config.keys():
        if not isinstance(config[part], (Mapping, PreTrainedConfig, type(None))):
            raise ValueError(f"{part} must be `key: value` lines; name pretrained parts in --audio_encoder and --llm")
    config = dict(config)
    feature_options = config.pop("feature_extractor", None) or {}
    window = config.pop("encoder_window", None)
    if isinstance(tokenizer, str):
        name, options = _gguf(tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    layout = layout_of(tokenizer) or CHATML
    _add_tokens(tokenizer, layout)

    stored = None if audio_encoder is None else AutoConfig.from_pretrained(audio_encoder)
    if stored is not None:
        config["audio_encoder_config"] = find_encoder_config(stored)
    if llm is not None:
        name, options = _gguf(llm)
        config["llm_config"] = AutoConfig.from_pretrained(name, **options).get_text_config()
    else:
        config["llm_config"] = {**(config.get("llm_config") or {}), "vocab_size": len(tokenizer)}
    config["audio_token_id"] = tokenizer.convert_tokens_to_ids(chat.AUDIO_TOKEN)
    with reading("the configuration of the model"):
        given, config = config, SpeechLLMConfig(**config)
        _check_settings(config, given)
        _check_settings(FbankFeatureExtractor(**feature_options), feature_options, "feature_extractor.")
    encoder_config = config.audio_encoder_config
    for setting, value in WITHOUT.items():
        if hasattr(encoder_config, setting):
            setattr(encoder_config, setting, value)
    if window is not None:
        set_window(encoder_config, window)
    model = SpeechLLMForConditionalGeneration(config).to(torch.float32)
    if stored is not None:
        _load_encoder(model.audio_encoder, str(audio_encoder), stored)
    if llm is not None:
        _load_llm(model.llm, llm)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.llm.resize_token_embeddings(len(tokenizer))
    for settings in (model.generation_config, model.llm.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
        settings.bos_token_id = None

    processor = SpeechLLMProcessor(
        _feature_extractor(encoder_config, audio_encoder, feature_options),
        tokenizer,
        downsample_rate=config.downsample_rate,
        use_low_frame_rate=config.use_low_frame_rate,
        chat_layout=None if layout is CHATML else layout.to_dict(),
        **config.encoder_lengths,
    )
    _rehearse(model, processor)
    return model, processor


@torch.no_grad()  # in inference mode, encoders would cache tensors that training cannot use
def _rehearse(model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor) -> None:
    """Computes two steps for half a second of silence, because some parts of transformers fail only when used.

    Raises:
        CheckpointError: if a step fails, or if the LLM computes its logits in another way than with its head, or from
            padding.
    """
    training = model.training
    model.eval()
    silence = np.zeros(processor.sampling_rate // 2, np.float32)
    with reading(f"an audio encoder of type {model.config.audio_encoder_config.model_type}"):
        inputs = processor.apply_transcription_request(silence)
        states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    with reading(f"an LLM of type {model.config.llm_config.model_type}", "cannot be combined with an encoder"):
        embeddings = model.embed(inputs["input_ids"], states, mask)
        expected = model.llm(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        for padding, problem in ((0, "its logits are not those of its head"), (3, "padding changes its logits")):
            steps = model.generate(
                input_ids=pad(inputs["input_ids"], (padding, 0)), max_new_tokens=2, min_new_tokens=2, do_sample=False,
                attention_mask=pad(inputs["attention_mask"], (padding, 0)), output_logits=True,
                inputs_embeds=pad(embeddings, (0, 0, padding, 0)), return_dict_in_generate=True,
            )  # fmt: skip
            if not torch.allclose(steps.logits[0], expected, rtol=1e-3, atol=1e-3):
                raise ValueError(problem)
    model.train(training)


def _check_settings(built: Any, given: Any, path: str = "") -> None:
    """Refuses misspelt settings, which transformers keeps as attributes of a config; warns about other unknown ones.

    A model of transformers may read a setting that its config class does not declare, such as `head_dim`. All models
    read `initializer_range`.

    Raises:
        ValueError: if a setting is misspelt, or a class of this package does not know the setting.
    """
    if not isinstance(given, Mapping):
        return
    known = type(built)()
    own = type(built).__module__.partition(".")[0] == __package__.partition(".")[0]
    for key in given:
        # Old names, such as `rope_theta`, become other attributes. `set_window` checks the windows.
        if key in vars(built) and not hasattr(known, key) and key not in ("window_seconds", "initializer_range"):
            similar = difflib.get_close_matches(key, vars(known), 1, cutoff=0.6 if own else MISSPELT)
            unknown = f"{path}{key}: {type(built).__name__} has no such setting"
            if own or similar:
                raise ValueError(f"{unknown}; {f'did you mean {similar[0]}?' if similar else 'leave it out'}")
            logger.warning("%s; without effect, unless the model reads it", unknown)
        if isinstance(part := getattr(built, key, None), PreTrainedConfig):
            _check_settings(part, given[key], f"{path}{key}.")


def _gguf(name: str) -> tuple[str, dict[str, str]]:
    """Splits the path of a GGUF file into arguments of `from_pretrained`."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})


def _add_tokens(tokenizer: PreTrainedTokenizerBase, layout: ChatLayout) -> None:
    needed = [chat.AUDIO_TOKEN] if layout is not CHATML else SPECIAL_TOKENS[1:]
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or layout.answer_end
    tokenizer.eos_token = layout.answer_end


def _load_encoder(encoder: PreTrainedModel, name: str, config: PreTrainedConfig) -> None:
    """Copies the weights of an encoder from a checkpoint that contains it."""
    builder = AutoModel if type(config) in MODEL_MAPPING else AutoModelForSpeechSeq2Seq  # `SpeechEncoderDecoderModel`
    model, info = builder.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    prefix, found = next((name, part) for name, part in model.named_modules() if type(part) is type(encoder))
    prefix = f"{prefix}." if prefix else ""
    _check_complete(name, [key for key in info["missing_keys"] if key.startswith(prefix)])
    encoder.load_state_dict(found.state_dict())


def _load_llm(model: PreTrainedModel, name: str) -> None:
    """Copies decoder and head of an LLM from a checkpoint, without the encoders of a multimodal model."""
    folder, options = _gguf(name)
    pretrained, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    _check_complete(name, info["missing_keys"])
    model.get_decoder().load_state_dict(pretrained.get_decoder().state_dict())
    model.get_output_embeddings().load_state_dict(pretrained.get_output_embeddings().state_dict())


def _check_complete(name: str, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are missing, for example {min(missing)}; name another model")


def _feature_extractor(config: PreTrainedConfig, name: str | None, options: dict) -> Any:
    """Returns the feature extractor that is published with an encoder, or the usual one of its family."""
    if config.model_type == "fun_asr_nano_encoder":
        return FbankFeatureExtractor(**options)
    with contextlib.suppress(OSError):
        if name is not None:
            return AutoFeatureExtractor.from_pretrained(name)
    return encoder_family(config).feature_extractor(config)
