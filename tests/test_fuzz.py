"""Fuzzing of all readers with damaged input: each reader returns usable rows, reports the others, and terminates.

A few examples always run; `pytest -m slow tests/test_fuzz.py` runs 2,000.
"""

import contextlib
import io
import json
import tarfile

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_speechllm.audio.waveform import AudioError, load_audio, probe_audio
from hf_speechllm.data.bad_rows import BadDataError, BadRow, BadRows
from hf_speechllm.data.jsonl import Row, read_jsonl
from hf_speechllm.data.kaldi import join, read_list, read_scp
from hf_speechllm.data.preparation import RowMaker
from hf_speechllm.data.shards import read_shard, shards_of
from hf_speechllm.data.sources import read_source, recognize
from hf_speechllm.data.sources.reading import Reading
from hf_speechllm.model.chat import ChatError, transcription_messages

QUICK, LONG = 25, 250  # examples of each of the ten readers


def fuzz(strategy):
    """Runs a test with few examples, and as a slow test with many examples."""

    def decorate(function):
        @pytest.mark.timeout(900)
        @pytest.mark.parametrize("examples", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
        def test(examples, tmp_path):
            @settings(
                max_examples=examples, deadline=10_000, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(strategy)
            def run(data):
                function(data, tmp_path)

            run()

        test.__doc__ = function.__doc__
        return test

    return decorate


def damaged(*originals):
    """Returns one of the originals with bytes changed, removed, inserted, repeated, or truncated."""

    @st.composite
    def build(draw):
        data = bytearray(draw(st.sampled_from(originals)))
        for _ in range(draw(st.integers(1, 6))):
            # Headers are short and most important.
            end = draw(st.sampled_from([16, 64, 600, len(data)]))
            place = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
            action = draw(st.sampled_from(["set", "flip", "cut", "insert", "double", "end"]))
            if action == "set" and data:
                data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            elif action == "flip" and data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            elif action == "cut":
                del data[place : place + draw(st.sampled_from([1, 4, 512, 2000]))]
            elif action == "insert":
                data[place:place] = draw(st.binary(max_size=20))
            elif action == "double":
                data[place:place] = data[place : place + 512]
            elif action == "end":
                del data[place:]
        return bytes(data)

    return build()


def recording(format, subtype=None, seconds=0.4, rate=16000):
    buffer = io.BytesIO()
    samples = np.sin(np.arange(int(seconds * rate)) / 5) * 0.5
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def m4a():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 6400), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


WAV = recording("WAV", "PCM_16")
RECORDINGS = [
    WAV, recording("WAV", "FLOAT"), recording("WAV", "IMA_ADPCM"), recording("AIFF"), recording("FLAC"),
    recording("OGG", "VORBIS"), recording("OGG", "OPUS"), recording("MP3"), m4a(),
]  # fmt: skip
LINES = "".join(
    json.dumps(row, ensure_ascii=False) + "\n"
    for row in (
        {
            "messages": transcription_messages("a.wav", "语音转写：", "几点了？"),
            "speech_length": 145,
            "text_length": 3,
        },
        {"messages": transcription_messages("https://u:p@h/b.wav?x=1", "Write:", "what"), "hotwords": ["a", "b"]},
        {"messages": transcription_messages({"path": "c"}, "Write:", "what"), "hotwords": "a,b"},
    )
).encode()
SCP = "a 1.wav\nb /data/2.flac\nc https://h/3.ogg\nd 录音.mp3\n".encode()
TEXT = "b two\na one\nd 几点了？\nc three\n".encode()


def tar_of(format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in [
            ("1.wav", WAV[:700]), ("1.txt", b"one"), ("long" * 40 + "ä.flac", b"x" * 30),
            ("long" * 40 + "ä.json", b'{"text": "two", "hotwords": ["x"]}'), ("3.mp3", b"y"), ("3.txt", b"three"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(messages):
    buffer = io.BytesIO()
    content = {"messages": transcription_messages("x", "Write:", "what")} if messages else {"text": "what"}
    row = {"audio": {"bytes": WAV[:500], "path": "a.wav"}, "language": "en", "hotwords": ["a"], **content}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 7), buffer, row_group_size=3)
    return buffer.getvalue()


@fuzz(damaged(*RECORDINGS))
def test_damaged_recording(data, folder):
    """Both functions agree: they return a recording, or raise an `AudioError` with a message."""
    path = folder / "a"
    path.write_bytes(data)
    results = []
    for function in (load_audio, probe_audio):
        try:
            results.append(function(path))
        except AudioError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) > len(str(path)) + 5
            results.append(None)
    waveform, length = results
    if waveform is not None:
        assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
        assert length is not None


@fuzz(damaged(LINES) | st.binary(max_size=200))
def test_damaged_jsonl(data, folder):
    """Each line is a row, or a bad row with a reason."""
    path = folder / "a.jsonl"
    path.write_bytes(data)
    rows = list(read_jsonl(path))
    assert len(rows) <= data.count(b"\n") + 1
    for row in rows:
        assert isinstance(row, Row) or row.reason
        json.dumps(getattr(row, "messages", None), ensure_ascii=False).encode("utf-8")


def one_row(data, folder):
    path = folder / "a.jsonl"
    path.write_bytes(data)
    (row,) = read_jsonl(path)
    assert isinstance(row, Row) or row.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "<|startofspeech|>!a<|endofspeech|>", "<|startofspeech|>", "hi"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "audio", "path", "text", "messages", "hotwords", "speech_length"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON})
