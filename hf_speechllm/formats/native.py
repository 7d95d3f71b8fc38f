"""Reading and writing of the native layout, that of transformers' `fun_asr_nano`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import FunAsrNanoConfig, FunAsrNanoFeatureExtractor, FunAsrNanoProcessor
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoAdaptorConfig

from ..audio.fbank import FbankFeatureExtractor
from ..model import chat
from ..model.configuration import SpeechLLMConfig
from ..model.processing import SpeechLLMProcessor
from .checkpoint import (
    MAX_SHARD_SIZE,
    Checkpoint,
    CheckpointError,
    build_config,
    check_tensors,
    read_ctc_tensors,
    read_generation_config,
    read_safetensors,
    set_weight_tying,
    widest,
    write_ctc_tensors,
    write_safetensors,
)
from .ctc_branch import split_head, take_head
from .untrusted import read_json, reading

MODEL_TYPE, PROCESSOR_CLASS = "fun_asr_nano", FunAsrNanoProcessor.__name__
# Key of this package in the native config; records how the model was trained. Without this key, the model is a release
# or was trained by other software, and the numerics of the original (FunASR) apply.
MARKER = "use_low_frame_rate"
ORIGINAL_LAYER_NORM_EPS = 1e-12  # of the adaptor's blocks in FunASR; the native class uses 1e-5
# In a subfolder, because some engines load every *.safetensors file of the main folder.
CTC_FILE = "funasr/ctc.safetensors"

# Prefixes of tensor names: (this package, native).
PREFIXES = (
    ("audio_encoder.", "model.audio_tower."),
    ("audio_adaptor.linear1.", "model.multi_modal_projector.linear_1."),
    ("audio_adaptor.linear2.", "model.multi_modal_projector.linear_2."),
    ("audio_adaptor.blocks.", "model.multi_modal_projector.layers."),
    ("llm.model.", "model.language_model."),
    ("llm.lm_head.", "lm_head."),
)
ADAPTOR_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout",
    "attention_dropout",
    "layer_norm_eps",
    "projector_hidden_size",
    "projector_hidden_act",
)
DIALOGUE_FIELDS = ("think_block", "system_prompt")  # options of `SpeechLLMProcessor`
FEATURE_FIELDS = ("feature_size", "sampling_rate", "frame_length", "frame_shift", "num_frames_lfr", "stride_lfr")

# Renders the layout of `chat.tokenize`. A user message whose list starts with the recording is a request from
# `FunAsrNanoProcessor.apply_transcription_request`: texts are context, keywords are hotwords. Other lists and strings
# are rendered unchanged.
CHAT_TEMPLATE = """\
{%- if @WANTED@ and (not messages or messages[0]['role'] != 'system') -%}
{{- '<|im_start|>system\\n@SYSTEM@<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if @WANTED@ or message['role'] != 'system' -%}
{%- set content = message['content'] -%}
{{- '<|im_start|>' + message['role'] + '\\n' + ('@THINK@' if message['role'] == 'assistant' else '') -}}
{%- if content is string -%}
{%- for piece in content.split('<|startofspeech|>') -%}
{%- if '<|endofspeech|>' in piece -%}
{{- '@AUDIO@' + piece.split('<|endofspeech|>', 1)[1] -}}
{%- else -%}
{{- piece -}}
{%- endif -%}
{%- endfor -%}
{%- elif content and content[0]['type'] == 'audio' -%}
{%- set request = namespace(context='', hotwords=[], instruction='语音转写') -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- set request.context = request.context + part['text'] + '\\n' -%}
{%- elif part['type'] == 'keywords' -%}
{%- set request.hotwords = request.hotwords + part['keywords'] -%}
{%- elif part['type'] == 'language' -%}
{%- set request.instruction = '语音转写成' + part['language'] -%}
{%- endif -%}
{%- endfor -%}
{%- if request.hotwords -%}
{%- set request.context = request.context + '热词列表：[' + request.hotwords | join(', ') + ']\\n' -%}
{%- endif -%}
{%- if request.context -%}
{{- '@HEADER@' + request.context -}}
{%- endif -%}
{{- request.instruction + '：' -}}
{%- for part in content if part['type'] == 'audio' -%}
{{- '@AUDIO@' -}}
{%- endfor -%}
{%- else -%}
{%- for part in content -%}
{{- '@AUDIO@' if part['type'] == 'audio' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' if message['role'] == 'assistant' else '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n@THINK@' -}}
{%- endif -%}
"""


def chat_template(audio_token: str = chat.AUDIO_TOKEN, think_block: bool = False, system_prompt: bool = True) -> str:
    """Returns the Jinja template with which the native processor builds this package's prompts.

    Args:
        audio_token, think_block, system_prompt: see `SpeechLLMProcessor`.
    """
    values = {
        "@SYSTEM@": chat.DEFAULT_SYSTEM,
        "@HEADER@": chat.hotword_context(["x"]).split("热词列表")[0],
        "@THINK@": chat.THINK_BLOCK if think_block else "",
        "@WANTED@": "true" if system_prompt else "false",
        "@AUDIO@": audio_token,
    }
    template = CHAT_TEMPLATE
    for mark, value in values.items():
        template = template.replace(mark, value.replace("\n", "\\n"))
    return template


def read_config(folder: Path) -> SpeechLLMConfig:
    """Reads the config of a native checkpoint.

    Without `MARKER`, `use_low_frame_rate` is true and the adaptor's LayerNorm epsilon is the original's.
    """
    raw = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        native = FunAsrNanoConfig.from_dict(raw)
    adaptor = {name: getattr(native.adaptor_config, name) for name in ADAPTOR_FIELDS}
    adaptor["use_low_frame_rate"] = raw.get(MARKER, True)
    if MARKER not in raw:
        adaptor["layer_norm_eps"] = ORIGINAL_LAYER_NORM_EPS
    native.text_config.tie_word_embeddings = native.tie_word_embeddings
    values = {
        "audio_encoder_config": native.audio_config,
        "audio_adaptor_config": adaptor,
        "llm_config": native.text_config,
        "audio_token_id": native.audio_token_id,
        "initializer_range": native.initializer_range,
        "ctc_head_config": raw.get("ctc_head_config"),
        "funasr_files": raw.get("funasr_files"),
    }
    return build_config(values, folder / "config.json")


def read(folder: Path) -> Checkpoint:
    """Reads a native checkpoint.

    Raises:
        CheckpointError: if a file is missing or damaged, or tensors are missing, unexpected or of a wrong shape.
    """
    config = read_config(folder)
    tensors = {_to_ours(name): tensor for name, tensor in read_safetensors(folder).items()}
    ctc_tensors = read_ctc_tensors(folder / CTC_FILE)
    tensors |= take_head(config, ctc_tensors, str(folder / CTC_FILE))
    set_weight_tying(config, tensors)
    config.dtype = widest(tensor.dtype for tensor in tensors.values())
    checkpoint = Checkpoint(config, tensors, read_generation_config(folder, config), ctc_tensors)
    check_tensors(checkpoint, str(folder), _to_native)
    return checkpoint


def read_processor(folder: Path, tokenizer, config: SpeechLLMConfig) -> SpeechLLMProcessor:
    """Reads the processor of a native checkpoint."""
    raw = read_json(folder / "processor_config.json")
    features = raw.get("feature_extractor", {})
    if not features and (folder / "preprocessor_config.json").is_file():
        features = read_json(folder / "preprocessor_config.json")
    options = {name: features[name] for name in (*FEATURE_FIELDS, "waveform_scale", "dither") if name in features}
    options["window_type"] = features.get("window_type", features.get("window", "hamming"))
    return SpeechLLMProcessor(
        FbankFeatureExtractor(**options),
        tokenizer,
        audio_token=raw.get("audio_token", chat.AUDIO_TOKEN),
        downsample_rate=config.downsample_rate,
        use_low_frame_rate=config.use_low_frame_rate,
        **{name: features[name] for name in DIALOGUE_FIELDS if name in features},
    )


def check_exportable(
    config: SpeechLLMConfig, force: bool = False, processor: SpeechLLMProcessor | None = None
) -> None:
    """Refuses models that the native class cannot represent, and, unless forced, models with different results there.

    Raises:
        CheckpointError: if the model is refused; the message contains the reasons.
    """
    adaptor, llm = config.audio_adaptor_config, config.llm_config
    reasons = []
    if config.audio_encoder_config.model_type != "fun_asr_nano_encoder":
        reasons.append(f"the native audio encoder is SAN-M, this one is {config.audio_encoder_config.model_type}")
    if adaptor.adaptor_type != "transformer":
        reasons.append(f"the native adaptor is a Transformer, this one is {adaptor.adaptor_type}")
    if adaptor.downsample_rate != 1:
        reasons.append(
            f"the native adaptor does not stack frames, this one stacks {adaptor.downsample_rate} (downsample_rate)"
        )
    if adaptor.intermediate_size != llm.hidden_size // 4:
        reasons.append(
            f"the native adaptor blocks have a quarter of the LLM's width ({llm.hidden_size // 4}), these have "
            f"{adaptor.intermediate_size}"
        )
    if processor is not None and processor.chat_layout is not None:
        reasons.append("the native processor writes ChatML, this one the chat template of another LLM")
    if reasons:
        raise CheckpointError("the native layout (fun_asr_nano) does not support this model: " + "; ".join(reasons))
    if config.use_low_frame_rate and not force:
        raise CheckpointError(
            "this model was trained on the first eighth of each recording's frames (use_low_frame_rate), but "
            "transformers' fun_asr_nano class passes all frames to the LLM, so it would transcribe badly there; to "
            "write it for software that shortens the frames, use --force (force=True)"
        )


def write(
    checkpoint: Checkpoint,
    processor: SpeechLLMProcessor | None,
    folder: Path,
    force: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Writes a native checkpoint, and a processor if given, to an existing folder.

    Raises:
        CheckpointError: see `check_exportable`; if tensors of the LLM have no name in the native class; or, unless
            forced, if the window of the front end differs from the native one.
    """
    check_exportable(checkpoint.config, force, processor)
    if processor is not None and not force:
        _check_window(processor.feature_extractor)
    head, others = split_head(checkpoint.tensors)
    tensors = {_to_native(name): tensor for name, tensor in others.items()}
    if unsupported := [name for name in tensors if name.startswith("llm.")]:
        raise CheckpointError(
            f"the native layout (fun_asr_nano) does not support this LLM: no name for {', '.join(unsupported[:5])}"
        )
    config = _native_config(checkpoint)
    config.save_pretrained(folder)
    _fix_adaptor_attention(folder / "config.json")
    checkpoint.generation_config.save_pretrained(folder)
    if processor is not None:
        native_processor(processor).save_pretrained(folder)
    write_safetensors(tensors, folder, max_shard_size)
    write_ctc_tensors(checkpoint.ctc_tensors | head, folder / CTC_FILE)


def _check_window(features: FbankFeatureExtractor) -> None:
    """Refuses windows other than Hamming: the native feature extractor does not read the window from its file."""
    if features.window_type != "hamming":
        raise CheckpointError(
            f"transformers' fun_asr_nano class uses a Hamming window, this model a {features.window_type} window, so "
            "it would compute other features there; to write it for this package, use force"
        )


def _native_config(checkpoint: Checkpoint) -> FunAsrNanoConfig:
    ours = checkpoint.config
    adaptor = {name: getattr(ours.audio_adaptor_config, name) for name in ADAPTOR_FIELDS}
    return FunAsrNanoConfig(
        audio_config=ours.audio_encoder_config.to_dict(),
        adaptor_config=FunAsrNanoAdaptorConfig(**adaptor),
        text_config=ours.llm_config.to_dict(),
        audio_token_id=ours.audio_token_id,
        initializer_range=ours.initializer_range,
        tie_word_embeddings=ours.llm_config.tie_word_embeddings,
        architectures=["FunAsrNanoForConditionalGeneration"],
        dtype=ours.dtype,
        funasr_files=ours.funasr_files,
        **({"ctc_head_config": ours.ctc_head_config.to_dict()} if ours.ctc_head_config is not None else {}),
        **{MARKER: ours.use_low_frame_rate},
    )


def _fix_adaptor_attention(file: Path) -> None:
    """Sets the adaptor's attention implementation in a config file.

    Otherwise the native class resolves no implementation for the adaptor, which then attends to padding.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["attn_implementation"] = {"adaptor_config": "sdpa"}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def native_processor(processor: SpeechLLMProcessor) -> FunAsrNanoProcessor:
    """Converts a processor to the native class, with the same tokenizer, prompts and feature options."""
    ours = processor.feature_extractor
    features = FunAsrNanoFeatureExtractor(
        window=ours.window_type,
        # Unknown to the native class, or dropped when it is saved (window); stored for the conversion back.
        window_type=ours.window_type,
        waveform_scale=ours.waveform_scale,
        dither=ours.dither,
        **{name: getattr(processor, name) for name in DIALOGUE_FIELDS},
        **{name: getattr(ours, name) for name in FEATURE_FIELDS},
    )
    tokenizer = copy.deepcopy(processor.tokenizer)
    # `generate` needs padding on the left; the native processor uses the padding settings of its tokenizer.
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs.update(padding=True, padding_side="left")
    template = chat_template(processor.audio_token, processor.think_block, processor.system_prompt)
    return FunAsrNanoProcessor(features, tokenizer, chat_template=template, audio_token=processor.audio_token)


def _to_native(name: str) -> str:
    return next((native + name[len(ours) :] for ours, native in PREFIXES if name.startswith(ours)), name)


def _to_ours(name: str) -> str:
    return next((ours + name[len(native) :] for ours, native in PREFIXES if name.startswith(native)), name)
