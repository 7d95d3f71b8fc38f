"""Partial checkpoints: contain only the trained parts, and refer to the base model for the frozen parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..files import atomic_write
from ..model.modeling import ALL_PARTS
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    build_config,
    check_tensors,
    read_generation_config,
    read_safetensors,
)
from .untrusted import base_model, one_line, read_json, stored_base

REFERENCE_FILE = "base_model.json"


def write_reference(folder: Path, name: str, digest: str) -> None:
    """Writes the reference to the base model of a partial checkpoint.

    Args:
        name: folder or Hub id of the base model.
        digest: `hash_tensors` of the frozen parts.
    """
    with atomic_write(folder / REFERENCE_FILE) as file:
        json.dump({"base_model_name_or_path": stored_base(name), "sha256": digest}, file, indent=1)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of names and float32 values; independent of the dtype, because training loads as float32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def read(folder: Path) -> Checkpoint:
    """Reads a partial checkpoint and its base model into one checkpoint.

    Raises:
        CheckpointError: if the base model differs from the one used in training.
    """
    from .loading import read_checkpoint  # `loading` imports this module

    with base_model(folder / REFERENCE_FILE) as name:
        base, trained = read_checkpoint(name), read_safetensors(folder)
    parts = {key.split(".", 1)[0] for key in trained} & set(ALL_PARTS)
    frozen = {key: tensor for key, tensor in base.tensors.items() if key.split(".", 1)[0] not in parts}
    check_base(folder, frozen)
    config = build_config(read_json(folder / "config.json"), folder / "config.json")
    checkpoint = Checkpoint(config, {**frozen, **trained}, read_generation_config(folder, config), base.ctc_tensors)
    check_tensors(checkpoint, str(folder))
    return checkpoint


def check_base(folder: Path, frozen: Mapping[str, torch.Tensor]) -> None:
    """Checks that frozen parts are equal to those used in the training of a partial checkpoint.

    Raises:
        CheckpointError: if they differ.
    """
    reference = read_json(folder / REFERENCE_FILE)
    if hash_tensors(frozen) != reference.get("sha256"):
        raise CheckpointError(
            f"{folder} contains the trained parts of {one_line(reference.get('base_model_name_or_path'))}, whose "
            f"frozen parts have changed since; restore the base model, or write its path to {REFERENCE_FILE}"
        )
