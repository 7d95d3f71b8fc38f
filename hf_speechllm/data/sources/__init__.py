"""Sources of training data in the layouts of corpora and other tools."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from ...audio.waveform import AUDIO_SUFFIXES
from ..bad_rows import BadDataError
from ..utterance import Utterance
from . import corpora, dialogues, hugging_face, lhotse_cuts, named_files, tables
from .reading import Reading, find_lists

Reader = Callable[[str, Reading], Iterator[Utterance]]

# Detector and reader of each format. The first format whose detector accepts a source is used.
SOURCES: dict[str, tuple[Callable[[str], bool], Reader]] = {
    "kaldi": (corpora.is_kaldi, corpora.read_kaldi),
    "aishell": (corpora.is_aishell, corpora.read_aishell),
    "wenetspeech": (corpora.is_wenetspeech, corpora.read_long_recordings),
    "gigaspeech": (corpora.is_gigaspeech, corpora.read_long_recordings),
    "common-voice": (tables.is_common_voice, tables.read_delimited),
    "ljspeech": (tables.is_ljspeech, tables.read_ljspeech),
    "datasets": (hugging_face.is_saved, hugging_face.read_saved),
    "lhotse-shar": (lhotse_cuts.is_shar, lhotse_cuts.read_shar),
    "lhotse": (lhotse_cuts.is_cuts, lhotse_cuts.read_cuts),
    "ms-swift": (lambda source: dialogues.is_dialogue(source) and not _is_list(source), dialogues.read_dialogues),
    "llama-factory": (dialogues.is_dialogue, dialogues.read_dialogues),
    "chatml": (dialogues.is_chatml, dialogues.read_chatml),
    "nemo": (tables.has_keys("audio_filepath"), tables.read_json_table),
    "funasr": (tables.has_keys("source", "target"), tables.read_json_table),
    "qwen3-asr": (tables.is_qwen3_asr, tables.read_json_table),
    "csv": (tables.is_delimited, tables.read_delimited),
    "json": (tables.is_json_table, tables.read_json_table),
    "librispeech": (corpora.is_librispeech, corpora.read_librispeech),
    "sidecar": (named_files.is_sidecar, named_files.read_sidecar),
    "names": (named_files.is_name_list, named_files.read_name_list),
    "parquet": (hugging_face.is_parquet, hugging_face.read_parquet),
    "hub": (hugging_face.is_hub_id, hugging_face.read_hub),
}

TABLE = "write a table, for example recordings.csv, with the columns audio (path) and text, and pass the table"
WITHOUT_LIST = f"recordings, but no list of transcripts in a known layout; {TABLE}"
# What to do with files of other kinds, by suffix. The first kind found counts: archives often lie beside the files.
ADVICE = {
    (".scp",): "Kaldi lists are called wav.scp and text; for other names, see `hf-speechllm scp2jsonl --help`",
    AUDIO_SUFFIXES: WITHOUT_LIST,
    (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar"): "packed; unpack the corpus and pass its folder",
    (".tar",): "shards need no preparation; pass the tar files (FOLDER/*.tar) to training (--train_file) or to doctor",
    (".xlsx", ".xls", ".ods"): "a spreadsheet; save it as CSV (UTF-8), and pass the CSV",
    (".arrow",): "a part of a data set; pass the folder of save_to_disk, or a Parquet file",
    (".list",): "a list of files; pass it to training (--train_file) or to doctor",
    (".jsonl.gz",): "manifests of lhotse without cuts; make cuts with `lhotse cut simple`, and pass the cuts",
}


def recognize(source: str) -> str | None:
    """Returns the format of a source; `None` if no format is detected."""
    return next((name for name, (is_one, _) in SOURCES.items() if is_one(source)), None)


def read_source(source: str, reading: Reading, format: str | None = None) -> Iterator[Utterance]:
    """Reads the utterances of a source.

    Args:
        source: file or folder, or the id of a data set on the Hub.
        reading: options; receives bad rows.
        format: one of `SOURCES`; default: result of `recognize`.

    Raises:
        BadDataError: if no format is detected, or the whole source is unusable.
        OSError: if a file cannot be read.
    """
    format = format or recognize(source)
    if format is None:
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        formats = ", ".join(SOURCES)
        raise unknown_layout(source, f"unknown layout; {TABLE}, or set --format to one of {formats}")
    return SOURCES[format][1](source, reading)


def unknown_layout(source: str, otherwise: str) -> BadDataError:
    """Returns the error for a source of unknown format.

    Args:
        source: file or folder.
        otherwise: message unless the source is, or contains, a file of a known kind.
    """
    names = [source] if os.path.isfile(source) else [name for *_, found in os.walk(source) for name in found]
    kinds = {suffixes for name in names for suffixes in ADVICE if name.lower().endswith(suffixes)}
    return BadDataError(f"{source}: {next((text for kind, text in ADVICE.items() if kind in kinds), otherwise)}")


def _is_list(source: str) -> bool:
    """Returns whether a source has JSON lists (LLaMA-Factory) instead of JSONL (ms-swift)."""
    lists = find_lists(source, tables.JSON_SUFFIXES)
    if not lists:
        return False
    with open(lists[0][0], "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
