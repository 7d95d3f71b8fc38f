"""Tensors of FunASR's `FunASRNano`: reading of `model.pt`, conversion of names and fused projections, LoRA."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..model.configuration import SpeechLLMConfig
from .checkpoint import EMBEDDINGS, HEAD, CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model")
DEFAULT_LORA = {"r": 16, "lora_alpha": 32}

# Names inside a block: (FunASR, this package).
BLOCK_NAMES = (
    ("self_attn.linear_q.", "self_attn.q_proj."),
    ("self_attn.linear_k.", "self_attn.k_proj."),
    ("self_attn.linear_v.", "self_attn.v_proj."),
    ("self_attn.linear_out.", "self_attn.o_proj."),
    ("self_attn.fsmn_block.", "self_attn.fsmn.conv."),
    ("feed_forward.w_1.", "mlp.fc1."),
    ("feed_forward.w_2.", "mlp.fc2."),
    ("norm1.", "input_layernorm."),
    ("norm2.", "post_attention_layernorm."),
)
FUSED = re.compile(r"(.*self_attn)\.linear_q_k_v\.(weight|bias)")
ENCODER_BLOCK = re.compile(r"audio_encoder\.(encoders0|encoders|tp_encoders)\.(\d+)\.(.+)")
ENCODER_LAYER = re.compile(r"audio_encoder\.layers\.(\d+)\.(.+)")
ADAPTOR_BLOCK = re.compile(r"((?:audio_adaptor|ctc_decoder|ctc_head\.decoder)\.blocks\.\d+\.)(.+)")
# Prefixes of the CTC head: (FunASR, this package).
CTC_PREFIXES = (("ctc_decoder.", "ctc_head.decoder."), ("ctc.ctc_lo.", "ctc_head.output."))
CTC_TOKENIZERS = {"SenseVoiceTokenizer": "tiktoken", "HuggingfaceTokenizer": "llm"}  # and names of vocabularies here


def load_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a `model.pt` without its wrapper dict; unpickles only tensors and plain values.

    Raises:
        CheckpointError: if the file is missing or damaged, would run code, or contains no state dict.
    """
    if not file.is_file():
        hint = "; consolidate DeepSpeed's folder to a file first" if file.is_dir() else ""
        raise CheckpointError(f"{file} is not a file{hint}")
    try:
        # Memory-mapped if the format allows it: several processes then share one copy.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} contains more than tensors, or is damaged; it is not loaded because it could run code"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); download or copy it again") from error
    while isinstance(state, dict) and (wrapped := [key for key in WRAPPERS if isinstance(state.get(key), dict)]):
        state = state[wrapped[0]]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise CheckpointError(f"{file} contains no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def to_ours(state: dict[str, torch.Tensor], config: SpeechLLMConfig) -> dict[str, torch.Tensor]:
    """Converts FunASR's tensors to this package's names and splits the encoder's fused query, key and value.

    Unknown names stay unchanged.
    """
    tensors = {}
    for name, tensor in state.items():
        fused = FUSED.fullmatch(name)
        if fused is None or not name.startswith("audio_encoder."):
            tensors[to_our_name(name, config)] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=False):
            # A copy: parts of one storage would be treated as shared weights.
            tensors[to_our_name(f"{fused[1]}.linear_{letter}.{fused[2]}", config)] = part.clone()
    return tensors


def to_our_name(name: str, config: SpeechLLMConfig) -> str:
    """Returns this package's name of a tensor of FunASR."""
    layers = config.audio_encoder_config.num_hidden_layers
    blocks = layers - config.audio_encoder_config.num_timestamp_prediction_layers
    if match := ENCODER_BLOCK.fullmatch(name):
        first = {"encoders0": 0, "encoders": 1, "tp_encoders": blocks}[match[1]]
        return f"audio_encoder.layers.{first + int(match[2])}.{_rename(match[3], 0)}"
    if match := ADAPTOR_BLOCK.fullmatch(name):
        name = match[1] + _rename(match[2], 0)
    for theirs, ours in CTC_PREFIXES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    name = name.replace("audio_encoder.after_norm.", f"audio_encoder.layers.{blocks - 1}.final_layernorm.")
    return name.replace("audio_encoder.tp_norm.", f"audio_encoder.layers.{layers - 1}.final_layernorm.")


