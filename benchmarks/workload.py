"""Workload of the benchmarks: a model of a given size with random weights, and synthetic rows.

Durations are log-normal (median 7 s, sigma 0.6), clipped to 1.5 to 30 s; 3.5 text tokens per second.
"""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.fbank import FbankFeatureExtractor
from hf_speechllm.data.dataset import FRAMES_PER_SECOND
from hf_speechllm.formats.composition import train_tokenizer
from hf_speechllm.model.chat import AUDIO_TOKEN, transcription_messages, transcription_prompt

MODELS = Path(__file__).resolve().parents[1] / "recipes/configs/models"
VOCABULARY = {"fun_asr_nano": 151936, "tiny": 400}  # rows of the embedding; the synthetic tokenizer needs fewer
TOKENS_PER_SECOND = 3.5
# fmt: off
WORDS = [
    "the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his",
    "they", "at", "be", "this", "have", "from", "or", "one", "had", "by",
]
# fmt: on


def make_model(size: str, device: str) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Returns a model of recipes/configs/models with random float32 weights, and a processor."""
    config = yaml.safe_load((MODELS / f"{size}.yaml").read_text(encoding="utf-8"))
    options = config.pop("feature_extractor", {})
    tokenizer = train_tokenizer([" ".join([*WORDS, *WORDS[::-1]])] * 100, 400)
    config["llm_config"] = {**config["llm_config"], "vocab_size": VOCABULARY[size]}
    config = SpeechLLMConfig(**config, audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN))
    torch.manual_seed(0)
    with torch.device(device):
        model = SpeechLLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = SpeechLLMProcessor(
        FbankFeatureExtractor(**options),
        tokenizer,
        downsample_rate=config.downsample_rate,
        use_low_frame_rate=config.use_low_frame_rate,
    )
    return model, processor


def make_durations(rows: int, seed: int = 0) -> np.ndarray:
    """Draws durations in seconds, shape = (rows,)."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(7.0), 0.6, rows), 1.5, 30.0)


def make_text(seconds: float, rng: np.random.Generator) -> str:
    """Draws a text with 3.5 tokens per second; every word is a token."""
    return " ".join(rng.choice(WORDS, max(1, round(TOKENS_PER_SECOND * seconds))))


def make_rows(number: int, seed: int = 0) -> Dataset:
    """Makes rows with cached float16 features, as `data.dataset.prepare_rows` returns them."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((40 * FRAMES_PER_SECOND, 80)).astype(np.float16)

    def generate():
        for seconds in make_durations(number, seed):
            frames = int(seconds * FRAMES_PER_SECOND)
            start = int(rng.integers(0, len(noise) - frames))
            messages = transcription_messages("made-up.wav", transcription_prompt(), make_text(seconds, rng))
            yield {
                "messages": json.dumps(messages),
                "recordings": ["made-up.wav"],
                "hotwords": [],
                "features": [noise[start : start + frames].tobytes()],
                "num_frames": [frames],
            }

    return Dataset.from_list(list(generate()))


def environment() -> dict:
    """Returns hardware, versions and date, for the record of every measurement."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
