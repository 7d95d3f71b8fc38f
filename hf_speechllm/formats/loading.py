"""Detection of checkpoint layouts, and loading, saving and conversion in all layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PretrainedConfig

from ..model.configuration import SpeechLLMConfig
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import FAMILIES, REFUSED, is_native
from ..model.processing import SpeechLLMProcessor
from . import families, funasr, funasr_files, native, partial
from . import peft_adapters as adapters
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    build_config,
    check_model_size,
    check_names,
    check_tensors,
    part_dtypes,
    read_ctc_tensors,
    read_generation_config,
    read_headers,
    read_safetensors,
    widest,
)
from .checkpoint import write_ctc_tensors as write_ctc_tensors  # the model calls this function, see `model.pretrained`
from .hub_files import find_file, offline_if_unreachable, read_json_file
from .quantization import only_whole_blocks
from .untrusted import base_model, check_folder, one_line, read_json, reading, stored_base

OWN, NATIVE, FUNASR, ADAPTER, PARTIAL = "speech_llm", "native", "funasr", "adapter", "partial"
FAMILY = "family"  # a native speech LLM of transformers, which stays in that library's layout
LAYOUTS = (OWN, NATIVE, FUNASR)
READERS = {NATIVE: native, FUNASR: funasr, PARTIAL: partial}
CTC_FILE = "ctc.safetensors"
PROCESSOR_ERROR = "contains no usable processor"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Files to download from a repository: (config and tokenizer, weights).
FILES = {
    OWN: (["*.json", "*.jinja", "*.txt"], ["*.safetensors"]),
    NATIVE: (["*.json", "*.jinja", "*.txt"], ["*.safetensors"]),
    FUNASR: (["config.yaml", "configuration.json", "*/*.json", "*/*.txt"], ["model.pt", "*.tiktoken"]),
    ADAPTER: (["*.json", "*.jinja", "*.txt"], ["*.safetensors"]),
    PARTIAL: (["*.json", "*.jinja", "*.txt"], ["*.safetensors"]),
    FAMILY: (["*.json", "*.jinja", "*.txt"], ["*.safetensors"]),
}


def find_layout(name: str | os.PathLike[str], **hub: Any) -> str:
    """Detects the layout of a checkpoint from its files.

    Args:
        name: folder, Hub id, or path of a weight file in a FunASR folder (`model.pt.best`, `model.pt.avg10`, ...).
        hub: options of transformers' `from_pretrained` (`cache_dir`, `token`, `revision`, ...).

    Raises:
        CheckpointError: if the folder or repository contains no model, or a model of another kind.
        OSError: if the folder or repository does not exist.
    """
    if _is_funasr_weights(name):
        return FUNASR
    if os.path.isfile(name):  # the path of a config.json instead of its folder
        read_json(Path(name))
        return OWN
    hub = offline_if_unreachable(name, hub)
    model_type = read_json_file(name, "config.json", hub).get("model_type")
    if model_type == SpeechLLMConfig.model_type:
        return OWN if find_file(name, partial.REFERENCE_FILE, hub) is None else PARTIAL
    if model_type == native.MODEL_TYPE:
        return NATIVE
    if model_type in FAMILIES:
        return FAMILY
    if model_type in REFUSED:
        raise CheckpointError(f"{name} is a {model_type} model, which cannot be trained here: {REFUSED[model_type]}")
    if find_file(name, adapters.CONFIG_FILE, hub) is not None:
        return ADAPTER
    if find_file(name, funasr_files.CONFIG_FILE, hub) is not None:
        return FUNASR
    if model_type is not None:
        raise CheckpointError(
            f"{name} is a {one_line(model_type, 100)} model, not a speech LLM; compose one with `hf-speechllm compose`"
        )
    if hub.get("local_files_only") and not os.path.exists(name):
        raise CheckpointError(
            f"{name}: no such folder, and not in the cache of the Hub; the Hub cannot be reached "
            "(check HF_HUB_OFFLINE and HF_ENDPOINT, or run `hf download ID --local-dir DIR` with network access "
            "and name the folder)"
        )
    newest = max(Path(name).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
    hint = f"; name its checkpoint {newest}, or save the model of the run (`trainer.save_model()`)" if newest else ""
    raise CheckpointError(
        f"{name} contains no model: there is no config.json (this package, transformers), adapter_config.json (peft) "
        f"or config.yaml (FunASR){hint}"
    )


def _is_funasr_weights(name: str | os.PathLike[str]) -> bool:
    return os.path.basename(name).startswith(funasr.WEIGHTS_FILE) and os.path.isfile(name)


def _read(name: str | os.PathLike[str], layout: str, folder: Path) -> Checkpoint:
    with reading(folder):
        if _is_funasr_weights(name):
            return funasr.read(folder, os.path.basename(name))
        return READERS[layout].read(folder)


def _fetch(name: str | os.PathLike[str], layout: str, hub: dict, weights: bool = True) -> Path:
    """Returns a checkpoint's local folder, downloaded from the Hub if necessary; see `untrusted.check_folder`."""
    hub = {key: value for key, value in hub.items() if value is not None}
    subfolder = hub.pop("subfolder", "")
    if not os.path.exists(name):
        small, large = FILES[layout]
        patterns = [*small, *large] if weights else small
        if subfolder:
            patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
        name = snapshot_download(str(name), allow_patterns=patterns, **hub)
    folder = Path(name).parent if _is_funasr_weights(name) else Path(name) / subfolder
    if folder.is_dir():
        check_folder(folder)
    return folder


