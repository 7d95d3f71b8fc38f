"""Four-digit codes from real recordings of single digits (Free Spoken Digit Dataset), for benchmarks/hotwords.sh.

    python benchmarks/hotwords_data.py DATA_DIR OUTPUT_DIR

A code is four recordings of one speaker, 50 ms apart; its transcript and its hotword is the code as a number (`7305`).
Three speakers are the base model's, the fourth is who the model is adapted to. Training uses the training takes,
the test the test takes; no code of the test is in training. Written are `base.jsonl`, `adapt.jsonl`, and the test with
three lists a row: `test_none.jsonl`, `test_list.jsonl` (the code among 9 others), `test_others.jsonl` (10 others);
`lines.txt` trains the tokenizer, so that each digit is a token and the header of hotwords costs few.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

BASE_SPEAKERS, NEW_SPEAKER = ("fsdd-george", "fsdd-jackson", "fsdd-lucas"), "fsdd-theo"
NUM_DIGITS, LIST_LENGTH = 4, 10
GAP_SECONDS = 0.05
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = {name: str(digit) for digit, name in enumerate(NAMES)}


def read_takes(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """Recordings by speaker and digit."""
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
    parser.add_argument("data_dir", type=Path, help="with train/ and test/, each text, utt2spk and wav.scp")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--base_rows", type=int, default=3000)
    parser.add_argument("--adapt_rows", type=int, default=600)
    parser.add_argument("--test_rows", type=int, default=300)
    args = parser.parse_args()

    import soundfile

    from hf_speechllm import chat
    from hf_speechllm.data.jsonl import write_jsonl

    rng = np.random.default_rng(0)
    codes = [f"{code:0{NUM_DIGITS}d}" for code in rng.permutation(10**NUM_DIGITS)]
    test_codes, train_codes = codes[: args.test_rows], codes[args.test_rows :]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "audio").mkdir(exist_ok=True)

    def record(name: str, takes: dict[tuple[str, str], list[Path]], speaker: str, code: str) -> dict:
        """Joins takes of the digits into a recording, and gives its row."""
        parts = []
        for digit in code:
            paths = takes[speaker, digit]
            waveform, rate = soundfile.read(paths[rng.integers(len(paths))])
            parts += [waveform, np.zeros(int(GAP_SECONDS * rate))]
        soundfile.write(args.output_dir / "audio" / f"{name}.wav", np.concatenate(parts[:-1]), rate)
        messages = chat.transcription_messages(f"audio/{name}.wav", chat.transcription_prompt(), code)
        return {"messages": messages, "hotwords": [code]}

    train, test = (read_takes(args.data_dir / split) for split in ("train", "test"))
    base = [
        record(f"base-{number:05d}", train, str(rng.choice(BASE_SPEAKERS)), str(rng.choice(train_codes)))
        for number in range(args.base_rows)
    ]
    adapt = [
        record(f"adapt-{number:05d}", train, NEW_SPEAKER, str(rng.choice(train_codes)))
        for number in range(args.adapt_rows)
    ]
    tested = [record(f"test-{code}", test, NEW_SPEAKER, code) for code in test_codes]
    others = [[word for word in rng.permutation(test_codes) if word != code][:LIST_LENGTH] for code in test_codes]
    lists = [
        [str(word) for word in rng.permutation([code, *others[number][1:]])] for number, code in enumerate(test_codes)
    ]
    write_jsonl(base, args.output_dir / "base.jsonl")
    write_jsonl(adapt, args.output_dir / "adapt.jsonl")
    for name, hotwords in (("none", [[]] * len(tested)), ("list", lists), ("others", others)):
        rows = [{**row, "hotwords": list(map(str, words))} for row, words in zip(tested, hotwords, strict=True)]
        write_jsonl(rows, args.output_dir / f"test_{name}.jsonl")
    header = chat.transcription_prompt(hotwords=["0"]).split("\n")
    lines = [*DIGITS.values(), *(line for line in header if line)] * 20
    (args.output_dir / "lines.txt").write_text("".join(f"line {line}\n" for line in lines), encoding="utf-8")
    print(f"{args.output_dir}: {len(base)} + {len(adapt)} + {len(tested)} recordings", file=sys.stderr)


if __name__ == "__main__":
    main()
