"""Reading of untrusted files: checks file names, JSON and YAML of a checkpoint before they are used.

A checkpoint may come from an unknown author. It must not name a file outside its folder, choose code to run, or make
the program allocate more memory than the size of the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..model.configuration import check_sizes

logger = logging.getLogger(__name__)

MAX_JSON, MAX_YAML = 2**24, 2**20  # bytes; the index of a model with 10^5 tensors has 10 MB; PyYAML reads 0.2 MB/s
MAX_VALUES = 1_000_000  # per settings file; in YAML, with expanded aliases
MAX_DEPTH = 50  # of nested lists and mappings
MAX_BASES = 8  # length of a chain of base models
MAX_NAME, MAX_PART = 1024, 255  # bytes of a path and of a path component: limits of file systems
# Attention and expert implementations of torch, flash-attn and transformers; all others are Hub kernels.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
FLASH = re.compile(r"flash_attention_\d")
CODE_OR_FILES = {
    "config.json": ("quantization_config", "transformers_weights"),
    "generation_config.json": ("custom_generate",),
    "processor_config.json": ("audio_tokenizer",),
    "tokenizer_config.json": ("init_inputs", "gguf_file", "vocab", "merges", "tokenizer_object"),
}
SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "adapter_config.json", "base_model.json",
)  # fmt: skip
NOT_READ = ("audio_tokenizer_config.json",)  # names a model that transformers would load
LINKABLE = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin", "*.pt", "*.yaml", "*.tiktoken")
# Exceptions that libraries raise on unexpected values.
BAD_VALUES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NotImplementedError,
    RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or written in a layout; the message contains the reason and the remedy."""


@contextmanager
def reading(source: Any, what: str = "cannot be used") -> Iterator[None]:
    """Converts exceptions on untrusted values to a one-line `CheckpointError` that names the source.

    Args:
        source: file or folder that is read.
        what: predicate of the message, for example "is damaged".
    """
    try:
        yield
    except torch.OutOfMemoryError:  # the GPU is too small; not a fault of the checkpoint
        raise
    except CheckpointError as error:
        raise CheckpointError(one_line(error)) from error
    except Exception as error:
        if not isinstance(error, BAD_VALUES) and type(error) is not Exception:  # tokenizers raises plain `Exception`
            raise
        kind = "" if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: "
        raise CheckpointError(f"{source} {what} ({kind}{one_line(error)})") from error


def one_line(text: Any, limit: int = 3000) -> str:
    """Returns a text as one line of printable characters, shortened to `limit` characters."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def inside(folder: Path, name: Any, source: Any) -> Path:
    """Returns the path of a file or folder that a checkpoint names, after checking that it is inside the checkpoint.

    Args:
        folder: folder of the checkpoint.
        name: relative path from the checkpoint.
        source: file and field that contain the name, for the message.

    Raises:
        CheckpointError: for any other path (absolute, with `..`, backslashes, drive letters or control characters),
            and for links to targets outside the folder.
    """
    check_name(name, source)
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # `RuntimeError` for circular links, before Python 3.13
        raise CheckpointError(
            f"{source}: {one_line(name)!r} is a broken or circular link; replace the link with the file"
        ) from error
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(
            f"{source}: {one_line(name)!r} is a link to a target outside the checkpoint's folder; copy the file "
            "into the folder"
        )
    return path


def check_name(name: Any, source: Any) -> None:
    """Checks that a name is a relative path of plain names; see `inside`.

    Raises:
        CheckpointError: if it is not; the message names the source.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{source}: {one_line(name, 100)!r} is not a file name")
    parts = name.removesuffix("/").split("/")
    if parts[0] == "." and len(parts) > 1:
        parts = parts[1:]
    encoded = name.encode("utf-8", "surrogatepass")
    if (
        not name.isprintable()
        or any(character in name for character in '\\:*?"<>|')
        or name.startswith("~")
        or any(part in ("", ".", "..") for part in parts)
        or len(encoded) > MAX_NAME
        or any(len(part.encode("utf-8", "surrogatepass")) > MAX_PART for part in parts)
    ):
        raise CheckpointError(
            f"{source}: {one_line(name, 100)!r} is not a file in the checkpoint's folder; give a relative path "
            "without '..'"
        )


