"""Configuration of a speech LLM: audio encoder, audio adaptor, LLM."""

# Without `from __future__ import annotations`: `strict` checks no types that are text.

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import pretrained
from .ctc_configuration import CTCHeadConfig
from .encoders import encoder_family, fixed_seconds, set_window
from .kv_cache import CACHE_NAMES

# Qwen3-0.6B, the LLM of Fun-ASR-Nano.
DEFAULT_LLM = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}

# Names of settings of transformers' models that set a number of modules or the size of a tensor. A config may come
# from an untrusted source, and a config class may build a list of that length before any tensor is checked.
COUNTS = re.compile(r"(num|n)_\w*(layer|block|head|expert|label|bin|frame|group)s?\w*|(\w+_)?(layers|blocks|heads)")
SIZES = re.compile(r"\w+_(size|dim|rate|positions?|position_embeddings)|d_model|n_(embd|positions|ctx)")
MAX_COUNT, MAX_SIZE = 100_000, 2**31
POSITIVE = {
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "max_position_embeddings", "d_model", "encoder_layers", "encoder_attention_heads",
    "encoder_ffn_dim", "max_source_positions", "num_mel_bins", "num_stacked_frames", "fsmn_kernel_size",
    "projector_hidden_size", "downsample_rate", "upsample_rate",
}  # fmt: skip
BY_LAYER = {
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
}  # one value per layer, or one value for all layers
NOT_NEGATIVE = {"audio_token_id", "num_timestamp_prediction_layers", "num_labels"}


def check_sizes(config: Mapping[str, Any], path: str = "") -> None:
    """Refuses impossible sizes and counts in a config and in its nested configs.

    Raises:
        ValueError: if a value is out of range; the message names the field.
    """
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            check_sizes(value, f"{name}.")
        elif key in POSITIVE or key in NOT_NEGATIVE:
            least = 1 if key in POSITIVE else 0
            most = MAX_COUNT if COUNTS.fullmatch(str(key)) else MAX_SIZE
            items = value if isinstance(value, list) and key in BY_LAYER else [value]
            for item in items:
                if type(item) not in (int, type(None)):
                    raise ValueError(f"{name} is {str(value)[:50]!r}; it must be a whole number")
                if item is not None and not least <= item <= most:
                    raise ValueError(f"{name} is {str(item)[:50]}; it must be from {least} to {most:,}")
        elif isinstance(value, int) and abs(value) > MAX_COUNT and COUNTS.fullmatch(str(key)):
            raise ValueError(f"{name} is {str(value)[:50]}; it must be at most {MAX_COUNT:,}")
        elif isinstance(value, int) and abs(value) > MAX_SIZE and SIZES.fullmatch(str(key)):
            raise ValueError(f"{name} is {str(value)[:50]}; it must be at most {MAX_SIZE:,}")


@strict
class AudioAdaptorConfig(PreTrainedConfig):
    """Configuration of the adaptor between the audio encoder and the LLM.

    Args:
        adaptor_type: `"transformer"` (Fun-ASR's: frame stacking, two linear layers, Transformer blocks) or `"linear"`
            (frame stacking and two linear layers).
        downsample_rate: number of neighbouring encoder frames concatenated into one adaptor frame.
        use_low_frame_rate: whether the LLM receives only the first `ceil(n / 8)` of `n` adaptor frames of an
            utterance, as in the training of the released Fun-ASR-Nano.
        encoder_hidden_size: width of the encoder's output; filled in by `SpeechLLMConfig`.
        hidden_size: width of the LLM's embeddings; filled in by `SpeechLLMConfig`.
        projector_hidden_size: width between the two linear layers (`ffn_dim` in the original).
        projector_hidden_act: activation between the two linear layers.
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout, attention_dropout,
            layer_norm_eps: settings of the Transformer blocks; `intermediate_size` defaults to a quarter of
            `hidden_size`, `layer_norm_eps` to the original's 1e-12.
    """

    model_type = "speech_llm_audio_adaptor"
    base_config_key = "audio_adaptor_config"

    adaptor_type: str = "transformer"
    downsample_rate: int = 1
    use_low_frame_rate: bool = False
    encoder_hidden_size: int = 512
    hidden_size: int = 1024
    projector_hidden_size: int = 2048
    projector_hidden_act: str = "relu"
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float | int = 1e-12
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.adaptor_type not in ("transformer", "linear"):
            raise ValueError(f"adaptor_type is {self.adaptor_type!r}; choose 'transformer' or 'linear'")
        if self.downsample_rate < 1:
            raise ValueError(f"downsample_rate is {self.downsample_rate}; it must be at least 1")


