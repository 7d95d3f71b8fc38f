"""The small files of a FunASR checkpoint: `config.yaml` and `configuration.json`, checked, and where the LLM's lie."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .untrusted import check_folder, inside, one_line, read_json, read_yaml

logger = logging.getLogger(__name__)

CONFIG_FILE, METAS_FILE = "config.yaml", "configuration.json"
# Our own section of config.yaml, ignored by FunASR: what it has no key for.
SECTION = "hf_speechllm"
# What readers take from either file: mappings, types, and the least and the most of numbers.
WIDTH, LAYERS, RATE = (1, 1_000_000), (0, 10_000), (0.0, 1.0)
TYPES: dict[str, dict[str, Any]] = {
    CONFIG_FILE: {
        "audio_encoder_conf": {
            "output_size": WIDTH, "attention_heads": WIDTH, "linear_units": WIDTH, "num_blocks": LAYERS,
            "tp_blocks": LAYERS, "dropout_rate": RATE, "attention_dropout_rate": RATE, "kernel_size": WIDTH,
            "sanm_shfit": LAYERS,
        },
        "audio_adaptor_conf": {
            "downsample_rate": (1, 10_000), "use_low_frame_rate": bool, "ffn_dim": WIDTH, "n_layer": LAYERS,
            "attention_heads": WIDTH, "attention_dropout_rate": RATE, "dropout_rate": RATE,
        },
        "frontend_conf": {
            "n_mels": (1, 1000), "lfr_m": (1, 1000), "lfr_n": (1, 1000), "fs": (1000, 1_000_000),
            "frame_length": (1, 1000), "frame_shift": (1, 1000), "window": str, "upsacle_samples": bool,
        },
        "llm_conf": {"init_param_path": str, "lora_conf": {"r": WIDTH, "lora_alpha": (0.0, 1e6)}},
        "tokenizer_conf": {},
        "dataset_conf": {"do_think": bool, "sys_prompt": bool},
        SECTION: {
            "max_position_embeddings": (1, 10_000_000), "layer_norm_eps": RATE, "audio_token_id": (0, 2**31),
            "generation_config": {},
        },
    },
    METAS_FILE: {"file_path_metas": {"init_param": str, "llm_conf": {"init_param_path": str}}},
}  # fmt: skip


def read_files(folder: Path) -> dict[str, Any]:
    """`config.yaml` and `configuration.json`, parsed."""
    files: dict[str, Any] = {}
    for name, parse in ((CONFIG_FILE, read_yaml), (METAS_FILE, read_json)):
        if (folder / name).is_file():
            files[name] = parse(inside(folder, name, folder))
            check_types(files[name], TYPES[name], folder / name)
        elif name == CONFIG_FILE:  # FunASR too does without the other one
            raise CheckpointError(f"{folder / name} is missing; download or copy the checkpoint again")
    return files


def check_types(values: dict[str, Any], types: dict[str, Any], source: Any, path: str = "") -> None:
    """Refuses fields of `config.yaml` and `configuration.json` that are not what readers take them for.

    Raises:
        CheckpointError: naming the field.
    """
    for key, expected in types.items():
        value = values.get(key)
        if value is None:  # the readers take the default
            values.pop(key, None)
        elif isinstance(expected, dict):
            if not isinstance(value, dict):
                raise CheckpointError(f"{source}: {path}{key} must hold a mapping")
            check_types(value, expected, source, f"{path}{key}.")
        elif isinstance(expected, tuple):
            least, most = expected
            is_number = isinstance(value, type(most)) or (isinstance(most, float) and isinstance(value, int))
            if not is_number or isinstance(value, bool) or not least <= value <= most:
                kind = "number" if isinstance(most, float) else "whole number"
                raise CheckpointError(
                    f"{source}: {path}{key} is {one_line(value, 100)}; it must be a {kind} from {least} to {most:,}"
                )
        elif not isinstance(value, expected):
            raise CheckpointError(f"{source}: {path}{key} is {one_line(value, 100)}, not a {expected.__name__}")


def refuse_unknown(conf: dict, folder: Path) -> None:
    for key, known in {
        "model": "FunASRNano",
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_adaptor": "Transformer",
        "frontend": "WavFrontend",
    }.items():
        if conf.get(key) != known:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {key} is {conf.get(key)!r}; only {known} can be read")
    encoder, frontend = conf.get("audio_encoder_conf") or {}, conf.get("frontend_conf") or {}
    for wrong, reason in (
        (encoder.get("sanm_shfit", 0) != 0, "audio_encoder_conf.sanm_shfit must be 0"),
        (encoder.get("tp_blocks", 0) < 1, "audio_encoder_conf.tp_blocks must be at least 1"),
        (frontend.get("cmvn_file") is not None, "frontend_conf.cmvn_file must be null: features are not normalised"),
    ):
        if wrong:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {reason}")
    if (rate := (conf.get("audio_adaptor_conf") or {}).get("downsample_rate", 2)) != 1:
        logger.warning("%s: FunASR's audio tokens don't heed downsample_rate %s, ours do", folder / CONFIG_FILE, rate)


def llm_folder(folder: Path, files: dict[str, Any] | None = None) -> Path:
    """Where the LLM's config and tokenizer lie: what `configuration.json` says, or `config.yaml`.

    Raises:
        CheckpointError: if there is no such folder.
    """
    files = read_files(folder) if files is None else files
    metas = files.get(METAS_FILE, {}).get("file_path_metas") or {}
    named = [
        (metas.get("llm_conf") or {}).get("init_param_path"),
        (files[CONFIG_FILE].get("llm_conf") or {}).get("init_param_path"),
    ]
    # A path of the machine where the model was trained stands for the folder of that name beside the weights.
    names = [name for path in named if path for name in (path, re.split(r"[/\\]", path.rstrip("/\\"))[-1])]
    candidates = []
    for name in dict.fromkeys(names):
        try:
            candidates.append(inside(folder, name, f"{folder}: llm_conf.init_param_path"))
        except CheckpointError:
            if (folder / name).is_symlink():
                raise
            continue
        if (candidates[-1] / "config.json").is_file():
            check_folder(candidates[-1])
            return candidates[-1]
    raise CheckpointError(
        f"{folder}: the LLM's folder with config.json and tokenizer is missing; copy it there; looked for "
        f"{', '.join(map(str, candidates)) or 'llm_conf.init_param_path in config.yaml'}"
    )