def _roots(folder: Path) -> list[Path]:
    """Returns the allowed folders of a checkpoint's files: its folder and, in the Hub cache, the blobs."""
    real = folder.resolve()
    return [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]


_followed: ContextVar[tuple[str, ...]] = ContextVar("followed", default=())


@cache  # configuration, processor and weights are read one after the other
def _log_base(folder: str, base: str) -> None:
    logger.info("%s: loading the base model %s", folder, base)


@contextmanager
def base_model(file: Path) -> Iterator[str]:
    """Provides the base model of a checkpoint, `base_model_name_or_path` in a JSON file, and logs its name.

    Only the base model may be outside the checkpoint's folder. The `with` block reads the base model.

    Raises:
        CheckpointError: if the name is missing or invalid, the base model refers back to this checkpoint, or the block
            fails.
    """
    name = read_json(file).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{file} names no base model; write its folder or Hub id to base_model_name_or_path")
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME or name.startswith(("//", "\\\\")):
        raise CheckpointError(
            f"{file}: base_model_name_or_path is {one_line(name, 100)!r}; it must be a folder or Hub id"
        )
    followed = (*_followed.get(), os.path.realpath(file.parent))
    if len(set(followed)) < len(followed) or len(followed) > MAX_BASES:
        raise CheckpointError(
            f"{file}: the base model {name} refers back to this checkpoint; write the model used in training"
        )
    base = find_base(file.parent, file.name, name)
    _log_base(str(file.parent), base)
    token = _followed.set(followed)
    try:
        yield base
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{file.parent}: the base model {base}, named in {file.name}, cannot be loaded: {one_line(error)}"
        ) from error
    finally:
        _followed.reset(token)


def stored_base(name: str | os.PathLike[str]) -> str:
    """Returns the name of a base model to store in a checkpoint: an absolute path, or the Hub id."""
    return os.path.abspath(name) if os.path.exists(name) else str(name)


def find_base(folder: Path, file: str, name: str) -> str:
    """Returns the path or Hub id of a checkpoint's base model, independent of the working directory.

    Args:
        folder: folder of the checkpoint.
        file: name of the file in `folder` that names the base model.
        name: absolute path, path relative to `folder`, or Hub id. A path relative to the working directory, as in old
            checkpoints, is tried last and causes a warning.

    Raises:
        CheckpointError: if the folder or file does not exist.
    """
    beside = os.path.normpath(folder / name)  # `name` itself if it is absolute
    if os.path.exists(beside):
        if os.path.realpath(beside) == os.path.realpath(folder):
            raise CheckpointError(
                f"{folder / file} names its own folder as the base model; write the model used in training"
            )
        return beside
    if not os.path.isabs(name) and os.path.exists(name):
        logger.warning("%s: using the base model %s from the working directory %s", folder, name, os.getcwd())
        return name
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{folder}: the base model {name} is missing; restore it, or write its path to {folder / file}"
        )
    return name


def check_folder(folder: Path) -> None:
    """Refuses a folder with links to targets outside, or with settings that name code, other files or invalid sizes.

    Raises:
        CheckpointError: if the folder is refused; the message names file and field.
    """
    for pattern in LINKABLE:
        for path in folder.glob(pattern):
            if path.is_symlink():
                inside(folder, path.name, path)
    for name in NOT_READ:
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name}: audio tokenizers are not supported; remove the file")
    for name in SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)


def read_json(file: Path) -> dict[str, Any]:
    """Reads settings from a JSON file.

    Raises:
        CheckpointError: if the file is not a JSON object, is too large or too deep, or contains duplicate keys, NaN,
            code, a file name, a Hub kernel, or an invalid size.
    """
    text = _read_text(file, MAX_JSON)
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(f"{file} cannot be parsed: more than {MAX_DEPTH} nested lists and objects") from error
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be parsed: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must contain an object, not {type(content).__name__}")
    check_settings(content, file)
    return content


