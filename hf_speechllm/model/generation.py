"""Generation configuration for transcription: only the special tokens come from the checkpoint."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings that transcription replaces without a warning: transcription sets sampling, lengths, beams and outputs.
REPLACED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "num_beams",
    "use_cache", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "transformers_version",
)  # fmt: skip
_LOCKS: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


def generation_lock(model: PreTrainedModel) -> Any:
    """Returns the reentrant lock of a model that a thread holds while it generates.

    The generation configuration and the hooks that observe a search belong to the model, not to the thread.
    """
    return _LOCKS.setdefault(model, threading.RLock())


def transcription_config(model: PreTrainedModel, **options: Any) -> GenerationConfig:
    """Returns the tokens of the model's generation configuration with options, and defaults of transformers otherwise.

    The configuration may be untrusted. Most settings would end transcription with an error (several sequences,
    assisted decoding, caches that require other packages) or change texts (penalties, biases, watermarks).

    Args:
        model: model with a generation configuration.
        **options: options of the search, such as `max_new_tokens` and `num_beams`.

    Raises:
        ValueError: if the id of a special token is not in the vocabulary.
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
    """Returns the settings of a generation configuration that would change texts, and that transcription ignores."""
    settings = config.to_diff_dict().items()
    return {key: value for key, value in settings if key not in (*TOKENS, *REPLACED) and not key.startswith("_")}


@contextmanager
def transcribing(model: PreTrainedModel, **options: Any) -> Iterator[GenerationConfig]:
    """Yields the configuration for `generate`, and sets it on the model while the block runs.

    Otherwise `generate` would add settings from the model's own configuration.

    Args:
        model: model with a generation configuration.
        **options: options of greedy or beam search, such as `max_new_tokens` and `num_beams`.
    """
    own = model.generation_config
    model.generation_config = transcription_config(model, do_sample=False, **options)
    try:
        yield model.generation_config
    finally:
        model.generation_config = own
