"""Cases of fuzzing: a function `case(world, rng, folder)` per family damages an input and checks the result.

Every input is read, or refused in one printable line. No input is lost, and undamaged inputs give the usual results.
"""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import soundfile
import yaml
from originals import (
    ANNOUNCED,
    CHECKED,
    ENCODINGS,
    END_UNKNOWN,
    UNMARKED,
    change_settings,
    damage,
    odd,
    parquet_of,
    recordings,
    tar_of,
)

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.downloads import UrlPolicy
from hf_speechllm.audio.vad import VoiceDetector
from hf_speechllm.audio.waveform import AudioError, load_audio, probe_audio, read_bytes
from hf_speechllm.data.bad_rows import BadRow, BadRows
from hf_speechllm.data.dataset import FeatureMapper, prepare_rows
from hf_speechllm.data.jsonl import read_jsonl, write_jsonl
from hf_speechllm.data.kaldi import join, read_list, read_scp
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.preparation import RowMaker, prepare
from hf_speechllm.data.shards import read_shard, shards_of
from hf_speechllm.data.transcripts import read_map
from hf_speechllm.formats.saving import write_checkpoint
from hf_speechllm.inference.journal import Journal, request_key
from hf_speechllm.inference.pieces import Transcript
from hf_speechllm.inference.requests import Request, requests_of_jsonl, requests_of_sources
from hf_speechllm.inference.transcriber import Transcriber
from hf_speechllm.inference.writers import write_results
from hf_speechllm.model import chat
from hf_speechllm.training.lora import add_lora

PROMPT = chat.transcription_prompt()


class World:
    """Objects shared by all cases: a tiny model in all layouts, and good recordings with their transcripts.

    Args:
        model, processor: of a speech LLM.
        folder: folder for all files.
    """

    def __init__(self, model, processor, folder: Path):
        self.folder = folder
        self.model, self.processor = model, processor
        self.transcriber = Transcriber(model, processor, max_new_tokens=6, num_workers=1)
        self.with_vad = Transcriber(model, processor, max_new_tokens=6, num_workers=1, vad=VoiceDetector(2.0))
        self.features = FeatureMapper(processor.feature_extractor, "float32", 100.0)
        time = np.arange(16000) / 16000
        for name, frequency in (("good1", 300), ("good2", 900)):
            soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(frequency * time), 16000)
        self.good = [folder / "good1.wav", folder / "good2.wav"]
        self.texts = self.transcriber.transcribe(self.good)
        added = processor.tokenizer.get_added_vocab().values()
        self.special = {*added, *processor.tokenizer.all_special_ids}

    @functools.cached_property
    def checkpoints(self) -> list[Path]:
        """The model in every layout, one folder each."""
        from hf_speechllm.formats.checkpoint import Checkpoint

        for layout in ("speech_llm", "native", "funasr"):
            write_checkpoint(Checkpoint.of(self.model), self.processor, self.folder / layout, layout, force=True)
        adapter = self.folder / "adapter"
        base = SpeechLLMForConditionalGeneration.from_pretrained(self.folder / "speech_llm")
        tuned = add_lora(base, 2, 4, 0.0, ["q_proj", "v_proj"])
        tuned.save_pretrained(adapter)
        self.processor.save_pretrained(adapter)
        file = adapter / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({**settings, "base_model_name_or_path": str(self.folder / "speech_llm")}))
        return [self.folder / name for name in ("speech_llm", "native", "funasr", "adapter")]


def request(name: str, source) -> Request:
    return Request(name, chat.transcription_messages(str(source), PROMPT))


def refusal(error: Exception) -> str:
    """Returns the message of an error; asserts that the message is one printable line."""
    text = str(error)
    assert text and text.isprintable(), f"not one printable line: {text[:300]!r}"
    return text


def loaded(path: Path) -> np.ndarray | None:
    """Loads a recording; returns `None` if the recording is refused in a line with its path."""
    try:
        waveform = load_audio(path)
    except AudioError as error:
        assert refusal(error).startswith(f"{path}: ")
        return None
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
    return waveform


