"""A checkpoint outside any layout: config and tensors, untouched in value and dtype, under the names of our model."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from ..model.configuration import SpeechLLMConfig
from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration

EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"
MAX_LISTED = 50  # names in an error message
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or can't be written in a layout; the message says why and what to do."""


@dataclass
class Checkpoint:
    """A model on its way from one layout to another.

    Args:
        config: of our model.
        tensors: by their names in our model's state dict; a tied `lm_head` is left out.
        generation_config: how to decode.
        side: what belongs to the checkpoint but not to the model: FunASR's CTC branch; see `funasr.read`.
    """

    config: SpeechLLMConfig
    tensors: dict[str, torch.Tensor]
    generation_config: GenerationConfig
    side: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: SpeechLLMForConditionalGeneration) -> Checkpoint:
        """The checkpoint that a model in memory would be saved as."""
        tied = model.all_tied_weights_keys
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        return cls(model.config, tensors, model.generation_config, model.side_tensors)


def settle_tying(config: SpeechLLMConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Ties the LLM's head to its embeddings in the config if both are stored and equal, unties it if they differ.

    An equal head is taken out of `tensors`.
    """
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return
    tied = head.dtype == embeddings.dtype and torch.equal(head, embeddings)
    if tied:
        del tensors[HEAD]
    config.llm_config.tie_word_embeddings = config.tie_word_embeddings = tied


def check_tensors(checkpoint: Checkpoint, source: str, rename: Callable[[str], str] = str) -> None:
    """Compares names and shapes with what the config asks for.

    Args:
        source: what the tensors were read from, for the message.
        rename: turns our names into those of the source.

    Raises:
        CheckpointError: listing missing and unexpected tensors and those of a wrong shape.
    """
    with torch.device("meta"):
        model = SpeechLLMForConditionalGeneration(checkpoint.config)
    tied = model.all_tied_weights_keys
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    problems = []
    if missing := [rename(name) for name in expected if name not in found]:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected := [rename(name) for name in found if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    misshapen = [
        f"{rename(name)} is {tuple(found[name])}, not {tuple(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of a wrong shape: {_listed(misshapen)}")
    if problems:
        raise CheckpointError(f"{source}: the tensors don't fit the config; " + "; ".join(problems))


def _listed(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))  # a fused tensor may stand for three of ours
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def part_dtypes(dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of each part of the model, the widest if its tensors differ.

    Args:
        dtypes: by the tensors' names.
    """
    parts: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        part = name.split(".", 1)[0]
        if part in PARTS and dtype.is_floating_point:
            parts[part] = torch.promote_types(parts.get(part, dtype), dtype)
    return parts


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds every value of all of these."""
    return functools.reduce(torch.promote_types, dtypes)


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(index.values()))
    else:
        index, files = {}, [WEIGHTS_FILE]
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; download or copy the checkpoint again")
        with _open(folder / name) as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    if missing := [name for name in index if name not in tensors]:
        raise CheckpointError(f"{folder}: not in the shards that the index names: {_listed(missing)}")
    return tensors


def read_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor in the folder's weights, from their headers; empty if they are not in safetensors."""
    if (folder / INDEX_FILE).is_file():
        files = set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
    else:
        files = {WEIGHTS_FILE}
    dtypes: dict[str, torch.dtype] = {}
    for name in files:
        if (folder / name).is_file():
            with _open(folder / name) as file:
                names = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
            dtypes.update({key: FLOATS[name] for key, name in names.items() if name in FLOATS})
    return dtypes


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); download or copy it again") from error


def write_safetensors(
    tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: str | int = MAX_SHARD_SIZE
) -> None:
    """Writes `model.safetensors`, or shards with an index beyond `max_shard_size`.

    Raises:
        OSError: if the disk is full.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_torch_state_dict(contiguous, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS_FILE} can't be written: {error}") from error


def read_side(file: str | os.PathLike[str] | None) -> dict[str, torch.Tensor]:
    """Tensors of a side file; none if there is no such file."""
    if file is None or not os.path.isfile(file):
        return {}
    with _open(Path(file)) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)


def write_side(side: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a side file; nothing if there is nothing to write."""
    if side:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in side.items()}, file, metadata={"format": "pt"})


def read_generation_config(folder: Path, config: SpeechLLMConfig) -> GenerationConfig:
    """`generation_config.json`, or what the LLM's config says of ends and padding."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return default_generation_config(config)


def default_generation_config(config: SpeechLLMConfig) -> GenerationConfig:
    """Greedy decoding up to the LLM's end token, which also pads if the LLM has no padding token."""
    end, padding = config.llm_config.eos_token_id, config.llm_config.pad_token_id
    if padding is None:
        padding = end[0] if isinstance(end, (list, tuple)) else end
    return GenerationConfig(eos_token_id=end, pad_token_id=padding)


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` once the block has ended without an exception.

    Raises:
        FileExistsError: if `output` exists.
        OSError: if its parent can't be written.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists; remove it or choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)
    finally:  # once renamed, it is not there any more
        shutil.rmtree(temporary, ignore_errors=True)
