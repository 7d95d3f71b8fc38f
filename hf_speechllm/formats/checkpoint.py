"""A checkpoint outside any layout: config and tensors, untouched in value and dtype, under the names of our model."""

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
from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration
from .untrusted import CheckpointError, check_name, inside, one_line, read_json, reading

EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"
MAX_LISTED = 50  # names in an error message
MAX_BUFFERS = 2**28  # numbers in tables that a config asks for beside the weights: 1 GiB of float32
CTC_PREFIX = "ctc"  # FunASR's `ctc_decoder.*` and `ctc.*`: a branch for timestamps that training never touches
FILE_PREFIX = "file:"  # in a side file: the bytes of a vocabulary that the CTC branch needs
SIDE_NAME = re.compile(r"[^./\\][^/\\]*\.tiktoken")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    expected = expected_shapes(checkpoint.config, len(checkpoint.tensors), source)
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if problems := _differences(expected, found, rename):
        raise CheckpointError(f"{source}: the tensors don't fit the config; {problems}")


def _differences(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], rename: Callable[[str], str] = str
) -> str:
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
    return one_line("; ".join(problems), 20_000)


def build_config(values: dict[str, Any], file: Path) -> SpeechLLMConfig:
    """Our config of a stranger's values; what is read can be written again.

    Raises:
        CheckpointError: naming the file and, where the config classes of transformers say so, the field.
    """
    with reading(file):
        config = SpeechLLMConfig(**values)
        config.validate()
        config.to_json_string()
    return config


def expected_shapes(config: SpeechLLMConfig, count: int, source: str) -> dict[str, torch.Size]:
    """Shapes of the tensors that a config asks for, without those that are tied; no memory is taken for them.

    Args:
        count: tensors in the checkpoint; a config that asks for many more modules than they fill is refused.
        source: of the config, for the message.

    Raises:
        CheckpointError: if no model can be built from the config, or its tables would take more than 1 GiB.
    """
    left = 20 * count + 2000

    def count_module(*_) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(f"{source}: the config asks for many more layers than {count} tensors fill")

    hook = register_module_module_registration_hook(count_module)
    try:
        with reading(source, "has a config that no model can be built from"), torch.device("meta"):
            model = SpeechLLMForConditionalGeneration(config)
    finally:
        hook.remove()
    if (size := sum(buffer.numel() for buffer in model.buffers())) > MAX_BUFFERS:
        raise CheckpointError(
            f"{source}: the config asks for tables of {size:,} numbers beside the weights (max_position_embeddings?); "
            f"the most is {MAX_BUFFERS:,}"
        )
    tied = model.all_tied_weights_keys
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def check_amount(config: SpeechLLMConfig, stored: Mapping[str, torch.Size], source: str) -> None:
    """Refuses a config that asks for more numbers than the weights hold, before memory is taken for them.

    Args:
        stored: shapes in the files, under any names.

    Raises:
        CheckpointError: naming the tensors that are missing or larger.
    """
    if is_deepspeed_zero3_enabled():  # transformers would shard the empty model over the ranks
        return
    expected = expected_shapes(config, len(stored), source)
    asked, there = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (expected, stored))
    if asked > there:
        raise CheckpointError(
            f"{source}: the tensors don't fit the config, which asks for {asked:,} numbers of which {there:,} are "
            f"there; {_differences(expected, stored)}"
        )


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
    index, files = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; download or copy the checkpoint again")
        tensors.update(read_tensors(path))
    if missing := [name for name in index if name not in tensors]:
        raise CheckpointError(f"{folder}: not in the shards that the index names: {one_line(_listed(missing))}")
    return tensors


def _weight_files(folder: Path) -> tuple[Iterable[str], list[Path]]:
    """The tensors that an index names, if there is one, and the files that hold the weights.

    Raises:
        CheckpointError: if the index is damaged or names a file elsewhere.
    """
    file = folder / INDEX_FILE
    # The order of transformers: a file that holds all comes before an index.
    if (folder / WEIGHTS_FILE).is_file() or not file.is_file():
        return (), [inside(folder, WEIGHTS_FILE, folder)]
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{file}: weight_map must name the file of each tensor")
    for key, name in index.items():
        check_name(name, f"{file}: weight_map.{one_line(key, 100)}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map.{one_line(key, 100)} must be a file called *.safetensors")
    return index, [inside(folder, name, f"{file}: weight_map") for name in sorted(set(index.values()))]


@dataclass
class StoredTensor:
    """Dtype (`None` if it is not a float of torch) and shape of a tensor in a file."""

    dtype: torch.dtype | None
    shape: torch.Size


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """What the folder's safetensors hold, from their headers; empty if there are none.

    Raises:
        CheckpointError: if a file is damaged, or the index names a file elsewhere.
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
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    with _open(file) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)


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
    apply_umask(folder)


def read_side(file: str | os.PathLike[str] | None) -> dict[str, torch.Tensor]:
    """Tensors of a side file; none if there is no such file.

    Raises:
        CheckpointError: if it is damaged, or holds what `check_side` refuses.
    """
    if file is None or not os.path.isfile(file):
        return {}
    side = read_tensors(Path(file))
    check_side(side, file)
    return side


def check_side(side: Mapping[str, torch.Tensor], source: Any) -> None:
    """Refuses all but the tensors of a CTC branch and the bytes of its vocabulary, a plain file name `*.tiktoken`.

    Raises:
        CheckpointError: naming the tensor.
    """
    for key, tensor in side.items():
        if not key.startswith(FILE_PREFIX):
            if not key.startswith(CTC_PREFIX):
                raise CheckpointError(f"{source}: {one_line(key, 100)} is no tensor of a CTC branch; remove it")
            continue
        name = key.removeprefix(FILE_PREFIX)
        check_name(name, source)
        if SIDE_NAME.fullmatch(name) is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError(f"{source}: {one_line(key, 100)} is not the bytes of a *.tiktoken file; remove it")


def write_side(side: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a side file; nothing if there is nothing to write."""
    if side:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in side.items()}, file, metadata={"format": "pt"})
        apply_umask(file.parent, file.name)


def read_generation_config(folder: Path, config: SpeechLLMConfig) -> GenerationConfig:
    """`generation_config.json`, or what the LLM's config says of ends and padding."""
    if (folder / GENERATION_FILE).is_file():
        with reading(folder / GENERATION_FILE):
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