def damaged_recording(world: World, rng: random.Random, folder: Path) -> None:
    """Loads, measures and decodes a recording (with and without voice detection), and computes its features."""
    name = rng.choice([*recordings()])
    content = recordings()[name]
    path = folder / "a.audio"
    path.write_bytes(content)
    whole = load_audio(path)
    kind = rng.choice(("bytes", "bytes", "bytes", "end", "join", "flip"))
    other = rng.choice([name, name, *recordings()])
    if kind == "end":
        path.write_bytes(content[: rng.choice((rng.randrange(1, len(content)), len(content) - rng.randrange(1, 100)))])
    elif kind == "join":
        path.write_bytes(content + recordings()[other])
    elif kind == "flip":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    else:
        path.write_bytes(damage(content, rng))
    waveform = loaded(path)
    if waveform is not None:
        container = name.split()[0]
        if kind == "end" and container in ANNOUNCED:
            assert len(whole) - len(waveform) <= 400, (
                f"{name}: {len(waveform)} of {len(whole)} samples, without an error"
            )
        elif kind == "flip" and container in CHECKED:
            np.testing.assert_allclose(waveform, whole, atol=1e-6, err_msg=name)
        elif kind == "join" and not (container in END_UNKNOWN and other.split()[0] in UNMARKED):
            length = len(whole) + len(load_audio(recordings()[other]))
            assert abs(len(waveform) - length) < 4000, f"{name} + {other}: {len(waveform)} of {length} samples"
    try:
        samples, rate = probe_audio(path)
        assert waveform is not None and abs(samples / rate - len(waveform) / 16000) < 0.01
    except AudioError as error:
        refusal(error)
        assert waveform is None or len(waveform) < 2
    result = world.features([str(path)])
    assert (result["error"] is None) == (waveform is not None and len(waveform) >= 400)
    if rng.random() < 0.5:
        transcriber = world.with_vad if rng.random() < 0.3 else world.transcriber
        requests = [request("good1", world.good[0]), request("a", path), request("good2", world.good[1])]
        found = {item.index: item for item in transcriber(requests)}
        assert found.keys() == {0, 1, 2}
        if transcriber is world.transcriber:
            assert [found[0].text, found[2].text] == world.texts
        assert waveform is None or len(waveform) < 400 or found[1].error is None
        assert waveform is not None or refusal(ValueError(found[1].error))


def row(path, text: str) -> dict:
    return {"messages": chat.transcription_messages(str(path), PROMPT, text)}


def damaged_rows(world: World, rng: random.Random, folder: Path) -> None:
    """Decodes, writes, reads and prepares a JSONL with unusual names, transcripts, encodings and bytes."""
    rows, names = [], []
    for number in range(rng.randrange(1, 6)):
        name = f"utt{number}"
        if rng.random() < 0.4:
            name = odd(name, rng)
        name = re.sub(r"[/\0]", "", name)[:60]
        path = folder / f"{name}.wav"
        if not path.exists():
            shutil.copy(world.good[0], path)
        names.append(name)
        rows.append(row(path.name, odd("one two", rng) if rng.random() < 0.5 else "one two"))
    lines = [json.dumps(item, ensure_ascii=rng.random() < 0.5) for item in rows]
    kind = rng.choice(("none", "none", "none", "bytes", "line", "encoding", "deep", "ends"))
    text = rng.choice(("\n", "\r\n")).join(lines) + rng.choice(("", "\n"))
    content = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        content = damage(content, rng)
    elif kind == "encoding":
        content = text.encode(rng.choice(ENCODINGS), "replace")
    elif kind == "line":
        junk = rng.choice(
            ("{}", "[]", "null", '{"messages": 3}', "\0" * 20, "\ufeff", "x" * 10**6, '{"messages": []}', " ")
        )
        content = (junk + "\n" + text).encode()
    elif kind == "deep":
        content = (rng.choice(('{"a":', "[")) * rng.choice((100, 10**5)) + "\n" + text).encode()
    elif kind == "ends":
        content = text.replace("\n", "\r").encode("utf-8", "surrogatepass")
    jsonl = folder / "rows.jsonl"
    jsonl.write_bytes(content)
    full = [line for line in content.split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip()]
    found = list(read_jsonl(jsonl))
    assert len(found) == len(full), f"{len(found)} of {len(full)} lines"
    for item in found:
        if isinstance(item, BadRow):
            assert str(item).isprintable() and "secret" not in str(item)
        else:
            example = world.processor.tokenize(item.dialogue, [5])
            labels = [label for label in example.labels if label != chat.IGNORE_INDEX]
            assert not set(labels[:-1]) & world.special, "a transcript became a special token"
    if kind == "none":
        texts = [item.dialogue.turns[-1].answer for item in found if not isinstance(item, BadRow)]
        given = [item["messages"][-1]["content"] for item in rows]
        assert len(texts) <= len(given) and all(text in given for text in texts)
    bad_rows = BadRows(1.0)
    requests = requests_of_jsonl(jsonl, None, bad_rows)
    assert len(requests) + len(bad_rows) == len(full)
    results = [(item.id, Transcript(0, text=f"text {number}")) for number, item in enumerate(requests)]
    if len({id_ for id_, _ in results}) == len(results):  # results are read back unchanged
        write_results(folder / "hyp.txt", results, segments=True, subtitles=True)
        assert list(read_map(folder / "hyp.txt").items()) == [(id_, item.text) for id_, item in results]
        check_damaged_journal(requests, folder, rng)
    if rng.random() < 0.04:
        options = DataOptions(cache_dir=str(folder / "cache"), preprocessing_num_workers=1)
        try:
            trained, _ = prepare_rows([str(jsonl)], world.processor, 2048, options, max_bad_fraction=0.99)
            assert 0 < len(trained) <= len(full)
        except ValueError as error:
            assert "\x1b" not in str(error) and "secret" not in str(error)