def load_config_dict(name: str | os.PathLike[str], options: dict) -> dict | None:
    """Returns the config of a checkpoint in another layout as a dict; `None` for the layout of this package."""
    hub = _hub_options(options)
    layout = find_layout(name, **hub)
    if layout in (OWN, PARTIAL):
        file = Path(name if os.path.isfile(name) else str(find_file(name, "config.json", hub)))
        build_config(read_json(file), file)  # errors of transformers name neither file nor field
        return None
    folder = _fetch(name, layout, hub, weights=False)
    if layout == ADAPTER:
        with base_model(folder / adapters.CONFIG_FILE) as base:
            return SpeechLLMConfig.from_pretrained(base, **_base_options(hub)).to_dict()
    if layout == FAMILY:
        raise CheckpointError(f"{name} is a native speech LLM of transformers; read its config with AutoConfig")
    with reading(folder):
        return READERS[layout].read_config(folder).to_dict()


def load_config(name: str | os.PathLike[str], **options: Any) -> PretrainedConfig:
    """Returns the config of any model that `load_model` loads."""
    hub = _hub_options(options)
    layout = find_layout(name, **hub)
    if layout == ADAPTER:
        folder = _fetch(name, layout, hub, weights=False)
        with base_model(folder / adapters.CONFIG_FILE) as base:
            return load_config(base, **_base_options(hub))
    if layout == FAMILY:
        return families.load_config(_fetch(name, layout, hub, weights=False))
    return SpeechLLMConfig.from_pretrained(name, **options)


