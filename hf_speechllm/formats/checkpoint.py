"""A checkpoint independent of its layout: config and unchanged tensors, under the names of this package's model."""

from __future__ import annotations

import functools
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ..files import apply_umask
from ..model.configuration import SpeechLLMConfig
from ..model.modeling import ALL_PARTS, SpeechLLMForConditionalGeneration
from .untrusted import CheckpointError, check_name, inside, one_line, read_json, reading

EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"
MAX_LISTED = 50  # names in an error message
MAX_BUFFERS = 2**28  # numbers in buffers beside the weights: 1 GiB of float32
CTC_PREFIX = "ctc"  # FunASR's `ctc_decoder.*` and `ctc.*`: a branch for timestamps, which training does not use
FILE_PREFIX = "file:"  # key prefix in a CTC file: the bytes of the vocabulary of the CTC branch
VOCABULARY_NAME = re.compile(r"[^./\\][^/\\]*\.tiktoken")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Checkpoint:
    """The content of a checkpoint, independent of the layout.

    Args:
        config: config of this package's model.
        tensors: state dict of this package's model, without a tied `lm_head`.
        generation_config: defaults of decoding.
        ctc_tensors: FunASR's CTC branch, which is not part of the model; see `funasr.read`.
    """

    config: SpeechLLMConfig
    tensors: dict[str, torch.Tensor]
    generation_config: GenerationConfig
    ctc_tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: SpeechLLMForConditionalGeneration) -> Checkpoint:
        """Returns the checkpoint of a model in memory."""
        tied = model.all_tied_weights_keys
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        return cls(model.config, tensors, model.generation_config, model.ctc_tensors)


