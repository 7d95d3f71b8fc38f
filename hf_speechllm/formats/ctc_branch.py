"""The CTC head in the layouts of FunASR and transformers: names of tensors, fields of `config.yaml`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..model.configuration import SpeechLLMConfig
from ..model.ctc import CTC_HEAD
from .checkpoint import expected_shapes
from .funasr_tensors import CTC_TOKENIZERS, is_funasr_branch, to_our_name

logger = logging.getLogger(__name__)

T = TypeVar("T")
PREFIX = f"{CTC_HEAD}."
DECODER, VOCABULARY_SIZE = "Transformer", 60515  # default size in FunASR's `models/fun_asr_nano/model.py`
LAYER_NORM_EPS = 1e-12  # in FunASR's `models/transformer/layer_norm.py`


def read_ctc_config(conf: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the fields of `CTCHeadConfig` for a `config.yaml`; `None` without a supported CTC branch.

    Args:
        conf: content of `config.yaml`.
        ours: this package's section of `config.yaml`.
    """
    if (saved := ours.get("ctc_head_config")) is not None:
        return saved
    decoder, dataset = conf.get("ctc_decoder_conf") or {}, conf.get("dataset_conf") or {}
    vocabulary = CTC_TOKENIZERS.get(str(conf.get("ctc_tokenizer") or dataset.get("ctc_tokenizer")))
    width = (conf.get("audio_encoder_conf") or {}).get("output_size", 256)
    same_frames = decoder.get("downsample_rate", 2) == 1 and decoder.get("llm_dim", 4096) == width
    if conf.get("ctc_decoder") != DECODER or vocabulary is None or not same_frames:
        return None
    size = conf.get("ctc_vocab_size", VOCABULARY_SIZE)
    return {
        "head_type": "transformer",
        "vocabulary": vocabulary,
        "vocab_size": size,
        "blank_id": size - 1,  # FunASR 1.4.16 fails on another `ctc_conf.blank_id`
        "projector_hidden_size": decoder.get("ffn_dim", 2048),
        "num_hidden_layers": decoder.get("n_layer", 2),
        "num_attention_heads": decoder.get("attention_heads", 8),
        "attention_dropout": decoder.get("attention_dropout_rate", 0.0),
        "hidden_dropout": decoder.get("dropout_rate", 0.0),
        "layer_norm_eps": ours.get("layer_norm_eps", LAYER_NORM_EPS),
    }


def write_ctc_config(conf: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns fields of `config.yaml`, and of this package's section, for a CTC head.

    Args:
        conf: original content of `config.yaml`, whose other settings of the branch are kept.
        config: of the head; `None` without a head.
    """
    if config is None:
        return {}, {}
    if not is_funasr_branch(config):
        return {}, {"ctc_head_config": config.to_diff_dict()}
    names = {vocabulary: name for name, vocabulary in CTC_TOKENIZERS.items()}
    fields = {
        "ctc_decoder": DECODER,
        "ctc_decoder_conf": {
            **(conf.get("ctc_decoder_conf") or {}),
            "downsample_rate": 1,
            "encoder_dim": config.hidden_size,
            "llm_dim": config.hidden_size,
            "ffn_dim": config.projector_hidden_size,
            "n_layer": config.num_hidden_layers,
            "attention_heads": config.num_attention_heads,
            "attention_dropout_rate": config.attention_dropout,
            "dropout_rate": config.hidden_dropout,
        },
        "ctc_vocab_size": config.vocab_size,
    }
    if "ctc_tokenizer" not in (conf.get("dataset_conf") or {}):
        path = {"init_param_path": "${llm_conf.init_param_path}"} if config.vocabulary == "llm" else {}
        fields |= {"ctc_tokenizer": names[config.vocabulary]}
        fields |= {"ctc_tokenizer_conf": conf.get("ctc_tokenizer_conf", path)}
    return fields, {}


def take_head(config: SpeechLLMConfig, ctc_tensors: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Removes the tensors of the CTC head from `ctc_tensors` and returns them under this package's names.

    An incomplete branch stays in `ctc_tensors`, and the model has no head: a release may name a branch in its config
    without its weights.

    Args:
        config: of the model; loses `ctc_head_config` if tensors are missing.
        ctc_tensors: tensors of the branch, and token files.
        source: file of the tensors, for the message.
    """
    if config.ctc_head_config is None:
        return {}
    found = {to_our_name(name, config): name for name in ctc_tensors}
    expected = split_head(expected_shapes(config, 1000, source))[0]
    missing = [
        name for name, shape in expected.items() if name not in found or ctc_tensors[found[name]].shape != shape
    ]
    if missing:
        logger.warning(
            "%s: the CTC branch is not used, because tensors are missing or of another shape, for example %s",
            source, missing[0],
        )  # fmt: skip
        config.ctc_head_config = None
        return {}
    return {name: ctc_tensors.pop(found[name]) for name in expected}


def split_head(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Splits tensors into those of the CTC head and all others."""
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return head, {name: tensor for name, tensor in tensors.items() if name not in head}
