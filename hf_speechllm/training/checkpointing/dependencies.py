"""Record of the dependencies of a run: part of every checkpoint, compared when a run resumes.

`dependencies.json` contains one JSON object:

- `version`: version of this format.
- `options`: options that can affect the result, without paths, logging and the Hub.
- `model`: `config` (without versions and paths); `trained` (number of trained parameters of each part); `adapter`
  (settings of LoRA, or null); `base` (SHA-256 of frozen weights, if the checkpoint lacks these weights or cached
  features depend on them; otherwise null).
- `tokenizer`: SHA-256 of vocabulary and rules, SHA-256 of the chat template, special tokens.
- `generation`: generation configuration for validation.
- `dialogues`: settings of the processor; `features`: settings of the feature extractor.
- `data`: `rows`, `files` (number of rows of each file), `order_seed`, and SHA-256 of `ids` (names of recordings),
  `texts` (dialogues and hotwords) and `weights`; for a stream, `shards` (sizes of the files).
- `recordings`: CRC-32 of sizes and of modification times of the recordings (for a stream, of the files), for at most
  10,000 blocks of consecutive rows.
- `validation`, `validation_recordings`: SHA-256 of the rows and of the recordings' stamps, for each validation set.
- `hotword_file`: SHA-256 of the file; `augmentation`: SHA-256 of names and sizes of the recordings in each folder of
  noises and impulse responses.
- `device`: cpu, or the name of the GPU; `engine`: none, fsdp, or deepspeed with the stage; `engine_settings`:
  settings such as offloading and precision; `processes`; `versions` of libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ...audio.noise import recordings_in
from ...data.augmentation_options import source_folders
from ...data.column_values import BATCH_ROWS, read_column
from ...data.streaming import RowStream
from ...files import atomic_write
from ...model import chat
from ...version import __version__
from ..arguments import SpeechLLMTrainingArguments
from ..freezing import count_parameters

RECORD_FILE = "dependencies.json"
VERSION = 1
MAX_BLOCKS = 10_000
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets")
# Options that are not recorded, by the reason why they do not affect the result. Any other option is recorded.
HARMLESS = {
    "paths; the files are compared": ("output_dir", "cache_dir"),
    "options of resuming": ("resume_from_checkpoint", "ignore_data_skip"),
    "publishes the finished model": (
        "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
        "hub_always_push",
    ),
    "logging": (
        "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps",
        "logging_strategy", "logging_nan_inf_filter", "report_to", "run_name", "project", "trackio_bucket_id",
        "trackio_space_id", "trackio_static_space_id", "disable_tqdm", "skip_memory_metrics",
        "include_num_input_tokens_seen", "include_for_metrics",
    ),
    "set by the launcher; the number of processes is recorded": ("local_rank", "ddp_timeout"),
    "features do not depend on the number of processes": ("preprocessing_num_workers",),
    "limits of downloads: a recording is complete or an error": (
        "url_max_megabytes", "url_timeout_seconds", "allow_private_redirects",
    ),
    "refused, see inherited_options.py": ("do_train", "do_eval", "do_predict"),
    "only detects overflows": ("debug",),
}  # fmt: skip
DEEPSPEED_SETTINGS = ("zero_optimization", "bf16", "fp16", "gradient_clipping")
FSDP_SETTINGS = ("reshard_after_forward", "cpu_offload", "mixed_precision_policy", "auto_wrap_policy")
DIALOGUE_FIELDS = (
    "audio_token", "downsample_rate", "use_low_frame_rate", "encoder_downsample_rate", "think_block", "system_prompt",
    "encoder_convolutions", "chat_layout",
)  # fmt: skip
CONFIG_NOTES = re.compile(  # the record of the tokenizer contains the tokens
    r"transformers_version|_?name_or_path|(torch_)?dtype|architectures|funasr_files|(bos|eos|pad)_token_id|_.*"
)
_HARMLESS = {name for names in HARMLESS.values() for name in names}
_RECORDING = re.compile(f"(?<={re.escape(chat.SPEECH_START)}!).*?(?={re.escape(chat.SPEECH_END)})", re.DOTALL)


def describe_engine(accelerator: Accelerator) -> tuple[str, dict[str, Any]]:
    """Returns name and settings of the engine: `none`, `fsdp`, or `deepspeed` with the stage."""
    state = accelerator.state
    if (plugin := state.deepspeed_plugin) is not None:
        config = plugin.deepspeed_config
        return f"deepspeed, stage {plugin.zero_stage}", {name: config.get(name) for name in DEEPSPEED_SETTINGS}
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        return "fsdp", {name: str(getattr(plugin, name, None)) for name in FSDP_SETTINGS}
    return "none", {}


def describe_run(
    args: SpeechLLMTrainingArguments,
    model,
    processor,
    train_rows,
    weights,
    validation,
    engine: tuple[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Collects the dependencies of a run; must be called by all ranks. The first rank broadcasts the record.

    Args:
        args: of the run.
        model: before training, with or without adapters.
        processor: of the model.
        train_rows: a `datasets.Dataset` or a `RowStream`.
        weights: how often an epoch uses each row, shape = (rows,), or `None`.
        validation: rows, a dict of rows by name, or `None`.
        engine: result of `describe_engine`.

    Returns:
        The record; see the docstring of the module.
    """
    columns = getattr(train_rows, "column_names", None) or ()
    kept = args.save_only_trained or {"encoder_states", "audio_tokens"} & {*columns}
    base = _hash_frozen(model, args.process_index == 0) if kept or hasattr(model, "peft_config") else None
    record: list[Any] = [None]
    if args.process_index == 0:
        record = [_describe(args, model, processor, train_rows, weights, validation)]
        record[0]["engine"], record[0]["engine_settings"] = engine[0], _as_json(engine[1])
        record[0]["model"]["base"] = base
    if args.world_size > 1:
        broadcast_object_list(record)
    return record[0]


