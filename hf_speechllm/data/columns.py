"""Training rows from any `datasets.Dataset` with columns of recordings and transcripts."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset, Features, List, Value

from ..audio.inputs import to_source
from ..audio.waveform import MAX_SECONDS, AudioError, load_audio
from ..model import chat
from ..model.native_processing import NativeProcessor
from ..model.processing import SpeechLLMProcessor
from .bad_rows import BadDataError, BadRows
from .dataset import ROW_FEATURES, FeatureMapper, drop_bad_rows, single_thread
from .jsonl import hotwords_of
from .kaldi import FRAME_LENGTH, speech_length

PREPARED_FEATURES = Features(
    {
        **ROW_FEATURES,
        "stamps": List(Value("string")),
        "features": List(Value("large_binary")),
        "num_frames": List(Value("int64")),
    }
)

UNCACHED_FEATURES = Features(
    {
        **{name: kind for name, kind in PREPARED_FEATURES.items() if name != "features"},
        "contents": List(Value("large_binary")),  # null for a recording with a path
    }
)


def prepare_dataset(
    dataset: Dataset,
    processor: SpeechLLMProcessor,
    audio_column: str = "audio",
    text_column: str = "text",
    language_column: str | None = None,
    hotwords_column: str | None = None,
    max_seconds: float = MAX_SECONDS,
    max_bad_fraction: float = 0.0,
    feature_dtype: str = "float16",
    num_proc: int | None = None,
) -> Dataset:
    """Converts a dataset of recordings and transcripts to rows for `SpeechLLMTrainer`, with cached fbank features.

    Args:
        dataset: one split.
        processor: processor of the model.
        audio_column: recordings: a column of type `Audio`, paths, bytes, or structs with `array` and `sampling_rate`.
            Relative paths start at the working directory.
        text_column: transcripts.
        language_column: ISO code or Chinese name of each row's language; by default, the prompt names no language.
        hotwords_column: lists of words, or strings with commas between words.
        max_seconds: maximum length of a recording; rows with longer recordings are bad. The model's limit is
            `config.max_feature_frames * processor.frame_seconds`.
        max_bad_fraction: allowed share of bad rows, which are skipped with a warning.
        feature_dtype: `"float16"` or `"float32"`; `"off"`: no features, so that each epoch computes them from the
            recordings, for augmentation of waveforms. Recordings without a file are stored with the rows. By default,
            rows for a native speech LLM contain the waveforms.
        num_proc: number of processes.

    Returns:
        A dataset with the columns of `load_rows`, `features` (or `contents`) and `num_frames` (10 ms frames).

    Raises:
        BadDataError: if more rows are bad than allowed, or no rows are left; the message lists bad rows with reasons.
        TypeError: if `dataset` is not a `datasets.Dataset`.
        ValueError: if a column is missing, or `feature_dtype` is unknown.
    """
    if feature_dtype not in ("float16", "float32", "off"):
        raise ValueError(f"feature_dtype is {feature_dtype!r}; choose float16, float32 or off")
    if not isinstance(dataset, Dataset):
        hint = "; prepare each split separately" if isinstance(dataset, dict) else ""
        raise TypeError(f"dataset must be a datasets.Dataset, not {type(dataset).__name__}{hint}")
    columns = [audio_column, text_column, *(name for name in (language_column, hotwords_column) if name is not None)]
    for name in columns:
        if name not in dataset.column_names:
            raise ValueError(f"the dataset has no column {name!r}; columns: {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise BadDataError("the dataset has no rows")
    feature_mapper = WaveformMapper if isinstance(processor, NativeProcessor) else FeatureMapper
    mapper = RowMapper(
        feature_mapper(processor.feature_extractor, feature_dtype, max_seconds),
        str(dataset.info.dataset_name or dataset.info.builder_name or "dataset"),
        language_column is not None,
        hotwords_column is not None,
    )
    rows = dataset.with_format(None).select_columns(columns)
    if isinstance(rows.features[audio_column], Audio):
        rows = rows.cast_column(audio_column, Audio(decode=False))
    bad_rows = BadRows(max_bad_fraction)
    with single_thread():
        prepared = rows.map(
            mapper,
            with_indices=True,
            input_columns=columns,
            remove_columns=columns,
            features=PREPARED_FEATURES if feature_dtype != "off" else UNCACHED_FEATURES,
            num_proc=None if num_proc is None or num_proc < 2 else min(num_proc, len(rows)),
            writer_batch_size=200,
            desc="fbank" if feature_dtype != "off" else "lengths",
        )
    prepared = drop_bad_rows(prepared, bad_rows)
    bad_rows.check(len(dataset), paths_start=f"the working directory, {os.getcwd()}")
    if len(prepared) == 0:
        raise BadDataError("the dataset has no usable rows")
    return prepared


@dataclass
class WaveformMapper(FeatureMapper):
    """Loads the waveforms of a row, as float32 bytes: the family's own processor computes features of them."""

    def __getstate__(self) -> dict:
        state = {"rate": self.extractor.sampling_rate, "max_seconds": self.max_seconds, "version": self.version}
        return {**state, "dtype": self.dtype} if self.dtype == "off" else state

    def __setstate__(self, state: dict) -> None:
        self.extractor = SimpleNamespace(sampling_rate=state["rate"])
        self.dtype, self.max_seconds = state.get("dtype", "float32"), state["max_seconds"]
        self.version = state["version"]

    def features_of(self, waveform: np.ndarray) -> tuple[bytes, int]:
        """Returns the waveform and the number of 10 ms frames."""
        return waveform.astype(np.float32).tobytes(), speech_length(len(waveform), self.extractor.sampling_rate)


