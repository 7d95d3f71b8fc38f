"""The small files of a FunASR checkpoint: reads and checks `config.yaml` and `configuration.json`, finds the LLM."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .untrusted import check_folder, inside, one_line, read_json, read_yaml

logger = logging.getLogger(__name__)

CONFIG_FILE, METAS_FILE = "config.yaml", "configuration.json"
# Section of config.yaml for settings without a FunASR key; FunASR ignores it.
SECTION = "hf_speechllm"
# Fields that are read from both files: mappings, types, and the range of numbers.
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
        "ctc_decoder_conf": {
            "downsample_rate": (1, 10_000), "llm_dim": WIDTH, "ffn_dim": WIDTH, "n_layer": LAYERS,
            "attention_heads": WIDTH, "attention_dropout_rate": RATE, "dropout_rate": RATE,
        },
        "ctc_vocab_size": (2, 10_000_000), "ctc_tokenizer_conf": {},
        "dataset_conf": {"do_think": bool, "sys_prompt": bool},
        SECTION: {
            "max_position_embeddings": (1, 10_000_000), "layer_norm_eps": RATE, "audio_token_id": (0, 2**31),
            "generation_config": {}, "ctc_head_config": {},
        },
    },
    METAS_FILE: {"file_path_metas": {"init_param": str, "llm_conf": {"init_param_path": str}}},
}  # fmt: skip


def read_files(folder: Path) -> dict[str, Any]:
    """Reads `config.yaml` and `configuration.json`.

    Raises:
        CheckpointError: if `config.yaml` is missing, or a file or field is invalid.
    """
    files: dict[str, Any] = {}
    for name, parse in ((CONFIG_FILE, read_yaml), (METAS_FILE, read_json)):
        if (folder / name).is_file():
            files[name] = parse(inside(folder, name, folder))
            check_types(files[name], TYPES[name], folder / name)
        elif name == CONFIG_FILE:  # FunASR does not require configuration.json either
            raise CheckpointError(
                f"{folder / name} is missing; copy it and the LLM's folder there from the model that was trained"
            )
    return files


def check_types(values: dict[str, Any], types: dict[str, Any], source: Any, path: str = "") -> None:
    """Checks types and ranges of fields in `config.yaml` and `configuration.json`; removes null fields.

    Raises:
        CheckpointError: if a field is invalid; the message names the field.
    """
    for key, expected in types.items():
        value = values.get(key)
        if value is None:  # readers use the default
            values.pop(key, None)
        elif isinstance(expected, dict):
            if not isinstance(value, dict):
                raise CheckpointError(f"{source}: {path}{key} must be a mapping")
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
            raise CheckpointError(f"{source}: {path}{key} is {one_line(value, 100)}; it must be a {expected.__name__}")


def check_supported(conf: dict, folder: Path) -> None:
    """Refuses a `config.yaml` with unsupported parts or options.

    Raises:
        CheckpointError: if a part or option is unsupported; the message names the field.
    """
    for key, known in {
        "model": "FunASRNano",
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_adaptor": "Transformer",
        "frontend": "WavFrontend",
    }.items():
        if conf.get(key) != known:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {key} is {conf.get(key)!r}; only {known} is supported")
    encoder, frontend = conf.get("audio_encoder_conf") or {}, conf.get("frontend_conf") or {}
    for wrong, reason in (
        (encoder.get("sanm_shfit", 0) != 0, "audio_encoder_conf.sanm_shfit must be 0"),
        (encoder.get("tp_blocks", 0) < 1, "audio_encoder_conf.tp_blocks must be at least 1"),
        (frontend.get("cmvn_file") is not None, "frontend_conf.cmvn_file must be null: features are not normalised"),
    ):
        if wrong:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {reason}")
    if (rate := (conf.get("audio_adaptor_conf") or {}).get("downsample_rate", 2)) != 1:
        logger.warning(
            "%s: downsample_rate is %s; FunASR ignores it when it counts audio tokens, this package does not",
            folder / CONFIG_FILE, rate,
        )  # fmt: skip


def llm_folder(folder: Path, files: dict[str, Any] | None = None) -> Path:
    """Returns the folder of the LLM's config and tokenizer, named in `configuration.json` or `config.yaml`.

    Raises:
        CheckpointError: if the folder is missing.
    """
    files = read_files(folder) if files is None else files
    metas = files.get(METAS_FILE, {}).get("file_path_metas") or {}
    named = [
        (metas.get("llm_conf") or {}).get("init_param_path"),
        (files[CONFIG_FILE].get("llm_conf") or {}).get("init_param_path"),
    ]
    # A path on the training machine is replaced by the folder with the same name beside the weights.
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
        f"{folder}: the LLM's folder with config.json and tokenizer is missing; copy it to "
        f"{' or '.join(map(str, candidates)) or 'the path in llm_conf.init_param_path of config.yaml'}"
    )
