"""Synthetic training speech: texts spoken by installed engines with many voices, written as tar shards.

Each row depends on the seed and its number alone: text, engine, voice, rate and pitch; only babble also depends on the
shard. A shard appears when it is complete, so an interrupted run continues with the missing shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..audio.noise import Babble
from ..audio.waveform import AudioError, load_audio
from ..files import atomic_write
from ..model.chat import transcription_messages
from .augmentation import waveform_augmentation
from .augmentation_options import AugmentationOptions
from .bad_rows import BadRows
from .hotword_lists import CHARACTERS, MARKS
from .kaldi import speech_length
from .processes import end_with_parent
from .speech_engines import ENGINES, TIMEOUT, fill_command

SAMPLING_RATE = 16000  # Hz, of the shards
RATES, PITCHES = (0.8, 1.25), (0.8, 1.25)  # range of the factors of speaking rate and pitch
SENTENCE_ENDS = ".!?。！？।॥؟۔።"  # also of Hindi, Arabic, Urdu and Amharic
PUNCTUATION = f',;:"“”()，、；：،؛{SENTENCE_ENDS}'
SENTENCE_BOUNDARY = re.compile(rf"(?<=[{SENTENCE_ENDS}])\s+|(?<=[{SENTENCE_ENDS}][\"”'])\s+|(?<=[。！？])")
SENTENCE_END = re.compile(rf"[{SENTENCE_ENDS}][\"”']?$")
PLAIN = re.compile(rf"[\w\"“][\w\s{MARKS}{PUNCTUATION}'’%$€£-]+")  # text without markup
UNSPACED = re.compile(f"[{CHARACTERS}]")
LETTERS = rf"(?:[^\W\d_{CHARACTERS}][{MARKS}]*)+"
# A Chinese or Japanese character is a word.
WORD = re.compile(rf"[{CHARACTERS}][{MARKS}]*|{LETTERS}(?:['’]{LETTERS})*")
RECENT = 64  # rows of which babble is mixed
SETTINGS_FILE = "synthesis.json"


@dataclass(frozen=True)
class Plan:
    """What to synthesize.

    Args:
        texts: texts; row i speaks text i modulo their number.
        num_rows: number of rows.
        voices: voices of each engine.
        shares: share of the rows of each engine, by engine; the sum is 1.
        prompt: user's text of every row, see `chat.transcription_prompt`.
        seed: seed of engine, voice, rate and pitch of every row.
        rows_per_shard: number of rows in a shard.
        shuffled: share of the rows with the words of a text (without spaces: its characters) in random order, which an
            LLM cannot guess from context.
        words: list of words, for rows of random words and replaced words; a word in several lines is chosen as often.
        random_words: share of the rows that speak 3 to 8 random words of the list instead of their text.
        replaced_words: share of the words of the other texts that random words of the list replace.
        augmentation: changes the waveforms; its babble is mixed from earlier rows of the shard.
        commands: command lines of further engines, with `{voice}`, `{rate}`, `{pitch}`, `{text}` (file) and `{wav}`.
    """

    texts: Sequence[str]
    num_rows: int
    voices: Mapping[str, Sequence[str]]
    shares: Mapping[str, float]
    prompt: str
    seed: int = 0
    rows_per_shard: int = 1000
    shuffled: float = 0.0
    words: Sequence[str] = ()
    random_words: float = 0.0
    replaced_words: float = 0.0
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    commands: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_rows // self.rows_per_shard)

    def choose(self, row: int) -> tuple[str, str, float, float]:
        """Returns engine, voice, factor of the rate and factor of the pitch of a row."""
        rng = np.random.default_rng([self.seed, row])
        engine = str(rng.choice(list(self.shares), p=list(self.shares.values())))
        voice = self.voices[engine][int(rng.integers(len(self.voices[engine])))]
        rate, pitch = (float(np.exp(rng.uniform(*np.log(limits)))) for limits in (RATES, PITCHES))
        return engine, voice, round(rate, 3), round(pitch, 3)

    def text(self, row: int) -> str:
        """Returns what a row says."""
        text = self.texts[row % len(self.texts)]
        rng = np.random.default_rng([self.seed, row, 1])
        kind = rng.random()
        if kind < self.random_words:
            chosen = [self.words[index] for index in rng.integers(len(self.words), size=rng.integers(3, 9))]
            return _join(chosen)
        if self.replaced_words:
            text = WORD.sub(lambda word: self._replace(word[0], rng), text)
        if kind >= self.random_words + self.shuffled:
            return text
        words = [word.strip(f"{PUNCTUATION}- ") for word in (text if UNSPACED.search(text) else text.split())]
        words = [word for word in words if word]
        if len(words) < 2:
            return text
        end = text[-1] if text[-1] in SENTENCE_ENDS else ""
        return ("" if UNSPACED.search(text) else " ").join(rng.permutation(words)) + end

    def _replace(self, word: str, rng: np.random.Generator) -> str:
        """Returns the word, or a random word of the list in its place."""
        return self.words[int(rng.integers(len(self.words)))] if rng.random() < self.replaced_words else word


def _join(words: Sequence[str]) -> str:
    """Joins words with spaces, but without one between two Chinese or Japanese characters."""
    text = words[0]
    for word in words[1:]:
        text += word if UNSPACED.match(text[-1]) and UNSPACED.match(word) else f" {word}"
    return text


def speak(plan: Plan, row: int, folder: Path) -> np.ndarray:
    """Synthesizes a row.

    Args:
        folder: folder for temporary files.

    Returns:
        The waveform at `SAMPLING_RATE`, shape = (samples,).

    Raises:
        AudioError: if the engine fails, or its recording is not usable.
    """
    engine, voice, rate, pitch = plan.choose(row)
    text, wav = folder / "text.txt", folder / "speech.wav"
    content = plan.text(row)
    text.write_text(content + "\n", encoding="utf-8")
    wav.unlink(missing_ok=True)
    if engine in plan.commands:
        command = fill_command(plan.commands[engine], voice, rate, pitch, str(text), str(wav))
    else:
        command = ENGINES[engine].command(voice, rate, pitch, str(text), str(wav))
    try:
        result = subprocess.run(command, input=content.encode(), capture_output=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AudioError(f"{engine}, voice {voice}: {error}") from error
    if result.returncode or not wav.is_file():
        reason = " ".join(result.stderr.decode(errors="replace").split())[-200:] or "no recording"
        raise AudioError(f"{engine}, voice {voice}: exit status {result.returncode}: {reason}")
    try:
        waveform = load_audio(str(wav), SAMPLING_RATE)
    except AudioError as error:
        raise AudioError(f"{engine}, voice {voice}: {error}") from error
    if speech_length(len(waveform), SAMPLING_RATE) < 10 or not np.abs(waveform).max() > 0:
        raise AudioError(f"{engine}, voice {voice}: silence")
    return waveform


def write_shard(plan: Plan, shard: int, path: Path) -> tuple[float, list[tuple[int, str]]]:
    """Synthesizes the rows of a shard and writes a tar file, which `data.shards` reads.

    Returns:
        Seconds of speech, and the number and reason of each failed row.
    """
    seconds, failed = 0.0, []
    augment = waveform_augmentation(plan.augmentation, SAMPLING_RATE)
    recent: deque[np.ndarray] = deque(maxlen=RECENT)
    babbles = [noise for noise in augment.noises if isinstance(noise, Babble)] if augment is not None else []
    rows = range(shard * plan.rows_per_shard, min((shard + 1) * plan.rows_per_shard, plan.num_rows))
    with (
        tempfile.TemporaryDirectory() as folder,
        atomic_write(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for row in rows:
            try:
                waveform = speak(plan, row, Path(folder))
            except AudioError as error:
                failed.append((row, str(error)))
                continue
            if augment is not None:
                for babble in babbles:
                    babble.recordings, babble.num_rows = (lambda index: [recent[index]]), len(recent)
                recent.append(waveform)
                waveform = augment(waveform, np.random.default_rng([plan.seed, row, 2]))
            seconds += len(waveform) / SAMPLING_RATE
            _add(tar, plan, row, waveform)
    return seconds, failed


def _add(tar: tarfile.TarFile, plan: Plan, row: int, waveform: np.ndarray) -> None:
    audio = io.BytesIO()
    soundfile.write(audio, waveform, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    messages = transcription_messages(f"{row:08d}.flac", plan.prompt, plan.text(row))
    names = ("engine", "voice", "rate", "pitch")
    record = {
        "messages": messages,
        "speech_length": speech_length(len(waveform), SAMPLING_RATE),
        "synthesis": dict(zip(names, plan.choose(row), strict=True)),
    }
    for suffix, data in (("flac", audio.getvalue()), ("json", json.dumps(record, ensure_ascii=False).encode())):
        member = tarfile.TarInfo(f"{row:08d}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def synthesize(
    plan: Plan, output_dir: Path, num_workers: int = 1, max_bad_fraction: float = 0.01
) -> Iterator[tuple[int, float]]:
    """Writes the missing shards `shard-N.tar` of a plan, several at once.

    Args:
        output_dir: folder; must exist.
        num_workers: number of processes.
        max_bad_fraction: largest share of rows that fail.

    Yields:
        Number of each new shard, and its seconds of speech.

    Raises:
        ValueError: if the folder contains shards of another plan.
        BadDataError: if more rows fail.
    """
    _check_settings(plan, output_dir)
    bad_rows = BadRows(max_bad_fraction)
    paths = {shard: output_dir / f"shard-{shard:05d}.tar" for shard in range(plan.num_shards)}
    missing = [shard for shard, path in paths.items() if not path.is_file()]
    with ProcessPoolExecutor(max(1, min(num_workers, len(missing))), initializer=end_with_parent) as pool:
        jobs = {shard: pool.submit(write_shard, plan, shard, paths[shard]) for shard in missing}
        try:
            for shard, job in jobs.items():
                seconds, failed = job.result()
                for row, reason in failed:
                    bad_rows.add(str(paths[shard]), row, reason)
                if len(bad_rows) > max_bad_fraction * plan.num_rows:
                    bad_rows.check(plan.num_rows)
                yield shard, seconds
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bad_rows.check(plan.num_rows)


def _check_settings(plan: Plan, output_dir: Path) -> None:
    settings = {
        **{
            name: value
            for name, value in vars(plan).items()
            if name not in ("texts", "words", "voices", "augmentation")
        },
        "augmentation": asdict(plan.augmentation),
        "texts": digest(plan.texts),
        "words": digest(plan.words if plan.random_words or plan.replaced_words else ()),
        "voices": {engine: digest(voices) for engine, voices in plan.voices.items()},
    }
    check_settings(output_dir / SETTINGS_FILE, settings)


def digest(lines: Sequence[str]) -> str:
    """Returns a hash of lines."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Stores the settings of a folder with speech.

    Raises:
        ValueError: if the file has other settings.
    """
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{file}: the folder contains speech with other settings; choose another --output_dir")
    with atomic_write(file) as opened:
        json.dump(settings, opened, indent=1, ensure_ascii=False)


def clean_texts(lines: Sequence[str], min_words: int = 2, max_words: int = 30) -> list[str]:
    """Returns sentences that an engine can read: without markup, addresses and repetitions of other lines.

    A Chinese or Japanese character counts as a word.

    Args:
        lines: texts, each of one or several sentences.
        min_words, max_words: length of a sentence.
    """
    found: dict[str, None] = {}
    for line in lines:
        for sentence in SENTENCE_BOUNDARY.split(line):
            text = " ".join(sentence.split())
            words = len(WORD.findall(text)) + len(re.findall(r"\d+", text))
            plain = PLAIN.fullmatch(text) and "_" not in text
            if plain and min_words <= words <= max_words and SENTENCE_END.search(text):
                found.setdefault(text)
    return list(found)
