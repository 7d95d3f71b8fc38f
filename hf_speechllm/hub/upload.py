"""Upload to the Hub, in the most widely supported layout, with a model card and without private information."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..audio.fbank import FbankFeatureExtractor
from ..console import format_seconds
from ..formats import native
from ..formats.checkpoint import MAX_SHARD_SIZE, Checkpoint, CheckpointError
from ..formats.families import FamilyCheckpoint
from ..formats.loading import checkpoint_of
from ..model.configuration import SpeechLLMConfig
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import ALL_PARTS, FAMILIES, PARTS, part_of
from ..model.native_processing import NativeProcessor
from ..model.processing import SpeechLLMProcessor
from .code import CODE_FOLDER, PACKAGE, write_code

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TAGS = ["automatic-speech-recognition", "speech_llm"]
# Sections of a FunASR config.yaml that describe the model. Other sections (data lists, output folder, trainer, tokens
# of trackers) describe a training run and are private.
MODEL_SECTIONS = (
    "model", "model_conf", "audio_encoder", "audio_encoder_conf", "audio_adaptor", "audio_adaptor_conf", "llm",
    "llm_conf", "frontend", "frontend_conf", "tokenizer", "tokenizer_conf", "ctc_decoder", "ctc_decoder_conf",
    "ctc_conf", "ctc_weight", "ctc_vocab_size", "ctc_tokenizer", "ctc_tokenizer_conf", "detach_ctc_decoder",
    "hf_speechllm",
)  # fmt: skip
DIALOGUE_KEYS = ("do_think", "sys_prompt", "ctc_tokenizer", "ctc_tokenizer_conf")  # public keys of `dataset_conf`
ABSOLUTE_PATH = re.compile(r"[/~]|[A-Za-z]:[\\/]|\\\\|file:", re.IGNORECASE)


def hub_id(name: str) -> str | None:
    """Returns the Hub id of a model name; `None` for a local folder or an invalid id."""
    if not name or os.path.exists(name) or os.path.isabs(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_exportable(config: SpeechLLMConfig, processor: SpeechLLMProcessor | None = None) -> bool:
    """Returns whether transformers' `fun_asr_nano` class computes the same results as this model."""
    try:
        native.check_exportable(config, processor=processor)
    except CheckpointError:
        return False
    return True


def without_paths(config: SpeechLLMConfig) -> SpeechLLMConfig:
    """Returns a copy of a config without private settings of FunASR files: local paths and sections about a run."""
    config = SpeechLLMConfig.from_dict(config.to_dict())
    files = {}
    for file, content in (config.funasr_files or {}).items():
        if file.endswith(".yaml"):
            dialogue = content.get("dataset_conf") or {}
            dialogue = {key: dialogue[key] for key in DIALOGUE_KEYS if key in dialogue}
            content = {key: content[key] for key in MODEL_SECTIONS if key in content}
            content |= {"dataset_conf": dialogue} if dialogue else {}
        files[file] = _without_absolute(content)
    config.funasr_files = files or None
    return config


def _without_absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_absolute(item) for key, item in value.items() if not _is_absolute(item)}
    if isinstance(value, list):
        return [_without_absolute(item) for item in value if not _is_absolute(item)]
    return value


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and ABSOLUTE_PATH.match(value) is not None


def usage(name: str, model_type: str = SpeechLLMConfig.model_type) -> str:
    """Returns the section of a card about transcription with the model.

    Args:
        name: Hub id or folder name of the model; a folder name may contain any character.
        model_type: of the config; a native speech LLM needs no conversion.
    """
    name = "".join(char if char.isprintable() and char != "`" else " " for char in name)  # cannot end the code block
    quoted, argument = json.dumps(name, ensure_ascii=False), shlex.quote(name)
    conversion = f"""

For transformers without `hf_speechllm` (`fun_asr_nano`) or FunASR, convert the model: `hf-speechllm convert --input
{argument} --output converted --format native` (or `funasr`). If the model would give different results there, the
conversion is refused with the reason."""
    return f"""## Use
```python
from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.inference.transcriber import Transcriber

model = SpeechLLMForConditionalGeneration.from_pretrained({quoted})
processor = SpeechLLMProcessor.from_pretrained({quoted})
Transcriber(model, processor).transcribe(["recording.wav"])
```

With lists, on the command line:

```bash
hf-speechllm decode --model_name_or_path {argument} --scp_file wav.scp --output_file hyp.txt
```{"" if model_type in FAMILIES else conversion}"""


def layout_note(repo_id: str, in_native: bool, checkpoint: Checkpoint | FamilyCheckpoint | None = None) -> str:
    """Returns the section of a card about the repository's layout.

    Args:
        in_native: whether the repository has a layout of transformers.
        checkpoint: `None` for adapters.
    """
    if in_native:
        is_family = isinstance(checkpoint, FamilyCheckpoint)
        name = checkpoint.config.model_type if checkpoint is not None and is_family else native.MODEL_TYPE
        difference = """

This class computes the same results. Its feature extractor has a higher noise floor (it does not scale the waveform by
2^15 before the logarithm), so transcripts of very quiet recordings may differ."""
        return f"""## Layout
This repository has the layout of transformers' own `{name}`, so it also loads without `hf_speechllm`:

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repo_id}")
processor = AutoProcessor.from_pretrained("{repo_id}")
```{"" if is_family else difference}"""
    return f"""## Layout
This repository has the layout of `hf_speechllm`, because no class of transformers supports this model. The package is
in the folder `{CODE_FOLDER}`:

```bash
hf download {repo_id} --include "{CODE_FOLDER}/*" --local-dir speech_llm && pip install ./speech_llm/{CODE_FOLDER}
```

It has the commands `hf-speechllm decode` and `align`.
`decode --vad` needs `pip install './speech_llm/{CODE_FOLDER}[vad]'`."""


