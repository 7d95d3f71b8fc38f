"""Reads a small example of each source, writes its rows as JSONL, and loads the JSONL as training does."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data.bad_rows import BadDataError, BadRows
from hf_speechllm.data.corpus import write_corpus
from hf_speechllm.data.dataset import add_lengths, load_rows
from hf_speechllm.data.preparation import RowMaker
from hf_speechllm.data.sources import SOURCES, read_source, recognize
from hf_speechllm.data.sources.reading import Reading, TarWriter, language_code, split_of

RATE = 16000


@pytest.fixture
def write_audio(tmp_path):
    """Writes noise of a length in seconds to the test's folder, different for every name; returns the path."""

    def write(name, seconds=1.0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(list(name.encode())).uniform(-0.5, 0.5, round(seconds * RATE))
        soundfile.write(path, noise.astype(np.float32), RATE)
        return path

    return write


@pytest.fixture
def write_lines(tmp_path):
    """Writes lines, or objects as lines of JSON, to the test's folder."""

    def write(name, lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(tmp_path):
    """Reads a source of a format, which must be recognised; every utterance must become a row that training loads.

    Returns:
        The utterances, and the reading.
    """

    def read(source, format, num_bad=0, **options):
        assert recognize(str(source)) == format
        with TarWriter(str(tmp_path)) as tar:
            reading = Reading(BadRows(1.0), recordings_tar=tar, **options)
            found = list(read_source(str(source), reading))
        assert len(reading.bad_rows) == num_bad, list(map(str, reading.bad_rows))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        bad_rows = BadRows()
        summary = write_corpus(found, ["train"] * len(found), RowMaker("Write:"), str(out), bad_rows, 2)
        assert summary["splits"]["train"]["rows"] == len(found)
        rows = load_rows([out / "train.jsonl"], bad_rows, str(tmp_path / "cache"))
        rows = add_lengths(
            rows.remove_columns("speech_length").add_column("speech_length", [None] * len(rows)), bad_rows
        )
        bad_rows.check(len(found))
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [sum(frames) for frames in rows["num_frames"]] == [line["speech_length"] for line in lines]
        return found, reading

    return read


def texts(found):
    return [utterance.transcript for utterance in found]


def times(utterance):
    return utterance.recording.partition("#t=")[2]


def test_kaldi_folder(write_audio, write_lines, read, tmp_path, caplog):
    write_audio("kaldi/audio/rec 1.wav", 4)
    write_lines("kaldi/wav.scp", ["rec1 audio/rec 1.wav"])
    write_lines("kaldi/text", ["a-1 hello there", "a-2 good morning", "b-1 last one"])
    write_lines("kaldi/segments", ["a-1 rec1 0.2 1.4", "a-2 rec1 1.40 3.9", "b-1 rec1 3 -1"])
    write_lines("kaldi/utt2spk", ["a-1 a", "a-2 a", "b-1 b"])
    found, _ = read(tmp_path / "kaldi", "kaldi")
    assert not caplog.text  # the segments are used
    assert [(item.id, item.transcript, item.speaker, times(item)) for item in found] == [
        ("a-1", "hello there", "a", "0.2,1.4"),
        ("a-2", "good morning", "a", "1.4,3.9"),
        ("b-1", "last one", "b", "3"),
    ]
    whole = load_audio(str(tmp_path / "kaldi/audio/rec 1.wav"))
    np.testing.assert_array_equal(load_audio(found[1].recording), whole[22400:62400])


def test_bad_segments_are_named(write_audio, write_lines, read, tmp_path):
    write_audio("kaldi/a.wav", 1)
    write_lines("kaldi/wav.scp", ["rec a.wav"])
    write_lines("kaldi/text", ["a one", "b two", "c three", "d four"])
    write_lines("kaldi/segments", ["a rec 0 0.5", "b none 0 1", "c rec 1 0.5", "d rec zero 1"])
    found, reading = read(tmp_path / "kaldi", "kaldi", num_bad=3)
    assert [item.id for item in found] == ["a"]
    assert [(os.path.basename(row.file), row.line, row.reason.partition(":")[0]) for row in reading.bad_rows] == [
        ("segments", 2, "unknown recording"), ("segments", 3, "bad segment"), ("segments", 4, "bad segment"),
    ]  # fmt: skip


def test_kaldi_folders_called_after_splits(write_audio, write_lines, read, tmp_path):
    for split in ("train", "dev", "test", "local"):
        write_audio(f"data/{split}/a.wav")
        write_lines(f"data/{split}/wav.scp", [f"{split}-1 a.wav"])
        write_lines(f"data/{split}/text", [f"{split}-1 in {split}"])
    found, _ = read(tmp_path / "data", "kaldi")
    assert {item.transcript: item.split for item in found} == {f"in {s}": s for s in ("train", "dev", "test")}


def test_folder_with_csv(write_audio, write_lines, read, tmp_path):
    write_audio("csv/audio/a.wav", 3)
    write_audio("csv/audio/b.flac")
    write_lines(
        "csv/list.csv",
        ["file_name,start,end,transcription,speaker_id", 'a.wav,0.5,1.5,"Hello, ""you""",s1', "b.flac,,,Bye,s2"],
    )
    found, _ = read(tmp_path / "csv", "csv")
    assert [(item.transcript, item.speaker, times(item)) for item in found] == [
        ('Hello, "you"', "s1", "0.5,1.5"), ("Bye", "s2", ""),
    ]  # fmt: skip


def test_unrecognised_columns_can_be_named(write_audio, write_lines, read):
    write_audio("a.wav")
    path = write_lines("list.csv", ["clip,said", "a.wav,one", "a.wav,"])
    with pytest.raises(
        BadDataError,
        match="and no column of transcripts found; .* audio=NAME text=NAME .the columns, .* are clip, said",
    ):
        list(read_source(str(path), Reading(BadRows())))
    found, reading = read(path, "csv", num_bad=1, columns={"audio": "clip", "text": "said"})
    assert texts(found) == ["one"]
    assert [(row.line, row.reason) for row in reading.bad_rows] == [(3, "empty transcript: ''")]


def test_chinese_names_of_columns(write_audio, write_lines, read):
    write_audio("a.wav")
    assert texts(read(write_lines("录音.csv", ["\ufeff音频,文本", "a.wav,几点了"]), "csv")[0]) == ["几点了"]


def test_tsv_with_lone_quotation_marks(write_audio, write_lines, read):
    write_audio("a.wav")
    found, _ = read(write_lines("a.tsv", ["path\ttext", 'a.wav\t5" long', 'a.wav\t"He said ""no"""']), "csv")
    assert texts(found) == ['5" long', 'He said "no"']


def test_common_voice(write_audio, write_lines, read, tmp_path):
    names = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale"
    for number, split in enumerate(("train", "dev", "test", "validated", "other")):
        write_audio(f"cv/de/clips/common_voice_de_{number}.mp3")
        row = [f"client{number}", f"common_voice_de_{number}.mp3", "x", f'"Satz {number}"', *"_23____", "de"]
        write_lines(f"cv/de/{split}.tsv", ["\t".join(names.split()), "\t".join(row)])
    write_lines("cv/de/reported.tsv", ["sentence\treason"])
    found, _ = read(tmp_path / "cv/de", "common-voice")
    assert [(item.transcript, item.speaker, item.language, item.split) for item in found] == [
        (f"Satz {number}", f"client{number}", "de", split) for number, split in enumerate(("train", "dev", "test"))
    ]
    assert texts(read(tmp_path / "cv/de/validated.tsv", "common-voice")[0]) == ["Satz 3"]


def test_librispeech(write_audio, write_lines, read, tmp_path):
    for part, id_ in [
        ("train-clean-100", "103-1240-0000"),
        ("dev-other", "116-288-0000"),
        ("test-clean", "61-70968-0"),
    ]:
        folder = f"LibriSpeech/{part}/{id_.split('-')[0]}/{id_.split('-')[1]}"
        write_audio(f"{folder}/{id_}.flac")
        write_lines(f"{folder}/{id_.rpartition('-')[0]}.trans.txt", [f"{id_} CHAPTER ONE"])
    write_audio(f"{folder}/extra.flac")
    found, reading = read(tmp_path / "LibriSpeech", "librispeech")
    assert sorted((item.split, item.speaker, item.transcript) for item in found) == [
        ("dev", "116", "CHAPTER ONE"), ("test", "61", "CHAPTER ONE"), ("train", "103", "CHAPTER ONE"),
    ]  # fmt: skip
    assert reading.left_out == {"recordings without a transcript": 1}
    assert len(read(tmp_path / "LibriSpeech/dev-other", "librispeech")[0]) == 1


def test_aishell(write_audio, write_lines, read, tmp_path):
    root = "data_aishell"
    for split, speaker in [("train", "S0002"), ("dev", "S0724"), ("test", "S0764")]:
        write_audio(f"{root}/wav/{split}/{speaker}/BAC009{speaker}W0122.wav")
    write_lines(
        f"{root}/transcript/aishell_transcript_v0.8.txt",
        [f"BAC009{speaker}W0122 而 对 楼市 IBM cloud 的" for speaker in ("S0002", "S0724", "S0764")] + ["BAC009X 无"],
    )
    for source in (tmp_path, tmp_path / root):
        found, reading = read(source, "aishell", num_bad=1)
        assert {(item.split, item.speaker, item.transcript) for item in found} == {
            ("train", "S0002", "而对楼市IBM cloud的"), ("dev", "S0724", "而对楼市IBM cloud的"),
            ("test", "S0764", "而对楼市IBM cloud的"),
        }  # fmt: skip
    assert "no recording" in next(iter(reading.bad_rows)).reason


def at(second):
    return {"begin_time": second, "end_time": second + 0.9}


@pytest.mark.parametrize("indent", [None, 2])
def test_wenetspeech(write_audio, tmp_path, read, indent):
    write_audio("w/audio/train/youtube/B00000/Y0.flac", 5)
    segments = [
        {"sid": f"Y0_S{number}", "confidence": 1.0, "subsets": subsets, "text": f"第{number}", **at(number)}
        for number, subsets in enumerate([["L", "M", "S"], ["L"], ["DEV"], ["TEST_NET"]])
    ]  # fmt: skip
    audio = {
        "aid": "Y0",
        "duration": 5.0,
        "md5": "x",
        "path": "audio/train/youtube/B00000/Y0.flac",
        "segments": segments,
    }
    content = {"dataset": "WenetSpeech", "language": "ZH", "audios": [audio]}
    (tmp_path / "w/WenetSpeech.json").write_text(json.dumps(content, ensure_ascii=False, indent=indent))
    found, _ = read(tmp_path / "w", "wenetspeech")
    assert [(item.transcript, item.split, times(item)) for item in found] == [
        ("第0", "train", "0,0.9"), ("第1", "train", "1,1.9"), ("第2", "dev", "2,2.9"), ("第3", "test", "3,3.9"),
    ]  # fmt: skip
    found, reading = read(tmp_path / "w/WenetSpeech.json", "wenetspeech", subset="s")
    assert texts(found) == ["第0", "第2", "第3"] and reading.left_out == {"segments outside the subset s": 1}


def test_gigaspeech(write_audio, tmp_path, read):
    write_audio("g/audio/podcast/P0000/POD1.flac", 5)
    segments = [
        {"sid": f"POD1_S{number}", "speaker": "N/A", "text_tn": text, "subsets": subsets, **at(number)}
        for number, (text, subsets) in enumerate(
            [("OH <COMMA> YES <PERIOD>", ["{XL}", "{L}"]), ("<MUSIC>", ["{XL}"]), ("WHY <QUESTIONMARK>", ["{TEST}"])]
        )
    ]  # fmt: skip
    audio = {"title": "t", "aid": "POD1", "path": "audio/podcast/P0000/POD1.flac", "segments": segments, "subsets": []}
    (tmp_path / "g/GigaSpeech.json").write_text(json.dumps({"dataset": "GigaSpeech", "audios": [audio]}, indent=1))
    found, reading = read(tmp_path / "g", "gigaspeech")
    assert [(item.transcript, item.split, item.speaker, times(item)) for item in found] == [
        ("OH, YES.", "train", None, "0,0.9"), ("WHY?", "test", None, "2,2.9"),
    ]  # fmt: skip
    assert reading.left_out == {"segments without speech": 1}
    content = {"dataset": "GigaSpeech", "audios": [{**audio, "segments": [{}, segments[0]]}, {}]}
    (tmp_path / "g/GigaSpeech.json").write_text(json.dumps(content))
    found, reading = read(tmp_path / "g", "gigaspeech", num_bad=2)
    assert texts(found) == ["OH, YES."]
    assert [row.line for row in reading.bad_rows] == ["recording 1, segment 1", "recording 2"]


def test_ljspeech(write_audio, write_lines, read, tmp_path):
    write_audio("LJSpeech-1.1/wavs/LJ001-0001.wav")
    write_lines("LJSpeech-1.1/metadata.csv", ['LJ001-0001|In 1450, "he"|In fourteen fifty, "he"'])
    assert texts(read(tmp_path / "LJSpeech-1.1", "ljspeech")[0]) == ['In 1450, "he"']
    columns = {"text": "normalized_text"}
    assert texts(read(tmp_path / "LJSpeech-1.1", "ljspeech", columns=columns)[0]) == ['In fourteen fifty, "he"']


def test_nemo_manifest(write_audio, write_lines, read):
    path = write_audio("nemo/long.wav", 5)
    rows = [
        {"audio_filepath": str(path), "duration": 5.0, "text": "all"},
        {"audio_filepath": "long.wav", "duration": 1.5, "text": "a part", "offset": 2.25},
        {"audio_filepath": "long.wav", "duration": 2.0, "text": "the start"},
        {"audio_filepath": "long.wav", "duration": 2.0},
    ]
    found, reading = read(write_lines("nemo/manifest.json", rows), "nemo", num_bad=1)
    assert [(item.transcript, times(item)) for item in found] == [
        ("all", ""), ("a part", "2.25,3.75"), ("the start", "0,2"),
    ]  # fmt: skip
    assert next(iter(reading.bad_rows)).line == 4


def test_funasr_source_and_target(write_audio, write_lines, read):
    write_audio("a.wav")
    row = {
        "key": "ID1",
        "source": "a.wav",
        "source_len": 100,
        "target": "你好",
        "target_len": 2,
        "text_language": "<|zh|>",
    }
    found, _ = read(write_lines("list.jsonl", [row]), "funasr")
    assert [(item.id, item.transcript, item.language) for item in found] == [("ID1", "你好", "zh")]


def test_qwen3_asr(write_audio, write_lines, read):
    write_audio("a.wav")
    lines = [("English", "Hello."), ("None", "Hm."), ("None", "")]
    rows = [{"audio": "a.wav", "text": f"language {language}<asr_text>{text}"} for language, text in lines]
    found, _ = read(write_lines("list.jsonl", rows), "qwen3-asr", num_bad=1)
    assert [(item.transcript, item.language) for item in found] == [("Hello.", "en"), ("Hm.", None)]


def test_metadata_jsonl_below_folders_called_after_splits(write_audio, write_lines, read, tmp_path):
    for split in ("train", "validation"):
        write_audio(f"folder/{split}/a.wav")
        write_lines(f"folder/{split}/metadata.jsonl", [{"file_name": "a.wav", "text": split}])
    found, _ = read(tmp_path / "folder", "json")
    assert [(item.transcript, item.split) for item in found] == [("train", "train"), ("validation", "dev")]


def dialogue(path, text):
    user = f"语音转写：<|startofspeech|>!{path}<|endofspeech|>"
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": text}]}


def test_funasr_chatml(write_audio, write_lines, read):
    write_audio("a.wav")
    rows = [{**dialogue("a.wav", "你好"), "speech_length": 7, "hotwords": ["好"]}, {"messages": []}]
    found, _ = read(write_lines("list.jsonl", rows), "chatml", num_bad=1)
    assert found[0].messages[1]["content"] == "你好" and found[0].hotwords == ["好"]


def test_ms_swift(write_audio, write_lines, read, tmp_path):
    paths = [str(write_audio(name)) for name in ("a.wav", "b.wav")]
    turns = [("user", "<audio>What?"), ("assistant", "This."), ("user", "And <audio>?"), ("assistant", "That.")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns], "audios": paths},
        {"query": "Write:", "response": "No tag.", "audios": ["a.wav"], "system": "Be brief."},
        {"messages": [{"role": "user", "content": "<audio><audio>"}], "audios": ["a.wav"]},
        {"messages": [{"role": "user", "content": "<audio>"}], "audios": ["a.wav", "b.wav"]},
    ]
    found, reading = read(write_lines("swift.jsonl", rows), "ms-swift", num_bad=2)
    assert found[0].recordings == paths
    assert found[0].messages[2] == {"role": "user", "content": f"And <|startofspeech|>!{paths[1]}<|endofspeech|>?"}
    assert [message["content"] for message in found[1].messages] == [
        "Be brief.", f"<|startofspeech|>!{paths[0]}<|endofspeech|>Write:", "No tag.",
    ]  # fmt: skip
    assert [row.line for row in reading.bad_rows] == [3, 4]