@dataclass
class RowMapper:
    """Builds a training row from the columns of a dataset. `map` hashes this object for the cache fingerprint.

    Args:
        features: computes the features of a recording.
        name: name of the dataset, for messages and the model card.
        has_language: whether the text is followed by a language.
        has_hotwords: whether the last column contains hotwords.
    """

    features: FeatureMapper
    name: str
    has_language: bool
    has_hotwords: bool

    def __call__(self, audio: Any, text: Any, *others: Any) -> dict[str, Any]:
        """Returns the columns of the row; a bad row has only `file`, `line` and `error`."""
        *others, index = others  # type: ignore[assignment]
        language = others[0] if self.has_language else None
        hotwords = others[-1] if self.has_hotwords else None
        place = {"file": self.name, "line": index + 1}
        try:
            return {**self._row(audio, text, language, hotwords, f"row-{index + 1}"), **place, "error": None}
        except (AudioError, BadDataError, chat.ChatError, ValueError) as error:
            columns = PREPARED_FEATURES if self.features.dtype != "off" else UNCACHED_FEATURES
            return {**dict.fromkeys(columns), **place, "error": str(error)}

    def _row(self, audio: Any, text: Any, language: Any, hotwords: Any, name: str) -> dict[str, Any]:
        if not isinstance(text, str) or not text.strip():
            raise BadDataError(f"bad transcript: {text!r}; the transcript must be a text")
        if audio is None:
            raise BadDataError("no recording: the audio column is empty")
        words = hotwords_of({"hotwords": hotwords})
        messages = chat.transcription_messages(name, chat.transcription_prompt(language), text.strip())
        chat.parse_messages(messages, words)
        rate = self.features.extractor.sampling_rate
        source = to_source(np.asarray(audio) if isinstance(audio, list) else audio, rate)
        computed = self._stored(source, rate) if self.features.dtype == "off" else self._computed(source)
        path = audio if isinstance(audio, str) else audio.get("path") if isinstance(audio, dict) else None
        return {
            "messages": json.dumps(messages, ensure_ascii=False),
            "recordings": [os.fspath(path) if path else name],
            "hotwords": words,
            "speech_length": computed["num_frames"][0],
            "text_length": None,
            **computed,
        }

    def _computed(self, source: Any) -> dict[str, Any]:
        computed = self.features([source])
        if (error := computed.pop("error")) is not None:
            raise BadDataError(error)
        return {**computed, "stamps": [hashlib.sha256(computed["features"][0]).hexdigest()]}

    def _stored(self, source: Any, rate: int) -> dict[str, Any]:
        waveform = load_audio(source, rate, self.features.max_seconds)
        if (frames := speech_length(len(waveform), rate)) < 1:
            raise AudioError(f"the recording is shorter than {FRAME_LENGTH} ms")
        content = source
        if isinstance(source, np.ndarray):
            buffer = io.BytesIO()
            soundfile.write(buffer, source, rate, format="WAV", subtype="FLOAT")
            content = buffer.getvalue()
        return {
            "contents": [content if isinstance(content, bytes) else None],
            "num_frames": [frames],
            "stamps": [hashlib.sha256(waveform.tobytes()).hexdigest()],
        }
