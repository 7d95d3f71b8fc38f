"""`prepare_dataset`: rows for the trainer from any dataset with recordings and transcripts."""

import json
import pathlib

import datasets
import numpy as np
import pytest

from hf_speechllm import (
    SpeechLLMForConditionalGeneration,
    SpeechLLMProcessor,
    SpeechLLMTrainer,
    SpeechLLMTrainingArguments,
    load_audio,
    prepare_dataset,
)
from hf_speechllm.data.bad_rows import BadDataError

pytestmark = pytest.mark.core


@pytest.fixture
def processor(tiny_model):
    return SpeechLLMProcessor.from_pretrained(tiny_model)


@pytest.fixture
def table(tiny_corpus):
    """Paths and transcripts of the tiny corpus."""
    paths = dict(line.split(maxsplit=1) for line in tiny_corpus.scp.read_text(encoding="utf-8").splitlines())
    texts = dict(line.split(maxsplit=1) for line in tiny_corpus.text.read_text(encoding="utf-8").splitlines())
    return {"audio": [str(tiny_corpus.folder / paths[key]) for key in paths], "text": [texts[key] for key in paths]}


def as_paths(table):
    return datasets.Dataset.from_dict(table)


def as_audio(table):
    return as_paths(table).cast_column("audio", datasets.Audio())


def as_resampled_audio(table):
    return as_paths(table).cast_column("audio", datasets.Audio(sampling_rate=8000))


def as_bytes(table):
    contents = [pathlib.Path(path).read_bytes() for path in table["audio"]]
    return datasets.Dataset.from_dict({**table, "audio": contents})


def as_arrays(table):
    waveforms = [{"array": load_audio(path), "sampling_rate": 16000} for path in table["audio"]]
    return datasets.Dataset.from_dict({**table, "audio": waveforms})


@pytest.mark.parametrize("make", [as_paths, as_audio, as_resampled_audio, as_bytes, as_arrays])
def test_rows_equal_those_of_a_jsonl(make, table, processor, tiny_rows):
    rows = prepare_dataset(make(table), processor)
    assert len(rows) == len(tiny_rows)
    expected = {json.loads(row["messages"])[-1]["content"]: row for row in tiny_rows}
    for row in rows:
        same = expected[json.loads(row["messages"])[-1]["content"]]
        assert row["num_frames"] == same["num_frames"]
        assert row["features"] == same["features"]


def test_trains_without_files(table, processor, tiny_model, tmp_path):
    rows = prepare_dataset(as_audio(table), processor)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    args = SpeechLLMTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    trainer = SpeechLLMTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    before = model.audio_adaptor.linear1.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 2
    assert not np.array_equal(before, model.audio_adaptor.linear1.weight.detach())
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_language_and_hotwords_are_in_the_prompt(table, processor):
    size = len(table["text"])
    columns = {**table, "lang": ["en"] * size, "words": [["Aachen", "Ulm"]] * size}
    rows = prepare_dataset(
        datasets.Dataset.from_dict(columns), processor, language_column="lang", hotwords_column="words"
    )
    plain = prepare_dataset(as_paths(table), processor)
    assert rows[0]["hotwords"] == ["Aachen", "Ulm"] and plain[0]["hotwords"] == []
    assert rows[0]["messages"] != plain[0]["messages"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", None, "dataset.*2: bad transcript: None"),
        ("text", " ", "bad transcript"),
        ("audio", None, "no recording"),
        ("audio", "nowhere.wav", "nowhere.wav: no such file\nRelative paths start at the working directory, /"),
    ],
)
def test_bad_rows_are_reported_or_skipped(table, processor, column, value, message):
    table[column][1] = value
    dataset = datasets.Dataset.from_dict(table)
    with pytest.raises(BadDataError, match=message):
        prepare_dataset(dataset, processor)
    assert len(prepare_dataset(dataset, processor, max_bad_fraction=0.5)) == len(dataset) - 1


def test_recordings_that_are_too_long_are_bad(table, processor):
    with pytest.raises(BadDataError, match="the maximum is 0.3 s"):
        prepare_dataset(as_paths(table), processor, max_seconds=0.3)


def test_wrong_columns_and_types_are_refused(table, processor):
    dataset = as_paths(table)
    with pytest.raises(ValueError, match="no column 'sentence'; columns: audio, text"):
        prepare_dataset(dataset, processor, text_column="sentence")
    with pytest.raises(TypeError, match="DatasetDict.*prepare each split"):
        prepare_dataset(datasets.DatasetDict(train=dataset), processor)
    with pytest.raises(TypeError, match="IterableDataset"):
        prepare_dataset(dataset.to_iterable_dataset(), processor)


def test_a_dataset_without_rows_is_named(table, processor):
    with pytest.raises(BadDataError, match="no rows"):
        prepare_dataset(as_paths(table).select([]), processor)


def test_features_are_cached(table, processor, tmp_path):
    as_audio(table).save_to_disk(tmp_path / "saved")
    dataset = datasets.load_from_disk(tmp_path / "saved")
    first = prepare_dataset(dataset, processor)
    second = prepare_dataset(datasets.load_from_disk(tmp_path / "saved"), processor)
    assert first.cache_files == second.cache_files != []