def load_model(
    model_class: type[SpeechLLMForConditionalGeneration],
    name: str | os.PathLike[str],
    *model_args: Any,
    **options: Any,
) -> Any:
    """Implements `SpeechLLMForConditionalGeneration.from_pretrained`; arguments and result as in transformers.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of a wrong shape, or a file is damaged.
    """
    hub = _hub_options(options)
    layout = find_layout(name, **hub)
    folder = _fetch(name, layout, hub)
    asked = [options.pop(key) for key in ("dtype", "torch_dtype") if key in options]
    dtype = next((item for item in asked if item is not None and item != "auto"), None)
    want_info = options.pop("output_loading_info", False)
    if layout == FAMILY:
        return families.load_model(folder, dtype=dtype, output_loading_info=want_info, **_without_hub(options))
    if layout == ADAPTER:
        options = _base_options(options)
        with base_model(folder / adapters.CONFIG_FILE) as base:
            model, info = model_class.from_pretrained(
                base, *model_args, dtype=dtype, output_loading_info=True, **options
            )
        model = adapters.merge(model, folder, keep_dtypes=dtype is None)
        model.name_or_path = stored_base(name)  # adapters trained on this model store it as their base model
        return (model, info) if want_info else model

    if layout == OWN:
        source, ctc_tensors = name, read_ctc_tensors(find_file(name, CTC_FILE, hub))
        headers = _check_own(folder, options)
        stored = part_dtypes({key: item.dtype for key, item in headers.items() if item.dtype is not None})
        sizes = {key: item.shape for key, item in headers.items()}
    else:
        checkpoint = _read(name, layout, folder)
        source, ctc_tensors = None, checkpoint.ctc_tensors
        stored = part_dtypes({key: tensor.dtype for key, tensor in checkpoint.tensors.items()})
        options.setdefault("generation_config", checkpoint.generation_config)
        options["config"] = options.get("config") or _override(checkpoint.config, options)
        options["state_dict"] = checkpoint.tensors
        sizes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    if quantization := options.get("quantization_config"):
        options["quantization_config"] = only_whole_blocks(quantization, sizes)
    # transformers loads all parts in one dtype. The widest dtype keeps all values; each part is converted below.
    loaded = widest(stored.values()) if dtype is None and stored else dtype
    strict = not options.pop("ignore_mismatched_sizes", False)  # reported below, in one error
    options["ignore_mismatched_sizes"] = True
    load = super(SpeechLLMForConditionalGeneration, model_class).from_pretrained  # type: ignore[misc]
    model, info = load(source, *model_args, dtype=loaded, output_loading_info=True, **options)
    check_names(info, name)
    if strict and info["mismatched_keys"]:
        shapes = [
            f"{key} is {tuple(found)}, not {tuple(asked)}" for key, found, asked in sorted(info["mismatched_keys"])
        ]
        raise CheckpointError(
            f"{name}: the tensors do not match the config; wrong shape: {one_line(', '.join(shapes))}"
        )
    if dtype is None and len(set(stored.values())) > 1:
        for part, part_dtype in stored.items():
            for parameter in getattr(model, part).parameters():  # buffers (position tables) stay float32
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(part_dtype)
    if source is None:
        model.config.name_or_path = str(name)
    model.name_or_path = stored_base(name)  # adapters trained on this model store it as their base model
    model.ctc_tensors = ctc_tensors
    if model.ctc_head is not None:
        model.ctc_head.requires_grad_(False)  # see `CTCHead`; transformers has replaced the parameters
    return (model, info) if want_info else model


def _check_own(folder: Path, options: dict) -> dict[str, StoredTensor]:
    """Checks a folder in the layout of this package before transformers reads it.

    Returns:
        Dtypes and shapes of the tensors; empty without safetensors files.
    """
    if (folder / adapters.CONFIG_FILE).exists():  # transformers would load the adapter's base model
        raise CheckpointError(
            f"{folder} contains both config.json and {adapters.CONFIG_FILE}; remove the one that does not belong to it"
        )
    options.setdefault("use_safetensors", True)
    headers = read_headers(folder) if folder.is_dir() else {}
    if headers and not options.get("ignore_mismatched_sizes") and not options.get("variant"):
        config = options.get("config") or read_config(folder)
        check_model_size(config, {key: item.shape for key, item in headers.items()}, str(folder))
        if "generation_config" not in options:
            read_generation_config(folder, config)
    return headers


def read_config(folder: Path) -> SpeechLLMConfig:
    """Reads the config of a folder in the layout of this package.

    Raises:
        CheckpointError: if the config is missing, or is not the config of a speech LLM.
    """
    return build_config(read_json(folder / "config.json"), folder / "config.json")


def _override(config: SpeechLLMConfig, options: dict) -> SpeechLLMConfig:
    """Sets attributes of the config from options of `from_pretrained` and removes these options."""
    for key in [key for key in options if key in config.to_dict()]:
        setattr(config, key, options.pop(key))
    return config


def _hub_options(options: dict) -> dict:
    return {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}


