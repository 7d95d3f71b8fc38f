"""Merging of peft's LoRA adapters into their base model."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex
import torch
from transformers import PreTrainedModel

from ..model.modeling import PARTS
from .checkpoint import CheckpointError, one_line, read_tensors, widest
from .untrusted import inside, read_json, reading

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Refused options: they import a module by name, read other files, or duplicate layers.
REFUSED = ("megatron_config", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "layer_replication")
INITIAL = re.compile(
    r"gaussian|olora|orthogonal|pissa(_niter_\d{1,2})?"
)  # values of `init_lora_weights` that need no data
MAX_RANK = 1024  # unless the tensors have a higher rank
MATCHING_SECONDS = 2.0  # time limit for all patterns of an adapter; a hostile pattern may never finish


def wrap(model: PreTrainedModel, config: Any) -> Any:
    """Returns `peft.get_peft_model(model, config)`, without a warning about a name that transformers has changed."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def merge(model: PreTrainedModel, folder: Path, keep_dtypes: bool) -> PreTrainedModel:
    """Merges an adapter into its base model: adds low-rank matrices, and replaces fully trained parts.

    Args:
        model: base model; changed in place.
        folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
        keep_dtypes: whether fully trained parts get the adapter's dtype.

    Returns:
        `model`, without peft's wrapper.

    Raises:
        CheckpointError: if tensors of the adapter are missing or unexpected, or do not match the base model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing; download or copy the adapter again")
    tensors = read_tensors(inside(folder, WEIGHTS_FILE, folder))
    with reading(folder / CONFIG_FILE):
        config = _read_config(folder, tensors, [name for name, _ in model.named_modules()])
    if keep_dtypes:
        for part in set(config.modules_to_save or ()) & set(PARTS):
            dtype = widest(tensor.dtype for name, tensor in tensors.items() if f".{part}." in name)
            for parameter in getattr(model, part).parameters():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype))
    config.inference_mode = True
    with reading(folder / CONFIG_FILE):
        wrapped = wrap(model, config)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # With low-rank matrices for embeddings, peft also saves the full embeddings.
    known = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - known.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not match {config.base_model_name_or_path}; "
            f"missing: {one_line(', '.join(sorted(missing))) or 'none'}; "
            f"unexpected: {one_line(', '.join(sorted(unexpected))) or 'none'}"
        )
    misshapen = [name for name in tensors if tensors[name].shape != known[name].shape]
    if misshapen:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not match {config.base_model_name_or_path}; "
            f"wrong shape: {', '.join(misshapen)}"
        )
    if getattr(model.config, "tie_word_embeddings", False) and any(
        "lora_embedding_A" in name or "lm_head.lora" in name for name in tensors
    ):
        # Merging into one of two tied modules would also change the other.
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} cannot be merged: it adapts the LLM's embeddings or head, which share their "
            "weights; decode with peft.PeftModel, or train without them in --lora_target_modules"
        )
    set_peft_model_state_dict(wrapped, tensors)
    with reading(folder, "cannot be merged"):
        merged = wrapped.merge_and_unload(safe_merge=True)
    merged.requires_grad_(True).eval()
    return merged


def _read_config(folder: Path, tensors: dict[str, torch.Tensor], names: list[str]) -> Any:
    """Reads the `LoraConfig` of an adapter and replaces regular expressions by the names of matching modules.

    Args:
        names: module names of the base model.

    Raises:
        CheckpointError: if the adapter is not LoRA, or has unsafe options.
    """
    from peft import LoraConfig, PeftConfig

    file = folder / CONFIG_FILE
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        kind = one_line(settings.get("peft_type"), 100)
        raise CheckpointError(f"{file}: peft_type is {kind!r}; only LORA can be merged")
    for key in REFUSED:
        if settings.get(key):
            raise CheckpointError(f"{file}: {key} is not supported; remove it")
    initial = settings.get("init_lora_weights", True)
    if not isinstance(initial, bool) and not (isinstance(initial, str) and INITIAL.fullmatch(initial)):
        raise CheckpointError(f"{file}: init_lora_weights is {one_line(initial, 100)!r}; set it to true")
    for key in ("modules_to_save", "layers_pattern"):
        items = settings.get(key) or []
        for item in [items] if isinstance(items, str) else items:
            if not isinstance(item, str) or not re.fullmatch(r"[\w.]+", item):
                raise CheckpointError(f"{file}: {key}: {one_line(item, 100)!r} is not a module name")
    patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    ranks = [settings.get("r", LoraConfig.r), *patterns["rank_pattern"].values()]
    most = max([MAX_RANK, *(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name and tensor.dim())])
    if not all(isinstance(rank, int) and 1 <= rank <= most for rank in ranks):
        raise CheckpointError(f"{file}: r and rank_pattern must be whole numbers from 1 to {most}")
    end = time.monotonic() + MATCHING_SECONDS
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), str) and settings[key] != "all-linear":
            settings[key] = list(_matching(settings[key], names, end, f"{file}: {key}"))
    for key, pattern in patterns.items():
        values: dict[str, int] = {}
        for expression, value in pattern.items():
            for name in _matching(rf"(.*\.)?({expression})", names, end, f"{file}: {key}"):
                values.setdefault(re.escape(name), value)
        settings[key] = values
    return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**settings))


def _matching(pattern: str, names: Iterable[str], end: float, source: str) -> Iterable[str]:
    for name in names:
        try:
            if regex.fullmatch(pattern, name, timeout=max(0.0, end - time.monotonic())):
                yield name
        except TimeoutError as error:
            raise CheckpointError(
                f"{source}: matching takes more than {MATCHING_SECONDS:g} s; write a list of module names instead"
            ) from error
        except regex.error as error:
            raise CheckpointError(f"{source} is not a valid regular expression ({one_line(error)})") from error
