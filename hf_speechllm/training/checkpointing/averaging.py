"""Mean of several checkpoints, full models or LoRA adapters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...files import apply_umask
from ...formats import peft_adapters as adapters
from ...formats.checkpoint import INDEX_FILE, MAX_LISTED, WEIGHTS_FILE, CheckpointError, new_folder
from ...formats.loading import CTC_FILE

# Files that are not copied: weights, states and results of a run.
EXCLUDED_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "trainer_state.json", "*_results.json",
    "README.md", "*.png", "*.tsv", "manifest.json", "position.json", "stream_rank*.json", "dependencies.json",
    "course.json", "finished.json",
)  # fmt: skip
CONFIG_NOTES = ("transformers_version", "_name_or_path", "peft_version")  # may differ between checkpoints


class _CheckpointTensors:
    """Tensors of a checkpoint folder, which are read on access.

    Args:
        folder: full model (one file or shards with an index) or peft adapter.
        stack: closes the files.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.is_adapter = (folder / adapters.CONFIG_FILE).is_file()
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if self.is_adapter:
            names = [adapters.WEIGHTS_FILE]
        elif (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        else:
            names = [WEIGHTS_FILE]
        self.files: dict[str, Any] = {}
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name} is missing; averaging requires safetensors: convert other formats with "
                    "`hf-speechllm convert`"
                )
            try:
                self.files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{folder / name} is damaged ({error}); copy it again") from error
        self.file_of = {key: name for name, file in self.files.items() for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.files[self.file_of[key]].get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape of a tensor from the file header."""
        return tuple(self.files[self.file_of[key]].get_slice(key).get_shape())

    def config(self) -> dict[str, Any]:
        """Returns the values of `adapter_config.json` or `config.json` that must be equal in all checkpoints."""
        path = self.folder / (adapters.CONFIG_FILE if self.is_adapter else "config.json")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        config = json.loads(path.read_text(encoding="utf-8"))
        # peft writes sets, whose order changes from run to run.
        ordered = {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
        return {key: value for key, value in ordered.items() if key not in CONFIG_NOTES}


def average_checkpoints(inputs: Sequence[str | Path], output: str | Path, exact_lora: bool = False) -> None:
    """Writes the mean of checkpoints, with configuration and processor of the last checkpoint, atomically.

    Computes sums in float64 and rounds the mean to the dtype of the weights. Integer tensors must be equal.

    For LoRA adapters, the result contains the mean factors, `mean(B) mean(A)`. For checkpoints of one run, this
    differs from the mean update `mean(B A)` only by the covariance of B and A, and the rank does not change.
    `exact_lora` stacks the factors: the product of `[B_1 .. B_n] / n` and `[A_1; ..; A_n]` is the mean update of any
    adapters, even of different runs, and has n times the rank.

    Args:
        inputs: at least two folders with safetensors: full models only, or adapters only.
        output: new folder.
        exact_lora: whether to compute the exact mean update; for adapters only.

    Raises:
        CheckpointError: if the checkpoints do not match, or a file is missing or damaged.
        FileExistsError: if `output` exists and is not empty.
    """
    folders, output = [Path(item) for item in inputs], Path(output)
    if len(folders) < 2:
        raise CheckpointError("a mean requires at least two checkpoints; name another checkpoint")
    with ExitStack() as stack:
        checkpoints = [_CheckpointTensors(folder, stack) for folder in folders]
        _check(checkpoints, exact_lora)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        with new_folder(output) as temporary:
            for path in sorted(folders[-1].iterdir()):
                excluded = path.name != CTC_FILE and any(fnmatch(path.name, pattern) for pattern in EXCLUDED_FILES)
                if path.is_file() and not excluded:
                    shutil.copy(path, temporary)
            first = checkpoints[0]
            for name, file in first.files.items():
                means = {key: _mean(checkpoints, key, exact_lora) for key in file.keys()}  # noqa: SIM118
                save_file(means, temporary / name, metadata=file.metadata())
            apply_umask(temporary)
            if set(first.files) not in ({WEIGHTS_FILE}, {adapters.WEIGHTS_FILE}):  # shards
                shutil.copy(first.folder / INDEX_FILE, temporary)
            if exact_lora:
                _multiply_rank(temporary / adapters.CONFIG_FILE, len(checkpoints))


def _check(checkpoints: list[_CheckpointTensors], exact_lora: bool) -> None:
    first, *others = checkpoints
    for other in others:
        names = f"{first.folder} and {other.folder}"
        if first.is_adapter != other.is_adapter:
            raise CheckpointError(
                f"{names}: one is a LoRA adapter, the other a full model; merge the adapter with `hf-speechllm merge`"
            )
        here, there = first.config(), other.config()
        if differing := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
            raise CheckpointError(f"{names} differ in their configs: {', '.join(differing)}")
        if differing := sorted(first.file_of.keys() ^ other.file_of.keys()):
            raise CheckpointError(f"{names}: only one of them has {_join_names(differing)}")
        if differing := [key for key in first.file_of if first.shape(key) != other.shape(key)]:
            raise CheckpointError(f"{names} differ in the shapes of {_join_names(differing)}")
    if exact_lora:
        if not first.is_adapter:
            raise CheckpointError("--exact_lora is for LoRA adapters; leave the option out for full models")
        config = first.config()
        unsupported = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias") if config.get(key)]
        if unsupported:
            raise CheckpointError(
                f"{first.folder}: --exact_lora does not support adapters with {', '.join(unsupported)}; leave it out"
            )


def _join_names(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (" ..." if len(names) > MAX_LISTED else "")


def _mean(checkpoints: list[_CheckpointTensors], key: str, exact_lora: bool) -> torch.Tensor:
    last = checkpoints[-1][key]
    if not last.is_floating_point():
        if any(not torch.equal(checkpoint[key], last) for checkpoint in checkpoints[:-1]):
            raise CheckpointError(f"{key} contains different integers in the checkpoints, which have no mean")
        return last
    if exact_lora and ".lora_A." in key:
        return torch.cat([checkpoint[key] for checkpoint in checkpoints], dim=0)
    if exact_lora and ".lora_B." in key:
        stacked = torch.cat([checkpoint[key] for checkpoint in checkpoints], dim=1)
        return (stacked.double() / len(checkpoints)).to(last.dtype)
    total = torch.zeros(last.shape, dtype=torch.float64)
    for checkpoint in checkpoints:
        total += checkpoint[key]
    return (total / len(checkpoints)).to(last.dtype)


def _multiply_rank(path: Path, factor: int) -> None:
    """Multiplies the rank in an adapter's configuration, and changes alpha so that the scale of updates stays."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["r"] *= factor
    config["lora_alpha"] *= math.sqrt(factor) if config.get("use_rslora") else factor
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
