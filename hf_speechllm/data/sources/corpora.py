"""Readers of Kaldi data folders, LibriSpeech, AISHELL-1, WenetSpeech and GigaSpeech."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from ...audio.waveform import AUDIO_SUFFIXES
from ..bad_rows import BadDataError, BadRows
from ..kaldi import KaldiList, join, read_list, read_scp, read_segments, require_transcripts
from ..utterance import Utterance
from .json_arrays import read_array
from .reading import HEAD_BYTES, Reading, language_code, split_of

logger = logging.getLogger(__name__)

AISHELL_TRANSCRIPT = "transcript/aishell_transcript_v0.8.txt"
# Tags in GigaSpeech's `text_tn`: punctuation, and segments without speech.
PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
NO_SPEECH = {"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"}
_PUNCTUATION = re.compile(rf"\s*({'|'.join(PUNCTUATION)})")
_DATASET = re.compile(rb'"dataset"\s*:\s*"(WenetSpeech|GigaSpeech)', re.IGNORECASE)
# All spaces except those between Latin words. Chinese transcripts often have spaces between words.
_SPACES = re.compile(r"(?<![A-Za-z0-9'])\s+|\s+(?![A-Za-z0-9'])")


def is_kaldi(source: str) -> bool:
    """Returns whether a source is a Kaldi data folder, or contains Kaldi data folders named after splits."""
    return bool(_kaldi_folders(source))


def _kaldi_folders(source: str) -> list[tuple[str, str | None]]:
    if _has_lists(source):
        return [(source, None)]
    return _split_folders(source)


def _has_lists(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("wav.scp", "text"))


def _split_folders(source: str) -> list[tuple[str, str | None]]:
    root = glob.escape(source)
    found = glob.glob(f"{root}/*/wav.scp") or glob.glob(f"{root}/data/*/wav.scp")  # the root of a Kaldi recipe
    found = sorted(map(os.path.dirname, found))
    named = ((folder, split_of(os.path.basename(folder))) for folder in found)
    return [(folder, split) for folder, split in named if split and _has_lists(folder)]


def read_kaldi(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `wav.scp` and `text`, and `segments`, `utt2spk` and `utt2lang` if the files exist."""
    folders = _kaldi_folders(source)
    if others := [os.path.basename(folder) for folder, _ in _split_folders(source) if (source, None) in folders]:
        logger.warning("%s: the lists of this folder are read, the folders %s are not", source, ", ".join(others))
    for folder, split in folders:
        bad_rows = reading.bad_rows
        transcripts = read_list(os.path.join(folder, "text"), bad_rows, "transcript")
        require_transcripts(transcripts)
        recordings = read_scp(os.path.join(folder, "wav.scp"), bad_rows)
        if os.path.isfile(segments := os.path.join(folder, "segments")):
            recordings = read_segments(segments, recordings, bad_rows)
        speakers, languages = (_optional(os.path.join(folder, name), bad_rows) for name in ("utt2spk", "utt2lang"))
        for item in join(recordings, transcripts, bad_rows):
            yield item._replace(
                speaker=speakers.get(item.id), language=language_code(languages.get(item.id)), split=split
            )


def _optional(path: str, bad_rows: BadRows) -> dict[str, str]:
    entries = read_list(path, bad_rows).entries if os.path.isfile(path) else []
    return {entry.id: entry.value.strip() for entry in entries}


def _transcript_files(source: str) -> Iterator[str]:
    """Yields all `SPEAKER-CHAPTER.trans.txt` in a folder of LibriSpeech, from the root to a chapter."""
    for depth in range(6):
        yield from sorted(glob.iglob(f"{glob.escape(source)}/{'*/' * depth}*.trans.txt"))


def is_librispeech(source: str) -> bool:
    """Returns whether a source is LibriSpeech, a part of LibriSpeech, or another corpus in this layout."""
    return any(
        next(glob.iglob(f"{glob.escape(source)}/{'*/' * depth}*.trans.txt"), None) is not None for depth in range(6)
    )


