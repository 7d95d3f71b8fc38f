"""Publishing on the Hub: in the layout that most readers can load, with a card, and nothing that is private."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCardData

from ..audio.fbank import FbankFeatureExtractor
from ..formats import native
from ..formats.checkpoint import MAX_SHARD_SIZE, Checkpoint, CheckpointError
from ..model.configuration import SpeechLLMConfig
from ..model.modeling import PARTS, SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from .code import CODE_FOLDER, PACKAGE, write_code

CARD_FILE = "README.md"
TAGS = ["automatic-speech-recognition", "speech_llm"]
# Of a FunASR config.yaml, what describes the model. The rest (data lists, output folder, trainer, trackers with their
# tokens) is about somebody's run.
MODEL_SECTIONS = (
    "model", "model_conf", "audio_encoder", "audio_encoder_conf", "audio_adaptor", "audio_adaptor_conf", "llm",
    "llm_conf", "frontend", "frontend_conf", "tokenizer", "tokenizer_conf", "ctc_decoder", "ctc_decoder_conf",
    "ctc_conf", "ctc_weight", "ctc_vocab_size", "ctc_tokenizer", "ctc_tokenizer_conf", "detach_ctc_decoder",
    "hf_speechllm",
)  # fmt: skip
DIALOGUE_KEYS = ("do_think", "sys_prompt", "ctc_tokenizer", "ctc_tokenizer_conf")  # of its `dataset_conf`
ABSOLUTE_PATH = re.compile(r"[/~]|[A-Za-z]:[\\/]|\\\\|file:", re.IGNORECASE)


def hub_id(name: str) -> str | None:
    """The Hub id that a model was loaded by; `None` for a folder of this machine."""
    return None if not name or os.path.exists(name) or os.path.isabs(name) or name.count("/") > 1 else name


def is_native(config: SpeechLLMConfig) -> bool:
    """Whether transformers' own `fun_asr_nano` class computes what this model does."""
    try:
        native.check_exportable(config)
    except CheckpointError:
        return False
    return True


def without_paths(config: SpeechLLMConfig) -> SpeechLLMConfig:
    """A copy without what a FunASR checkpoint's files tell of the machine and the run that they come from."""
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


def usage(name: str) -> str:
    """The section of a card that says how to transcribe with the model.

    Args:
        name: Hub id, or the name of its folder.
    """
    return f"""## Use
```python
from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.inference.transcriber import Transcriber

model = SpeechLLMForConditionalGeneration.from_pretrained("{name}")
processor = SpeechLLMProcessor.from_pretrained("{name}")
Transcriber(model, processor).transcribe(["recording.wav"])
```

With lists, on the command line:

```bash
hf-speechllm decode --model_name_or_path {name} --scp_file wav.scp --output_file hyp.txt
```

For stock transformers (`fun_asr_nano`) or FunASR, convert it: `hf-speechllm convert --input {name}
--output converted --format native` (or `funasr`). Where the model would behave differently there, this is refused, and
the reason given."""


def layout_note(repo_id: str, in_native: bool) -> str:
    """The section of a card that says which layout the repository has, and what loads it."""
    if in_native:
        return f"""## Layout
This repository has the layout of transformers' own `fun_asr_nano`, so that it also loads without `hf_speechllm`:

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repo_id}")
processor = AutoProcessor.from_pretrained("{repo_id}")
```

That class computes what the model was trained to do. Its feature extractor has a higher noise floor (it does not scale
the waveform by 2^15 before the logarithm), so that transcripts of very quiet recordings may differ."""
    return f"""## Layout
This repository has the layout of `hf_speechllm`, which no class of transformers can hold. The package is in its folder
`{CODE_FOLDER}`:

```bash
hf download {repo_id} --include "{CODE_FOLDER}/*" --local-dir speech_llm && pip install ./speech_llm/{CODE_FOLDER}
```"""


