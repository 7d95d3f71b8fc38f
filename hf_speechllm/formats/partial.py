"""Checkpoints that leave out the frozen parts of a model, and name the base model that has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..files import atomic_write
from ..model.modeling import PARTS
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
    """Names the base model of a folder whose `model.safetensors` holds the trained parts alone.

    Args:
        name: folder or Hub id of the base model.
        digest: `hash_tensors` of the parts that it is to give.
    """
    with atomic_write(folder / REFERENCE_FILE) as file:
        json.dump({"base_model_name_or_path": stored_base(name), "sha256": digest}, file, indent=1)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, as float32, whatever the dtype: training widens what it loads."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def read(folder: Path) -> Checkpoint:
    """Reads a folder and its base model into one checkpoint.

    Raises:
        CheckpointError: if the base model is not what the trained parts were trained with.
    """
    from .loading import read_checkpoint  # which builds on this module

    with base_model(folder / REFERENCE_FILE) as name:
        base, trained = read_checkpoint(name), read_safetensors(folder)
    parts = {key.split(".", 1)[0] for key in trained} & set(PARTS)
    frozen = {key: tensor for key, tensor in base.tensors.items() if key.split(".", 1)[0] not in parts}
    check_base(folder, frozen)
    config = build_config(read_json(folder / "config.json"), folder / "config.json")
    checkpoint = Checkpoint(config, {**frozen, **trained}, read_generation_config(folder, config), base.side)
    check_tensors(checkpoint, str(folder))
    return checkpoint


def check_base(folder: Path, frozen: Mapping[str, torch.Tensor]) -> None:
    """Sees to it that frozen parts are those that a checkpoint was trained with.

    Raises:
        CheckpointError: if they are not.
    """
    reference = read_json(folder / REFERENCE_FILE)
    if hash_tensors(frozen) != reference.get("sha256"):
        raise CheckpointError(
            f"{folder} holds the trained parts of {one_line(reference.get('base_model_name_or_path'))}, whose other "
            f"parts have changed since; restore that model, or name its place in {REFERENCE_FILE}"
        )
