"""What of a checkpoint's generation configuration holds for transcription: its tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transcription replaces without a word: it never samples, and has lengths, beams and outputs of its own.
REPLACED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "num_beams",
    "use_cache", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "transformers_version",
)  # fmt: skip


def transcription_config(model: PreTrainedModel, **options: Any) -> GenerationConfig:
    """The tokens of a model's generation configuration, and options; the defaults of transformers for all else.

    A checkpoint comes from anybody. Most of its settings would end transcription with an error (several sequences,
    assisted decoding, caches that need other packages) or change texts (penalties, biases, watermarks).

    Raises:
        ValueError: if an end or padding token is no token.
    """
    config = model.generation_config
    size = model.get_input_embeddings().num_embeddings
    tokens = {name: getattr(config, name, None) for name in TOKENS}
    for name, value in tokens.items():
        for token in value if isinstance(value, (list, tuple)) and name == "eos_token_id" else [value]:
            if token is not None and not (type(token) is int and 0 <= token < size):
                raise ValueError(f"generation_config.{name} is {str(value)[:100]}; tokens are 0 to {size - 1}")
    return GenerationConfig(**tokens, **options)


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """Settings of a generation configuration that would change texts, and that transcription leaves out."""
    settings = config.to_diff_dict().items()
    return {key: value for key, value in settings if key not in (*TOKENS, *REPLACED) and not key.startswith("_")}


@contextmanager
def transcribing(model: PreTrainedModel, **options: Any) -> Iterator[GenerationConfig]:
    """Gives what to call `generate` with, which fills in nothing of the model's own while the block runs.

    Args:
        options: of greedy or beam search, such as `max_new_tokens` and `num_beams`.
    """
    own = model.generation_config
    model.generation_config = transcription_config(model, do_sample=False, **options)
    try:
        yield model.generation_config
    finally:
        model.generation_config = own
