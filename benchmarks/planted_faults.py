"""Makes a corpus with planted faults from the quickstart recordings, and counts how many `hf-speechllm doctor` finds.

    python benchmarks/planted_faults.py --output_dir exp/planted --num_rows 500 --rows_per_fault 3

Writes train.jsonl, dev.jsonl, test.jsonl and the recordings, runs the doctor with its JSON and HTML reports, and
prints one JSON line: faults planted and found, and false alarms on clean rows.
"""

import argparse
import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from hf_speechllm.audio.resampling import resample
from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data.kaldi import speech_length
from hf_speechllm.model.chat import transcription_messages, transcription_prompt

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "quickstart_data"
RATE = 16000
VOICES = {"dev": "en-gb-x-rp-m1", "test": "en-us-f3"}  # one speaker each; training has the others


@dataclass
class Item:
    """A row of the corpus.

    Args:
        key, path, text, speaker: ID, recording, transcript, voice.
        split: `train`, `dev` or `test`.
        fault: name of the planted fault; empty for a clean row.
        kinds: kinds of findings, of which one must be found.
        keys: other keys of the row.
        prompt: of the row.
        line: replaces the line of the JSONL.
        group: rows with the same number share a fault, which may be reported on any of them; 0: none.
    """

    key: str
    path: str
    text: str
    speaker: str | None
    split: str
    fault: str = ""
    kinds: tuple[str, ...] = ()
    keys: dict = field(default_factory=dict)
    prompt: str = transcription_prompt()
    line: str | None = None
    group: int = 0

    @property
    def samples(self) -> np.ndarray:
        """The waveform."""
        return load_audio(self.path)

    def json(self) -> str:
        """The line of the JSONL."""
        if self.line is not None:
            return self.line + "\n"
        row = {"messages": transcription_messages(self.path, self.prompt, self.text), "key": self.key}
        row |= {"speaker": self.speaker} if self.speaker else {}
        return json.dumps({**row, **self.keys}, ensure_ascii=False) + "\n"


