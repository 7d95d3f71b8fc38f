"""Loading of native speech LLMs of transformers, which stay in that library's layout."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from ..model.configuration import check_sizes
from ..model.native_modeling import native_class
from ..model.native_processing import NativeProcessor
from . import peft_adapters as adapters
from .checkpoint import CheckpointError, check_names, read_headers
from .untrusted import read_json, reading, stored_base


@dataclass
class FamilyCheckpoint:
    """A native speech LLM in memory, with the interface of `Checkpoint`."""

    model: Any

    @property
    def config(self) -> PretrainedConfig:
        """Config of the model."""
        return self.model.config

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """State dict of the model."""
        return self.model.state_dict()

    def write(self, processor: NativeProcessor | None, folder: Path, max_shard_size: str | int) -> None:
        """Writes model and processor in the layout of transformers."""
        self.model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)


def load_config(folder: Path) -> PretrainedConfig:
    """Reads the config.

    Raises:
        CheckpointError: if the config is damaged.
    """
    with reading(folder):
        check_sizes(read_json(folder / "config.json"))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_model(folder: Path, output_loading_info: bool = False, **options: Any) -> Any:
    """Loads a model with the interface of `SpeechLLMForConditionalGeneration`.

    Args:
        folder: local folder.
        output_loading_info: whether to return transformers' report, too.
        **options: of transformers' `from_pretrained`.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of a wrong shape, or a file is damaged.
    """
    config = options.pop("config", None) or load_config(folder)
    if options.get("attn_implementation") == "sdpa":  # the default where a part supports it; an error elsewhere
        del options["attn_implementation"]
    with reading(folder), _without_adapter(folder) as source:
        base = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
        _check_size(base, config, folder)
        model, info = native_class(base).from_pretrained(
            source, config=config, output_loading_info=True, use_safetensors=True, **options
        )
    check_names(info, folder)
    model.name_or_path = model.config.name_or_path = stored_base(folder)
    if (folder / adapters.CONFIG_FILE).is_file():
        model = adapters.merge(model, folder, keep_dtypes=options.get("dtype") is None)
        model.config.has_lora_adapter = False
    return (model, info) if output_loading_info else model


def _check_size(base: type, config: PretrainedConfig, folder: Path) -> None:
    """Refuses a config that defines a larger model than the stored weights, before memory is allocated."""
    if is_deepspeed_zero3_enabled():  # transformers would shard the empty model over the ranks
        return
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in base(copy.deepcopy(config)).parameters())
    found = sum(math.prod(tensor.shape) for tensor in read_headers(folder).values())
    if needed > found:
        raise CheckpointError(
            f"{folder}: the tensors do not match the config, which needs {needed:,} numbers; the files contain "
            f"{found:,}"
        )


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yields a folder without the adapters of the model's own (Granite Speech), which are merged after loading."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                Path(temporary, file.name).symlink_to(file.resolve())
        yield Path(temporary)


def load_processor(folder: Path) -> NativeProcessor:
    """Loads a processor with the interface of `SpeechLLMProcessor`.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    with reading(folder, "contains no usable processor"):
        model_type = load_config(folder).model_type
        return NativeProcessor(AutoProcessor.from_pretrained(folder, trust_remote_code=False), model_type)