def _without_hub(options: dict) -> dict:
    return {key: value for key, value in options.items() if key not in HUB_OPTIONS}


def _base_options(options: dict) -> dict:
    """Returns options for an adapter's base model, without the adapter's revision and subfolder."""
    return {key: value for key, value in options.items() if key not in ("revision", "subfolder")}


def load_processor(
    processor_class: type[SpeechLLMProcessor], name: str | os.PathLike[str], **options: Any
) -> SpeechLLMProcessor:
    """Implements `SpeechLLMProcessor.from_pretrained`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the tokenizer lacks a token of the dialogue format.
    """
    hub = _hub_options(options)
    options.setdefault("trust_remote_code", False)  # `None` would start a prompt on the terminal
    hub = offline_if_unreachable(name, hub)
    is_folder = not _is_funasr_weights(name)
    written_by = read_json_file(name, "processor_config.json", hub).get("processor_class") if is_folder else None
    own = written_by == SpeechLLMProcessor.__name__
    layout = OWN if own else find_layout(name, **hub)
    if layout == FAMILY:
        return families.load_processor(_fetch(name, layout, hub, weights=False))
    processor = _read_processor(processor_class, name, layout, written_by, hub, options)
    with reading(name, PROCESSOR_ERROR):  # bad settings of a tokenizer only fail when the tokenizer is used
        ids = processor.tokenizer.encode("a", add_special_tokens=False)
        processor.tokenizer.batch_decode([ids], skip_special_tokens=True)
    return processor


def _read_processor(
    processor_class: type[SpeechLLMProcessor],
    name: str | os.PathLike[str],
    layout: str,
    written_by: Any,
    hub: dict,
    options: dict,
) -> SpeechLLMProcessor:
    if layout == OWN and written_by == native.PROCESSOR_CLASS:  # pushed without its model
        folder = _fetch(name, NATIVE, hub, weights=False)
        with reading(folder, PROCESSOR_ERROR):
            config = SpeechLLMConfig.from_pretrained(folder)
            return native.read_processor(folder, _read_tokenizer(folder, options), config)
    folder = _fetch(name, layout, hub, weights=False)
    if layout == OWN:
        with reading(folder, PROCESSOR_ERROR):
            return super(SpeechLLMProcessor, processor_class).from_pretrained(name, **options)  # type: ignore[misc]
    if layout == ADAPTER:
        with base_model(folder / adapters.CONFIG_FILE) as base:
            return processor_class.from_pretrained(base, **_base_options(options))
    with reading(folder, PROCESSOR_ERROR):
        config = READERS[layout].read_config(folder)
        tokenizer = _read_tokenizer(folder if layout == NATIVE else funasr_files.llm_folder(folder), options)
        return READERS[layout].read_processor(folder, tokenizer, config)


def _read_tokenizer(folder: Path, options: dict) -> Any:
    check_folder(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])


def checkpoint_of(model: Any) -> Checkpoint | families.FamilyCheckpoint:
    """Returns the checkpoint of a model in memory."""
    return families.FamilyCheckpoint(model) if is_native(model) else Checkpoint.of(model)


def read_checkpoint(name: str | os.PathLike[str], **hub: Any) -> Checkpoint | families.FamilyCheckpoint:
    """Reads a checkpoint in any layout without building the model or changing tensors; merges an adapter.

    Raises:
        CheckpointError: see `load_model`.
    """
    layout = find_layout(name, **hub)
    if layout in (ADAPTER, FAMILY):
        return checkpoint_of(SpeechLLMForConditionalGeneration.from_pretrained(name, **hub))
    folder = _fetch(name, layout, hub)
    if layout != OWN:
        return _read(name, layout, folder)
    config = read_config(folder)
    tensors = read_safetensors(folder)
    ctc_tensors = read_ctc_tensors(folder / CTC_FILE)
    checkpoint = Checkpoint(config, tensors, read_generation_config(folder, config), ctc_tensors)
    check_tensors(checkpoint, str(folder))
    return checkpoint
