"""Fingerprints of a model, so that an unfinished run resumes only with the same model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

PACKAGES = ("transformers", "tokenizers")  # releases may change prompts, search and texts
# Keys of configurations that are no properties of the model: paths, versions, and how the files were found.
PLACES = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "is_local", "local_files_only")


def model_fingerprint(model: PreTrainedModel, processor: ProcessorMixin, num_workers: int = 4) -> dict[str, str]:
    """Computes hashes of a loaded model and processor, and adds versions of packages.

    The hashes cover the objects in memory, not the files. This works for all formats, for merged adapters, and for a
    repository whose content has changed. All bytes of the weights are read (about 1 s per GB and thread), because
    samples would miss an edited row of an embedding table.

    Args:
        model: preferably on the CPU; weights on a GPU would be copied to the host.
        processor: of the model.
        num_workers: number of threads.

    Returns:
        Values by the names in error messages: `weights`, `configuration`, `generation configuration`, `processor`
        (tokenizer, chat template, feature extractor), and names of packages.
    """
    from ..version import __version__

    with ThreadPoolExecutor(num_workers) as pool:
        named = list(itertools.chain(model.named_parameters(), model.named_buffers()))
        digests = pool.map(_digest_of_tensor, (tensor for _, tensor in named))
        weights = sorted(zip((name for name, _ in named), digests, strict=True))
    generation = model.generation_config.to_dict() if model.generation_config is not None else None
    return {
        "weights": _digest([json.dumps(weights).encode()]),
        "configuration": _digest([_canonical(model.config.to_dict())]),
        "generation configuration": _digest([_canonical(generation)]),
        "processor": _digest_of_processor(processor),
        "hf_speechllm": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _digest_of_tensor(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _digest([f"{tensor.dtype} {tuple(tensor.shape)}".encode(), content.numpy()])


def _digest_of_processor(processor: ProcessorMixin) -> str:
    """Hashes the files that `save_pretrained` writes."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                parts.append(path.relative_to(folder).as_posix().encode())
                is_config = path.name.endswith("_config.json")
                parts.append(_canonical(json.loads(content)) if is_config else content)
    return _digest(parts)


def _canonical(value: Any) -> bytes:
    return json.dumps(_without_places(value), sort_keys=True, default=str).encode()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_places(item) for key, item in value.items() if key not in PLACES}
    return [_without_places(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(parts: Iterable[Any]) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))  # separates the parts
        result.update(part)
    return result.hexdigest()[:16]