RECORD = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=4) | JSON},
    optional={key: JSON for key in ("hotwords", "speech_length", "text_length", "language", "text")},
)


@fuzz(RECORD)
def test_json_of_another_shape(record, folder):
    """Invalid structures in a JSONL and in a JSON member of a tar file."""
    data = json.dumps(record).encode()
    one_row(data + b"\n", folder)
    path = folder / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("1.wav", WAV), ("1.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert len(rows_of(path)) == 1


@fuzz(st.tuples(damaged(SCP) | st.binary(max_size=100), damaged(TEXT) | st.binary(max_size=100)))
def test_damaged_lists(data, folder):
    """Joined lines are text; every other line is reported. A list without any path is refused as a whole."""
    for name, content in zip(("wav.scp", "text"), data, strict=True):
        (folder / name).write_bytes(content)
    bad_rows = BadRows(1.0)
    try:
        scp = read_scp(folder / "wav.scp", bad_rows)
    except ValueError as error:
        assert str(error).startswith(f"{folder / 'wav.scp'}: ") and b"/" not in data[0] and b".wav" not in data[0]
        return
    text = read_list(folder / "text", bad_rows, "transcript")
    for utterance in join(scp, text, bad_rows):
        assert utterance.id and utterance.recording and utterance.transcript.strip()
    for row in bad_rows:
        assert row.reason and 1 <= row.line <= max(content.count(b"\n") + 1 for content in data)


def rows_of(path):
    rows = []
    for shard in shards_of(str(path)):
        for embed in (True, False):
            rows = [item.row for item in read_shard(shard, embed=embed)]
            assert len(rows) < 50
            for row in rows:
                if isinstance(row, BadRow):
                    assert str(row).startswith(f"{path}:") and row.reason
                else:
                    json.dumps(row["messages"], ensure_ascii=False).encode("utf-8")
                    assert len(row["recordings"]) == 1
    return rows


@fuzz(damaged(tar_of(tarfile.PAX_FORMAT), tar_of(tarfile.GNU_FORMAT)))
def test_damaged_tar(data, folder):
    path = folder / "a.tar"
    path.write_bytes(data)
    rows_of(path)


@fuzz(damaged(parquet_of(True), parquet_of(False)))
def test_damaged_parquet(data, folder):
    path = folder / "a.parquet"
    path.write_bytes(data)
    rows_of(path)


@fuzz(st.tuples(damaged(tar_of(tarfile.GNU_FORMAT), parquet_of(True)), st.integers(0, 4000)))
def test_damaged_end_of_archives(data, folder):
    """Parquet has its metadata at the end."""
    original, start = data
    for name in ("a.tar", "a.parquet"):
        (folder / name).write_bytes(original[::-1][:start][::-1])
        rows_of(folder / name)


@fuzz(damaged(LINES) | st.binary(max_size=200))
def test_blocks_of_a_damaged_jsonl(data, folder):
    """Blocks contain the same rows as the whole file."""
    path = folder / "a.jsonl"
    path.write_bytes(data)
    whole = [isinstance(row, BadRow) for row in read_jsonl(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", 64)
        rows = [item.row for shard in shards_of(str(path)) for item in read_shard(shard)]
    assert [isinstance(row, BadRow) for row in rows] == whole


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


SEGMENT = {
    "sid": "a_1", "begin_time": 0.5, "end_time": 1.5, "subsets": ["{XL}", "S"], "text": "一", "text_tn": "A <COMMA> B",
}  # fmt: skip
LONG_RECORDINGS = json.dumps(
    {"dataset": "GigaSpeech", "audios": [{"aid": "a", "path": "a.opus", "segments": [SEGMENT, SEGMENT]}]}
).encode()
# Name and content of a file in each format.
SOURCE_FILES = {
    "csv": ("a.csv", b'path,text,start,end\na.wav,"one, two",0.5,1\nb.wav,three,,\n'),
    "common-voice": ("a.tsv", b'client_id\tpath\tsentence\nx\ta.mp3\t"One"\ny\tb.mp3\tTwo\n'),
    "ljspeech": ("metadata.csv", b"a|One 2|one two\nb|Three|three\n"),
    "nemo": ("a.json", lines({"audio_filepath": "a.wav", "duration": 3.5, "offset": 1, "text": "one"}) * 2),
    "funasr": ("a.jsonl", lines({"key": "a", "source": "a.wav", "target": "一", "text_language": "<|zh|>"})),
    "qwen3-asr": ("a.jsonl", lines({"audio": "a.wav", "text": "language English<asr_text>One."})),
    "ms-swift": (
        "a.jsonl",
        lines(
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "o"}], "audios": "a"},
            {"query": "<audio>", "response": "o", "history": [["a", "b"]], "audios": ["a"], "system": "s"},
        ),
    ),
    "llama-factory": (
        "a.json",
        b'[{"conversations": [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "o"}], "audios": "a"}]',
    ),
    "gigaspeech": ("GigaSpeech.json", LONG_RECORDINGS),
    "wenetspeech": ("WenetSpeech.json", LONG_RECORDINGS.replace(b"GigaSpeech", b"WenetSpeech")),
}  # fmt: skip
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["a.wav", [{}]])
)


