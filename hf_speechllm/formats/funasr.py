"""Reading and writing of FunASR's layout: `model.pt`, `config.yaml`, `configuration.json` and the LLM's folder.

Names follow `FunASRNano` in FunASR's `models/fun_asr_nano/model.py`; defaults follow FunASR's classes.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, GenerationConfig

from ..audio.fbank import FbankFeatureExtractor
from ..model.configuration import SpeechLLMConfig
from ..model.processing import SpeechLLMProcessor
from .checkpoint import (
    CTC_PREFIX,
    EMBEDDINGS,
    FILE_PREFIX,
    HEAD,
    Checkpoint,
    CheckpointError,
    build_config,
    check_ctc_tensors,
    check_tensors,
    default_generation_config,
    set_weight_tying,
    widest,
)
from .ctc_branch import read_ctc_config, take_head, write_ctc_config
from .funasr_files import CONFIG_FILE, METAS_FILE, SECTION, TYPES, check_supported, check_types, llm_folder, read_files
from .funasr_tensors import load_state_dict, merge_lora, to_funasr, to_funasr_name, to_ours
from .untrusted import inside, reading

logger = logging.getLogger(__name__)

WEIGHTS_FILE, LLM_FOLDER = "model.pt", "Qwen3-0.6B"
# The original computes position embeddings for any length. The table here covers 10 minutes at 60 ms per frame.
MAX_POSITIONS = 10001
LAYER_NORM_EPS = 1e-12  # in FunASR's `models/transformer/layer_norm.py`
LLM_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def read_config(folder: Path) -> SpeechLLMConfig:
    """Reads the config of a FunASR checkpoint.

    Raises:
        CheckpointError: if a file is missing or unreadable, or names an unsupported part or option.
    """
    files = read_files(folder)
    conf = files[CONFIG_FILE]
    check_supported(conf, folder)
    encoder, adaptor = conf.get("audio_encoder_conf") or {}, conf.get("audio_adaptor_conf") or {}
    frontend, ours = conf.get("frontend_conf") or {}, conf.get(SECTION) or {}
    blocks, tp_blocks = encoder.get("num_blocks", 6), encoder.get("tp_blocks", 0)
    with reading(llm_folder(folder, files) / "config.json"):
        llm = AutoConfig.from_pretrained(llm_folder(folder, files), trust_remote_code=False)
    llm.name_or_path = ""  # the path of the folder is meaningless on other machines
    values = {
        "audio_encoder_config": {
            "model_type": "fun_asr_nano_encoder",
            "num_mel_bins": frontend.get("n_mels", 80),
            "num_stacked_frames": frontend.get("lfr_m", 1),
            "hidden_size": encoder.get("output_size", 256),
            "num_attention_heads": encoder.get("attention_heads", 4),
            "intermediate_size": encoder.get("linear_units", 2048),
            "num_hidden_layers": blocks + tp_blocks,
            "num_timestamp_prediction_layers": tp_blocks,
            "hidden_dropout": encoder.get("dropout_rate", 0.1),
            "attention_dropout": encoder.get("attention_dropout_rate", 0.0),
            "fsmn_kernel_size": encoder.get("kernel_size", 11),
            "max_position_embeddings": ours.get("max_position_embeddings", MAX_POSITIONS),
        },
        "audio_adaptor_config": {
            "downsample_rate": adaptor.get("downsample_rate", 2),
            "use_low_frame_rate": adaptor.get("use_low_frame_rate", False),
            "projector_hidden_size": adaptor.get("ffn_dim", 2048),
            "num_hidden_layers": adaptor.get("n_layer", 2),
            "num_attention_heads": adaptor.get("attention_heads", 8),
            "attention_dropout": adaptor.get("attention_dropout_rate", 0.0),
            "hidden_dropout": adaptor.get("dropout_rate", 0.0),
            "layer_norm_eps": ours.get("layer_norm_eps", LAYER_NORM_EPS),
        },
        "llm_config": llm,
        "ctc_head_config": read_ctc_config(conf, ours),
        "audio_token_id": ours.get("audio_token_id", SpeechLLMConfig.audio_token_id),
        "funasr_files": files,
    }
    return build_config(values, folder / CONFIG_FILE)


def read(folder: Path, weights: str | None = None) -> Checkpoint:
    """Reads a FunASR checkpoint and merges LoRA matrices; `ctc_tensors` has an unusable CTC branch, and token files.

    Args:
        folder: folder of the checkpoint.
        weights: name of a weight file in the folder (for example `model.pt.best`); default: according to the folder.

    Raises:
        CheckpointError: if a file is missing, damaged or not a plain state dict, or tensors are missing, unexpected or
            of a wrong shape.
    """
    config = read_config(folder)
    files = config.funasr_files or {}
    metas = files.get(METAS_FILE, {}).get("file_path_metas") or {}
    weights = weights or metas.get("init_param", WEIGHTS_FILE)
    file = inside(folder, weights, f"{folder / METAS_FILE}: file_path_metas.init_param")
    state = load_state_dict(file)
    ctc_tensors = {name: state.pop(name) for name in list(state) if name.startswith(CTC_PREFIX)}
    for path in sorted(folder.glob("*.tiktoken")):  # the CTC branch's vocabulary
        content = inside(folder, path.name, path).read_bytes()
        ctc_tensors[FILE_PREFIX + path.name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    check_ctc_tensors(ctc_tensors, file)
    merge_lora(state, files[CONFIG_FILE].get("llm_conf") or {}, file)
    tensors = to_ours(state, config) | take_head(config, ctc_tensors, str(file))
    if HEAD not in tensors and not config.llm_config.tie_word_embeddings:
        raise CheckpointError(
            f"{file}: {HEAD} is missing, but tie_word_embeddings is false in the LLM's config.json; correct one"
        )
    set_weight_tying(config, tensors)
    config.dtype = widest(tensor.dtype for tensor in tensors.values())
    saved = (files[CONFIG_FILE].get(SECTION) or {}).get("generation_config")
    with reading(folder / CONFIG_FILE, f"has an unusable {SECTION}.generation_config"):
        generation = GenerationConfig.from_dict(saved) if saved else default_generation_config(config)
    checkpoint = Checkpoint(config, tensors, generation, ctc_tensors)
    check_tensors(checkpoint, str(file), lambda name: to_funasr_name(name, config))
    return checkpoint


def read_processor(folder: Path, tokenizer, config: SpeechLLMConfig) -> SpeechLLMProcessor:
    """Reads the processor of a FunASR checkpoint. Dither is off, because the original's 1.0 makes decoding random.

    Raises:
        CheckpointError: if the tokenizer lacks the audio token.
    """
    conf = read_files(folder)[CONFIG_FILE]
    frontend, dialogue = conf.get("frontend_conf") or {}, conf.get("dataset_conf") or {}
    features = FbankFeatureExtractor(
        feature_size=frontend.get("n_mels", 80),
        sampling_rate=frontend.get("fs", 16000),
        frame_length=frontend.get("frame_length", 25),
        frame_shift=frontend.get("frame_shift", 10),
        window_type=frontend.get("window", "hamming"),
        num_frames_lfr=frontend.get("lfr_m", 1),
        stride_lfr=frontend.get("lfr_n", 1),
        waveform_scale=32768.0 if frontend.get("upsacle_samples", True) else 1.0,
    )
    audio_token = tokenizer.convert_ids_to_tokens(config.audio_token_id)
    if audio_token is None:
        raise CheckpointError(f"{folder}: the tokenizer has no token {config.audio_token_id} (audio_token_id)")
    return SpeechLLMProcessor(
        features,
        tokenizer,
        audio_token=audio_token,
        downsample_rate=config.downsample_rate,
        use_low_frame_rate=config.use_low_frame_rate,
        think_block=not dialogue.get("do_think", True),
        system_prompt=dialogue.get("sys_prompt", True),
    )


def check_exportable(config: SpeechLLMConfig, processor: SpeechLLMProcessor, force: bool = False) -> None:
    """Refuses models that FunASR's class cannot represent, and, unless forced, models with different results there.

    Raises:
        CheckpointError: if the model is refused; the message contains the reasons.
    """
    adaptor = config.audio_adaptor_config
    reasons = []
    if config.audio_encoder_config.model_type != "fun_asr_nano_encoder":
        reasons.append(f"FunASR's audio encoder is SAN-M, this one is {config.audio_encoder_config.model_type}")
    if adaptor.adaptor_type != "transformer":
        reasons.append(f"FunASR's adaptor is a Transformer, this one is {adaptor.adaptor_type}")
    elif adaptor.intermediate_size != adaptor.hidden_size // 4:
        reasons.append(
            f"FunASR's adaptor blocks have a quarter of the LLM's width ({adaptor.hidden_size // 4}), these have "
            f"{adaptor.intermediate_size}"
        )
    if {adaptor.hidden_act, adaptor.projector_hidden_act} != {"relu"}:
        reasons.append(f"FunASR's adaptor uses ReLU, this one {adaptor.hidden_act} and {adaptor.projector_hidden_act}")
    if processor.chat_layout is not None:
        reasons.append("FunASR writes ChatML, this processor the chat template of another LLM")
    if reasons:
        raise CheckpointError("FunASR's layout does not support this model: " + "; ".join(reasons))
    if adaptor.downsample_rate != 1:
        reasons.append("FunASR ignores downsample_rate when it counts audio tokens")
    if (eps := adaptor.layer_norm_eps) != LAYER_NORM_EPS:
        reasons.append(f"FunASR's adaptor has a LayerNorm epsilon of {LAYER_NORM_EPS}, this one {eps}")
    if reasons and not force:
        raise CheckpointError(
            f"this model would give different results in FunASR: {'; '.join(reasons)}; to write it anyway, "
            "use --force (force=True)"
        )


def write(checkpoint: Checkpoint, processor: SpeechLLMProcessor, folder: Path, force: bool = False) -> None:
    """Writes a FunASR checkpoint into an existing folder; FunASR's `AutoModel(model=folder)` loads it.

    Raises:
        CheckpointError: see `check_exportable`.
    """
    check_exportable(checkpoint.config, processor, force)
    config = checkpoint.config
    state = to_funasr(checkpoint.tensors, config)
    check_ctc_tensors(checkpoint.ctc_tensors, "the CTC branch")
    for name, tensor in checkpoint.ctc_tensors.items():
        if name.startswith(FILE_PREFIX):
            (folder / name.removeprefix(FILE_PREFIX)).write_bytes(tensor.numpy().tobytes())
        else:
            state[name] = tensor
    try:
        torch.save({"state_dict": state}, folder / WEIGHTS_FILE)
    except RuntimeError as error:  # raised by torch on a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{folder / WEIGHTS_FILE} cannot be written; is the disk full? ({reason})") from error
    files = copy.deepcopy(config.funasr_files or {})
    check_types(files, TYPES, "config.json", "funasr_files.")
    conf = _funasr_config(files.get(CONFIG_FILE, {}), checkpoint, processor)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(conf, sort_keys=False, allow_unicode=True), encoding="utf-8")
    metas = _funasr_metas(files.get(METAS_FILE, {}))
    (folder / METAS_FILE).write_text(json.dumps(metas, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    config.llm_config.save_pretrained(folder / LLM_FOLDER)
    processor.tokenizer.save_pretrained(folder / LLM_FOLDER)


def _funasr_config(conf: dict, checkpoint: Checkpoint, processor: SpeechLLMProcessor) -> dict:
    """Returns the content of `config.yaml`: the original file's, if any, updated with the model's settings."""
    config = checkpoint.config
    encoder, adaptor, features = config.audio_encoder_config, config.audio_adaptor_config, processor.feature_extractor
    tp_blocks = encoder.num_timestamp_prediction_layers
    llm_conf = {"hub": "hf", "freeze": True, **(conf.get("llm_conf") or {})}
    llm_conf.pop("lora_conf", None)
    dialogue = conf.get("dataset_conf") or {}
    layout = {"do_think": not processor.think_block, "sys_prompt": processor.system_prompt}
    dialogue = {**dialogue, **{key: value for key, value in layout.items() if dialogue.get(key, True) != value}}
    llm_conf.update(
        llm_dtype=LLM_DTYPES[checkpoint.tensors[EMBEDDINGS].dtype], init_param_path=LLM_FOLDER, use_lora=False
    )
    ctc_fields, ctc_section = write_ctc_config(conf, config.ctc_head_config)
    return {
        **conf,
        **ctc_fields,
        "model": "FunASRNano",
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_encoder_conf": {
            "freeze": True,
            **(conf.get("audio_encoder_conf") or {}),
            "output_size": encoder.hidden_size,
            "attention_heads": encoder.num_attention_heads,
            "linear_units": encoder.intermediate_size,
            "num_blocks": encoder.num_hidden_layers - tp_blocks,
            "tp_blocks": tp_blocks,
            "dropout_rate": encoder.hidden_dropout,
            "attention_dropout_rate": encoder.attention_dropout,
            "kernel_size": encoder.fsmn_kernel_size,
        },
        "llm": conf.get("llm", LLM_FOLDER),
        "llm_conf": llm_conf,
        "audio_adaptor": "Transformer",
        "audio_adaptor_conf": {
            "freeze": True,
            **(conf.get("audio_adaptor_conf") or {}),
            "downsample_rate": adaptor.downsample_rate,
            "use_low_frame_rate": adaptor.use_low_frame_rate,
            "ffn_dim": adaptor.projector_hidden_size,
            "llm_dim": adaptor.hidden_size,
            "encoder_dim": adaptor.encoder_hidden_size,
            "n_layer": adaptor.num_hidden_layers,
            "attention_heads": adaptor.num_attention_heads,
            "attention_dropout_rate": adaptor.attention_dropout,
            "dropout_rate": adaptor.hidden_dropout,
        },
        "frontend": "WavFrontend",
        "frontend_conf": {
            **(conf.get("frontend_conf") or {}),
            "fs": features.sampling_rate,
            "window": features.window_type,
            "n_mels": features.feature_size,
            "frame_length": features.frame_length,
            "frame_shift": features.frame_shift,
            "lfr_m": features.num_frames_lfr,
            "lfr_n": features.stride_lfr,
            "upsacle_samples": features.waveform_scale != 1.0,
            "dither": features.dither,  # FunASR's default of 1.0 would make decoding random
            "cmvn_file": None,
        },
        "tokenizer": "HuggingfaceTokenizer",
        "tokenizer_conf": {"init_param_path": "${llm_conf.init_param_path}", **(conf.get("tokenizer_conf") or {})},
        **({"dataset_conf": dialogue} if dialogue else {}),
        SECTION: {
            "audio_token_id": config.audio_token_id,
            "max_position_embeddings": encoder.max_position_embeddings,
            "layer_norm_eps": adaptor.layer_norm_eps,
            "generation_config": checkpoint.generation_config.to_diff_dict(),
            **ctc_section,
        },
    }


def _funasr_metas(metas: dict) -> dict:
    """Returns the content of `configuration.json`, which names the files that FunASR reads."""
    paths = {
        **(metas.get("file_path_metas") or {}),
        "init_param": WEIGHTS_FILE,
        "config": CONFIG_FILE,
        "tokenizer_conf": {"init_param_path": LLM_FOLDER},
        "llm_conf": {"init_param_path": LLM_FOLDER},
    }
    return {
        "framework": "pytorch",
        "task": "auto-speech-recognition",
        "model": {"type": "funasr"},
        **metas,
        "file_path_metas": paths,
    }