def read_librispeech(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`, with recordings in the same folder."""
    for path in _transcript_files(os.path.abspath(source)):
        folder = os.path.dirname(path)
        speaker = os.path.basename(path).partition("-")[0]
        part = os.path.basename(os.path.dirname(os.path.dirname(folder)))
        texts = read_list(path, reading.bad_rows, "transcript")
        files = {
            os.path.splitext(name)[0]: name for name in os.listdir(folder) if name.lower().endswith(AUDIO_SUFFIXES)
        }
        yield from _join_files(
            texts, {id_: os.path.join(folder, name) for id_, name in files.items()}, reading,
            speaker=speaker, split=split_of(part), language="en",
        )  # fmt: skip


def _join_files(texts: KaldiList, files: dict[str, str], reading: Reading, **others) -> Iterator[Utterance]:
    """Yields utterances from a list of transcripts and files named after the IDs."""
    for entry in texts.entries:
        path = files.get(entry.id)
        if path is None:
            reading.bad_rows.add(texts.file, entry.line, f'no recording: no file is named after the ID "{entry.id}"')
            continue
        item = reading.utterance(texts.file, entry.line, path, entry.value, id=entry.id, **others)
        if item is not None:
            yield item
    listed = {entry.id for entry in texts.entries} | texts.bad_ids
    if missing := sum(id_ not in listed for id_ in files):
        reading.left_out["recordings without a transcript"] += missing


def is_aishell(source: str) -> bool:
    """Returns whether a source is AISHELL-1."""
    return os.path.isfile(os.path.join(_aishell_root(source), AISHELL_TRANSCRIPT))


def _aishell_root(source: str) -> str:
    below = os.path.join(source, "data_aishell")
    return os.path.abspath(below if os.path.isdir(below) else source)


def read_aishell(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads `transcript/aishell_transcript_v0.8.txt` and `wav/SPLIT/SPEAKER/ID.wav`.

    Raises:
        BadDataError: if there are no recordings, for example because the archives are not unpacked.
    """
    root = _aishell_root(source)
    found = glob.glob(f"{glob.escape(root)}/wav/*/*/*.wav")
    if not found:
        archives = glob.glob(f"{glob.escape(root)}/wav/*.tar.gz")
        hint = f"; unpack {archives[0]} and the other {len(archives) - 1} archives in this folder" if archives else ""
        raise BadDataError(f"{root}: no recordings wav/SPLIT/SPEAKER/ID.wav{hint}")
    texts = read_list(os.path.join(root, AISHELL_TRANSCRIPT), reading.bad_rows, "transcript")
    entries = [entry._replace(value=_SPACES.sub("", entry.value.strip())) for entry in texts.entries]
    texts = KaldiList(texts.file, entries, texts.bad_ids)
    files = {os.path.splitext(os.path.basename(path))[0]: path for path in found}
    for item in _join_files(texts, files, reading, language="zh"):
        folder, speaker = os.path.split(os.path.dirname(item.recording))
        yield item._replace(speaker=speaker, split=split_of(os.path.basename(folder)))


def is_wenetspeech(source: str) -> bool:
    """Returns whether a source is the folder or JSON of WenetSpeech."""
    return _corpus_of(source) == "wenetspeech"


def is_gigaspeech(source: str) -> bool:
    """Returns whether a source is the folder or JSON of GigaSpeech."""
    return _corpus_of(source) == "gigaspeech"


def _corpus_of(source: str) -> str | None:
    path = _corpus_json(source)
    if path is None:
        return None
    with open(path, "rb") as file:
        match = _DATASET.search(file.read(HEAD_BYTES))
    return match[1].decode().lower() if match else None


def _corpus_json(source: str) -> str | None:
    if os.path.isdir(source):
        paths = [os.path.join(source, f"{name}.json") for name in ("WenetSpeech", "GigaSpeech")]
        return next(filter(os.path.isfile, paths), None)
    return source if source.endswith(".json") and os.path.isfile(source) else None


def read_long_recordings(source: str, reading: Reading) -> Iterator[Utterance]:
    """Reads the JSON of WenetSpeech or GigaSpeech: long recordings with times and texts of segments.

    Raises:
        BadDataError: if the file has another format.
    """
    path = os.path.abspath(str(_corpus_json(source)))
    chinese = _corpus_of(source) == "wenetspeech"
    for number, audio in enumerate(_audios(path), start=1):
        if not isinstance(audio, dict) or not isinstance(audio.get("segments"), list):
            reading.bad_rows.add(path, f"recording {number}", "no list of segments")
            continue
        for index, segment in enumerate(audio["segments"], start=1):
            place = f"recording {number}, segment {index}"
            try:
                item = _segment(path, place, audio, segment, chinese, reading)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reading.bad_rows.add(path, place, f"not a segment of WenetSpeech or GigaSpeech: {error!r}")
                continue
            if item is not None:
                yield item


def _audios(path: str) -> Iterator[Any]:
    try:
        yield from read_array(path, "audios")
    except (RecursionError, ValueError) as error:
        raise BadDataError(f"{path}: not the JSON of WenetSpeech or GigaSpeech, or damaged: {error}") from error


def _segment(path: str, place: str, audio: dict, segment: dict, chinese: bool, reading: Reading) -> Utterance | None:
    subsets = {subset.strip("{}").upper() for subset in segment["subsets"]}
    split = "dev" if "DEV" in subsets else "test" if any(name.startswith("TEST") for name in subsets) else "train"
    if split == "train" and reading.subset is not None and reading.subset.upper() not in subsets:
        reading.left_out[f"segments outside the subset {reading.subset}"] += 1
        return None
    text = segment["text"] if chinese else segment["text_tn"]
    if not chinese:
        if text.strip() in NO_SPEECH:
            reading.left_out["segments without speech"] += 1
            return None
        text = _PUNCTUATION.sub(lambda match: PUNCTUATION[match[1]], text)
    speaker = segment.get("speaker", "N/A")
    return reading.utterance(
        path, place, audio["path"], text, folder=os.path.dirname(path), id=segment["sid"],
        start=float(segment["begin_time"]), end=float(segment["end_time"]),
        speaker=None if speaker == "N/A" else speaker, split=split, language="zh" if chinese else "en",
    )  # fmt: skip
