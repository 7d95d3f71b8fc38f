"""Loads the weights of a checkpoint into the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...formats import partial
from ...formats.checkpoint import CheckpointError, read_safetensors
from ..freezing import part_of, trained_parts


def load_weights(model: Any, folder: Path) -> None:
    """Loads the weights of a checkpoint without shards and without adapters.

    Args:
        model: the trained model; changed in place.
        folder: of the checkpoint; a checkpoint of `--save_only_trained` lacks the frozen parts.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of a wrong shape, or if the frozen parts have changed.
    """
    if (folder / partial.REFERENCE_FILE).is_file():
        frozen = frozen_tensors(model)
        partial.check_base(folder, frozen)
    else:
        frozen = {}
    tied = model.all_tied_weights_keys  # saved once, under the other name
    try:
        result = model.load_state_dict(read_safetensors(folder), strict=False)
    except RuntimeError as error:  # wrong shapes
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
    missing = [name for name in result.missing_keys if name not in frozen and name not in tied]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {', '.join(missing) or 'none'}; unexpected "
            f"{', '.join(result.unexpected_keys) or 'none'}"
        )


def frozen_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of frozen parts, under the names in the base model."""
    parts, tied = trained_parts(model), model.all_tied_weights_keys
    return {
        name: tensor for name, tensor in model.state_dict().items() if part_of(name) not in parts and name not in tied
    }
