"""Finds files of a checkpoint in a local folder, in the cache of the Hub, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.utils import cached_file

from .untrusted import CheckpointError, inside, read_json


def offline_if_unreachable(name: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """Returns the options, with `local_files_only` if the Hub does not answer.

    Otherwise the client would try for half a minute per file.

    Args:
        name: folder or Hub id.
        hub: options of `from_pretrained` for the Hub.

    Raises:
        CheckpointError: if `name` is neither a folder nor a valid Hub id.
    """
    if os.path.exists(name):
        return hub
    try:
        hf_hub_download(str(name), "config.json", **{key: value for key, value in hub.items() if value is not None})
    except LocalEntryNotFoundError:
        return {**hub, "local_files_only": True}
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder") from error
    except (OSError, ValueError):
        pass  # the Hub answers: no such repository, or no such file
    return hub


def find_file(name: str | os.PathLike[str], file: str, hub: dict[str, Any]) -> str | None:
    """Returns the local path of a file of a checkpoint; `None` if there is no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)


def read_json_file(name: str | os.PathLike[str], file: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint; returns an empty dict if there is no such file.

    Raises:
        CheckpointError: if the file is damaged, or is a link to a target outside the checkpoint.
    """
    path = find_file(name, file, hub)
    if path is None:
        return {}
    inside(Path(path).parent, Path(path).name, path)
    return read_json(Path(path))
