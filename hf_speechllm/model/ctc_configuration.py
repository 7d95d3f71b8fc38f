"""Configuration of the CTC head."""

# Without `from __future__ import annotations`: `strict` checks no types that are text.

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CTC_HEADS = ("linear", "sanm", "transformer")
CTC_VOCABULARIES = ("characters", "llm", "tiktoken")


@strict
class CTCHeadConfig(PreTrainedConfig):
    """Configuration of the CTC head on the audio encoder's output.

    Args:
        head_type: `"linear"` (one linear layer), `"sanm"` (SAN-M layers, then the linear layer) or `"transformer"`
            (FunASR's `ctc_decoder`: two linear layers and Transformer blocks, then the linear layer).
        vocabulary: `"characters"` (those in `characters`), `"llm"` (tokens of the LLM's tokenizer) or `"tiktoken"`
            (FunASR's token file, which the model keeps in `ctc_tensors`).
        characters: for the vocabulary `"characters"`: character of each id; the blank is the empty string.
        vocab_size: number of ids, with the blank.
        blank_id: id of the blank.
        upsample_rate: number of output frames per encoder frame.
        hidden_size: width of the encoder's output; filled in by `SpeechLLMConfig`.
        projector_hidden_size: for `"transformer"`: width between the two linear layers (`ffn_dim` in FunASR).
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout, attention_dropout,
            layer_norm_eps, fsmn_kernel_size: settings of the layers; `intermediate_size` defaults to twice
            `hidden_size`, for `"transformer"` to a quarter.
    """

    model_type = "speech_llm_ctc_head"
    base_config_key = "ctc_head_config"
    has_no_defaults_at_init = True  # `characters` are required; transformers before 5.24 would use the defaults

    head_type: str = "sanm"
    vocabulary: str = "characters"
    characters: list[str] | None = None
    vocab_size: int = 2
    blank_id: int = 0
    upsample_rate: int = 1
    hidden_size: int = 512
    projector_hidden_size: int = 2048
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float | int = 1e-5
    fsmn_kernel_size: int = 11
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, known in (("head_type", CTC_HEADS), ("vocabulary", CTC_VOCABULARIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {str(getattr(self, name))[:50]!r}; choose one of {', '.join(known)}")
        if self.vocabulary == "characters" and len(self.characters or ()) != self.vocab_size:
            raise ValueError(f"characters must have vocab_size entries ({self.vocab_size})")
        if not 0 <= self.blank_id < self.vocab_size:
            raise ValueError(f"blank_id is {self.blank_id}; it must be from 0 to {self.vocab_size - 1}")
        if not 1 <= self.upsample_rate <= 100:
            raise ValueError(f"upsample_rate is {self.upsample_rate}; it must be from 1 to 100")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}; it must divide {self.hidden_size}")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.intermediate_size is None:
            is_funasr = self.head_type == "transformer"
            self.intermediate_size = self.hidden_size // 4 if is_funasr else 2 * self.hidden_size