def _describe(args: SpeechLLMTrainingArguments, model, processor, train_rows, weights, validation) -> dict[str, Any]:
    """Collects the parts of the record that need one rank only."""
    sets = validation if isinstance(validation, dict) else {"validation": validation} if validation else {}
    describe = _describe_stream if isinstance(train_rows, RowStream) else _describe_rows
    data, recordings = describe(train_rows)
    data["order_seed"] = args.data_seed if args.data_seed is not None else args.seed
    data["weights"] = None if weights is None else _sha(np.ascontiguousarray(weights, dtype=np.float64).tobytes())
    record = {
        "version": VERSION,
        "options": describe_options(args),
        "model": {
            "config": _without_notes(model.config.to_dict()),
            "trained": {part: trained for part, (trained, _) in count_parameters(model).items()},
            "adapter": _describe_adapter(model),
        },
        "generation": _without_notes(model.generation_config.to_dict()),
        "dialogues": {name: getattr(processor, name) for name in DIALOGUE_FIELDS},
        "tokenizer": _describe_tokenizer(processor.tokenizer),
        "features": _without_notes(processor.feature_extractor.to_dict()),
        "data": data,
        "recordings": recordings,
        "validation": {name: _hash_texts(rows) for name, rows in sets.items()},
        "validation_recordings": {name: _hash_stamps(rows) for name, rows in sets.items()},
        "hotword_file": _hash_file(args.run_options.get("hotword_file")),
        "augmentation": _hash_folders(args.run_options),
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "versions": {"hf_speechllm": __version__, **{name: version(name) for name in LIBRARIES}},
    }
    return _as_json(record)


def describe_options(args: SpeechLLMTrainingArguments) -> dict[str, Any]:
    """Returns the options that can affect the result, by name."""
    values = {**args.run_options, **args.to_dict()}
    options = {name: value for name, value in values.items() if name not in _HARMLESS}
    if not options.get("use_lora"):
        options = {name: value for name, value in options.items() if not name.startswith("lora_")}
    return _as_json(options)


def write_record(record: Mapping[str, Any], args: SpeechLLMTrainingArguments, folder: Path) -> None:
    """Writes a record into a checkpoint, with the current options, which include a measured batch budget."""
    with atomic_write(folder / RECORD_FILE) as file:
        json.dump({**record, "options": describe_options(args)}, file, indent=1, ensure_ascii=False)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Reads the record of a checkpoint; returns `None` if the checkpoint has no record."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_file(path: str | None) -> str | None:
    return _sha(Path(path).read_bytes()) if path is not None and Path(path).is_file() else None