def to_funasr_name(name: str, config: SpeechLLMConfig) -> str:
    """Returns FunASR's name of a tensor; the encoder's query, key and value have the name of the fused tensor."""
    layers = config.audio_encoder_config.num_hidden_layers
    blocks = layers - config.audio_encoder_config.num_timestamp_prediction_layers
    if name.startswith("ctc_head.") and not is_funasr_branch(config.ctc_head_config):
        return name  # ignored by FunASR
    if match := ADAPTOR_BLOCK.fullmatch(name):
        name = match[1] + _rename(match[2], 1)
    for theirs, ours in CTC_PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    match = ENCODER_LAYER.fullmatch(name)
    if match is None:
        return name
    index, rest = int(match[1]), match[2]
    if rest.startswith("final_layernorm."):
        return f"audio_encoder.{'after' if index == blocks - 1 else 'tp'}_norm.{rest.removeprefix('final_layernorm.')}"
    rest = re.sub(r"self_attn\.[qkv]_proj\.", "self_attn.linear_q_k_v.", rest)
    if index == 0:
        group = "encoders0.0"
    elif index < blocks:
        group = f"encoders.{index - 1}"
    else:
        group = f"tp_encoders.{index - blocks}"
    return f"audio_encoder.{group}.{_rename(rest, 1)}"


def is_funasr_branch(config: Any) -> bool:
    """Whether FunASR's class can compute a CTC head; otherwise FunASR ignores its tensors."""
    return (
        config is not None
        and config.head_type == "transformer"
        and config.vocabulary in CTC_TOKENIZERS.values()
        and config.upsample_rate == 1
        and config.blank_id == config.vocab_size - 1
    )


def _rename(name: str, column: int) -> str:
    for names in BLOCK_NAMES:
        if name.startswith(names[column]):
            return names[1 - column] + name[len(names[column]) :]
    return name


def to_funasr(tensors: dict[str, torch.Tensor], config: SpeechLLMConfig) -> dict[str, torch.Tensor]:
    """Converts this package's tensors to FunASR's names and fuses the encoder's query, key and value."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        target = to_funasr_name(name, config)
        if not FUSED.fullmatch(target):
            state[target] = tensor
        elif target not in state:
            parts = [tensors[re.sub(r"[qkv]_proj", f"{letter}_proj", name)] for letter in "qkv"]
            state[target] = torch.cat(parts)
    if HEAD not in state:
        state[HEAD] = state[EMBEDDINGS]  # FunASR's model has both names; torch.save stores them once
    return state


def merge_lora(state: dict[str, torch.Tensor], llm_conf: dict, source: Path) -> None:
    """Merges FunASR's LoRA matrices in place: `W + lora_alpha / r * B A`, as in FunASR's `models/lora/layers.py`.

    Raises:
        CheckpointError: if one of two matrices is missing, or their rank differs from `llm_conf.lora_conf`.
    """
    options = {**DEFAULT_LORA, **(llm_conf.get("lora_conf") or {})}
    for name in [name for name in state if name.endswith(".lora_A")]:
        layer = name.removesuffix(".lora_A")
        if f"{layer}.lora_B" not in state or f"{layer}.weight" not in state:
            raise CheckpointError(f"{source}: {name} without {layer}.lora_B or {layer}.weight; the file is incomplete")
        down, up = state.pop(name), state.pop(f"{layer}.lora_B")
        if down.shape[0] != options["r"]:
            raise CheckpointError(
                f"{source}: {name} has rank {down.shape[0]}, but llm_conf.lora_conf.r in config.yaml is "
                f"{options['r']}; write r and lora_alpha of the training to config.yaml"
            )
        weight = state[f"{layer}.weight"]
        update = up.float() @ down.float() * (options["lora_alpha"] / options["r"])
        state[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
