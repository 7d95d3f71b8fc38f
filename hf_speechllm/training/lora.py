"""LoRA (peft) on the LLM, together with fully trained parts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..formats.peft_adapters import wrap
from ..model.modeling import SpeechLLMForConditionalGeneration
from .freezing import part_modules, part_names


def add_lora(
    model: SpeechLLMForConditionalGeneration,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
):
    """Wraps a model for LoRA training.

    Fully trained parts are in peft's `modules_to_save`, so that peft loads the result without this project.

    Args:
        model: after freezing; peft freezes the weights of the LLM.
        r: rank.
        alpha: scale; the update is multiplied by `alpha / r`.
        dropout: before the low-rank matrices.
        target_modules: names of linear layers of the LLM.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ValueError: if the LLM has no layer of a name, or if an adapter of the layer cannot be merged.
    """
    from peft import LoraConfig

    llm = [item for module in part_modules(model, "llm") for item in module.named_modules()]
    names = {name.rsplit(".", 1)[-1] for name, _ in llm}
    unknown = [name for name in target_modules if name not in names]
    if unknown:
        linear = sorted({name.rsplit(".", 1)[-1] for name, module in llm if isinstance(module, (nn.Linear, Conv1D))})
        raise ValueError(
            f"--lora_target_modules: the LLM has no layers named {', '.join(unknown)}; choose from {', '.join(linear)}"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = [name.rsplit(".", 1)[-1] for name, module in llm if any(module is end for end in ends)]
    if getattr(model.config, "tie_word_embeddings", False) and {*shared} & {*target_modules}:
        raise ValueError(
            "--lora_target_modules: embeddings and head of the LLM share their weights, so adapters of one of them "
            f"cannot be merged; leave out {' and '.join(shared)}"
        )
    fully_trained = [
        name
        for name in part_names(model, "audio_encoder") + part_names(model, "audio_adaptor")
        if any(p.requires_grad for p in model.get_submodule(name).parameters())
    ]
    root = part_names(model, "llm")[0]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"{re.escape(root)}\..*\.({'|'.join(re.escape(name) for name in target_modules)})",
        modules_to_save=fully_trained or None,
    )
    return wrap(model, config)


def uses_lora(model) -> bool:
    """Whether a model has peft adapters."""
    return bool(getattr(model, "peft_config", None))