@strict
class SpeechLLMConfig(PreTrainedConfig):
    """Configuration of `SpeechLLMForConditionalGeneration`; its defaults are the sizes of Fun-ASR-Nano.

    Args:
        audio_encoder_config: config (or dict with `model_type`) of an encoder in `encoders.FAMILIES`; default
            `fun_asr_nano_encoder`, the SAN-M encoder. Of an encoder-decoder, only the encoder is used.
        audio_adaptor_config: `AudioAdaptorConfig` or dict.
        llm_config: config (or dict with `model_type`) of any LLM that `AutoModelForCausalLM` builds; default
            Qwen3-0.6B.
        audio_token_id: id of the placeholder for audio tokens in `input_ids` (`<|object_ref_start|>` in the Qwen3
            tokenizer).
        ctc_head_config: `CTCHeadConfig` or dict of the CTC head on the encoder's output; `None` without a head.
        funasr_files: `config.yaml` and `configuration.json` of the FunASR checkpoint from which the model was loaded,
            if any; an export to FunASR completes and writes these files.
    """

    model_type = "speech_llm"
    attribute_map: ClassVar = {"text_config": "llm_config", "audio_config": "audio_encoder_config"}
    # Outputs that transformers' Trainer must not gather as predictions.
    keys_to_ignore_at_inference: ClassVar = [*CACHE_NAMES, "num_label_tokens", "token_accuracy", "ctc_loss"]
    sub_configs: ClassVar = {
        "audio_encoder_config": AutoConfig,
        "audio_adaptor_config": AudioAdaptorConfig,
        "llm_config": AutoConfig,
        "ctc_head_config": CTCHeadConfig,
    }

    audio_encoder_config: dict | PreTrainedConfig | None = None
    audio_adaptor_config: dict | PreTrainedConfig | None = None
    llm_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 151646
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    funasr_files: dict | None = None
    ctc_head_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        for alias in kwargs.keys() & self.attribute_map.keys():
            setattr(self, alias, kwargs.pop(alias))
        check_sizes({**kwargs, "audio_token_id": self.audio_token_id})
        if not isinstance(self.audio_adaptor_config, (dict, AudioAdaptorConfig, type(None))):
            raise ValueError("audio_adaptor_config must be a mapping")
        if not isinstance(self.ctc_head_config, (dict, CTCHeadConfig, type(None))):
            raise ValueError("ctc_head_config must be a mapping")
        if not isinstance(self.funasr_files, (dict, type(None))):
            raise ValueError("funasr_files must be a mapping")
        self.audio_encoder_config = _build(self.audio_encoder_config, {"model_type": "fun_asr_nano_encoder"})
        if (window := getattr(self.audio_encoder_config, "window_seconds", None)) is not None:
            set_window(self.audio_encoder_config, window)
        self.llm_config = _build(self.llm_config, DEFAULT_LLM)
        if not isinstance(self.audio_adaptor_config, AudioAdaptorConfig):
            self.audio_adaptor_config = AudioAdaptorConfig(**(self.audio_adaptor_config or {}))
        adaptor = self.audio_adaptor_config
        adaptor.encoder_hidden_size = self.audio_encoder_config.hidden_size
        adaptor.hidden_size = self.llm_config.hidden_size
        if adaptor.intermediate_size is None:
            adaptor.intermediate_size = adaptor.hidden_size // 4
        if isinstance(self.ctc_head_config, dict):
            check_sizes(self.ctc_head_config, "ctc_head_config.")
            width = {"hidden_size": adaptor.encoder_hidden_size}
            self.ctc_head_config = CTCHeadConfig(**{**self.ctc_head_config, **width})
        # The LLM's config decides whether its embeddings are tied; transformers reads the outer config.
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Returns the config of a folder or Hub id as a dict, and the unused options.

        Reads the layouts of this package, transformers' `fun_asr_nano` and FunASR, and peft adapters.
        """
        config = pretrained.formats().load_config_dict(pretrained_model_name_or_path, kwargs)
        if config is None:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        used = (
            *pretrained.formats().HUB_OPTIONS,
            "proxies",
            "trust_remote_code",
            "_from_pipeline",
            "_from_auto",
            "gguf_file",
        )
        return config, {key: value for key, value in kwargs.items() if key not in used}

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dict; without a CTC head, the field `ctc_head_config` is absent."""
        fields = super().to_dict()
        if fields.get("ctc_head_config") is None:
            fields.pop("ctc_head_config", None)
        return fields

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Returns the LLM's config, from which generation reads cache sizes and vocabulary."""
        return self.llm_config

    @property
    def use_low_frame_rate(self) -> bool:
        """Whether the LLM receives only the first eighth of the adaptor's frames."""
        return self.audio_adaptor_config.use_low_frame_rate

    @property
    def downsample_rate(self) -> int:
        """Encoder frames per adaptor frame."""
        return self.audio_adaptor_config.downsample_rate

    @property
    def encoder_lengths(self) -> dict[str, Any]:
        """Options of the processor that give the number of encoder frames of a recording."""
        encoder = self.audio_encoder_config
        family = encoder_family(encoder)
        convolutions = [list(convolution) for convolution in family.convolutions(encoder)]
        lengths: dict[str, Any] = {"encoder_downsample_rate": family.downsample_rate}
        if convolutions:
            lengths |= {"encoder_convolutions": convolutions, "encoder_window": family.window(encoder)}
        return lengths

    @property
    def max_feature_frames(self) -> int:
        """Maximum number of feature frames per recording, limited by the encoder's position table."""
        return encoder_family(self.audio_encoder_config).max_frames(self.audio_encoder_config)

    @property
    def fixed_seconds(self) -> float:
        """Seconds that the encoder computes for every recording; 0 if they follow the recording."""
        return fixed_seconds(self.audio_encoder_config)


def _build(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(default) if config is None else {"model_type": default["model_type"], **config}
    check_sizes(config)
    model_type = config.pop("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {model_type!r}; the installed transformers has no such model")
    return CONFIG_MAPPING[model_type](**config)


AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig)