def plain_card(repo_id: str, checkpoint: Checkpoint | FamilyCheckpoint, source: str) -> str:
    """Builds the card of a model without information about its training.

    Args:
        source: folder or Hub id from which the model was loaded.
    """
    base, config = hub_id(source), checkpoint.config
    front_matter = ModelCardData(library_name="transformers", base_model=base, tags=TAGS, pipeline_tag=TAGS[0])
    sizes = dict.fromkeys(ALL_PARTS, 0)
    for name, tensor in checkpoint.tensors.items():
        sizes[part_of(name)] += tensor.numel()
    if isinstance(checkpoint, FamilyCheckpoint):
        types, tokens = [config.model_type] * len(PARTS), ""
    else:
        types = [config.audio_encoder_config.model_type, config.audio_adaptor_config.adaptor_type]
        types.append(config.llm_config.model_type)
        if config.ctc_head_config is not None:
            types.append(config.ctc_head_config.head_type)
        tokens = f"The adaptor converts {config.downsample_rate} encoder frame(s) to one audio token for the LLM."
        if config.use_low_frame_rate:
            tokens += " The LLM receives only the first eighth of these tokens."
    rows = [f"| {part} | {kind} | {sizes[part] / 1e6:,.2f} |" for part, kind in zip(ALL_PARTS, types, strict=False)]
    sections = [
        f"---\n{front_matter.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}",
        "A speech LLM (audio encoder, adaptor, causal LLM) that transcribes speech"
        + (f", from [{base}](https://huggingface.co/{base})." if base else "."),
        "## Parts\n| part | type | million parameters |\n| --- | --- | --- |\n" + "\n".join(rows),
        tokens,
        usage(repo_id, config.model_type),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write_model(
    checkpoint: Checkpoint | FamilyCheckpoint, processor: SpeechLLMProcessor | None, folder: Path, **options: Any
) -> bool:
    """Writes a model for publishing to an existing folder, in the native layout if `is_exportable`.

    Args:
        processor: `None` if the processor is published separately.
        options: `max_shard_size`.

    Returns:
        Whether the native layout was used.
    """
    from ..formats.loading import NATIVE, OWN
    from ..formats.saving import write_files

    if isinstance(checkpoint, FamilyCheckpoint):
        write_files(checkpoint, processor, folder, OWN, **options)
        return True
    in_native = is_exportable(checkpoint.config, processor)
    clean = dataclasses.replace(checkpoint, config=without_paths(checkpoint.config))
    write_files(clean, processor, folder, NATIVE if in_native else OWN, **options)
    if not in_native:
        write_code(folder)
    return in_native


def upload(folder: Path, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any) -> CommitInfo:
    """Creates a missing repository and uploads a folder in one commit. After an interruption, call this again.

    Args:
        commit: options of `HfApi.upload_folder` (`commit_message`, `revision`, ...).

    Raises:
        OSError: if the Hub refuses the upload, or cannot be reached.
    """
    api = HfApi(library_name=PACKAGE.name, token=token)
    with reporting_unreachable(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        logger.info("uploading %d files, %.1f MB, to %s", len(sizes), sum(sizes) / 1e6, repo_id)
        started = time.monotonic()
        uploaded = api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)
        logger.info("uploaded in %s", format_seconds(time.monotonic() - started))
        return uploaded


@contextlib.contextmanager
def reporting_unreachable(repo_id: str) -> Iterator[None]:
    """Converts exceptions of the HTTP client without a connection to `ConnectionError`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError):
        raise
    except Exception as error:  # releases of huggingface_hub use different HTTP clients
        raise ConnectionError(f"{repo_id}: the Hub cannot be reached: {error}") from error


def push_model(
    model: SpeechLLMForConditionalGeneration,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **commit: Any,
) -> CommitInfo:
    """Implements `SpeechLLMForConditionalGeneration.push_to_hub`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, checkpoint = Path(temporary), checkpoint_of(model)
        in_native = write_model(checkpoint, None, folder, max_shard_size=max_shard_size)
        source = model.config.name_or_path
        card = read_card(Path(source)) or plain_card(repo_id, checkpoint, source)
        (folder / CARD_FILE).write_text(
            f"{card.rstrip()}\n\n{layout_note(repo_id, in_native, checkpoint)}\n", encoding="utf-8"
        )
        return upload(folder, repo_id, private, token, **commit)


def push_processor(
    processor: SpeechLLMProcessor, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any
) -> CommitInfo:
    """Implements `SpeechLLMProcessor.push_to_hub`. `SpeechLLMProcessor` reads both layouts."""
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(processor, NativeProcessor):
            processor.save_pretrained(temporary)
            return upload(Path(temporary), repo_id, private, token, **commit)
        stock = isinstance(processor.feature_extractor, FbankFeatureExtractor) and not processor.use_low_frame_rate
        stock = stock and processor.downsample_rate == 1 and processor.chat_layout is None
        (native.native_processor(processor) if stock else processor).save_pretrained(temporary)
        return upload(Path(temporary), repo_id, private, token, **commit)


def read_card(folder: Path) -> str | None:
    """Reads the card that training wrote to a folder, if any."""
    file = folder / CARD_FILE
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    front_matter = text.partition("\n---")[0]
    return text if text.startswith("---") and f"- {TAGS[-1]}" in front_matter.split("\n") else None
