"""Adapter folders of peft, as LoRA training writes them: merged into their base model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..model.modeling import PARTS
from .checkpoint import CheckpointError, widest

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def base_model(folder: Path) -> str:
    """The model that the adapter was trained on: `base_model_name_or_path`.

    Raises:
        CheckpointError: if the adapter names none.
    """
    name = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{folder / CONFIG_FILE} names no base model; write its folder or Hub id there")
    return name


def merge(model: PreTrainedModel, folder: Path, keep_dtypes: bool) -> PreTrainedModel:
    """Merges an adapter into its base model: low-rank matrices are added, parts that were trained whole replaced.

    Args:
        model: the base model; it is changed.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        keep_dtypes: whether a part that was trained whole takes the dtype in which the adapter stores it.

    Returns:
        The model itself, without a trace of peft.

    Raises:
        CheckpointError: if tensors of the adapter are missing or unexpected, or don't fit the base model.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing; download or copy the adapter again")
    config = PeftConfig.from_pretrained(str(folder))
    tensors = load_file(folder / WEIGHTS_FILE)
    if keep_dtypes:
        for part in set(config.modules_to_save or ()) & set(PARTS):
            dtype = widest(tensor.dtype for name, tensor in tensors.items() if f".{part}." in name)
            for parameter in getattr(model, part).parameters():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype))
    config.inference_mode = True
    wrapped = get_peft_model(model, config)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} doesn't fit {config.base_model_name_or_path}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; unexpected: {', '.join(sorted(unexpected)) or 'none'}"
        )
    misshapen = [name for name in expected if tensors[name].shape != expected[name].shape]
    if misshapen:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} doesn't fit {config.base_model_name_or_path}; "
            f"of a wrong shape: {', '.join(misshapen)}"
        )
    set_peft_model_state_dict(wrapped, tensors)
    merged = wrapped.merge_and_unload(safe_merge=True)
    merged.requires_grad_(True).eval()
    return merged