def check_damaged_journal(requests: list[Request], folder: Path, rng: random.Random) -> None:
    """Checks that a damaged journal returns the written text, or no text, for each request."""
    journal = Journal(folder / "hyp.txt", {"a": 1})
    journal.open()
    keys = [request_key(item) for item in requests]
    for number, key in enumerate(keys):
        journal.add(key, Transcript(0, text=f"text {number}", seconds=1.0))
    path = Path(journal.path)
    path.write_bytes(damage(path.read_bytes(), rng))
    texts = {key: item.text for key, item in Journal(folder / "hyp.txt", {"a": 1}).read().items()}
    written = {key: f"text {number}" for number, key in enumerate(keys)}
    assert texts.items() <= written.items()


def damaged_kaldi(world: World, rng: random.Random, folder: Path) -> None:
    """Reads `wav.scp`, `text` and `segments` with unusual values and bytes: every line is a row or reported."""
    scp, text = [], []
    for number in range(rng.randrange(1, 6)):
        id_ = f"utt{number}"
        if rng.random() < 0.3:
            id_ = odd(id_, rng).split("://")[0]
        path = rng.choice(
            (str(world.good[0]), "good.wav", "|sox x -t wav - |", "a.ark:12", "https://u:secret@127.0.0.1:9/a b")
        )
        scp.append(f"{id_}{rng.choice((' ', chr(9), '  '))}{path}")
        text.append(f"{id_} {odd('one two', rng) if rng.random() < 0.5 else 'one two'}")
    if rng.random() < 0.2:
        scp.append(rng.choice(scp))
    rng.shuffle(text)
    secrets = 0  # number of files in which URLs may be unrecognisable
    for name, lines in (("wav.scp", scp), ("text", text), ("segments", [f"{scp[0].split()[0]}-1 utt0 0.0 1.0"])):
        content = ("\n".join(lines) + "\n").encode(rng.choice((*["utf-8"] * 12, *ENCODINGS)), "replace")
        if is_damaged := rng.random() < 0.2:
            content = damage(content, rng)
        (folder / name).write_bytes(content)
        secrets += is_damaged or not content.isascii()
    bad_rows = BadRows(1.0)
    try:
        recordings_, transcripts = (
            read_scp(folder / "wav.scp", bad_rows),
            read_list(folder / "text", bad_rows, "transcript"),
        )
        utterances = join(recordings_, transcripts, bad_rows)
    except ValueError as error:
        refusal(error)
        return
    for item in bad_rows:
        assert str(item).isprintable() and (secrets or "secret" not in str(item)), str(item)
    numbers = {item.recording_line for item in utterances}
    named = {item.line for item in bad_rows if item.file.endswith("scp")}
    content = (folder / "wav.scp").read_bytes().split(b"\n")
    lines = {n for n, line in enumerate(content, 1) if line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")}
    assert numbers | named <= lines and not numbers & named
    texts_bad = len([item for item in bad_rows if item.file.endswith("text")])
    assert len(lines) <= len(numbers) + len(named) + texts_bad, "a line is neither a row nor reported"
    if rng.random() < 0.3:
        maker = RowMaker(PROMPT)
        parts = list(prepare(utterances, maker, 1))
        made = [json.loads(line) for part in parts for line in part.lines]
        assert len(made) + sum(len(part.bad) for part in parts) == len(utterances)
        write_jsonl(made, folder / "out.jsonl")
        read = [item for item in read_jsonl(folder / "out.jsonl") if not isinstance(item, BadRow)]
        assert [item.dialogue.turns[-1].answer for item in read] == [m["messages"][-1]["content"] for m in made]


def damaged_archive(world: World, rng: random.Random, folder: Path) -> None:
    """Reads tar and Parquet files for decoding (also without transcripts) and for training (embedded or not)."""
    samples = [(f"s{n}", odd("one two", rng) if rng.random() < 0.3 else "one two") for n in range(rng.randrange(1, 5))]
    names = [*recordings()]
    contents = [recordings()[rng.choice(names)] if rng.random() < 0.2 else world.good[0].read_bytes() for _ in samples]
    if rng.random() < 0.5:
        members = []
        for (name, text), content in zip(samples, contents, strict=True):
            members.append((f"{name}.{rng.choice(('wav', 'wav', 'flac', 'exe'))}", content))
            members.append((f"{name}.txt", text.encode("utf-8", "replace")))
        if rng.random() < 0.2:
            rng.shuffle(members)
        whole, path = tar_of(members), folder / "a.tar"
    else:
        keys = rng.choice((("text",), ("sentence", "id"), ("text", "language"), ("messages",)))
        rows = []
        for (name, text), content in zip(samples, contents, strict=True):
            values = {"text": text, "sentence": text, "id": name, "language": "en"}
            values["messages"] = json.dumps(row("x", text)["messages"])
            audio = rng.choice(({"bytes": content, "path": f"{name}.wav"}, {"bytes": None, "path": "x.wav"}))
            rows.append({"audio": audio, **{key: values[key] for key in keys}})
        whole, path = parquet_of(rows, rng), folder / "a.parquet"
    is_damaged = rng.random() < 0.8
    path.write_bytes(damage(whole, rng) if is_damaged else whole)
    sizes = set()
    for embed in (True, False):
        (shard,) = shards_of(str(path))
        found = [item.row for item in read_shard(shard, embed=embed)]
        assert len(found) < 100
        for item in found:
            if isinstance(item, BadRow):
                assert str(item).isprintable(), repr(str(item))
            else:
                assert len(item["recordings"]) == 1 and json.loads(item["messages"])
        sizes.add(len(found))
    if not is_damaged and path.suffix == ".parquet":
        assert sizes == {len(samples)}
    bad_rows = BadRows(1.0)
    requests = requests_of_sources([str(path)], PROMPT, bad_rows)
    assert requests or bad_rows
    if not is_damaged:
        counts = (
            len(samples)
            if path.suffix == ".parquet"
            else sum(not name.endswith((".txt", ".exe")) for name, _ in members)
        )
        assert len(requests) == counts
    for item, length in zip(requests, world.transcriber.measure(requests), strict=True):
        assert isinstance(length, float) or refusal(ValueError(length)), item.id
    if rng.random() < 0.2:
        found = list(world.transcriber(requests))
        assert sorted(item.index for item in found) == list(range(len(requests)))


def damaged_checkpoint(world: World, rng: random.Random, folder: Path) -> None:
    """Loads a checkpoint with a changed, damaged, missing or linked file: the model transcribes, or is refused."""
    source = rng.choice(world.checkpoints)
    copy = folder / "model"
    shutil.copytree(source, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    settings = [path for path in files if path.suffix in (".json", ".yaml") and path.name != "tokenizer.json"]
    kind = rng.choice(("value", "value", "value", "value", "bytes", "missing", "link"))
    file = rng.choice(settings if kind == "value" else files)
    if kind == "value":
        is_yaml = file.suffix == ".yaml"
        content = yaml.safe_load(file.read_text()) if is_yaml else json.loads(file.read_text())
        for _ in range(rng.choice((1, 1, 2))):
            content = change_settings(content, rng)
        file.write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))
    elif kind == "bytes":
        file.write_bytes(damage(file.read_bytes(), rng))
    else:
        file.unlink()
        if kind == "link":
            file.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", file, copy)))
    try:
        model = SpeechLLMForConditionalGeneration.from_pretrained(copy)
        processor = SpeechLLMProcessor.from_pretrained(copy)
        transcriber = Transcriber(model, processor, max_new_tokens=3, num_workers=1)
        transcriber.rehearse(copy)
    except (OSError, ValueError) as error:
        refusal(error)
        return
    (found,) = transcriber([request("good1", world.good[0])])
    assert found.error is None or refusal(ValueError(found.error))


