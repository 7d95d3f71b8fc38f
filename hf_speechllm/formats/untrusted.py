"""Reading what others wrote: names of files, JSON and YAML of a checkpoint, each checked before it is used.

A checkpoint comes from the Hub or from a stranger. Nothing in it may name a file outside its folder, choose code to
run, or ask for more memory than the checkpoint itself is large.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..model.configuration import check_sizes

logger = logging.getLogger(__name__)

MAX_JSON, MAX_YAML = 2**24, 2**20  # bytes; the index of a model of 10^5 tensors has 10 MB; PyYAML reads 0.2 MB/s
MAX_VALUES = 1_000_000  # in a settings file; in YAML, with aliases written out
MAX_DEPTH = 50  # of lists and mappings inside each other
MAX_BASES = 8  # base models of base models
MAX_NAME, MAX_PART = 1024, 255  # bytes of a path, and of each of its parts: what file systems take
# Attention and expert implementations that belong to torch, flash-attn or transformers; others are Hub kernels.
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
# How libraries answer values that they did not expect.
BAD_VALUES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NotImplementedError,
    RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or can't be written in a layout; the message says why and what to do."""


@contextmanager
def reading(source: Any, what: str = "can't be used") -> Iterator[None]:
    """Turns what a library raises on a stranger's values into a `CheckpointError` of one line that names the source.

    Args:
        source: the file or folder that is read.
        what: what is the matter with it.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # of a GPU that is too small
        raise
    except CheckpointError as error:
        raise CheckpointError(one_line(error)) from error
    except BAD_VALUES as error:
        kind = "" if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: "
        raise CheckpointError(f"{source} {what} ({kind}{one_line(error)})") from error


def one_line(text: Any, limit: int = 3000) -> str:
    """The text on one line that a terminal prints as it stands, shortened if it is very long."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def inside(folder: Path, name: Any, source: Any) -> Path:
    """The file or folder that a checkpoint names, if it lies in the checkpoint.

    Args:
        folder: of the checkpoint.
        name: a relative path, as the checkpoint gives it.
        source: the file and field that give it, for the message.

    Raises:
        CheckpointError: for any other path (absolute, with `..`, backslashes, drive letters or control characters),
            and for links that lead out of the folder.
    """
    check_name(name, source)
    path = folder / name
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(
            f"{source}: {one_line(name)!r} is a link out of the checkpoint's folder; put the file itself there"
        )
    return path


def check_name(name: Any, source: Any) -> None:
    """Refuses what is not a relative path of plain names; see `inside`.

    Raises:
        CheckpointError: naming the source.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{source}: {one_line(name, 100)!r} is not the name of a file")
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
    """Where the files of a checkpoint may lie: its folder and, in the Hub's cache, the blobs of its repository."""
    real = folder.resolve()
    return [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]


_followed: ContextVar[tuple[str, ...]] = ContextVar("followed", default=())


@contextmanager
def base_model(file: Path) -> Iterator[str]:
    """The model that a checkpoint builds on: `base_model_name_or_path` of a JSON file, which may lie anywhere.

    The one thing outside its folder that a checkpoint may name; it is announced. The block reads it.

    Raises:
        CheckpointError: if there is none, or it leads back to this checkpoint.
    """
    name = read_json(file).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{file} names no base model; write its folder or Hub id there")
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME or name.startswith(("//", "\\\\")):
        raise CheckpointError(
            f"{file}: base_model_name_or_path is {one_line(name, 100)!r}; it must be a folder or Hub id"
        )
    followed = (*_followed.get(), os.path.realpath(file.parent))
    if len(set(followed)) < len(followed) or len(followed) > MAX_BASES:
        raise CheckpointError(f"{file}: its base model {name} builds on it in turn; name the model it was trained on")
    base = find_base(file.parent, file.name, name)
    logger.info("%s builds on %s, which is read too", file.parent, base)
    token = _followed.set(followed)
    try:
        yield base
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{file.parent}: its base model {base}, named in {file.name}, can't be loaded: {one_line(error)}"
        ) from error
    finally:
        _followed.reset(token)


def stored_base(name: str | os.PathLike[str]) -> str:
    """A base model as a checkpoint names it: a Hub id as it is, a folder by its absolute path."""
    return os.path.abspath(name) if os.path.isdir(name) else str(name)


