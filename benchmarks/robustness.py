"""Measures what augmentation of waveforms does for noisy and reverberant speech; prints a JSON line for each score.

python benchmarks/robustness.py DATA/fsdd_en OUTPUT_DIR --babble DATA/kathleen_en/audio DATA/asterisk_en/audio

A base model (recipes/configs/models/tiny.yaml) learns spoken digits from random weights, without augmentation. It is
fine-tuned on the same recordings with augmentation of waveforms, without augmentation, and with augmentation of
features, for as many epochs. The test sets are a speaker who is not in training, and other recordings of the speakers
in training. Noises and rooms of the tests are not in training: another kind (white; training has pink noise and babble
of its own speakers), babble of speakers of other corpora, and other rooms with longer reverberation. DATA/fsdd_en has
train/ and test/ with wav.scp, text and utt2spk. A base model in the output folder is used again.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
import yaml

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber, compose, load_audio
from hf_speechllm.audio.augmentation import AddNoise, AddReverb
from hf_speechllm.audio.noise import RecordingFolder, simulate_room, white_noise
from hf_speechllm.data.kaldi import speech_length
from hf_speechllm.formats.composition import train_tokenizer
from hf_speechllm.model.chat import transcription_messages, transcription_prompt

RATE = 16000
WAVEFORMS = [
    "--feature_cache", "off", "--noise_prob", "0.5", "--noise_source", "pink", "babble", "--reverb_prob", "0.5",
]  # fmt: skip
RUNS = {"waveforms": WAVEFORMS, "none": [], "features": ["--spec_augment", "true", "--tempo_perturb", "0.1"]}
TALKERS = 4  # of a test babble
TEST_ROOMS = 20
TEST_SECONDS = (0.5, 0.8)  # RT60; training has 0.2 to 0.6


class TestBabble:
    """Mixes recordings of other corpora."""

    def __init__(self, folders):
        self.folders = [RecordingFolder(folder, RATE) for folder in folders]

    def __call__(self, samples, rng):
        """Returns the sum of several talkers at equal levels, shape = (samples,)."""
        mixture = np.zeros(samples, np.float32)
        for _ in range(TALKERS):
            talker = self.folders[rng.integers(len(self.folders))](samples, rng)
            mixture += talker / max(float(np.sqrt(np.square(talker).mean())), 1e-4)
        return mixture


class TestRooms:
    """Impulse responses whose numbers training does not use."""

    def random_recording(self, rng):
        """Returns an impulse response."""
        return simulate_room(1_000_000 + int(rng.integers(TEST_ROOMS)), *TEST_SECONDS, RATE)


def make_test_sets(rows, babble, folder):
    """Writes the test sets; returns the paths of each set's recordings."""
    noises = {"white noise": white_noise, "babble": TestBabble(babble)}
    conditions = {"clean": []}
    for name, source in noises.items():
        for snr in (10, 0):
            conditions[f"{name}, {snr} dB"] = [AddNoise([source], (snr, snr))]
    conditions["rooms"] = [AddReverb([TestRooms()])]
    conditions["rooms and babble, 10 dB"] = [*conditions["rooms"], *conditions["babble, 10 dB"]]
    sets = {}
    for condition, transforms in conditions.items():
        rng = np.random.default_rng(7)
        target = folder / condition.replace(", ", "_").replace(" ", "_")
        target.mkdir(parents=True, exist_ok=True)
        for row in rows:
            waveform = load_audio(row["path"])
            for transform in transforms:
                waveform = transform(waveform, rng)
            soundfile.write(target / f"{row['id']}.wav", waveform, RATE, subtype="FLOAT")
        sets[condition] = [str(target / f"{row['id']}.wav") for row in rows]
    return sets