def test_llama_factory(write_audio, write_lines, read, tmp_path):
    write_audio("data/mllm/1.wav")
    sharegpt = {"conversations": [{"from": "human", "value": "<audio>Say."}, {"from": "gpt", "value": "one"}]}
    alpaca = {"instruction": "<audio>Say.", "input": "", "output": "two"}
    rows = [{**row, "audios": ["mllm/1.wav"]} for row in (sharegpt, alpaca)]
    path = tmp_path / "data/demo.json"
    path.write_text(json.dumps(rows, indent=2))
    found, _ = read(path, "llama-factory")
    assert [item.messages[-1]["content"] for item in found] == ["one", "two"]


def wav_bytes(seconds=1.0):
    content = io.BytesIO()
    soundfile.write(content, np.zeros(round(seconds * RATE)) + 0.1, RATE, format="WAV")
    return content.getvalue()


@pytest.fixture
def dataset(write_audio):
    """Returns a row with bytes and a row with a path."""
    rows = {
        "audio": [{"bytes": wav_bytes(), "path": "x.wav"}, {"bytes": None, "path": str(write_audio("a.wav", 2))}],
        "sentence": ["one", "two"],
        "speaker_id": [1, 2],
    }
    return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))


def test_folder_of_save_to_disk(dataset, read, tmp_path):
    dataset.cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "one")
    found, _ = read(tmp_path / "one", "datasets")
    assert [(item.transcript, item.speaker, item.split) for item in found] == [("one", "1", None), ("two", "2", None)]
    assert all(item.recording.startswith(f"{tmp_path}/one/data-00000-of-00001.arrow::") for item in found)
    assert [len(load_audio(item.recording)) for item in found] == [RATE, 2 * RATE]
    # Without the type `Audio`, recordings with a path are not embedded.
    dataset = datasets.Dataset.from_list([{"wav": row["audio"], "text": row["sentence"]} for row in dataset])
    two = datasets.DatasetDict(train=dataset, validation=dataset.select([1, 0, 0]))
    two.save_to_disk(tmp_path / "two", num_shards={"train": 2, "validation": 2})
    found, _ = read(tmp_path / "two", "datasets")
    assert [(item.split, item.transcript) for item in found] == [
        ("train", "one"), ("train", "two"), ("dev", "two"), ("dev", "one"), ("dev", "one"),
    ]  # fmt: skip
    # Rows without bytes keep their path.
    assert [item.recording for item in found] == [
        f"{tmp_path}/two/train/data-00000-of-00002.arrow::wav:0", str(tmp_path / "a.wav"), str(tmp_path / "a.wav"),
        f"{tmp_path}/two/validation/data-00000-of-00002.arrow::wav:1",
        f"{tmp_path}/two/validation/data-00001-of-00002.arrow::wav:0",
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tar"))


def test_recordings_of_the_hub_need_prepare(dataset, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    with pytest.raises(BadDataError, match="google/fleurs: recordings are not files; .* prepare"):
        list(read_source("google/fleurs", Reading(BadRows(0))))


def test_parquet_with_bytes_stays_where_it_is(dataset, read, tmp_path):
    path = tmp_path / "p/train-00000-of-00001.parquet"
    path.parent.mkdir()
    dataset.select([0, 0]).to_parquet(path)
    found, _ = read(path.parent, "parquet")
    assert [item.recording for item in found] == [f"{path}::0", f"{path}::1"]
    assert [(item.split, item.speaker) for item in found] == [("train", "1")] * 2


@pytest.mark.parametrize("column", ["audio", "wav"])
def test_parquet_without_bytes_or_with_another_column(write_audio, read, tmp_path, column):
    audio = str(write_audio("a.wav")) if column == "audio" else wav_bytes()
    table = pyarrow.Table.from_pylist([{column: audio, "text": "one"}])
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    found, _ = read(tmp_path / "list.parquet", "parquet")
    assert texts(found) == ["one"]
    assert found[0].recording == str(tmp_path / ("a.wav" if column == "audio" else "list.parquet::wav:0"))
    assert len(load_audio(found[0].recording)) == RATE


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("statistics", [False, True])
def test_each_row_of_a_parquet_file_has_bytes_or_a_path(dataset, read, tmp_path, order, statistics):
    path = tmp_path / "list.parquet"
    table = dataset.select(order).with_format("arrow")[:]
    pyarrow.parquet.write_table(table, path, row_group_size=1 if order == (1, 0) else 2, write_statistics=statistics)
    found, _ = read(path, "parquet")
    expected = [str(tmp_path / "a.wav") if row else f"{path}::{number}" for number, row in enumerate(order)]
    assert [item.recording for item in found] == expected
    assert [len(load_audio(item.recording)) for item in found] == [(1 + row) * RATE for row in order]


def test_a_parquet_row_without_bytes_and_path_is_bad(dataset, read, tmp_path):
    dataset.map(lambda row: {"audio": {"bytes": None, "path": None}} if row["sentence"] == "two" else row).to_parquet(
        tmp_path / "list.parquet"
    )
    found, reading = read(tmp_path / "list.parquet", "parquet", num_bad=1)
    assert texts(found) == ["one"] and "list.parquet:row 2: no recording" in str(next(iter(reading.bad_rows)))


@pytest.mark.parametrize("config", ["", "train_config/"])
def test_parquet_folders_called_after_splits(dataset, read, tmp_path, config):
    for split in ("train", "test"):
        path = tmp_path / f"p/{config}{split}/0000.parquet"
        path.parent.mkdir(parents=True)
        dataset.select([0]).to_parquet(path)
    assert [item.split for item in read(tmp_path / "p", "parquet")[0]] == ["train", "test"]
    dataset.to_parquet(tmp_path / f"p/{config}more.parquet")
    if not config:
        with pytest.raises(BadDataError, match="rename more.parquet"):
            list(read_source(str(tmp_path / "p"), Reading(BadRows())))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(dataset, read, monkeypatch, streaming):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        part = dataset.to_iterable_dataset() if streaming else dataset
        return part if split else {"train": part, "test": part}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, _ = read("google/fleurs", "hub", config="de_de", streaming=streaming)
    assert [item.split for item in found] == ["train", "train", "test", "test"]
    assert texts(read("google/fleurs", "hub", hub_split="test", streaming=streaming)[0]) == ["one", "two"]
    assert asked == [("google/fleurs", "de_de", None, streaming), ("google/fleurs", None, "test", streaming)]


def test_lhotse_cuts_and_shar(write_audio, read, tmp_path):
    lhotse = pytest.importorskip("lhotse")
    recording = lhotse.Recording.from_file(write_audio("a.wav", 4))
    supervision = lhotse.SupervisionSegment("s1", "a", 0.5, 1.0, text="hello", language="English", speaker="x")
    whole = lhotse.SupervisionSegment("s2", "a", 0.0, 4.0, text="all of it")
    cuts = [
        lhotse.MonoCut("c1", start=1.0, duration=2.0, channel=0, recording=recording, supervisions=[supervision]),
        lhotse.MonoCut("c2", start=0.0, duration=4.0, channel=0, recording=recording, supervisions=[whole]),
    ]
    mixed = cuts[0].mix(cuts[1].with_id("c3"))
    lhotse.CutSet.from_cuts([*cuts, mixed]).to_file(tmp_path / "cuts_train.jsonl.gz")
    found, reading = read(tmp_path / "cuts_train.jsonl.gz", "lhotse", num_bad=1)
    assert [(item.transcript, item.language, item.speaker, times(item)) for item in found] == [
        ("hello", "en", "x", "1.5,2.5"), ("all of it", None, None, ""),
    ]  # fmt: skip
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=1)
    found, _ = read(tmp_path / "shar", "lhotse-shar")
    assert [(item.transcript, times(item), item.origin) for item in found] == [
        ("hello", "0.5,1.5", "a"), ("all of it", "", "a"),
    ]  # fmt: skip
    np.testing.assert_allclose(load_audio(found[0].recording), load_audio(f"{tmp_path}/a.wav")[24000:40000], atol=1e-4)


def test_unknown_sources_are_refused(tmp_path, write_lines):
    for source, error in [(tmp_path, BadDataError), (tmp_path / "none", FileNotFoundError)]:
        assert recognize(str(source)) is None
        with pytest.raises(error, match="unknown layout|no such file"):
            list(read_source(str(source), Reading(BadRows())))


def test_a_missing_list_is_not_searched_on_the_hub():
    with pytest.raises(FileNotFoundError, match="data/recording.csv: no such file or folder"):
        list(read_source("data/recording.csv", Reading(BadRows())))


def test_unloadable_hub_id_is_reported(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(
        BadDataError, match="data/none: no such file, and no data set with this name can be loaded .*offline"
    ):
        list(read_source("data/none", Reading(BadRows())))


def test_several_lists_without_splits_are_refused(write_lines, tmp_path):
    for name in ("a.csv", "b.csv"):
        write_lines(name, ["path,text"])
    with pytest.raises(BadDataError, match=r"several lists \(a.csv, b.csv\); pass one"):
        list(read_source(str(tmp_path), Reading(BadRows())))


@pytest.mark.parametrize("names", [("train.csv", "more.csv"), ("train/a.jsonl", "more/a.jsonl")])
def test_lists_without_a_split_beside_others_are_refused(write_lines, tmp_path, names):
    for name in names:
        write_lines(name, ["path,text"] if name.endswith("csv") else [{"audio": "a.wav", "text": "one"}])
    with pytest.raises(BadDataError, match=f"rename {names[1]} .*, move them to another folder"):
        list(read_source(str(tmp_path), Reading(BadRows())))


def test_files_that_are_no_lists_may_be_beside_lists(write_audio, write_lines, read, tmp_path, caplog):
    write_audio("a.wav")
    write_lines("train.json", ['[{"audio": "a.wav", "text": "one"}]'])
    write_lines("dataset_info.json", [{"my_data": {"file_name": "train.json"}}])
    with caplog.at_level("INFO"):
        assert texts(read(tmp_path, "json")[0]) == ["one"]
    assert f"{tmp_path}: not read: dataset_info.json" in caplog.text


def test_joined_json_lists_are_refused(tmp_path):
    rows = json.dumps([{"audio": "a.wav", "text": "one"}])
    (tmp_path / "a.json").write_text(f"{rows}\n{rows}\n")
    with pytest.raises(BadDataError, match="a.json: not JSON: more text after the end .*; .*join lists"):
        list(read_source(str(tmp_path / "a.json"), Reading(BadRows(1.0))))


def test_unusable_rows_of_a_csv_are_reported(write_audio, read, tmp_path):
    write_audio("a.wav")
    (tmp_path / "a.csv").write_bytes(b"path,text\na.wav,\xff\na.wav,b,c\na.wav,d\na.wav\n")
    found, reading = read(tmp_path / "a.csv", "csv", num_bad=3)
    assert texts(found) == ["d"]
    assert [(row.line, row.reason.partition(":")[0]) for row in reading.bad_rows] == [
        (2, "not UTF-8"), (3, "more fields than names; quote fields that contain the delimiter"),
        (5, "empty transcript"),
    ]  # fmt: skip


def test_damaged_lists_are_errors_in_one_line(write_lines, tmp_path):
    for name, content, format in [
        ("a.csv", b'path,text\na,"b\n', "csv"),
        ("b.json", b'[{"audio": "a", "text": "b"}, ', "json"),
        ("GigaSpeech.json", b'{"dataset": "GigaSpeech", "audios": 3}', "gigaspeech"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadDataError, match=name):
            list(read_source(str(tmp_path / name), Reading(BadRows()), format))


def test_names_of_splits_and_languages():
    assert [split_of(name) for name in ("train-clean-100", "valid", "test_net", "validated", "training")] == [
        "train", "dev", "test", None, "train",
    ]  # fmt: skip
    assert [language_code(name) for name in ("zh-CN", "<|en|>", "Chinese", "None", "", 3)] == [
        "zh", "en", "zh", None, None, None,
    ]  # fmt: skip


def test_a_tar_writer_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(KeyError), TarWriter(str(tmp_path)) as tar:
        tar.add("a.wav", b"x")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_csv_with_another_delimiter(write_audio, write_lines, read, delimiter):
    write_audio("a.wav")
    path = write_lines("list.csv", [delimiter.join(line) for line in (("path", "text"), ("a.wav", "one, two"))])
    assert read(path, "csv")[0][0].transcript == "one, two"


def test_csv_of_pandas_with_an_index_and_spaces_in_the_names(write_audio, write_lines, read):
    write_audio("a.wav")
    path = write_lines("list.csv", [",path, text", "0,a.wav,one", "1,a.wav,two, three"])
    assert [item.transcript for item in read(path, "csv", num_bad=1)[0]] == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"path,text,text\na.wav,one,two\n", "two columns are called 'text'"), ("path,text\n".encode("utf-16"), "UTF-8")],
)
def test_columns_that_are_not_clear_are_refused(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(BadDataError, match=message):
        list(read_source(str(tmp_path / "list.csv"), Reading(BadRows())))


def test_a_missing_first_recording_does_not_hide_the_folder_of_the_others(write_audio, write_lines, tmp_path):
    write_audio("wavs/b.wav")
    path = write_lines("list.csv", ["path,text", "https://host/x,zero", "none,one", "b,two"])
    found = list(read_source(str(path), Reading(BadRows())))
    assert [item.recording for item in found] == [
        "https://host/x", str(tmp_path / "none"), str(tmp_path / "wavs/b.wav")
    ]  # fmt: skip


def test_values_that_are_not_texts_or_times_are_named(write_lines):
    rows = [{"audio_filepath": "a.wav", "text": 5}, {"audio_filepath": "a.wav", "text": "a", "duration": float("nan")}]
    reading = Reading(BadRows())
    assert list(read_source(str(write_lines("m.json", rows)), reading)) == []
    reasons = [row.reason for row in reading.bad_rows]
    assert reasons == ["a transcript must be text, not 5", "bad time: nan is not a time; write seconds"]


def test_fields_that_ljspeech_does_not_have_are_not_lost(write_audio, write_lines, read, tmp_path):
    write_audio("wavs/a.wav")
    write_lines("metadata.csv", ["a|one|one", "a|one|two|three"])
    assert read(tmp_path, "ljspeech", num_bad=1)[1].bad_rows


def test_deeply_nested_json_is_no_source(tmp_path):
    path = tmp_path / "m.json"
    path.write_text("[" * 100_000)
    assert recognize(str(path)) is None
    with pytest.raises(BadDataError, match="m.json: not JSON"):
        list(read_source(str(path), Reading(BadRows()), "json"))


@pytest.mark.parametrize("line", ['{"id":', '{"id": "x", "type": "MonoCut"}', '{"type": "Other"}', "[1]"])
def test_damaged_cuts_are_named(write_audio, tmp_path, line):
    lhotse = pytest.importorskip("lhotse")
    cut = lhotse.Recording.from_file(write_audio("a.wav")).to_cut()
    cut.supervisions = [lhotse.SupervisionSegment("s", "a", 0, 1, text="one")]
    path = tmp_path / "cuts.jsonl"
    good = json.dumps(cut.to_dict())
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(BadDataError, match="cuts.jsonl:2: "):
        list(read_source(str(path), Reading(BadRows())))
    path.write_text(good.replace('"duration": 1.0', '"duration": "x"', 1) + f"\n{good}\n")
    reading = Reading(BadRows())
    assert len(list(read_source(str(path), reading))) == len(reading.bad_rows) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b""),
        ("a.parquet", b"PAR1"),
        ("WenetSpeech.json", b'{"dataset": "WenetSpeech", "a": ' + b"[" * 10**5),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError, match=f"{name}: not "):
        list(read_source(str(tmp_path / name), Reading(BadRows())))