def check_settings(content: dict[str, Any], file: Path) -> None:
    """Checks values for `read_json`, and for settings inside other files.

    Raises:
        CheckpointError: if a value is refused; the message names the field.
    """
    for key in CODE_OR_FILES.get(file.name, ()):
        if content.get(key):
            raise CheckpointError(f"{file}: {key} is not supported; remove it")
    if file.name == "tokenizer_config.json":
        for key, value in content.items():
            # transformers never opens `special_tokens_map_file`.
            if key.endswith("_file") and key != "special_tokens_map_file" and value is not None:
                inside(file.parent, value, f"{file}: {key}")
    for path, key, value in _walk(content, file):
        if IMPLEMENTATION.fullmatch(key):
            _check_implementation(value, f"{file}: {path}")
    if file.suffix == ".json":
        try:
            check_sizes(content)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error


def _check_implementation(value: Any, source: str) -> None:
    for name in value.values() if isinstance(value, dict) else [value]:
        if name is not None and name not in IMPLEMENTATIONS and not (isinstance(name, str) and FLASH.fullmatch(name)):
            raise CheckpointError(
                f"{source} is {one_line(name, 100)!r}, not part of transformers; a checkpoint must not choose "
                "code from the Hub: remove it, or, if you trust it, pass attn_implementation to from_pretrained"
            )


def _walk(content: Any, file: Path) -> Iterator[tuple[str, str, Any]]:
    """Yields path, key and value of every field, including nested fields."""
    stack: list[tuple[str, Any, int]] = [("", content, 1)]
    count = 0
    while stack:
        path, item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{file} cannot be parsed: more than {MAX_DEPTH} nested lists and objects")
        if (count := count + len(item)) > MAX_VALUES:
            raise CheckpointError(f"{file} has more than {MAX_VALUES:,} values, the maximum for settings")
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, value in pairs:
            name = f"{path}.{key}" if path else str(key)
            yield name, str(key), value
            if isinstance(value, (dict, list)):
                stack.append((name, value, depth + 1))


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    _refuse_repeated([key for key, _ in pairs])
    if pairs in ([("__float__", "Infinity")], [("__float__", "-Infinity")]):  # infinite numbers in configs
        return float(pairs[0][1])
    return dict(pairs)


def _refuse_repeated(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        repeated = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {one_line(repeated, 100)!r}")


def _no_constant(name: str) -> float:
    # Infinity is allowed: transformers writes it as a bound for some models.
    if name == "NaN":
        raise ValueError("NaN is not allowed")
    return float(name)


def _read_text(file: Path, most: int) -> str:
    if (size := file.stat().st_size) > most:
        raise CheckpointError(f"{file} has {size:,} bytes; the maximum for settings of a model is {most:,}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} cannot be parsed: it is not UTF-8 text") from error


class _Loader(yaml.SafeLoader):
    """A YAML loader for plain values. Dates stay strings, since JSON has no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads settings from a YAML file.

    Raises:
        CheckpointError: if the file is not a mapping of plain values, has duplicate keys, or is too large or too deep,
            also after expansion of aliases.
    """
    loader = None
    try:
        loader = _Loader(_read_text(file, MAX_YAML))
        node = loader.get_single_node()
        if node is not None:
            _count(node, {}, 1)
        content = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise CheckpointError(f"{file} cannot be parsed: more than {MAX_DEPTH} nested lists and mappings") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be parsed: {one_line(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must contain a mapping")
    check_settings(content, file)
    return content


def _count(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """Returns the number of values in a node after expansion of aliases."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError("an alias contains itself")
        return size
    if node.tag not in PLAIN_TAGS:
        raise ValueError(f"{node.tag} is not a plain value")
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} nested lists and mappings")
    sizes[id(node)] = None
    size = 1
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError("a key must be a plain value")
        _refuse_repeated(keys)
        size += sum(1 + _count(value, sizes, depth + 1) for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_count(value, sizes, depth + 1) for value in node.value)
    if size > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values after expansion of aliases")
    sizes[id(node)] = size
    return size