BODY = b"honest content " * 1000
REDIRECTS = [
    "file:///etc/passwd", "ftp://127.0.0.1/a", "http://169.254.169.254/latest", "http://[::1]:1/",
    "http://0/", "//", "",
    "javascript:1", "http://u:secret@127.0.0.1:1/a?key=secret", "/again", "http://[bad", "http://a" * 500,
    "\x00", " /a b",
]  # fmt: skip


def answer_of(rng: random.Random) -> tuple[list[bytes], bool]:
    """Returns the parts of an HTTP answer, and whether the answer is valid."""
    length = rng.choice((len(BODY),) * 6 + (0, -1, 10**30, len(BODY) + 50, len(BODY) - 50, "a", " 5"))
    status = rng.choice((b"HTTP/1.1 200 OK",) * 8 + (
        b"HTTP/1.1 206 Partial", b"HTTP/1.1 204 No", b"HTTP/1.1 100 Continue", b"HTTP/1.1 999 X",
        b"HTTP/9.9 200", b"junk",
        b"HTTP/1.1 500 \x1b[31mred", b"HTTP/1.1 404", b"",
    ))  # fmt: skip
    headers = [b"Content-Length: %s" % str(length).encode()] if rng.random() < 0.8 else []
    for _ in range(rng.choice((0, 0, 1, 3))):
        headers.append(rng.choice((
            b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"X: " + b"x" * 70000, b"no colon",
            b"\x00: \xff", b" folded",
            b"Content-Length: 3", b"Connection: keep-alive", b"Set-Cookie: a=" + b"b" * 5000,
            b"Content-Range: bytes 0-1/2",
        )))  # fmt: skip
    if rng.random() < 0.25:
        status = b"HTTP/1.1 " + rng.choice((b"301 M", b"302 F", b"307 T", b"308 P", b"300 C"))
        headers.append(b"Location: " + rng.choice(REDIRECTS).encode())
    headers += [b"Y%d: a" % number for number in range(rng.choice((0, 0, 0, 300)))]
    body = rng.choice((BODY, BODY, BODY, b"", b"5\r\nabcde\r\n0\r\n\r\n", b"zz\r\n", BODY[:100], BODY * 200))
    content = status + b"\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body
    honest = status == b"HTTP/1.1 200 OK" and body == BODY and headers == [b"Content-Length: %d" % len(BODY)]
    if rng.random() < 0.2:
        content, honest = damage(content, rng), False
    if rng.random() < 0.1:
        size = max(1, len(content) // 200)
        return [content[start : start + size] for start in range(0, len(content), size)], False
    return [content], honest


def misbehaving_server(world: World, rng: random.Random, folder: Path) -> None:
    """Downloads from a misbehaving server: returns in time, with the content or one line without secrets."""
    parts, honest = answer_of(rng)
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(0.5)
                    connection.recv(65536)
                    for part in parts:
                        connection.sendall(part)
                        if len(parts) > 1 and over.wait(0.05):
                            return
                    if rng.random() < 0.2:
                        over.wait(3)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    UrlPolicy.change(max_megabytes=1, timeout_seconds=1)
    address = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}/a.wav?key=secret"
    began = time.monotonic()
    try:
        content = read_bytes(address)
        assert len(content) <= 10**6
        assert not honest or content == BODY
    except AudioError as error:
        assert not honest and "secret" not in refusal(error)
    finally:
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
    assert time.monotonic() - began < 3


FAMILIES = {
    "recordings": damaged_recording,
    "rows": damaged_rows,
    "kaldi": damaged_kaldi,
    "archives": damaged_archive,
    "checkpoints": damaged_checkpoint,
    "urls": misbehaving_server,
}
