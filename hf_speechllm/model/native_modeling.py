"""Native speech LLMs of transformers with the interface of `SpeechLLMForConditionalGeneration`.

A model keeps the class name, config, weights and `generate` of transformers, so transformers loads what is saved. This
module adds the parts by name and the loss over supervised tokens.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from . import pretrained
from .gradient_checkpointing import enable_frozen_checkpointing
from .loss import label_positions
from .modeling import SpeechLLMOutput
from .native_families import FAMILIES, PARTS, Family
from .packing import PaddingFreeBatch, causal_masks, require_padding_free


class NativeSpeechLLM:
    """Mixin for a class of transformers; see `native_class`."""

    config: Any
    ctc_tensors: dict[str, torch.Tensor] = {}
    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`, the supervised tokens of the whole step

    @property
    def family(self) -> Family:
        """Entry of the model's type in `native_families.FAMILIES`."""
        return FAMILIES[self.config.model_type]

    @property
    def llm(self) -> PreTrainedModel:
        """The LLM without its head."""
        return self.part("llm")[0]  # type: ignore[return-value]

    def part(self, name: str) -> list[nn.Module]:
        """Returns the modules of a part: `audio_encoder`, `audio_adaptor` or `llm`."""
        modules = {path.rpartition(".")[2]: module for path, module in self._top_modules()}
        return [modules[module] for module in self.family.modules[name]]

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, token: str | bool | None = None, **kwargs):
        """Uploads the model with a model card; arguments as in `SpeechLLMForConditionalGeneration.push_to_hub`."""
        return pretrained.hub().push_model(self, repo_id, private, token, **kwargs)

    def _top_modules(self):
        for name, module in self.named_children():  # type: ignore[attr-defined]
            yield name, module
            yield from ((f"{name}.{child}", inner) for child, inner in module.named_children())

    def train(self, mode: bool = True):
        """Sets the training mode. Completely frozen parts stay in eval mode, without dropout."""
        super().train(mode)  # type: ignore[misc]
        for name in PARTS:
            modules = self.part(name)
            if not any(parameter.requires_grad for module in modules for parameter in module.parameters()):
                for module in modules:
                    module.eval()
                    if mode and isinstance(module, PreTrainedModel):
                        enable_frozen_checkpointing(module)
        return self


@functools.cache
def native_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns a subclass of a transformers model with parts and the loss over supervised tokens.

    The subclass has the name of its base, which `save_pretrained` writes into the config.

    Args:
        base: class of a model type in `native_families.FAMILIES`.
    """

    can_skip_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    @functools.wraps(base.forward)  # `generate` inspects the signature
    def forward(self, *args, labels=None, positions=None, num_items_in_batch=None, return_logits=False, **kwargs):
        kwargs = {**dict(self.family.options), **kwargs}
        if labels is None:
            if can_skip_logits:
                return base.forward(self, *args, **kwargs)
            kept = kwargs.pop("logits_to_keep", 0)
            outputs = base.forward(self, *args, **kwargs)
            outputs.logits = outputs.logits[:, slice(-kept, None) if isinstance(kept, int) else kept]
            return outputs
        positions = {"labels": label_positions(labels)} | (positions or {})
        if "tokens" in positions:
            require_padding_free(self.llm.config)
            packing = PaddingFreeBatch(kwargs.pop("attention_mask"), positions["tokens"])
            kwargs |= {"input_ids": kwargs["input_ids"].flatten()[positions["tokens"]].unsqueeze(0),
                       "attention_mask": causal_masks(self.llm.config), "position_ids": packing.position_ids,
                       **packing.attention}  # fmt: skip
            places = torch.searchsorted(positions["tokens"], positions["labels"])
            rows, columns = torch.zeros_like(places), places
        else:
            rows, columns = positions["labels"] // labels.shape[1], positions["labels"] % labels.shape[1]
        if can_skip_logits and not return_logits:
            kept, columns = columns.unique(return_inverse=True)
            kwargs["logits_to_keep"] = kept
        outputs = base.forward(self, *args, **kwargs)
        targets = labels.flatten()[positions["labels"] + 1]
        logits = outputs.logits[rows, columns].float()
        total = functional.cross_entropy(logits, targets, reduction="sum")
        count = torch.full((), len(targets), device=labels.device)  # a copy would be a host-device sync
        items = count.clamp(min=1)
        return SpeechLLMOutput(
            loss=total / (items if num_items_in_batch is None else num_items_in_batch),
            logits=outputs.logits if return_logits else None,
            num_label_tokens=count,
            token_accuracy=(logits.detach().argmax(-1) == targets).sum() / items,
        )

    return type(base.__name__, (NativeSpeechLLM, base), {"forward": forward, "__module__": base.__module__})
