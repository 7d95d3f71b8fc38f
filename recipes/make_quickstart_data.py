"""Synthesises the recordings of the quickstart: English digit strings and short Mandarin commands.

eSpeak NG (`apt-get install espeak-ng`) speaks every recording, in 12 voices with small variations of speed and pitch.
The script writes 16 kHz mono Ogg Opus files and Kaldi lists. The project includes the corpus; run the script only to
change the corpus. It takes about a minute. Another version of eSpeak NG gives slightly different audio.

    python recipes/make_quickstart_data.py --output_dir recipes/quickstart_data --seed 0
"""

import argparse
import io
import random
import subprocess
from collections import Counter
from collections.abc import Iterable
from itertools import cycle, product
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

SAMPLE_RATE = 16000
OPUS_COMPRESSION = 0.98  # libsndfile's scale from 0 to 1: 11 kbit/s; at 0.99 Opus removes frequencies above 4 kHz
SILENCE = 0.002  # relative to the peak: below the weakest consonant, above the fade-out of the synthesiser
MARGIN = SAMPLE_RATE // 20  # samples of silence before the first and after the last sound

# With its other Mandarin voice, `cmn`, eSpeak NG 1.51 reads most characters as English letters. It ignores variants of
# `en-gb` (`en-gb+f2`), but not variants of the other English voices.
MANDARIN = "cmn-latn-pinyin"
VOICES = {
    "en": ["en-us", "en-us+m3", "en-us+f3", "en-gb", "en-gb-scotland+f4", "en-gb-x-rp+m1"],
    "zh": [MANDARIN, *(f"{MANDARIN}+{variant}" for variant in ("m1", "m3", "m7", "f2", "f4"))],
}
WORDS_PER_MINUTE = (175, 205)
PITCH = (40, 60)  # eSpeak NG's scale from 0 to 99

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT_STRINGS = {2: (80, 10), 3: (360, 50), 4: (200, 30)}  # length: (in train, in test)

UNITS = ["一", "二", "三", "四", "五", "六", "七", "八", "九"]
# A command has one word from every slot. Words that eSpeak NG misreads (歌曲, 音乐, 扫地) are excluded.
COMMANDS = [
    [["打开", "关闭"], ["客厅", "卧室", "厨房", "阳台"], ["的"], ["灯", "空调", "窗帘", "风扇"]],
    [["播放", "暂停"], ["客厅", "卧室", "厨房", "阳台"], ["的"], ["新闻", "广播", "电影"]],
    [["早上", "晚上"], UNITS[4:], ["点"], ["叫我"]],
    [["把"], ["温度", "音量"], ["调到"], ["二十", "三十"], UNITS[4:]],
    [["上一首", "下一首", "声音大一点", "声音小一点", "取消闹钟", "现在几点了", "今天会下雨吗", "明天天气怎么样"]],
]
TEST_FRACTION = 1 / 6  # of every kind of command, if train keeps each of its words
VOICES_PER_TEST_COMMAND = 3


def digit_strings(rng: random.Random) -> tuple[list[str], list[str]]:
    """Draws strings of two to four digits as words, for train and for test; no string is in both."""
    train, test = [], []
    for length, (num_train, num_test) in DIGIT_STRINGS.items():
        numbers = rng.sample(range(10**length), num_train + num_test)
        strings = [" ".join(DIGITS[int(digit)] for digit in f"{number:0{length}}") for number in numbers]
        train += strings[:num_train]
        test += strings[num_train:]
    return train, test


def commands(rng: random.Random) -> tuple[list[str], list[str]]:
    """Draws Mandarin commands for train and for test; test commands use words that train has in other commands."""
    kinds = [list(product(*slots)) for slots in COMMANDS]
    left = Counter(word for kind in kinds for words in kind for word in words)
    test: list[tuple[str, ...]] = []
    for kind in kinds:
        held_out = []
        for words in rng.sample(kind, len(kind)):
            if len(held_out) < int(TEST_FRACTION * len(kind)) and all(left[word] > 1 for word in words):
                held_out.append(words)
                left.subtract(words)
        test += held_out
    train = [words for kind in kinds for words in kind if words not in test]
    return ["".join(words) for words in train], ["".join(words) for words in test]


def plan(rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Returns (voice, transcript) of every recording, by split. All single digits are in train, since they are few."""
    (train_digits, test_digits), (train_commands, test_commands) = digit_strings(rng), commands(rng)
    english, mandarin = VOICES["en"], VOICES["zh"]
    train = [*product(english, DIGITS), *zip(cycle(english), train_digits), *product(mandarin, train_commands)]
    test = [*zip(cycle(english), test_digits), *zip(cycle(mandarin), test_commands * VOICES_PER_TEST_COMMAND)]
    return {"train": train, "test": test}


def synthesize(text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """Synthesises `text`: 16 kHz mono float32, shape = (num_samples,), with MARGIN samples of silence at both ends."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", text]
    try:
        wav = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    except FileNotFoundError as error:
        raise SystemExit("espeak-ng is missing: `apt-get install espeak-ng` or `brew install espeak-ng`") from error
    waveform, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    waveform = resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()
    sound = np.flatnonzero(np.abs(waveform) > SILENCE * np.abs(waveform).max())
    return np.pad(waveform[sound[0] : sound[-1] + 1], MARGIN)


def write_audio(path: Path, waveform: np.ndarray) -> None:
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="OPUS", compression_level=OPUS_COMPRESSION)


def write_list(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    path.write_text("".join(f"{key} {value}\n" for key, value in sorted(rows)), encoding="utf-8")


def main(output_dir: Path, seed: int) -> None:
    rng = random.Random(seed)
    audio_dir = output_dir / "audio"
    audio_dir.mkdir(parents=True, exist_ok=True)
    for stale in audio_dir.glob("*.ogg"):
        stale.unlink()
    for split, recordings in plan(rng).items():
        scp, text, speakers, seconds = [], [], [], 0.0
        for number, (voice, transcript) in enumerate(recordings):
            speaker = voice.replace(MANDARIN, "cmn").replace("+", "-")
            utterance = f"{speaker}-{split}-{number:04}"  # Kaldi sorts IDs and speakers alike
            waveform = synthesize(transcript, voice, rng.randint(*WORDS_PER_MINUTE), rng.randint(*PITCH))
            path = audio_dir / f"{utterance}.ogg"
            write_audio(path, waveform)
            scp.append((utterance, f"../audio/{path.name}"))
            text.append((utterance, transcript))
            speakers.append((utterance, speaker))
            seconds += len(waveform) / SAMPLE_RATE
        (output_dir / split).mkdir(exist_ok=True)
        write_list(output_dir / split / "wav.scp", scp)
        write_list(output_dir / split / "text", text)
        write_list(output_dir / split / "utt2spk", speakers)
        print(f"{split}: {len(text)} recordings, {len(set(dict(text).values()))} transcripts, {seconds:.0f} s")
    print(f"audio: {sum(path.stat().st_size for path in audio_dir.glob('*.ogg')):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "quickstart_data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.output_dir, arguments.seed)
