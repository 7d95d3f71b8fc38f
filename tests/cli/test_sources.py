"""Every source of `prepare`, end to end: prepared, inspected, examined, trained on for a step, decoded and scored."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import soundfile

from hf_speechllm.data.jsonl import recording_id
from hf_speechllm.data.row_files import generate_rows, generator_arguments
from hf_speechllm.data.sources import SOURCES
from hf_speechllm.model.processing import SpeechLLMProcessor

RATE = 16000
SPLITS = ("train", "dev", "test")


class Row(NamedTuple):
    """A row of a tree: ID, transcript, split and speaker."""

    id: str
    text: str
    split: str
    speaker: str


class Tree:
    """Writes the files of a source.

    Args:
        folder: new folder of the source.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        words = ("one two", "three", "four one", "five", "six two", "seven")
        self.rows = [Row(f"u{i}", words[i], SPLITS[i // 2], f"s{i // 2}") for i in range(6)]

    def of(self, split: str) -> list[Row]:
        """Returns the rows of a split."""
        return [row for row in self.rows if row.split == split]

    def sound(self, name: str, seconds: float = 0.4) -> Path:
        """Writes a recording, which differs from all others."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        time = np.arange(round(seconds * RATE)) / RATE
        soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 150 * self.count) * time).astype(np.float32), RATE)
        return path

    def content(self) -> bytes:
        """Returns the bytes of a recording."""
        path = self.sound("content.wav")
        content = path.read_bytes()
        path.unlink()
        return content

    def write(self, name: str, lines) -> Path:
        """Writes lines, or objects as lines of JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path


def kaldi(tree):
    for split in SPLITS:
        tree.sound(f"{split}/long.flac", 1.2)
        rows = tree.of(split)
        tree.write(f"{split}/wav.scp", ["long long.flac"])
        tree.write(f"{split}/text", [f"{row.id} {row.text}" for row in rows])
        tree.write(f"{split}/segments", [f"{row.id} long {0.6 * n} {0.6 * n + 0.5}" for n, row in enumerate(rows)])
        tree.write(f"{split}/utt2spk", [f"{row.id} {row.speaker}" for row in rows])


def aishell(tree):
    for row in tree.rows:
        tree.sound(f"data_aishell/wav/{row.split}/{row.speaker}/{row.id}.wav")
    lines = [f"{row.id} {row.text}" for row in tree.rows]
    tree.write("data_aishell/transcript/aishell_transcript_v0.8.txt", lines)


def long_recording(tree, name, segment):
    tree.sound("audio/long.flac", 6)
    segments = [
        {"sid": row.id, "begin_time": n, "end_time": n + 0.5, "speaker": row.speaker, **segment(row)}
        for n, row in enumerate(tree.rows)
    ]
    audio = {"aid": "long", "path": "audio/long.flac", "segments": segments}
    tree.write(f"{name}.json", [json.dumps({"dataset": name, "audios": [audio]}, indent=1)])


def wenetspeech(tree):
    names = {"train": "L", "dev": "DEV", "test": "TEST_NET"}
    long_recording(tree, "WenetSpeech", lambda row: {"text": row.text, "subsets": [names[row.split]]})


def gigaspeech(tree):
    names = {"train": "{XL}", "dev": "{DEV}", "test": "{TEST}"}
    long_recording(tree, "GigaSpeech", lambda row: {"text_tn": row.text + " <PERIOD>", "subsets": [names[row.split]]})
    tree.rows = [row._replace(text=row.text + ".") for row in tree.rows]


def common_voice(tree):
    for split in SPLITS:
        lines = ["client_id\tpath\tsentence\tlocale"]
        for row in tree.of(split):
            tree.sound(f"clips/{row.id}.mp3")
            lines.append(f"{row.speaker}\t{row.id}.mp3\t{row.text}\ten")
        tree.write(f"{split}.tsv", lines)


def ljspeech(tree):
    for row in tree.rows:
        tree.sound(f"wavs/{row.id}.wav")
    tree.write("metadata.csv", [f"{row.id}|{row.text}|{row.text}" for row in tree.rows])
    tree.rows = [row._replace(split="", speaker="") for row in tree.rows]


def librispeech(tree):
    names = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-other"}
    tree.rows = [
        row._replace(id=f"{n}-7-{row.id}", speaker=f"{n}", text=row.text.upper()) for n, row in enumerate(tree.rows)
    ]
    for row in tree.rows:
        folder = f"{names[row.split]}/{row.speaker}/7"
        tree.sound(f"{folder}/{row.id}.flac")
        tree.write(f"{folder}/{row.speaker}-7.trans.txt", [f"{row.id} {row.text}"])


def hugging_face_splits(tree):
    def rows(split):
        return [
            {"audio": {"bytes": tree.content(), "path": f"{row.id}.wav"}, "sentence": row.text, "speaker": row.speaker}
            for row in tree.of(split)
        ]

    names = {"train": "train", "dev": "validation", "test": "test"}
    made = {names[split]: datasets.Dataset.from_list(rows(split)) for split in SPLITS}
    return datasets.DatasetDict(made).cast_column("audio", datasets.Audio())


def saved(tree):
    hugging_face_splits(tree).save_to_disk(tree.folder)


def parquet(tree):
    tree.folder.mkdir()
    for split, dataset in hugging_face_splits(tree).items():
        dataset.rename_column("audio", "wav").to_parquet(tree.folder / f"{split}-00000-of-00001.parquet")


def hub(tree):
    found = hugging_face_splits(tree)
    tree.monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    return "owner/name"


def cuts_of(tree, split):
    lhotse = pytest.importorskip("lhotse")
    recording = lhotse.Recording.from_file(tree.sound(f"audio/{split}.wav", 1.5))
    cuts = []
    for number, row in enumerate(tree.of(split)):
        text = lhotse.SupervisionSegment(row.id, split, 0.0, 0.5, text=row.text, speaker=row.speaker)
        cut = lhotse.MonoCut(f"c-{row.id}", 0.6 * number, 0.6, 0, recording=recording, supervisions=[text])
        cuts.append(cut)
    return lhotse.CutSet.from_cuts(cuts)


def lhotse_cuts(tree):
    for split in SPLITS:
        cuts_of(tree, split).to_file(tree.folder / f"cuts_{split}.jsonl.gz")


def lhotse_shar(tree):
    for split in SPLITS:
        (tree.folder / split).mkdir(parents=True)
        cuts_of(tree, split).to_shar(tree.folder / split, fields={"recording": "flac"}, shard_size=1)


def dialogues(tree, suffix, row_of, write):
    for split in SPLITS:
        for row in tree.of(split):
            tree.sound(f"audio/{row.id}.wav")
        write(tree, f"{split}.{suffix}", [row_of(row) for row in tree.of(split)])
    tree.rows = [row._replace(speaker="") for row in tree.rows]


def ms_swift(tree):
    def row_of(row):
        turns = [("user", "<audio>Write:"), ("assistant", row.text)]
        messages = [{"role": role, "content": text} for role, text in turns]
        return {"messages": messages, "audios": [f"audio/{row.id}.wav"]}

    dialogues(tree, "jsonl", row_of, Tree.write)


def llama_factory(tree):
    def row_of(row):
        turns = [{"from": "human", "value": "<audio>Write:"}, {"from": "gpt", "value": row.text}]
        return {"conversations": turns, "audios": [f"audio/{row.id}.wav"]}

    dialogues(tree, "json", row_of, lambda tree, name, rows: tree.write(name, [json.dumps(rows, indent=2)]))


def chatml(tree):
    def row_of(row):  # all recordings have one name: the key is the ID
        path = tree.sound(f"audio/{row.id}/a.wav").relative_to(tree.folder).as_posix()
        user = f"Write:<|startofspeech|>!{path}<|endofspeech|>"
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row.text}]
        return {"messages": messages, "key": row.id, "speaker": row.speaker}

    for split in SPLITS:
        tree.write(f"{split}.jsonl", map(row_of, tree.of(split)))


def nemo(tree):
    for split in SPLITS:
        path = str(tree.sound(f"audio/{split}.wav", 1.5))
        tree.write(
            f"{split}_manifest.json",
            [
                {"audio_filepath": path, "text": row.text, "offset": 0.7 * n, "duration": 0.5, "speaker": row.speaker}
                for n, row in enumerate(tree.of(split))
            ],
        )
    starts = {row.id: ("0,0.5", "0.7,1.2")[number % 2] for number, row in enumerate(tree.rows)}
    tree.rows = [row._replace(id=f"{row.split}#t={starts[row.id]}") for row in tree.rows]


def table(tree, name, lines_of, path_of):
    """Writes lists by split; recordings of different speakers have the same names if the list has no IDs."""
    for split in SPLITS:
        for row in tree.of(split):
            tree.sound(f"{split}/{path_of(row)}")
        tree.write(name.format(split=split), lines_of(tree.of(split)))


def funasr(tree):
    def lines_of(rows):
        return [
            {"key": row.id, "source": f"{row.split}/a/{row.id}x.wav", "target": row.text, "speaker": row.speaker}
            for row in rows
        ]

    table(tree, "{split}.jsonl", lines_of, lambda row: f"a/{row.id}x.wav")


def qwen3_asr(tree):
    def lines_of(rows):
        text = "language English<asr_text>"
        return [{"audio": f"{row.split}/{row.id}.wav", "text": text + row.text, "spk": row.speaker} for row in rows]

    table(tree, "{split}.jsonl", lines_of, lambda row: f"{row.id}.wav")


def csv(tree):
    def lines_of(rows):
        return ["file_name,transcription,spk", *(f"{row.id}/a.wav,{row.text},{row.speaker}" for row in rows)]

    table(tree, "{split}/metadata.csv", lines_of, lambda row: f"{row.id}/a.wav")
    tree.rows = [row._replace(id=f"{row.split}/{row.id}/a") for row in tree.rows]


def json_lists(tree):
    def lines_of(rows):
        return [{"file_name": f"{row.id}.wav", "text": row.text, "speaker": row.speaker} for row in rows]

    table(tree, "{split}/metadata.jsonl", lines_of, lambda row: f"{row.id}.wav")


def sidecar(tree):
    """Texts and subtitles beside the recordings; a table of speakers is no list of rows."""
    for row in tree.rows:
        if row.split == "test":
            tree.sound(f"{row.split}/{row.id}.wav", 1.0)
            cue = f"<v Ann>{row.text.replace(' ', chr(10))}</v>"
            tree.write(
                f"{row.split}/{row.id}.vtt", ["WEBVTT", "", "1", "00:00.250 --> 00:00:00.750 align:start", cue, ""]
            )
        else:
            tree.sound(f"{row.split}/{row.id}.WAV")
            tree.write(f"{row.split}/{row.id}.TXT", [row.text, ""])
    tree.write("speakers.tsv", ["READER\tGENDER", "s0\tF"])
    times = {"test": "#t=0.25,0.75"}
    tree.rows = [row._replace(speaker="", id=row.id + times.get(row.split, "")) for row in tree.rows]


def names(tree):
    """Transcripts of MLS: IDs, and recordings in folders of speakers."""
    for split in SPLITS:
        for row in tree.of(split):
            tree.sound(f"{split}/audio/{row.speaker}/{row.id}.flac")
        tree.write(f"{split}/transcripts.txt", (f"{row.id}\t{row.text}" for row in tree.of(split)))
        tree.write(f"{split}/segments.txt", (f"{row.id}\thttp://host\t0\t1" for row in tree.of(split)))
    tree.rows = [row._replace(speaker="") for row in tree.rows]


TREES = {
    "kaldi": kaldi, "aishell": aishell, "wenetspeech": wenetspeech, "gigaspeech": gigaspeech,
    "common-voice": common_voice, "ljspeech": ljspeech, "datasets": saved, "lhotse-shar": lhotse_shar,
    "lhotse": lhotse_cuts, "ms-swift": ms_swift, "llama-factory": llama_factory, "chatml": chatml, "nemo": nemo,
    "funasr": funasr, "qwen3-asr": qwen3_asr, "csv": csv, "json": json_lists, "librispeech": librispeech,
    "sidecar": sidecar, "names": names, "parquet": parquet, "hub": hub,
}  # fmt: skip


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recording_of(row):
    user = next(message for message in row["messages"] if message["role"] == "user")
    return user["content"].partition("!")[2].partition("<|end")[0]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    made = Tree(tmp_path / "source")
    made.monkeypatch = monkeypatch
    return made


def test_every_source_has_a_tree():
    assert set(TREES) == set(SOURCES)


@pytest.mark.parametrize("format", SOURCES)
def test_source_is_prepared_inspected_examined_trained_decoded_and_scored(
    format, tree, run, tiny_model, tmp_path, caplog
):
    source = TREES[format](tree) or tree.folder
    out = tmp_path / "out"

    # Prepare: IDs, texts, splits, speakers.
    code, output = run("prepare", source, "--output_dir", out, "--num_workers", 1)
    assert code is None, code
    summary = json.loads((out / "summary.json").read_text())
    assert summary["format"] == format and summary["bad_rows"] == 0 and not summary["left_out"]
    rows = {split: read_lines(out / f"{split}.jsonl") for split in SPLITS}
    if tree.rows[0].split:
        assert {split: len(found) for split, found in rows.items()} == dict.fromkeys(SPLITS, 2)
    expected = {row.id: row for row in tree.rows}
    ids = {}
    for split, found in rows.items():
        ids[split] = [row.get("key") or recording_id(recording_of(row)) for row in found]
        for id_, row in zip(ids[split], found, strict=True):
            assert row["messages"][-1]["content"] == expected[id_].text
            assert row.get("speaker", "") == expected[id_].speaker and split == (expected[id_].split or split)
    assert sorted(sum(ids.values(), [])) == sorted(expected)

    # Inspect: each row's supervised text.
    tokenizer = SpeechLLMProcessor.from_pretrained(tiny_model).tokenizer
    model = ["--model_name_or_path", tiny_model]
    code, output = run("inspect", *model, "--jsonl_file", out / "train.jsonl", "--json")
    assert not code
    shown = [[token for token in json.loads(line)["labels"] if token != -100] for line in output.out.splitlines()]
    assert [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in shown] == [
        row["messages"][-1]["content"] for row in rows["train"]
    ]

    # Train: from the source itself, and from its rows.
    files = [out / "train.jsonl"]
    if format != "hub":
        direct = list(generate_rows(**generator_arguments(source, "train")))
        assert [row["error"] for row in direct] == [None] * len(direct)
        texts = sorted(json.loads(row["messages"])[-1]["content"] for row in direct)
        assert texts == sorted(row.text for row in tree.rows if row.split in ("train", ""))
        files.append(source)
    caplog.set_level(logging.INFO, "hf_speechllm")
    code, _ = run(
        "finetune", *model, "--train_file", *files, "--output_dir", tmp_path / "run", "--max_steps", 1,
        "--per_device_train_batch_seconds", 100, "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1,
        "--dataloader_num_workers", 0, "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
        "--save_strategy", "no",
    )  # fmt: skip
    assert code is None, code
    total = len(rows["train"]) + (len(direct) if format != "hub" else 0)
    assert f"training: {total} rows" in caplog.text

    # Examine the source itself.
    if format != "hub":
        run("doctor", source, "--no_vad", "--num_workers", 1, "--json", tmp_path / "doctor.json")
        report = json.loads((tmp_path / "doctor.json").read_text("utf-8"))
        assert report["rows"] == len(tree.rows)
        kinds = {finding["kind"] for finding in report["findings"]}
        assert not kinds & {"bad-row", "missing-recording", "unreadable-recording", "duplicate-id"}

    # Decode and score the test split.
    test, hypotheses = out / "test.jsonl", tmp_path / "hyp.txt"
    code, output = run(
        "decode", "--model_name_or_path", tmp_path / "run", "--max_new_tokens", 4, "--jsonl_file", test,
        "--output_file", hypotheses,
    )  # fmt: skip
    assert not code, code
    assert [line.partition("\t")[0] for line in hypotheses.read_text("utf-8").splitlines()] == ids["test"]
    code, output = run(
        "score", test, hypotheses, "--output_dir", tmp_path / "score", "--num_resamples", 100, "--num_workers", 1
    )
    assert not code, code
    result = json.loads((tmp_path / "score/score.json").read_text("utf-8"))
    assert result["missing_hypotheses"] == result["extra_hypotheses"] == []