def test_parquet_without_rows(tmp_path):
    table = pyarrow.table({"wav": pyarrow.array([], pyarrow.binary()), "text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_source(str(tmp_path / "a.parquet"), Reading(BadRows()))) == []


def test_names_of_columns_and_paths_as_people_write_them(write_audio, write_lines, read):
    write_audio("audio/a b.WAV")
    lines = ["Audio File;Raw-Transcription;Speaker Name;Subset", "audio\\a b.WAV;one, two;ann;test"]
    (item,) = read(write_lines("list.TXT.CSV", lines), "csv")[0]
    assert (item.transcript, item.speaker, item.split) == ("one, two", "ann", "test")


def test_recordings_of_datasets_in_json(write_audio, write_lines, read):
    write_audio("a.wav")
    rows = [{"audio": {"path": "a.wav"}, "sentence": "one", "duration": 1.0, "sentences": []}]
    assert texts(read(write_lines("train.json", rows), "json")[0]) == ["one"]


def test_lists_of_rows_may_have_any_name(write_audio, write_lines, read, tmp_path):
    write_audio("a.wav")
    path = write_lines("data.txt", [{"key": "a", "wav": "a.wav", "txt": "one"}])
    assert texts(read(path, "json")[0]) == ["one"]
    table = write_lines("table.txt", ["path,text", "a.wav,two"])
    assert texts(read_source(str(table), Reading(BadRows()), "csv")) == ["two"]  # a given format decides


def test_a_list_of_files_beside_lists_of_rows_is_none(write_audio, write_lines, read, tmp_path):
    write_audio("a.wav")
    write_lines("train.jsonl", [{"source": "a.wav", "target": "one"}])
    write_lines("data.list", ["train.jsonl"])  # of FunASR
    assert texts(read(tmp_path, "funasr")[0]) == ["one"]


def test_tables_with_known_columns_start_no_search(write_lines, tmp_path, monkeypatch):
    write_lines("list.csv", ["audio,text"])
    monkeypatch.setattr(os, "walk", lambda folder: pytest.fail("the folder is searched"))
    assert recognize(str(tmp_path)) == "csv"


def test_a_table_without_names_of_columns_says_so(write_lines):
    for lines in (["a.wav,one"], ["1\ta.wav\tone", "2\tb.wav\ttwo"]):
        with pytest.raises(BadDataError, match="first line has a recording instead of the names .* add a line"):
            list(read_source(str(write_lines("list.csv", lines)), Reading(BadRows())))


def test_common_voice_without_splits_is_its_validated_rows(write_audio, write_lines, read, tmp_path):
    for name in ("validated", "invalidated", "other"):
        write_audio(f"de/clips/{name}.mp3")
        write_lines(f"de/{name}.tsv", ["client_id\tpath\tsentence", f"a\t{name}.mp3\tis {name}"])
    assert texts(read(tmp_path / "de", "common-voice")[0]) == ["is validated"]


def test_an_own_list_beside_validated_rows_is_not_left_out(write_audio, write_lines, tmp_path):
    write_audio("de/clips/a.mp3")
    for name in ("validated", "mine"):
        write_lines(f"de/{name}.tsv", ["client_id\tpath\tsentence", "a\ta.mp3\tone"])
    with pytest.raises(BadDataError, match=r"several lists \(mine.tsv, validated.tsv\); pass one"):
        list(read_source(str(tmp_path / "de"), Reading(BadRows())))


def test_one_list_in_each_folder_is_one_source(write_audio, write_lines, read, tmp_path):
    for name in ("ann", "bob"):
        write_audio(f"corpus/data/{name}/1.wav")
        write_lines(f"corpus/data/{name}/metadata.csv", ["file_name,text", f"1.wav,by {name}"])
    assert texts(read(tmp_path / "corpus", "csv")[0]) == ["by ann", "by bob"]


def test_kaldi_recipe(write_audio, write_lines, read, tmp_path):
    write_audio("egs/data/train_sp/a.wav")
    write_lines("egs/data/train_sp/wav.scp", ["a a.wav"])
    write_lines("egs/data/train_sp/text", ["a one"])
    assert read(tmp_path / "egs", "kaldi")[0][0].split == "train"


def test_names_that_fit_no_recording_or_two_are_bad_rows(write_audio, write_lines, read, tmp_path):
    for name in ("x/a.wav", "x/b.wav", "y/b.wav"):
        write_audio(f"corpus/{name}")
    write_lines("corpus/transcript.txt", ["a one", "b two", "x/c.wav three"])
    found, reading = read(tmp_path / "corpus", "names", num_bad=2)
    assert texts(found) == ["one"]
    assert [row.reason for row in reading.bad_rows] == [
        'no recording: 2 files are named after "b"', 'no recording: no files are named after "x/c.wav"',
    ]  # fmt: skip


def test_binary_files_are_no_lists_of_names(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"PAR1 \0\1")
    monkeypatch.setattr(os, "walk", lambda folder: pytest.fail("the folder of the file is searched"))
    assert not SOURCES["names"][0](str(tmp_path / "a.bin"))


def test_texts_beside_recordings_whose_names_differ_in_case(write_audio, write_lines, read, tmp_path):
    for name in ("A", "a"):
        write_audio(f"{name}.wav")
        write_lines(f"{name}.txt", [f"by {name}"])
    if len([*tmp_path.iterdir()]) < 4:
        pytest.skip("names of files do not depend on case")
    assert texts(read(tmp_path, "sidecar")[0]) == ["by A", "by a"]


def test_subtitles(write_audio, write_lines, read, tmp_path):
    write_audio("talk.wav", 62)
    write_audio("other.wav")
    lines = [
        "1",
        "00:00:01,5 --> 00:00:02,250",
        "<i>one</i>",
        "two",
        "",
        "2",
        "00:01:00,000 --> 00:01:01,000",
        r"{\an8}three",
    ]
    write_lines("talk.srt", lines)
    found, reading = read(tmp_path, "sidecar")
    assert [(item.transcript, times(item), item.transcript_line) for item in found] == [
        ("one two", "1.5,2.25", 2), ("three", "60,61", 7),
    ]  # fmt: skip
    assert reading.left_out == {"recordings without a transcript": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.zip", "unpack"), ("a.tar.gz", "unpack"), ("a.tar", "--train_file"), ("a.xlsx", "save it as CSV"),
     ("a.arrow", "save_to_disk"), ("train_wav.scp", "scp2jsonl"), ("a.jsonl.gz", "lhotse cut simple"),
     ("a.WAV", "write a table"), ("shards.list", "--train_file")],
)  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_files_of_other_kinds_say_what_to_do(tmp_path, name, message, folder):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadDataError, match=message):
        list(read_source(str(tmp_path if folder else tmp_path / name), Reading(BadRows())))


def test_an_archive_beside_its_recordings_is_not_the_corpus(tmp_path):
    for name in ("corpus.zip", "a.wav"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadDataError, match="write a table"):
        list(read_source(str(tmp_path), Reading(BadRows())))
