"""Weights of a checkpoint, read back into the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...formats import partial
from ...formats.checkpoint import CheckpointError, read_safetensors
from ..freezing import part_of, trained_parts


def load_weights(model: Any, folder: Path) -> None:
    """Loads the weights of a checkpoint that is not sharded and holds no adapters.

    Args:
        model: as it is trained; changed in place.
        folder: of the checkpoint; one of `--save_only_trained` leaves out the frozen parts.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of a wrong shape, or the frozen parts are not those that
            the checkpoint was trained with.
    """
    if (folder / partial.REFERENCE_FILE).is_file():
        frozen = frozen_tensors(model)
        partial.check_base(folder, frozen)
    else:
        frozen = {}
    tied = model.all_tied_weights_keys  # saved once, under their other name
    try:
        result = model.load_state_dict(read_safetensors(folder), strict=False)
    except RuntimeError as error:  # of a wrong shape
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
    missing = [name for name in result.missing_keys if name not in frozen and name not in tied]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {', '.join(missing) or 'none'}; unexpected "
            f"{', '.join(result.unexpected_keys) or 'none'}"
        )


def frozen_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of the parts that are not trained, under the names that a base model has for them."""
    parts, tied = trained_parts(model), model.all_tied_weights_keys
    return {
        name: tensor for name, tensor in model.state_dict().items() if part_of(name) not in parts and name not in tied
    }
