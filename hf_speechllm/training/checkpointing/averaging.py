"""The mean of several checkpoints of one run, full models or LoRA adapters, tensor by tensor."""

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

# What is not the model's or the processor's: weights, states and results of a run.
LEFT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "trainer_state.json", "*_results.json",
    "README.md", "*.png", "*.tsv", "manifest.json", "position.json", "stream_rank*.json", "dependencies.json",
    "course.json", "finished.json",
)  # fmt: skip
CONFIG_NOTES = ("transformers_version", "_name_or_path", "peft_version")  # may differ between checkpoints


class _Weights:
    """The tensors of a checkpoint folder, opened but not read.

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
                    f"{folder / name} is missing; only folders with safetensors can be averaged: convert others "
                    "with `hf-speechllm convert`"
                )
            try:
                self.files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{folder / name} is damaged ({error}); copy it again") from error
        self.file_of = {key: name for name, file in self.files.items() for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.files[self.file_of[key]].get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self.files[self.file_of[key]].get_slice(key).get_shape())

    def config(self) -> dict[str, Any]:
        """What must be the same in all: `adapter_config.json` or `config.json`, without notes."""
        path = self.folder / (adapters.CONFIG_FILE if self.is_adapter else "config.json")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        config = json.loads(path.read_text(encoding="utf-8"))
        # peft writes sets, whose order changes from run to run.
        ordered = {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
        return {key: value for key, value in ordered.items() if key not in CONFIG_NOTES}


def average_checkpoints(inputs: Sequence[str | Path], output: str | Path, exact_lora: bool = False) -> None:
    """Writes the mean of checkpoints, with config and processor of the last, all or nothing.

    Sums are float64, whatever the dtype of the weights, which the mean is rounded to. Integer tensors must be equal.

    Of LoRA adapters, the mean of the factors is taken, `mean(B) mean(A)`: of checkpoints of one run it differs from
    the mean of the updates `mean(B A)` by the covariance of B and A alone, and the rank stays. `exact_lora` stacks the
    factors instead, `[B_1 .. B_n] / n` and `[A_1; ..; A_n]`, whose product is the mean of the updates for any
    adapters, those of different runs included, with n times the rank.

    Args:
        inputs: two folders or more, all full models or all adapters, in safetensors.
        output: new folder.
        exact_lora: see above; adapters only.

    Raises:
        CheckpointError: if they don't fit each other, or a file is missing or damaged.
        FileExistsError: if `output` is there and not empty.
    """
    folders, output = [Path(item) for item in inputs], Path(output)
    if len(folders) < 2:
        raise CheckpointError("one checkpoint alone has no mean; name at least two")
    with ExitStack() as stack:
        checkpoints = [_Weights(folder, stack) for folder in folders]
        _check(checkpoints, exact_lora)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        with new_folder(output) as temporary:
            for path in sorted(folders[-1].iterdir()):
                left = path.name != CTC_FILE and any(fnmatch(path.name, pattern) for pattern in LEFT_FILES)
                if path.is_file() and not left:
                    shutil.copy(path, temporary)
            first = checkpoints[0]
            for name, file in first.files.items():
                means = {key: _mean(checkpoints, key, exact_lora) for key in file.keys()}  # noqa: SIM118
                save_file(means, temporary / name, metadata=file.metadata())
            apply_umask(temporary)
            if set(first.files) not in ({WEIGHTS_FILE}, {adapters.WEIGHTS_FILE}):  # shards
                shutil.copy(first.folder / INDEX_FILE, temporary)
            if exact_lora:
                _raise_rank(temporary / adapters.CONFIG_FILE, len(checkpoints))


def _check(checkpoints: list[_Weights], exact_lora: bool) -> None:
    first, *others = checkpoints
    for other in others:
        names = f"{first.folder} and {other.folder}"
        if first.is_adapter != other.is_adapter:
            raise CheckpointError(f"{names}: one is a LoRA adapter, one a full model; merge it: hf-speechllm merge")
        here, there = first.config(), other.config()
        if differing := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
            raise CheckpointError(f"{names} differ in their configs: {', '.join(differing)}")
        if differing := sorted(first.file_of.keys() ^ other.file_of.keys()):
            raise CheckpointError(f"{names}: only one of them has {_join_names(differing)}")
        if differing := [key for key in first.file_of if first.shape(key) != other.shape(key)]:
            raise CheckpointError(f"{names} differ in the shapes of {_join_names(differing)}")
    if exact_lora:
        if not first.is_adapter:
            raise CheckpointError("the exact mean of updates is for LoRA adapters; full models need no such option")
        config = first.config()
        special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias") if config.get(key)]
        if special:
            raise CheckpointError(f"{first.folder}: no exact mean for adapters with {', '.join(special)}")


def _join_names(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (" ..." if len(names) > MAX_LISTED else "")


def _mean(checkpoints: list[_Weights], key: str, exact_lora: bool) -> torch.Tensor:
    last = checkpoints[-1][key]
    if not last.is_floating_point():
        if any(not torch.equal(checkpoint[key], last) for checkpoint in checkpoints[:-1]):
            raise CheckpointError(f"{key} holds integers that differ between the checkpoints: they have no mean")
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


def _raise_rank(path: Path, times: int) -> None:
    """Writes `times` the rank into an adapter's config, and the alpha that keeps the scale of the update."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["r"] *= times
    config["lora_alpha"] *= math.sqrt(times) if config.get("use_rslora") else times
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
