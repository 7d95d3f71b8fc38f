"""Makes four-digit codes from real recordings of single digits (Free Spoken Digit Dataset), for hotwords.sh.

    python benchmarks/hotwords_data.py DATA_DIR OUTPUT_DIR

A code consists of four recordings of one speaker with gaps of 50 ms. Its transcript and its hotword are the code as a
number (`7305`). Noise replaces two of the last three digits, so that the audio alone does not determine the code, but
a list does. Training uses the training takes; the test uses the test takes and other codes.

| file | content |
|---|---|
| `clean.jsonl` | four speakers, no hidden digit |
| `choose.jsonl` | four speakers, only the first digit audible |
| `base.jsonl` | four speakers, two hidden digits |
| `adapt.jsonl` | one of these speakers, two hidden digits |
| `test_none.jsonl` | test of that speaker, without a list |
| `test_list.jsonl` | the same with a list of the code and other codes |
| `test_others.jsonl` | the same with a list of other codes only |
| `lines.txt` | text for the tokenizer: each digit is one token, and the hotword header has few tokens |
"""

import argparse
import sys
from pathlib import Path

import numpy as np

SPEAKERS, ADAPTED = ("fsdd-george", "fsdd-jackson", "fsdd-lucas", "fsdd-theo"), "fsdd-theo"
NUM_DIGITS, LOST_DIGITS, LIST_LENGTH = 4, 2, 4
GAP_SECONDS, LOST_SECONDS = 0.05, 0.4
LEVEL = 0.05  # root mean square of every digit
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = {name: str(digit) for digit, name in enumerate(NAMES)}


def read_takes(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """Reads the recordings by speaker and digit."""
    text, speaker, scp = (
        dict(line.split(maxsplit=1) for line in (folder / name).read_text(encoding="utf-8").splitlines())
        for name in ("text", "utt2spk", "wav.scp")
    )
    takes: dict[tuple[str, str], list[Path]] = {}
    for id_, path in scp.items():
        takes.setdefault((speaker[id_], DIGITS[text[id_]]), []).append(folder / path)
    return takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder with train/ and test/; each has text, utt2spk and wav.scp")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--clean_rows", type=int, default=3000)
    parser.add_argument("--base_rows", type=int, default=12000, help="rows of choose.jsonl, and of base.jsonl")
    parser.add_argument("--adapt_rows", type=int, default=1500)
    parser.add_argument("--test_rows", type=int, default=300)
    args = parser.parse_args()

    import soundfile

    from hf_speechllm.data.jsonl import write_jsonl
    from hf_speechllm.model import chat

    rng = np.random.default_rng(0)
    codes = [f"{code:0{NUM_DIGITS}d}" for code in rng.permutation(10**NUM_DIGITS)]
    test_codes, train_codes = codes[: args.test_rows], codes[args.test_rows :]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "audio").mkdir(exist_ok=True)

    def record(name: str, takes: dict[tuple[str, str], list[Path]], speaker: str, code: str, lost: int) -> dict:
        """Joins takes of the digits into a recording with `lost` digits (not the first) as noise; returns its row."""
        gone = rng.permutation(np.arange(1, NUM_DIGITS))[:lost]
        parts = []
        for position, digit in enumerate(code):
            paths = takes[speaker, digit]
            waveform, rate = soundfile.read(paths[rng.integers(len(paths))])
            if position in gone:
                waveform = LEVEL * rng.standard_normal(int(LOST_SECONDS * rate))
            parts += [waveform * LEVEL / np.std(waveform), np.zeros(int(GAP_SECONDS * rate))]
        soundfile.write(args.output_dir / "audio" / f"{name}.wav", np.concatenate(parts[:-1]), rate)
        messages = chat.transcription_messages(f"audio/{name}.wav", chat.transcription_prompt(), code)
        return {"messages": messages, "hotwords": [code]}

    train, test = (read_takes(args.data_dir / split) for split in ("train", "test"))

    def rows(name: str, number: int, speakers: tuple[str, ...], lost: int) -> list[dict]:
        return [
            record(f"{name}-{index:05d}", train, str(rng.choice(speakers)), str(rng.choice(train_codes)), lost)
            for index in range(number)
        ]

    written = {
        "clean": rows("clean", args.clean_rows, SPEAKERS, lost=0),
        "choose": rows("choose", args.base_rows, SPEAKERS, lost=NUM_DIGITS - 1),
        "base": rows("base", args.base_rows, SPEAKERS, lost=LOST_DIGITS),
        "adapt": rows("adapt", args.adapt_rows, (ADAPTED,), lost=LOST_DIGITS),
    }
    tested = [record(f"test-{code}", test, ADAPTED, code, LOST_DIGITS) for code in test_codes]
    others = [[word for word in rng.permutation(test_codes) if word != code][:LIST_LENGTH] for code in test_codes]
    lists = [
        [str(word) for word in rng.permutation([code, *others[number][1:]])] for number, code in enumerate(test_codes)
    ]
    for name, hotwords in (("none", [[]] * len(tested)), ("list", lists), ("others", others)):
        written[f"test_{name}"] = [
            {**row, "hotwords": list(map(str, words))} for row, words in zip(tested, hotwords, strict=True)
        ]
    for name, content in written.items():
        write_jsonl(content, args.output_dir / f"{name}.jsonl")
    header = chat.transcription_prompt(hotwords=["0"]).split("\n")
    lines = [*DIGITS.values(), *(line for line in header if line)] * 20
    (args.output_dir / "lines.txt").write_text("".join(f"line {line}\n" for line in lines), encoding="utf-8")
    print(f"{args.output_dir}: { {name: len(content) for name, content in written.items()} }", file=sys.stderr)


if __name__ == "__main__":
    main()
