"""Makes strings of digits from real recordings of single digits (Free Spoken Digit Dataset), with times of the words.

    python benchmarks/digit_strings.py DATA_DIR OUTPUT_DIR

A string has two to six recordings of one speaker, with gaps of up to 0.3 s. Training strings use the training takes,
test strings the test takes. DATA_DIR has train/ and test/, each with `text`, `utt2spk` and `wav.scp`.

| file | content |
|---|---|
| `train.jsonl`, `test.jsonl` | training rows |
| `train.text`, `test.text`, `test.scp` | Kaldi lists |
| `test.words.jsonl` | start and end of each word, as `word_times.py` reads them: where a recording starts and ends |
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from hotwords_data import LEVEL, NAMES, read_takes

from hf_speechllm.model.chat import transcription_messages, transcription_prompt

LENGTHS, MAX_GAP_SECONDS, NOISE = (2, 7), 0.3, 5e-4


def make_string(takes, speakers: list[str], rng: np.random.Generator) -> tuple[np.ndarray, int, list[dict]]:
    """Returns waveform, rate, and words with their times."""
    speaker = str(rng.choice(speakers))
    parts, words, at = [], [], 0
    for digit in rng.integers(0, 10, rng.integers(*LENGTHS)):
        paths = takes[speaker, str(digit)]
        waveform, rate = soundfile.read(paths[rng.integers(len(paths))])
        gap = int(rng.uniform(0, MAX_GAP_SECONDS) * rate)
        start = at + gap
        at = start + len(waveform)
        parts += [np.zeros(gap), waveform * LEVEL / np.std(waveform)]
        words.append({"word": NAMES[digit], "start": start / rate, "end": at / rate})
    parts.append(np.zeros(int(rng.uniform(0, MAX_GAP_SECONDS) * rate)))
    joined = np.concatenate(parts)
    return joined + NOISE * rng.standard_normal(len(joined)), rate, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="training strings")
    parser.add_argument("--test_rows", type=int, default=500)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for name, count in (("train", args.rows), ("test", args.test_rows)):
        takes = read_takes(args.data_dir / name)
        speakers = sorted({speaker for speaker, _ in takes})
        folder = args.output_dir / name
        folder.mkdir(parents=True)
        lines: dict[str, list[str]] = {"jsonl": [], "text": [], "scp": [], "words.jsonl": []}
        for index in range(count):
            waveform, rate, words = make_string(takes, speakers, rng)
            id_, text = f"{name}{index:05d}", " ".join(word["word"] for word in words)
            path = f"{name}/{id_}.flac"
            soundfile.write(args.output_dir / path, waveform, rate)
            messages = transcription_messages(path, transcription_prompt(), text)
            frames = int(100 * len(waveform) / rate)
            lines["jsonl"].append(json.dumps({"messages": messages, "speech_length": frames}))
            lines["text"].append(f"{id_} {text}")
            lines["scp"].append(f"{id_} {path}")
            lines["words.jsonl"].append(json.dumps({"id": id_, "words": words}))
        for suffix, content in lines.items():
            (args.output_dir / f"{name}.{suffix}").write_text("\n".join(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