def set_weight_tying(config: SpeechLLMConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Sets `tie_word_embeddings` of the config according to the tensors: true if head and embeddings are equal.

    Removes an equal head from `tensors`. Changes nothing if one of both is missing.
    """
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return
    tied = head.dtype == embeddings.dtype and torch.equal(head, embeddings)
    if tied:
        del tensors[HEAD]
    config.llm_config.tie_word_embeddings = config.tie_word_embeddings = tied


def check_tensors(checkpoint: Checkpoint, source: str, rename: Callable[[str], str] = str) -> None:
    """Compares names and shapes of the tensors with the config.

    Args:
        source: file or folder of the tensors, for the message.
        rename: converts this package's tensor names to names in the source.

    Raises:
        CheckpointError: if they differ; the message lists missing, unexpected and wrongly shaped tensors.
    """
    expected = expected_shapes(checkpoint.config, len(checkpoint.tensors), source)
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if problems := _differences(expected, found, rename):
        raise CheckpointError(f"{source}: the tensors do not match the config; {problems}")


def _differences(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], rename: Callable[[str], str] = str
) -> str:
    problems = []
    if missing := [rename(name) for name in expected if name not in found]:
        problems.append(f"{len(missing)} missing: {_join_names(missing)}")
    if unexpected := [rename(name) for name in found if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected: {_join_names(unexpected)}")
    misshapen = [
        f"{rename(name)} is {tuple(found[name])}, not {tuple(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} with a wrong shape: {_join_names(misshapen)}")
    return one_line("; ".join(problems), 20_000)


def build_config(values: dict[str, Any], file: Path) -> SpeechLLMConfig:
    """Builds a config from untrusted values and checks that the config can be saved again.

    Raises:
        CheckpointError: if a value is invalid; the message names the file and, if transformers reports it, the field.
    """
    with reading(file):
        config = SpeechLLMConfig(**values)
        config.validate()
        config.to_json_string()
        if config.max_feature_frames < 1:
            raise ValueError("the position table of the audio encoder is too short for a recording")
    return config


def expected_shapes(config: SpeechLLMConfig, count: int, source: str) -> dict[str, torch.Size]:
    """Returns the shapes of all tensors according to a config, without tied ones; allocates no memory for tensors.

    Args:
        count: number of tensors in the checkpoint; limits the number of modules.
        source: file or folder of the config, for the message.

    Raises:
        CheckpointError: if the config is invalid, defines far more modules than `count`, or buffers over 1 GiB.
    """
    left = 20 * count + 2000

    def count_module(*_) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(
                f"{source}: the config defines far more layers than {count} tensors can fill; correct the config"
            )

    hook = register_module_module_registration_hook(count_module)
    try:
        with reading(source, "has an invalid config"), torch.device("meta"):
            model = SpeechLLMForConditionalGeneration(config)
    finally:
        hook.remove()
    if (size := sum(buffer.numel() for buffer in model.buffers())) > MAX_BUFFERS:
        raise CheckpointError(
            f"{source}: the config defines buffers of {size:,} numbers; the maximum is {MAX_BUFFERS:,}; "
            "reduce max_position_embeddings"
        )
    tied = model.all_tied_weights_keys
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def check_model_size(config: SpeechLLMConfig, stored: Mapping[str, torch.Size], source: str) -> None:
    """Refuses a config that defines a larger model than the stored weights, before memory is allocated.

    Args:
        stored: shapes of the stored tensors, with any names.

    Raises:
        CheckpointError: if the model is larger; the message lists missing and larger tensors.
    """
    if is_deepspeed_zero3_enabled():  # transformers would shard the empty model over the ranks
        return
    expected = expected_shapes(config, len(stored), source)
    needed, found = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (expected, stored))
    if needed > found:
        raise CheckpointError(
            f"{source}: the tensors do not match the config, which needs {needed:,} numbers; the files contain "
            f"{found:,}; {_differences(expected, stored)}"
        )


def check_names(info: Mapping[str, Any], source: Any) -> None:
    """Checks transformers' report of a loaded model (`output_loading_info`) for missing and unexpected tensors.

    Raises:
        CheckpointError: if there are any; the message lists both.
    """
    if info["missing_keys"] or info["unexpected_keys"]:
        missing, unexpected = (one_line(", ".join(sorted(info[key]))) for key in ("missing_keys", "unexpected_keys"))
        raise CheckpointError(
            f"{source}: the tensors do not match the config; missing: {missing or 'none'}; "
            f"unexpected: {unexpected or 'none'}"
        )


def _join_names(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))  # a fused tensor of the source may correspond to three tensors here
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def part_dtypes(dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Returns the dtype of each part of the model; the widest dtype if the tensors of a part differ.

    Args:
        dtypes: dtype of each tensor name.
    """
    parts: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        part = name.split(".", 1)[0]
        if part in ALL_PARTS and dtype.is_floating_point:
            parts[part] = torch.promote_types(parts.get(part, dtype), dtype)
    return parts


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Returns the smallest dtype that represents all values of the given dtypes."""
    return functools.reduce(torch.promote_types, dtypes)


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Reads all tensors of `model.safetensors`, or of the shards in the index.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    index, files = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; download or copy the checkpoint again")
        tensors.update(read_tensors(path))
    if missing := [name for name in index if name not in tensors]:
        raise CheckpointError(
            f"{folder}: tensors in {INDEX_FILE} are not in the shards: {one_line(_join_names(missing))}"
        )
    return tensors


def _weight_files(folder: Path) -> tuple[Iterable[str], list[Path]]:
    """Returns the tensor names in the index, if any, and the weight files.

    Raises:
        CheckpointError: if the index is damaged or names a file outside the folder.
    """
    file = folder / INDEX_FILE
    # As in transformers, a single weight file has precedence over an index.
    if (folder / WEIGHTS_FILE).is_file() or not file.is_file():
        return (), [inside(folder, WEIGHTS_FILE, folder)]
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{file}: weight_map must name the file of each tensor")
    for key, name in index.items():
        check_name(name, f"{file}: weight_map.{one_line(key, 100)}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map.{one_line(key, 100)} must be a file named *.safetensors")
    return index, [inside(folder, name, f"{file}: weight_map") for name in sorted(set(index.values()))]


@dataclass
class StoredTensor:
    """Dtype (`None` if it is not a float type of torch) and shape of a tensor in a file."""

    dtype: torch.dtype | None
    shape: torch.Size


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Reads dtypes and shapes from the headers of safetensors files in a folder; empty without such files.

    Raises:
        CheckpointError: if a file is damaged, or the index names a file outside the folder.
    """
    headers = {}
    for path in _weight_files(folder)[1]:
        if path.is_file():
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(key)
                    headers[key] = StoredTensor(FLOATS.get(tensor.get_dtype()), torch.Size(tensor.get_shape()))
    return headers


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    with reading(file, "is damaged; download or copy it again"), safe_open(file, framework="pt") as opened:
        yield opened


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads all tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is damaged.
    """
    with _open(file) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)


def write_safetensors(
    tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: str | int = MAX_SHARD_SIZE
) -> None:
    """Writes `model.safetensors`, or shards with an index if the size exceeds `max_shard_size`.

    Raises:
        OSError: if the disk is full.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_torch_state_dict(contiguous, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS_FILE} cannot be written: {error}") from error
    apply_umask(folder)


def read_ctc_tensors(file: str | os.PathLike[str] | None) -> dict[str, torch.Tensor]:
    """Reads the CTC branch from a file; empty if the file is missing.

    Raises:
        CheckpointError: if the file is damaged, or refused by `check_ctc_tensors`.
    """
    if file is None or not os.path.isfile(file):
        return {}
    ctc_tensors = read_tensors(Path(file))
    check_ctc_tensors(ctc_tensors, file)
    return ctc_tensors


def check_ctc_tensors(ctc_tensors: Mapping[str, torch.Tensor], source: Any) -> None:
    """Checks that there are only tensors of a CTC branch, and vocabularies as bytes under a file name `*.tiktoken`.

    Raises:
        CheckpointError: if there is anything else; the message names the tensor.
    """
    for key, tensor in ctc_tensors.items():
        if not key.startswith(FILE_PREFIX):
            if not key.startswith(CTC_PREFIX):
                raise CheckpointError(f"{source}: {one_line(key, 100)} is not a tensor of a CTC branch; remove it")
            continue
        name = key.removeprefix(FILE_PREFIX)
        check_name(name, source)
        if VOCABULARY_NAME.fullmatch(name) is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError(
                f"{source}: {one_line(key, 100)} does not contain the bytes of a *.tiktoken file; remove it"
            )


def write_ctc_tensors(ctc_tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes the CTC branch to a file, if there is one."""
    if ctc_tensors:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in ctc_tensors.items()}, file, metadata={"format": "pt"})
        apply_umask(file.parent, file.name)


def read_generation_config(folder: Path, config: SpeechLLMConfig) -> GenerationConfig:
    """Reads `generation_config.json`; default: `default_generation_config`."""
    if (folder / GENERATION_FILE).is_file():
        with reading(folder / GENERATION_FILE):
            return GenerationConfig.from_pretrained(folder)
    return default_generation_config(config)


def default_generation_config(config: SpeechLLMConfig) -> GenerationConfig:
    """Returns settings of greedy decoding, with the LLM's end token, also used as padding token if there is none."""
    end, padding = config.llm_config.eos_token_id, config.llm_config.pad_token_id
    if padding is None:
        padding = end[0] if isinstance(end, (list, tuple)) else end
    return GenerationConfig(eos_token_id=end, pad_token_id=padding)


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a temporary folder beside `output` and renames it to `output` if the block ends without an exception.

    Raises:
        FileExistsError: if `output` exists.
        OSError: if the parent folder is not writable.
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
    finally:  # after the renaming, there is nothing to remove
        shutil.rmtree(temporary, ignore_errors=True)
