"""Invented texts that the CTC head contradicts: prints the shares of flagged texts as JSON.

python benchmarks/ctc_guard.py exp/words/test.text --scp_file exp/words/test.scp --model_name_or_path exp/head

Texts: the true ones, those of other recordings, loops of the first word, and true texts for recordings without speech
(silence, noise, tones).
"""

import argparse
import json

import numpy as np

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.data.kaldi import read_scp
from hf_speechllm.evaluation.transcripts import read_map
from hf_speechllm.inference.aligning import Aligner
from hf_speechllm.inference.ctc_reader import is_contradicted

SECONDS, SHIFT, LOOPS = 6, 7, 40


def without_speech(rate: int) -> dict[str, np.ndarray]:
    """Returns recordings without speech by name."""
    rng, time = np.random.default_rng(0), np.arange(SECONDS * rate) / rate
    sounds = {
        "silence": np.zeros(len(time)),
        "quiet noise": 1e-3 * rng.standard_normal(len(time)),
        "loud noise": 0.05 * rng.standard_normal(len(time)),
        "brown noise": np.cumsum(rng.standard_normal(len(time))) / 3000,
        "beeps": 0.2 * np.sin(2 * np.pi * 440 * time) * (time % 0.5 < 0.25),
        "chord": 0.1 * sum(np.sin(2 * np.pi * frequency * time) for frequency in (261, 329, 392)),
    }
    return {name: sound.astype(np.float32) for name, sound in sounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--scp_file", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    args = parser.parse_args()
    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    aligner = Aligner(SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path), processor)
    texts = read_map(args.text)
    recordings = {entry.id: entry.value for entry in read_scp(args.scp_file, BadRows()).entries if entry.id in texts}
    heard = {
        id_: aligner.log_probabilities(load_audio(path, processor.sampling_rate)) for id_, path in recordings.items()
    }

    def flagged(pairs) -> str:
        found = [is_contradicted(aligner.reader.words(frames, text, 0.0)) for frames, text in pairs]
        return f"{sum(found)} of {len(found)}"

    ids = list(heard)
    sounds = {name: aligner.log_probabilities(x) for name, x in without_speech(processor.sampling_rate).items()}
    short = [" ".join(texts[id_].split()[:8]) for id_ in ids[:10]]
    result = {
        "true texts": flagged((heard[id_], texts[id_]) for id_ in ids),
        "texts of other recordings": flagged(
            (heard[id_], texts[ids[(index + SHIFT) % len(ids)]]) for index, id_ in enumerate(ids)
        ),
        "loops": flagged((heard[id_], " ".join(texts[id_].split()[:1] * LOOPS)) for id_ in ids),
        "texts without speech": flagged((frames, text) for frames in sounds.values() for text in short),
        "own text without speech": {
            name: aligner.reader.vocabulary.decode(aligner.reader.vocabulary.greedy(frames))
            for name, frames in sounds.items()
        },
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
