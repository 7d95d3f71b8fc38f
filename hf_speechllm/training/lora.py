"""LoRA, by peft, on the LLM; together with any other part that is trained whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration


def add_lora(
    model: SpeechLLMForConditionalGeneration,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
):
    """Wraps a model for LoRA training.

    Parts that are trained whole go through peft's `modules_to_save`, so that stock peft loads the result.

    Args:
        model: with its parts frozen as wanted; the LLM's own weights are frozen by peft.
        r: rank.
        alpha: scale; the update counts `alpha / r`.
        dropout: before the low-rank matrices.
        target_modules: names of linear layers of the LLM.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ValueError: if the LLM has no layer of such a name, or it is one whose adapter can't be merged.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.llm.named_modules()}
    unknown = [name for name in target_modules if name not in names]
    if unknown:
        raise ValueError(f"--lora_target_modules: the LLM has no layers named {', '.join(unknown)}")
    if model.config.tie_word_embeddings and {"embed_tokens", "lm_head"} & set(target_modules):
        raise ValueError(
            "--lora_target_modules: the LLM's embeddings and its head share their weights, so that adapters of one of "
            "them can't be merged; leave out embed_tokens and lm_head"
        )
    trained_whole = [
        name for name in PARTS if name != "llm" and any(p.requires_grad for p in getattr(model, name).parameters())
    ]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"llm\..*\.({'|'.join(re.escape(name) for name in target_modules)})",
        modules_to_save=trained_whole or None,
    )
    return get_peft_model(model, config)


def uses_lora(model) -> bool:
    """Whether a model has adapters of peft."""
    return bool(getattr(model, "peft_config", None))
