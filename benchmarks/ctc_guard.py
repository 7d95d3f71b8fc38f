"""Invented texts that the CTC head contradicts: prints the shares of flagged texts as JSON.

python benchmarks/ctc_guard.py exp/words/test.text --scp_file exp/words/test.scp --model_name_or_path exp/head

1. Given texts: the true ones, those of other recordings, loops of the first word, and true texts for recordings
   without speech (silence, noise, music).
2. With `--decode`: texts of the LLM for recordings without speech, as they are and with `--ctc_guard`. Every word is
   invented.
"""

import argparse
import itertools
import json
from collections.abc import Callable

import numpy as np

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.data.kaldi import read_scp
from hf_speechllm.data.transcripts import read_map
from hf_speechllm.inference.aligning import Aligner
from hf_speechllm.inference.ctc_reader import is_contradicted

SECONDS, SHIFT, LOOPS = (1, 8), 7, 40
SCALE = 220 * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12]) / 12)  # Hz


def melody(samples: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Returns music: notes of 0.15 to 0.6 s with decaying harmonics, over a chord."""
    time = np.arange(samples) / rate
    sound = 0.03 * sum(np.sin(2 * np.pi * frequency * time) for frequency in rng.choice(SCALE, 3, replace=False) / 2)
    start = 0
    while start < samples:
        length = min(samples - start, int(rng.uniform(0.15, 0.6) * rate))
        at, pitch = np.arange(length) / rate, rng.choice(SCALE) * rng.choice([1, 2])
        tones = (np.sin(2 * np.pi * pitch * order * at) / order for order in range(1, 6))
        sound[start : start + length] += 0.15 * sum(tones) * np.exp(-4 * at)
        start += length
    return sound


# A function from number of samples, rate in Hz and generator to a recording without speech.
SOUNDS: dict[str, Callable] = {
    "silence": lambda samples, rate, rng: np.zeros(samples),
    "quiet noise": lambda samples, rate, rng: 1e-3 * rng.standard_normal(samples),
    "loud noise": lambda samples, rate, rng: 0.05 * rng.standard_normal(samples),
    "brown noise": lambda samples, rate, rng: np.cumsum(rng.standard_normal(samples)) / 3000,
    "beeps": lambda samples, rate, rng: (
        0.2 * np.sin(np.arange(samples) * rng.uniform(1200, 6000) / rate) * (np.arange(samples) % rate < rate / 2)
    ),
    "music": melody,
}


def without_speech(rate: int, number: int) -> dict[str, list[np.ndarray]]:
    """Returns recordings of 1 to 8 s without speech, by name."""
    rng = np.random.default_rng(0)
    return {
        name: [make(int(rng.uniform(*SECONDS) * rate), rate, rng).astype(np.float32) for _ in range(number)]
        for name, make in SOUNDS.items()
    }


def invented(model, processor, sounds: dict[str, list[np.ndarray]]) -> dict:
    """Decodes recordings without speech; returns the shares of recordings with words, and examples."""
    result = {}
    for guard in (False, True):
        transcriber = Transcriber(
            model, processor, max_new_tokens=100, ctc_guard=guard, word_times=True, num_workers=1
        )
        texts = {name: transcriber.transcribe(recordings) for name, recordings in sounds.items()}
        result["guarded" if guard else "as decoded"] = {
            name: {"with words": f"{sum(map(bool, found))} of {len(found)}", "longest": max(found, key=len)[:60]}
            for name, found in texts.items()
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--scp_file", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--decode", action="store_true", help="also decode recordings without speech")
    parser.add_argument("--sounds", type=int, default=20, help="recordings of each kind without speech")
    args = parser.parse_args()
    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path)
    aligner = Aligner(model, processor)
    texts = read_map(args.text)
    recordings = {entry.id: entry.value for entry in read_scp(args.scp_file, BadRows()).entries if entry.id in texts}
    heard = {
        id_: aligner.log_probabilities(load_audio(path, processor.sampling_rate)) for id_, path in recordings.items()
    }

    def flagged(pairs) -> str:
        found = [is_contradicted(aligner.reader.words(frames, text, 0.0)) for frames, text in pairs]
        return f"{sum(found)} of {len(found)}"

    ids = list(heard)
    sounds = without_speech(processor.sampling_rate, args.sounds)
    unspoken = {name: [aligner.log_probabilities(item) for item in items] for name, items in sounds.items()}
    short = [" ".join(texts[id_].split()[:8]) for id_ in ids[:10]]
    vocabulary = aligner.reader.vocabulary
    result: dict = {
        "true texts": flagged((heard[id_], texts[id_]) for id_ in ids),
        "texts of other recordings": flagged(
            (heard[id_], texts[ids[(index + SHIFT) % len(ids)]]) for index, id_ in enumerate(ids)
        ),
        "loops": flagged((heard[id_], " ".join(texts[id_].split()[:1] * LOOPS)) for id_ in ids),
        "texts without speech": {
            name: flagged(zip(items, itertools.cycle(short), strict=False)) for name, items in unspoken.items()
        },
        "own texts without speech": {
            name: sum(bool(vocabulary.decode(vocabulary.greedy(frames))) for frames in items)
            for name, items in unspoken.items()
        },
    }
    if args.decode:
        result["texts of the LLM without speech"] = invented(model, processor, sounds)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
