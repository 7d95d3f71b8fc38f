"""Word times on synthetic speech: makes recordings whose word times eSpeak NG reports, and scores aligned times.

pip install espeakng-loader
python benchmarks/word_times.py make --texts data/kathleen_en/text --output_dir exp/words
hf-speechllm finetune ... --ctc_head sanm (see benchmarks/results/README.md)
hf-speechllm align exp/words/test.text --scp_file exp/words/test.scp --model_name_or_path exp/head \\
    --output_file exp/out
python benchmarks/word_times.py score exp/words/test.words.jsonl exp/out.words.jsonl

For real recordings, pocketsphinx (pip install pocketsphinx) replaces the events of eSpeak:
python benchmarks/word_times.py sphinx --data data/longform --output exp/longform.words.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import json
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from hf_speechllm.model.chat import transcription_messages, transcription_prompt

WORD, END_OF_SENTENCE, PHONEME = 1, 5, 7  # types of eSpeak's events
PAUSES = (b"_:", b"_", b"_!", b"_|")  # phonemes of a pause
# Held out: no recording of the training set has these voices.
TRAIN_VOICES = (
    "en-us",
    "en-us+m3",
    "en-us+f2",
    "gmw/en",
    "gmw/en+f4",
    "en-gb-scotland+m1",
    "en-us+m7",
    "en-gb-x-rp+f1",
)
TEST_VOICES = ("en-us+f3", "gmw/en+m5", "en-gb-x-gbclan+m2", "en-us+m4")


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", _Name),
    )  # fmt: skip


class Synthesiser:
    """eSpeak NG, through its C interface."""

    def __init__(self):
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(1, 0, espeakng_loader.get_data_path().encode(), 1)
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = callback(self._receive)  # kept, because the library stores a pointer only
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:
        if samples and count:
            self._audio.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type:
            event = events[index]
            name = bytes(event.id.string) if event.type == PHONEME else b""
            self._events.append((event.type, event.text_position, event.length, event.sample / self.rate, name))
            index += 1
        return 0

    def speak(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list[dict]]:
        """Returns samples as float32, and the words of the text with start and end in seconds."""
        self._audio, self._events = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak has no voice {voice}")
        self.library.espeak_SetParameter(1, speed, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        content = text.encode("ascii") + b"\0"
        self.library.espeak_Synth(content, len(content), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        audio = np.concatenate(self._audio).astype(np.float32) / 2**15
        words: list[dict] = []
        for kind, position, length, time, name in self._events:
            if words and "end" not in words[-1] and (kind in (WORD, END_OF_SENTENCE) or name in PAUSES):
                words[-1]["end"] = time
            if kind == WORD:
                words.append({"word": text[position - 1 : position - 1 + length], "start": time})
        for word in words:
            word.setdefault("end", len(audio) / self.rate)
        return audio, words


def with_pauses(audio: np.ndarray, rate: int, words: list[dict], rng) -> tuple[np.ndarray, int, float]:
    """Adds up to 0.6 s of silence on both sides, and noise; returns audio, rate and the shift of the words."""
    before, level, after = int(rng.uniform(0, 0.6) * rate), rng.uniform(0.3, 1.0), int(rng.uniform(0, 0.6) * rate)
    audio = np.pad(audio * level, (before, after))
    audio += 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(len(audio))
    return np.clip(audio, -1, 1), rate, before / rate


def like_quickstart(audio: np.ndarray, rate: int, words: list[dict], rng) -> tuple[np.ndarray, int, float]:
    """Cuts silence except 50 ms, as in recipes/quickstart_data; returns audio, rate and the shift of the words."""
    start, end = int(words[0]["start"] * rate), int(words[-1]["end"] * rate)
    cut = resample(torch.from_numpy(audio[start:end]), rate, 16000).numpy()
    return np.pad(0.6 * cut / np.abs(cut).max(), 800), 16000, 0.05 - start / rate


def make(args: argparse.Namespace) -> None:
    """Writes recordings, training JSONL, Kaldi lists and true word times."""
    output = args.output_dir
    rng = np.random.default_rng(args.seed)
    lines = [line.split(maxsplit=1)[1].strip() for line in args.texts.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.isascii() and not any(char.isdigit() for char in line)]
    rng.shuffle(lines)
    held_out = lines[: len(lines) // 5]
    synthesiser = Synthesiser()
    for name, count, sentences, voices in (
        ("train", args.rows, lines[len(held_out) :], TRAIN_VOICES),
        ("test", args.test_rows, held_out, args.test_voices),
    ):
        (output / name).mkdir(parents=True, exist_ok=True)
        with (
            open(output / f"{name}.jsonl", "w", encoding="utf-8") as jsonl,
            open(output / f"{name}.scp", "w", encoding="utf-8") as scp,
            open(output / f"{name}.text", "w", encoding="utf-8") as text_file,
            open(output / f"{name}.words.jsonl", "w", encoding="utf-8") as truth,
        ):
            for index in range(count):
                chosen = [str(item).strip(" ,.") for item in rng.choice(sentences, rng.integers(*args.sentences))]
                text = str(rng.choice([", ", " ", ". "])).join(chosen) + "."
                voice = str(rng.choice(voices))
                speed, pitch = int(rng.integers(*args.speed)), int(rng.integers(*args.pitch))
                audio, words = synthesiser.speak(text, voice, speed, pitch)
                change = like_quickstart if args.like_quickstart else with_pauses
                audio, rate, shift = change(audio, synthesiser.rate, words, rng)
                for word in words:
                    word["start"] += shift
                    word["end"] += shift
                id_ = f"{name}{index:05d}"
                path = output / name / (f"{id_}.ogg" if args.like_quickstart else f"{id_}.wav")
                options = {"subtype": "OPUS", "compression_level": 0.98} if args.like_quickstart else {}
                soundfile.write(path, audio, rate, **options)
                spoken = " ".join(word["word"] for word in words)
                messages = transcription_messages(str(path.resolve()), transcription_prompt(), spoken)
                frames = int(100 * len(audio) / rate)
                jsonl.write(json.dumps({"messages": messages, "speech_length": frames}) + "\n")
                scp.write(f"{id_} {path.resolve()}\n")
                text_file.write(f"{id_} {spoken}\n")
                truth.write(json.dumps({"id": id_, "words": words}) + "\n")


def sphinx(data: Path, output: Path, ids: Path | None) -> None:
    """Writes the word times that pocketsphinx finds in English recordings.

    Args:
        data: folder with `wav.scp` and `text`.
        ids: list whose first column names the recordings; default: all.
    """
    from vad_words import word_times

    from hf_speechllm.audio.waveform import load_audio
    from hf_speechllm.data.bad_rows import BadRows
    from hf_speechllm.data.kaldi import read_list, read_scp

    wanted = None if ids is None else {line.split()[0] for line in ids.read_text(encoding="utf-8").splitlines()}
    texts = {entry.id: entry.value for entry in read_list(data / "text", BadRows()).entries}
    with open(output, "w", encoding="utf-8") as file:
        for entry in read_scp(data / "wav.scp", BadRows()).entries:
            if wanted is not None and entry.id not in wanted:
                continue
            words = word_times(load_audio(entry.value), texts[entry.id])
            if words is not None:
                rows = [{"word": re.sub(r"\(\d\)", "", word), "start": a, "end": b} for word, a, b in words]
                file.write(json.dumps({"id": entry.id, "words": rows}) + "\n")


def score(truth: Path, aligned: Path) -> dict:
    """Compares the times of the words that both files have, in the same order."""
    expected = {row["id"]: row["words"] for row in map(json.loads, truth.read_text(encoding="utf-8").splitlines())}
    starts, ends, total = [], [], sum(map(len, expected.values()))
    for row in map(json.loads, aligned.read_text(encoding="utf-8").splitlines()):
        true, found = expected.get(row["id"], []), row["words"]
        texts = [[re.sub(r"[^\w']", "", word["word"].lower()) for word in words] for words in (true, found)]
        for block in difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks():
            for step in range(block.size):
                left, right = true[block.a + step], found[block.b + step]
                starts.append(right["start"] - left["start"])
                ends.append(right["end"] - left["end"])
    result: dict = {"words": total, "compared": len(starts)}
    for name, values in (("start", np.array(starts)), ("end", np.array(ends))):
        errors = np.abs(values)
        result[name] = {
            "median_error_ms": round(1000 * float(np.median(errors)), 1),
            "mean_error_ms": round(1000 * float(errors.mean()), 1),
            "median_shift_ms": round(1000 * float(np.median(values)), 1),
            **{f"share_under_{limit}_ms": round(float((errors < limit / 1000).mean()), 4) for limit in (50, 100, 150)},
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("--texts", type=Path, required=True, help="Kaldi list with sentences")
    maker.add_argument("--output_dir", type=Path, required=True)
    maker.add_argument("--rows", type=int, default=800)
    maker.add_argument("--test_rows", type=int, default=100)
    maker.add_argument("--sentences", type=int, nargs=2, default=(1, 5), help="number of sentences: from, below")
    maker.add_argument("--test_voices", nargs="+", default=TEST_VOICES, help="voices of eSpeak")
    maker.add_argument("--speed", type=int, nargs=2, default=(120, 210), help="words per minute: from, below")
    maker.add_argument("--pitch", type=int, nargs=2, default=(30, 75), help="pitch: from, below")
    maker.add_argument("--like_quickstart", action="store_true", help="16 kHz Opus without pauses and noise")
    maker.add_argument("--seed", type=int, default=0)
    other = verbs.add_parser("sphinx")
    other.add_argument("--data", type=Path, required=True, help="folder with wav.scp and text")
    other.add_argument("--output", type=Path, required=True)
    other.add_argument("--ids", type=Path, help="list of the recordings to align (default: all)")
    scorer = verbs.add_parser("score")
    scorer.add_argument("truth", type=Path)
    scorer.add_argument("aligned", type=Path)
    args = parser.parse_args()
    if args.verb == "make":
        make(args)
    elif args.verb == "sphinx":
        sphinx(args.data, args.output, args.ids)
    else:
        print(json.dumps(score(args.truth, args.aligned), indent=1))