def find_base(folder: Path, file: str, name: str) -> str:
    """The base model that a checkpoint needs, from any working directory.

    Args:
        folder: of the checkpoint.
        file: in it, that names the base model.
        name: absolute path, path relative to `folder`, or Hub id; at last a path relative to the working directory,
            as older checkpoints have it, with a warning.

    Raises:
        CheckpointError: if there is no such folder.
    """
    beside = os.path.normpath(folder / name)  # `name` itself if it is absolute
    if os.path.isdir(beside):
        if os.path.realpath(beside) == os.path.realpath(folder):
            raise CheckpointError(f"{folder / file} names its own folder as the base model; write the right one there")
        return beside
    if not os.path.isabs(name) and os.path.isdir(name):
        logger.warning("%s: its base model %s is taken from the working directory: %s", folder, name, os.getcwd())
        return name
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{folder}: its base model {name} is missing; restore it, or write where it is into {folder / file}"
        )
    return name


def check_folder(folder: Path) -> None:
    """Refuses a folder with links that lead out of it, or settings that name code, files elsewhere or senseless sizes.

    Raises:
        CheckpointError: naming the file and the field.
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
    """The settings in a JSON file.

    Raises:
        CheckpointError: if it is no JSON object, too large or too deep, has a key twice or NaN, names code, a file
            or a Hub kernel, or a size that no model has.
    """
    text = _read_text(file, MAX_JSON)
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(f"{file} can't be parsed: lists and objects are nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{file} can't be parsed: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold an object, not {type(content).__name__}")
    check_settings(content, file)
    return content


def check_settings(content: dict[str, Any], file: Path) -> None:
    """What `read_json` checks of the values; also for settings inside another file.

    Raises:
        CheckpointError: naming the field.
    """
    for key in CODE_OR_FILES.get(file.name, ()):
        if content.get(key):
            raise CheckpointError(f"{file}: {key} is not supported; remove it")
    if file.name == "tokenizer_config.json":
        for key, value in content.items():
            # transformers opens none of its own path names; `special_tokens_map_file` is never read.
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
                f"{source} is {one_line(name, 100)!r}, which is not part of transformers: a checkpoint can't choose "
                "code from the Hub; remove it, and give attn_implementation to from_pretrained if you trust it"
            )


def _walk(content: Any, file: Path) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of every field, of nested ones too."""
    stack: list[tuple[str, Any, int]] = [("", content, 1)]
    count = 0
    while stack:
        path, item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{file} can't be parsed: lists and objects are nested too deep")
        if (count := count + len(item)) > MAX_VALUES:
            raise CheckpointError(f"{file} has more than {MAX_VALUES:,} values")
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, value in pairs:
            name = f"{path}.{key}" if path else str(key)
            yield name, str(key), value
            if isinstance(value, (dict, list)):
                stack.append((name, value, depth + 1))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        repeated = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{one_line(repeated, 100)!r} is there twice")


def _no_constant(name: str) -> float:
    # Infinity is a bound that transformers writes for some models.
    if name == "NaN":
        raise ValueError("NaN is not a setting")
    return float(name)


def _read_text(file: Path, most: int) -> str:
    if (size := file.stat().st_size) > most:
        raise CheckpointError(f"{file} has {size:,} bytes; settings of a model have at most {most:,}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} can't be parsed: it is not UTF-8 text") from error


class _Loader(yaml.SafeLoader):
    """Plain values only: a date stays the string that it looks like, as JSON has no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        CheckpointError: if it is no mapping of plain values, is too large or too deep, has a key twice, or aliases
            that make it so.
    """
    loader = None
    try:
        loader = _Loader(_read_text(file, MAX_YAML))
        node = loader.get_single_node()
        if node is not None:
            _count(node, {}, 1)
        content = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise CheckpointError(f"{file} can't be parsed: lists and mappings are nested too deep") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} can't be parsed: {one_line(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a mapping")
    check_settings(content, file)
    return content


def _count(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """How many values a node has with its aliases written out."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError("an alias contains itself")
        return size
    if node.tag not in PLAIN_TAGS:
        raise ValueError(f"{node.tag} is not a plain value")
    if depth > MAX_DEPTH:
        raise ValueError("lists and mappings are nested too deep")
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
        raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
    sizes[id(node)] = size
    return size