class Planter:
    """Makes rows with faults."""

    def __init__(self, folder: Path, num_rows: int, rows_per_fault: int, seed: int):
        self.folder, self.num_rows, self.rows_per_fault = folder, num_rows, rows_per_fault
        self.rng = random.Random(seed)
        self.noise = np.random.default_rng(seed)
        self.count = self.groups = 0
        (folder / "audio").mkdir(parents=True)
        self.pools = self.read_rows()

    def read_rows(self) -> dict[str, list[Item]]:
        """Reads the quickstart rows by split, in random order; each transcript occurs once, without single digits."""
        pools: dict[str, list[Item]] = {"train": [], "dev": [], "test": []}
        seen = set()
        for part in ("train", "test"):
            lists = []
            for name in ("wav.scp", "text", "utt2spk"):
                lines = (DATA / part / name).read_text(encoding="utf-8").splitlines()
                lists.append(dict(line.split(" ", 1) for line in lines))
            for key in self.rng.sample(sorted(lists[0]), len(lists[0])):
                path, text, speaker = (found[key].strip() for found in lists)
                split = next((name for name, voice in VOICES.items() if voice == speaker), "train")
                if text in seen or (text.isascii() and " " not in text):
                    continue
                seen.add(text)
                recording = str((DATA / part / path).resolve())
                pools[split].append(Item(key, recording, text, speaker, split))
        return pools

    def take(self, split: str = "train", fits: Callable[[Item], bool] = lambda item: True) -> Item:
        """Takes a random clean row."""
        pool = self.pools[split]
        return pool.pop(next(index for index, item in enumerate(pool) if fits(item)))

    def english(self, words: int = 3) -> Item:
        """Takes an English row with at least `words` words."""
        return self.take(fits=lambda item: item.text.isascii() and len(item.text.split()) >= words)

    def mandarin(self) -> Item:
        """Takes a Mandarin row."""
        return self.take(fits=lambda item: not item.text.isascii())

    def write(self, samples: np.ndarray, suffix: str = "wav", rate: int = RATE, **options) -> str:
        """Writes a recording and returns its path."""
        self.count += 1
        path = self.folder / "audio" / f"{self.count:04}.{suffix}"
        if suffix in ("wav", "flac"):
            options.setdefault("subtype", "PCM_16")
        soundfile.write(path, samples, rate, **options)
        return str(path)

    def write_bytes(self, content: bytes, suffix: str = "wav") -> str:
        """Writes any file and returns its path."""
        self.count += 1
        path = self.folder / "audio" / f"{self.count:04}.{suffix}"
        path.write_bytes(content)
        return str(path)

    def joined(self, seconds: float, pause: float = 0.3) -> tuple[np.ndarray, str]:
        """Joins English recordings to a waveform of at least `seconds`; returns it with its transcript."""
        parts: list[np.ndarray] = []
        texts: list[str] = []
        pool = [item for item in self.pools["train"] if item.text.isascii()]
        while sum(map(len, parts)) < seconds * RATE:
            item = self.rng.choice(pool)
            texts.append(item.text)
            parts += [item.samples, 1e-4 * self.noise.standard_normal(int(pause * RATE)).astype(np.float32)]
        return np.concatenate(parts), " ".join(texts)

    def plant(self) -> list[Item]:
        """Makes all rows, in random order within each split, except blocks that belong together."""
        rows: list[Item] = []
        for name, (kinds, make) in FAULTS.items():
            for number in range(1 if name in ONCE else self.rows_per_fault):
                made = make(self, number)
                self.groups += 1
                for item in made if isinstance(made, list) else [made]:
                    item.fault, item.kinds, item.group = name, kinds, self.groups
                    rows.append(item)
        block = self.shifted()
        left = self.num_rows - len(rows) - len(block)
        if left < 0:
            raise SystemExit(f"{self.num_rows} rows are too few for {len(rows) + len(block)} faults")
        for split, count in (("test", left // 10), ("dev", left // 10), ("train", left - 2 * (left // 10))):
            rows += [self.take(split) for _ in range(count)]
        for index, item in enumerate(rows):
            if item.line is None:
                item.key = f"utt{item.group if item.fault == 'duplicate ID' else 1000 + index}"
        self.rng.shuffle(rows)
        return rows[: len(rows) // 2] + block + rows[len(rows) // 2 :]

    def shifted(self) -> list[Item]:
        """Rows whose transcripts are those of the next row."""
        block = [self.take() for _ in range(max(18, min(30, 6 * self.rows_per_fault)))]
        texts = [item.text for item in block]
        for item, text in zip(block, texts[1:] + texts[:1], strict=True):
            item.text, item.fault, item.kinds = text, "transcripts shifted by a row", ("shifted-transcripts",)
            item.group = -1
        return block


def changed(item: Item, path: str | None = None, text: str | None = None, **others) -> Item:
    """Changes a row."""
    item.path, item.text = path or item.path, item.text if text is None else text
    for name, value in others.items():
        setattr(item, name, value)
    return item


def audio(change: Callable[[Planter, np.ndarray], np.ndarray], words: int = 2, **options) -> Callable:
    """A fault of the samples."""

    def make(planter: Planter, number: int) -> Item:
        item = planter.english(words)
        return changed(item, planter.write(change(planter, item.samples), **options))

    return make


def text(change: Callable[[str], str], words: int = 3) -> Callable:
    """A fault of an English transcript."""
    return lambda planter, number: changed(item := planter.english(words), text=change(item.text))


def low_pass(samples: np.ndarray, hertz: float = 3800) -> np.ndarray:
    """Removes all frequencies above a limit."""
    spectrum = np.fft.rfft(samples)
    spectrum[int(hertz * len(samples) / RATE) :] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


def with_gaps(planter: Planter, samples: np.ndarray) -> np.ndarray:
    """Replaces 30 ms at the three loudest places by zeros."""
    samples, width = samples.copy(), int(0.03 * RATE)
    for _ in range(3):
        energy = np.convolve(np.square(samples), np.ones(width), "valid")
        samples[(first := int(energy.argmax())) : first + width] = 0
    return samples


def cut_word(planter: Planter, samples: np.ndarray) -> np.ndarray:
    """Ends the recording at the loudest place of its second half, after 0.7 s."""
    start = max(len(samples) // 2, round(0.7 * RATE))
    return samples[: start + int(np.abs(samples[start:]).argmax())]


def twice(planter: Planter, samples: np.ndarray) -> np.ndarray:
    """Repeats 40 ms at the loudest place."""
    width = int(0.04 * RATE)
    first = int(np.convolve(np.square(samples), np.ones(width), "valid").argmax())
    return np.insert(samples, first, samples[first : first + width])


def pink(planter: Planter, size: int) -> np.ndarray:
    """Pink noise."""
    spectrum = np.fft.rfft(planter.noise.standard_normal(size))
    noise = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1), size)
    return (0.3 * noise / np.abs(noise).max()).astype(np.float32)


def tone(samples: np.ndarray, hertz: float, level: float) -> np.ndarray:
    """A sine as long as the samples."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(len(samples)) / RATE)).astype(np.float32)


def cut_file(planter: Planter, number: int) -> Item:
    """A WAV that lacks its last third."""
    item = planter.take()
    path = Path(planter.write(item.samples))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return changed(item, str(path))


def cut_flac(planter: Planter, number: int) -> Item:
    """A FLAC that lacks its last third."""
    item = planter.take()
    path = Path(planter.write(item.samples, "flac"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return changed(item, str(path))


def no_path(planter: Planter, number: int) -> Item:
    """A row whose file does not exist."""
    return changed(planter.take(), str(planter.folder / "audio" / f"missing-{number}.wav"))


def copy_of(change: Callable[[Planter, Item], str], split: str = "train", wrong: bool = False) -> Callable:
    """A second row with the same recording."""

    def make(planter: Planter, number: int) -> list[Item]:
        first = planter.take(split, lambda item: len(item.text.split()) > 2)
        second = planter.take()
        path = change(planter, first)
        return [first, changed(second, path, second.text if wrong else first.text)]

    return make


def two_speakers(planter: Planter, number: int) -> Item:
    """Different speech in both channels."""
    first, second = planter.english(4), planter.english(4)
    size = max(len(first.samples), len(second.samples))
    channels = [np.pad(item.samples, (0, size - len(item.samples))) for item in (first, second)]
    return changed(first, planter.write(np.stack(channels, 1)))


def stereo(left: float, right: float) -> Callable:
    """The recording in two channels with gains."""
    return audio(lambda planter, samples: np.stack([left * samples, right * samples], 1))


def long_row(seconds: float) -> Callable:
    """A long recording with its transcript."""

    def make(planter: Planter, number: int) -> Item:
        samples, text = planter.joined(seconds)
        return changed(planter.english(), planter.write(samples, "flac"), text)

    return make


def with_silence(place: str) -> Callable:
    """A recording with 8 s of faint noise."""

    def make(planter: Planter, number: int) -> Item:
        item = planter.english()
        quiet = (1e-4 * planter.noise.standard_normal(8 * RATE)).astype(np.float32)
        parts = {"start": (quiet, item.samples), "end": (item.samples, quiet)}
        if place == "inside":
            other = planter.english()
            item.text += f" {other.text}"
            parts["inside"] = (item.samples, quiet, other.samples)
        return changed(item, planter.write(np.concatenate(parts[place])))

    return make


def one_word(planter: Planter, number: int) -> Item:
    """One word for 10 s of speech."""
    return changed(planter.english(), planter.write(planter.joined(10)[0], "flac"), "seven")


def a_third(planter: Planter, number: int) -> Item:
    """The transcript of the first of three recordings."""
    items = [planter.english(4) for _ in range(3)]
    return changed(items[0], planter.write(np.concatenate([item.samples for item in items])))


def same_sentence(planter: Planter, number: int) -> list[Item]:
    """One long sentence, spoken by two voices, in train and test."""
    items = [planter.take("test", lambda item: len(item.text.split()) == 4), planter.english(4)]
    others = [planter.take("test", lambda item: len(item.text.split()) == 4), planter.english(4)]
    sentence = f"{items[0].text} {others[0].text}"
    paths = [planter.write(np.concatenate([a.samples, b.samples])) for a, b in zip(items, others, strict=True)]
    return [changed(item, path, sentence) for item, path in zip(items, paths, strict=True)]


def same_id(planter: Planter, number: int) -> list[Item]:
    """Two rows with one ID."""
    return [planter.take(), planter.take()]


def overlapping(planter: Planter, number: int) -> list[Item]:
    """Two parts of a file that share a second."""
    samples, _ = planter.joined(6)
    path = planter.write(samples, "flac")
    first, second = planter.english(4), planter.english(4)
    return [changed(first, f"{path}#t=0,3"), changed(second, f"{path}#t=2,5")]


def in_json(**keys) -> Callable:
    """A row with wrong keys; values may be functions of the row."""

    def make(planter: Planter, number: int) -> Item:
        item = planter.take()
        values = {name: value(item) if callable(value) else value for name, value in keys.items()}
        return changed(item, keys=values)

    return make


def frames(item: Item) -> int:
    """The right speech_length of a row."""
    return speech_length(len(item.samples), RATE)


def nfd(text: str) -> str:
    """A text with a decomposed letter."""
    return unicodedata.normalize("NFD", f"{text} café")


def swapped(planter: Planter, samples: np.ndarray) -> np.ndarray:
    """Samples with the bytes in the wrong order."""
    return (samples * 32767).astype("<i2").byteswap().astype(np.int16)


ONCE = ("too long", "speaker in two splits", "repeated transcript")
FAULTS: dict[str, tuple[tuple[str, ...], Callable]] = {
    # Files.
    "missing file": (("missing-recording",), no_path),
    "truncated WAV": (("truncated-recording",), cut_file),
    "truncated FLAC": (("truncated-recording", "unreadable-recording"), cut_flac),
    "not audio": (("unreadable-recording",), lambda p, n: changed(p.take(), p.write_bytes(b"<html>404</html>" * 99))),
    "empty file": (("unreadable-recording",), lambda p, n: changed(p.take(), p.write_bytes(b""))),
    "NaN": (("unreadable-recording",), audio(lambda p, x: np.append(x, np.nan), subtype="FLOAT")),
    # Sound.
    "digital silence": (("silent",), audio(lambda p, x: 0 * x)),
    "near silence": (("silent", "no-speech"), audio(lambda p, x: 2e-5 * p.noise.standard_normal(len(x)))),
    "very low level": (("low-level",), audio(lambda p, x: 0.004 * x)),
    "white noise": (("no-speech", "steady-signal"), audio(lambda p, x: 0.1 * p.noise.standard_normal(len(x)))),
    "pink noise": (("no-speech",), audio(lambda p, x: pink(p, len(x)))),
    "only hum": (("no-speech", "steady-signal"), audio(lambda p, x: tone(x, 100, 0.2) + tone(x, 50, 0.2))),
    "clipped": (("clipped",), audio(lambda p, x: np.clip(6 * x / np.abs(x).max(), -1, 1))),
    "clipped below full scale": (("clipped",), audio(lambda p, x: 0.4 * np.clip(6 * x / np.abs(x).max(), -1, 1))),
    "clipped, then Vorbis": (
        ("clipped",),
        audio(lambda p, x: 0.9 * np.clip(10 * x / np.abs(x).max(), -1, 1), suffix="ogg", subtype="VORBIS"),
    ),
    "DC offset": (("dc-offset",), audio(lambda p, x: 0.5 * x + 0.1)),
    "50 Hz hum": (("hum",), audio(lambda p, x: 0.5 * x + tone(x, 50, 0.05), words=4)),
    "whistle": (("hum",), audio(lambda p, x: 0.5 * x + tone(x, 2400, 0.05), words=4)),
    "dropouts": (("dropouts",), audio(with_gaps)),
    "cut inside a word": (("cut-speech",), audio(cut_word, words=4)),
    "a buffer twice": (("repeated-sound",), audio(twice)),
    "dead channel": (("dead-channel",), stereo(1, 0)),
    "inverted channel": (("inverted-channel",), stereo(1, -1)),
    "two speakers in two channels": (("unrelated-channels",), two_speakers),
    "8 kHz content": (("narrow-band",), audio(lambda p, x: resample(resample(x, RATE, 8000), 8000, RATE))),
    "MP3 without high frequencies": (
        ("narrow-band",),
        audio(lambda p, x: low_pass(x, 3600), suffix="mp3", subtype="MPEG_LAYER_III"),
    ),
    "other sampling rate": (("unusual-sampling-rate",), audio(lambda p, x: resample(x, RATE, 22050), rate=22050)),
    "8 s of silence first": (("long-silence",), with_silence("start")),
    "8 s of silence last": (("long-silence",), with_silence("end")),
    "8 s of silence inside": (("long-silence",), with_silence("inside")),
    "too short": (("too-short",), audio(lambda p, x: x[3000:4200])),
    "one minute": (("long-recording",), long_row(65)),
    "too long": (("too-long",), long_row(610)),
    "bytes in wrong order": (("white-noise",), audio(swapped)),
    # Silero VAD finds no speech in some recordings at twice the speed.
    "wrong rate in the header": (
        ("unusual-pace", "no-speech"),
        audio(lambda p, x: resample(x, 2 * RATE, RATE), words=4),
    ),
    # Half of these short recordings can be less than the 0.55 s of speech that must be missing.
    "first third only": (("unusual-pace", "too-much-text"), audio(lambda p, x: x[: int(0.35 * len(x))], words=4)),
    # Copies and splits.
    "copy as FLAC": (("duplicate-recording",), copy_of(lambda p, item: p.write(item.samples, "flac"))),
    "copy with another transcript": (
        ("conflicting-transcripts",),
        copy_of(lambda p, item: p.write(item.samples, "flac"), wrong=True),
    ),
    "copy as MP3, half as loud": (
        ("near-duplicate",),
        copy_of(lambda p, item: p.write(0.5 * item.samples, "mp3", subtype="MPEG_LAYER_III")),
    ),
    "copy with padding": (
        ("duplicate-recording", "near-duplicate"),
        copy_of(lambda p, item: p.write(np.pad(item.samples, 3000))),
    ),
    "copy in test": (("recording-in-two-splits",), copy_of(lambda p, item: p.write(item.samples, "flac"), "test")),
    "near copy in test": (
        ("recording-in-two-splits",),
        copy_of(lambda p, item: p.write(0.5 * item.samples, "ogg", subtype="VORBIS"), "test"),
    ),
    "sentence in train and test": (("text-in-two-splits",), same_sentence),
    "speaker in two splits": (("speaker-in-two-splits",), lambda p, n: changed(p.english(), speaker=VOICES["test"])),
    "speaker spelled otherwise": (
        ("speaker-spelling",),
        lambda p, n: changed(item := p.take(), speaker=str(item.speaker).upper().replace("-", "_")),
    ),
    "speaker missing": (("missing-speaker",), lambda p, n: changed(p.take(), speaker=None)),
    "duplicate ID": (("duplicate-id",), same_id),
    "overlapping parts": (("overlapping-parts",), overlapping),
    # Rows.
    "not JSON": (("bad-row",), lambda p, n: changed(p.take(), line='{"messages": [')),
    "no path": (("bad-row",), lambda p, n: changed(p.take(), path=" ")),
    "other prompt in dev": (("prompt-mismatch",), lambda p, n: changed(p.take("dev"), prompt=f"Transcribe {n}:")),
    "mistyped prompt": (("rare-prompt",), lambda p, n: changed(p.take(), prompt=f"语音转写{n}：")),
    "wrong speech_length": (("wrong-speech-length",), in_json(speech_length=lambda item: frames(item) + 20)),
    "speech_length in ms": (("wrong-speech-length",), in_json(speech_length=lambda item: 10 * frames(item))),
    "wrong text_length": (("wrong-text-length",), in_json(text_length=500)),
    # Transcripts.
    "empty transcript": (("empty-transcript",), text(lambda t: " ")),
    "only punctuation": (("no-words",), text(lambda t: "...?")),
    "HTML tags": (("markup",), text(lambda t: f"<b>{t}</b><br/>")),
    "HTML entities": (("markup",), text(lambda t: t.replace(" ", " &amp; ", 1))),
    "<unk>": (("annotation",), text(lambda t: t.replace(" ", " <unk> ", 1))),
    "[noise]": (("annotation",), text(lambda t: f"{t} [noise]")),
    "speaker tag": (("annotation",), text(lambda t: f"Speaker_1: {t}")),
    "time stamp": (("markup",), text(lambda t: f"[00:01.20] {t}")),
    "word pieces": (("markup",), text(lambda t: " ".join(f"▁{word}" for word in t.split()))),
    "JSON": (("markup",), text(lambda t: json.dumps({"text": t}))),
    "name of the file": (("wrong-column",), text(lambda t: "clips/utt_00123.wav")),
    "missing value": (("wrong-column",), text(lambda t: "nan")),
    "URL-encoded": (("markup",), text(lambda t: t.replace(" ", "%20"))),
    "URL": (("url",), text(lambda t: f"{t} https://a.org")),
    "emoji": (("emoji",), text(lambda t: f"{t} \U0001f600")),
    "mojibake": (("mojibake",), text(lambda t: f"{t} café".encode().decode("cp1252"))),
    "mojibake of Chinese": (
        ("mojibake",),
        lambda p, n: changed(item := p.mandarin(), text=item.text.encode().decode("gbk", "ignore")),
    ),
    "replacement character": (("replacement-character",), text(lambda t: f"{t} caf\ufffd")),
    "control character": (("control-character",), text(lambda t: t.replace(" ", "\x07", 1))),
    "tab": (("line-break",), text(lambda t: t.replace(" ", "\t", 1))),
    "two lines": (("line-break",), text(lambda t: t.replace(" ", "\n", 1))),
    "zero-width space": (("invisible-character",), text(lambda t: t.replace(" ", " \u200b", 1))),
    "decomposed letters": (("not-normalized",), text(nfd)),
    "full-width letters": (
        ("full-width",),
        text(lambda t: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in t)),
    ),
    "Cyrillic letters": (("mixed-script",), text(lambda t: f"{t} \u0435nd")),
    "loop": (("repetition",), text(lambda t: f"{t} the the the the")),
    "loop of a phrase": (("repetition",), text(lambda t: "thank you so much " * 5)),
    "no spaces": (("long-word",), text(lambda t: t.replace(" ", "") * 6)),
    "two spaces": (("odd-spaces",), text(lambda t: t.replace(" ", "  ", 1))),
    "quotes of a CSV": (("odd-quotes",), text(lambda t: f'""{t}""')),
    "capitals": (("unusual-case",), text(str.upper)),
    "digits without normalisation": (
        ("digits",),
        lambda p, n: changed(p.english(), text="3 7 1", prompt=transcription_prompt(itn=False)),
    ),
    "wrong language": (
        ("wrong-language",),
        lambda p, n: changed(p.mandarin(), prompt=transcription_prompt("en")),
    ),
    "400 words on a few seconds": (("too-much-text",), text(lambda t: " ".join(100 * ["seven one two six"]))),
    "one word for 10 s": (("too-little-text", "unusual-pace"), one_word),
    "a third of a transcript": (("unusual-pace",), a_third),
}  # fmt: skip


def write_corpus(folder: Path, num_rows: int, rows_per_fault: int, seed: int = 0) -> dict[tuple[str, int], Item]:
    """Writes the corpus; returns the rows by file name and line."""
    rows = Planter(folder, num_rows, rows_per_fault, seed).plant()
    places = {}
    for split in ("train", "dev", "test"):
        chosen = [item for item in rows if item.split == split]
        lines = [item.json() for item in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        places |= {(f"{split}.jsonl", number): item for number, item in enumerate(chosen, start=1)}
    return places


def compare(places: dict[tuple[str, int], Item], findings: list[dict]) -> dict:
    """Counts planted faults that were found, and findings on clean rows.

    Returns:
        rows, faults (kinds of faults), planted and found rows, missed (faults with rows), false alarms.
    """
    found: dict[tuple[str, int], set[str]] = {}
    for finding in findings:
        found.setdefault((Path(finding["file"]).name, finding["line"]), set()).add(finding["kind"])
    planted = {place: item for place, item in places.items() if item.fault}
    reported: dict[int | tuple[str, int], set[str]] = {}
    for place, item in planted.items():
        reported.setdefault(item.group or place, set()).update(found.get(place, ()))
    missed = [
        f"{item.fault}: {place[0]}:{place[1]} has {sorted(found.get(place, ()))}"
        for place, item in planted.items()
        if not reported[item.group or place] & set(item.kinds)
    ]
    alarms = [f"{place[0]}:{place[1]}: {sorted(kinds)}" for place, kinds in found.items() if not places[place].fault]
    return {
        "rows": len(places), "faults": len({item.fault for item in planted.values()}), "planted": len(planted),
        "found": len(planted) - len(missed), "missed": missed, "clean": len(places) - len(planted),
        "false_alarms": alarms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--rows_per_fault", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_vad", action="store_true")
    args = parser.parse_args()
    places = write_corpus(args.output_dir, args.num_rows, args.rows_per_fault, args.seed)
    report = args.output_dir / "findings.json"
    command = [sys.executable, "-m", "hf_speechllm", "doctor", str(args.output_dir), "--json", str(report)]
    command += ["--html", str(args.output_dir / "report.html")] + ["--no_vad"] * args.no_vad
    start = time.perf_counter()
    subprocess.run(command, check=False)
    seconds = time.perf_counter() - start
    result = json.loads(report.read_text(encoding="utf-8"))
    print(json.dumps({**compare(places, result["findings"]), "seed": args.seed, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