def _hash_folders(options: Mapping[str, Any]) -> dict[str, str] | None:
    hashes: dict[str, str] = {}
    for folder in source_folders(options):
        files = [(os.path.relpath(file, folder), os.path.getsize(file)) for file in recordings_in(folder)]
        name = os.path.basename(os.path.abspath(folder))
        hashes[name] = _sha((hashes.get(name, "") + json.dumps(files)).encode())  # two folders may have one name
    return hashes or None


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_notes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not CONFIG_NOTES.fullmatch(str(key))
    }


# Data


def _describe_rows(rows) -> tuple[dict[str, Any], dict[str, list[int]]]:
    known = {*rows.column_names}
    files = Counter(map(os.path.basename, read_column(rows, "file"))) if "file" in known else {}
    ids = hashlib.sha256()
    for batch in _batches(rows, ["recordings"]):
        names = [[name.rsplit("/", 1)[-1] for name in names] for names in batch["recordings"]]
        ids.update(json.dumps(names).encode())
    stamps = (read_column(rows, "stamps"), len(rows)) if "stamps" in known else ((), 0)
    return {"rows": len(rows), "files": files, "ids": ids.hexdigest(), "texts": _hash_texts(rows)}, _blocks(*stamps)


def _describe_stream(stream: RowStream) -> tuple[dict[str, Any], dict[str, list[int]]]:
    files = {shard.file: os.stat(shard.file) for shard in stream.shards}
    sizes = {os.path.basename(file): status.st_size for file, status in files.items()}
    stamps = [[f"{status.st_size}-{status.st_mtime_ns}"] for status in files.values()]
    return {"shards": sizes}, _blocks(stamps, len(stamps))


def _hash_texts(rows) -> str:
    digest = hashlib.sha256()
    for batch in _batches(rows, ["messages", "hotwords"]):
        if "messages" in batch:  # recordings may be in another folder
            batch["messages"] = [_RECORDING.sub("", text) for text in batch["messages"]]
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def _hash_stamps(rows) -> str | None:
    return _sha(json.dumps(rows["stamps"][:]).encode()) if "stamps" in rows.column_names else None


def _batches(rows, columns: list[str]) -> Iterator[dict[str, list]]:
    known = [name for name in columns if name in rows.column_names]
    if known:
        yield from rows.with_format(None).select_columns(known).iter(BATCH_ROWS)


def _blocks(stamps: Iterable[list[str]], count: int) -> dict[str, Any]:
    """Returns checksums of stamps (`source_stamp`) by blocks of rows, so that a change can be located."""
    size = max(1, -(-count // MAX_BLOCKS))
    blocks: dict[str, list[int]] = {"sizes": [], "times": []}
    remaining = iter(stamps)
    while block := list(itertools.islice(remaining, size)):
        parts = [stamp.partition("-") for row in block for stamp in row]
        blocks["sizes"].append(zlib.crc32(",".join(part[0] for part in parts).encode()))
        blocks["times"].append(zlib.crc32(",".join(part[2] for part in parts).encode()))
    return {"rows_of_block": size, **blocks}


# Model and processor


def _describe_adapter(model) -> dict[str, Any] | None:
    settings: dict[str, Any] = {}
    for config in getattr(model, "peft_config", {}).values():
        values = config.to_dict()
        settings |= {
            key: sorted(map(str, value)) if isinstance(value, (list, set)) else value
            for key, value in values.items()
            if key not in ("base_model_name_or_path", "peft_version", "inference_mode", "revision", "auto_mapping")
        }
    return settings or None


def _describe_tokenizer(tokenizer) -> dict[str, Any]:
    if getattr(tokenizer, "is_fast", False):  # the tokenizer of mistral-common lacks some attributes
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {
            key: value for key, value in rules.items() if key not in ("padding", "truncation")
        }  # depend on the last call
    else:
        rules = tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": _sha(json.dumps(rules, sort_keys=True).encode()),
        "chat_template": None if template is None else _sha(json.dumps(template, sort_keys=True).encode()),
        "special_tokens": {name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()},
    }


def _hash_frozen(model, first: bool) -> str | None:
    """Returns the SHA-256 of frozen weights as float32 on the first rank; all ranks gather shards."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or ".original_module." in name:
            continue
        with _gathered(parameter):
            if first:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest() if first else None


@contextlib.contextmanager
def _gathered(parameter: torch.nn.Parameter) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        yield