def read_corpus(folder):
    """Returns ID, path, text and speaker of each recording."""
    columns = []
    for name in ("wav.scp", "text", "utt2spk"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        columns.append(dict(line.split(maxsplit=1) for line in lines))
    paths, texts, speakers = columns
    return [
        {"id": key, "path": str(folder / paths[key]), "text": texts[key].strip(), "speaker": speakers[key].strip()}
        for key in paths
    ]


def write_jsonl(rows, path):
    """Writes training rows."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = transcription_messages(row["path"], transcription_prompt(), row["text"])
            length = speech_length(len(load_audio(row["path"])), RATE)
            file.write(json.dumps({"messages": messages, "speech_length": length, "text_length": 2}) + "\n")


def compose_model(rows, seed, folder):
    """Composes a tiny model from random weights."""
    models = Path(__file__).resolve().parents[1] / "recipes/configs/models"
    config = yaml.safe_load((models / "tiny.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    for part in compose(config, train_tokenizer([row["text"] for row in rows], 300)):
        part.save_pretrained(folder)


def wrong_texts(model_folder, sets, rows):
    """Returns whether each text of each test set is wrong."""
    model = SpeechLLMForConditionalGeneration.from_pretrained(model_folder).eval()
    transcriber = Transcriber(model, SpeechLLMProcessor.from_pretrained(model_folder), max_new_tokens=8)
    wrong = {}
    for condition, paths in sets.items():
        texts = transcriber.transcribe(paths)
        wrong[condition] = np.array([text.strip() != row["text"] for text, row in zip(texts, rows, strict=True)])
    return wrong


def finetune(args, seed, model, output, options):
    """Trains a model with options."""
    command = [
        sys.executable, "-m", "hf_speechllm", "finetune", "--model_name_or_path", model, "--output_dir", output,
        "--train_file", args.output_dir / "train.jsonl", "--cache_dir", args.output_dir / "cache",
        "--num_train_epochs", args.epochs, "--seed", seed, "--use_cpu", "true", "--adam_beta2", 0.98,
        "--per_device_train_batch_seconds", 30, "--learning_rate", 1e-3, "--weight_decay", 0.05,
        "--warmup_steps", 0.1, "--save_strategy", "no", "--logging_steps", 50, "--report_to", "none",
        "--preprocessing_num_workers", 1, *options,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--babble", nargs="+", required=True, help="folders of speech for the babble of the test")
    parser.add_argument("--speaker", default="fsdd-theo", help="speaker who is not in training")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    train, test = (read_corpus(args.corpus / split) for split in ("train", "test"))
    unseen = [row for row in train if row["speaker"] == args.speaker][::3]
    train = [row for row in train if row["speaker"] != args.speaker]
    test = [row for row in test if row["speaker"] != args.speaker] + unseen
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(train, args.output_dir / "train.jsonl")
    sets = make_test_sets(test, args.babble, args.output_dir / "test")
    for seed in args.seeds:
        base = args.output_dir / f"base-{seed}"
        if not base.exists():
            compose_model(train, seed, args.output_dir / f"random-{seed}")
            finetune(args, seed, args.output_dir / f"random-{seed}", base, [])
        for name, options in {"base model": None, **RUNS}.items():
            started, output = time.time(), args.output_dir / f"{name}-{seed}"
            if options is not None:
                finetune(args, seed, base, output, options)
            seconds = round(time.time() - started)
            output = base if options is None else output
            for condition, wrong in wrong_texts(output, sets, test).items():
                new = np.array([row["speaker"] == args.speaker for row in test])
                line = {
                    "augmentation": name, "test": condition, "seed": seed,
                    "wrong_percent_known_speakers": round(100 * float(wrong[~new].mean()), 1),
                    "wrong_percent_new_speaker": round(100 * float(wrong[new].mean()), 1),
                    "known": int((~new).sum()), "new": int(new.sum()), "train_recordings": len(train),
                    "epochs": args.epochs, "new_speaker": args.speaker, "training_seconds": seconds,
                    "torch": torch.__version__, "transformers": transformers.__version__, "date": str(date.today()),
                }  # fmt: skip
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