def plain_card(repo_id: str, checkpoint: Checkpoint, source: str) -> str:
    """The card of a model of whose training nothing is known.

    Args:
        source: what it was loaded from.
    """
    base, config = hub_id(source), checkpoint.config
    front_matter = ModelCardData(library_name="transformers", base_model=base, tags=TAGS, pipeline_tag=TAGS[0])
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in checkpoint.tensors.items():
        sizes[name.split(".", 1)[0]] += tensor.numel()
    types = [config.audio_encoder_config.model_type, config.audio_adaptor_config.adaptor_type]
    types.append(config.llm_config.model_type)
    rows = [f"| {part} | {kind} | {sizes[part] / 1e6:,.2f} |" for part, kind in zip(PARTS, types, strict=True)]
    kept = " Of these, it reads the first eighth." if config.use_low_frame_rate else ""
    sections = [
        f"---\n{front_matter.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}",
        "A speech LLM (audio encoder, adaptor, causal LLM) that transcribes speech"
        + (f", from [{base}](https://huggingface.co/{base})." if base else "."),
        "## Parts\n| part | type | million parameters |\n| --- | --- | --- |\n" + "\n".join(rows),
        f"The adaptor makes one audio token for the LLM of {config.downsample_rate} encoder frame(s).{kept}",
        usage(repo_id),
    ]
    return "\n\n".join(sections) + "\n"


def write_model(checkpoint: Checkpoint, processor: SpeechLLMProcessor | None, folder: Path, **options: Any) -> bool:
    """Writes what is published of a model into an existing folder: natively where it behaves the same there.

    Args:
        processor: `None` if it is published by itself.
        options: `max_shard_size`.

    Returns:
        Whether it was written natively.
    """
    from ..formats.loading import NATIVE, OWN, write_files

    in_native = is_native(checkpoint.config)
    clean = dataclasses.replace(checkpoint, config=without_paths(checkpoint.config))
    write_files(clean, processor, folder, NATIVE if in_native else OWN, **options)
    if not in_native:
        write_code(folder)
    return in_native


def upload(folder: Path, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any) -> CommitInfo:
    """Creates the repository if it is not there and uploads a folder in one commit; may be repeated.

    Args:
        commit: `commit_message`, `revision` and the like of `HfApi.upload_folder`.
    """
    api = HfApi(library_name=PACKAGE.name, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)


def push_model(
    model: SpeechLLMForConditionalGeneration,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **commit: Any,
) -> CommitInfo:
    """What `SpeechLLMForConditionalGeneration.push_to_hub` does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, checkpoint = Path(temporary), Checkpoint.of(model)
        in_native = write_model(checkpoint, None, folder, max_shard_size=max_shard_size)
        source = model.config.name_or_path
        card = read_card(Path(source)) or plain_card(repo_id, checkpoint, source)
        (folder / CARD_FILE).write_text(f"{card.rstrip()}\n\n{layout_note(repo_id, in_native)}\n", encoding="utf-8")
        return upload(folder, repo_id, private, token, **commit)


def push_processor(
    processor: SpeechLLMProcessor, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any
) -> CommitInfo:
    """What `SpeechLLMProcessor.push_to_hub` does; ours reads both forms, whichever the model has."""
    with tempfile.TemporaryDirectory() as temporary:
        stock = isinstance(processor.feature_extractor, FbankFeatureExtractor) and not processor.use_low_frame_rate
        stock = stock and processor.downsample_rate == 1
        (native.native_processor(processor) if stock else processor).save_pretrained(temporary)
        return upload(Path(temporary), repo_id, private, token, **commit)


def read_card(folder: Path) -> str | None:
    """The card that training wrote into a folder, if there is one."""
    file = folder / CARD_FILE
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    front_matter = text.partition("\n---")[0]
    return text if text.startswith("---") and f"- {TAGS[-1]}" in front_matter.split("\n") else None