def read_damaged(format, data, folder):
    path = folder / SOURCE_FILES[format][0]
    path.write_bytes(data)
    recognize(str(path))
    bad_rows = BadRows(1.0)
    try:
        found = list(read_source(str(path), Reading(bad_rows), format))
    except BadDataError as error:
        assert str(path) in str(error)
        return
    for utterance in found:
        with contextlib.suppress(BadDataError, ChatError):
            RowMaker("Write:").messages(utterance)
        assert utterance.recordings and utterance.transcript_file == str(path)
    assert all(row.reason and row.file == str(path) for row in bad_rows)


@fuzz(st.sampled_from([*SOURCE_FILES]).flatmap(lambda name: st.tuples(st.just(name), damaged(SOURCE_FILES[name][1]))))
def test_damaged_sources(data, folder):
    """Rows of other tools are usable or reported; the error for an unreadable source names the file."""
    read_damaged(*data, folder)


@st.composite
def records_of_another_shape(draw):
    """Returns a JSON source with one value replaced."""
    format = draw(st.sampled_from([name for name, (file, _) in SOURCE_FILES.items() if ".json" in file]))
    content = SOURCE_FILES[format][1]
    whole = format not in ("nemo", "funasr", "qwen3-asr", "ms-swift")
    records = json.loads(content) if whole else [json.loads(line) for line in content.splitlines()]
    place = records
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.integers(0, 3)) == 0:
            place[key] = draw(VALUES)
            break
        place = place[key]
    return format, json.dumps(records).encode() if whole else lines(*records)


@fuzz(records_of_another_shape())
def test_sources_of_another_shape(data, folder):
    """JSON of other tools may contain values of wrong types."""
    read_damaged(*data, folder)
