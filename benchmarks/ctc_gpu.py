"""Measures the CTC head on a GPU: training from cached encoder states, and decoding with drafts. Prints JSON lines.

python benchmarks/ctc_gpu.py --seconds 150 --model exp/model --jsonl_file data/test.jsonl --output ctc_gpu.jsonl
python benchmarks/ctc_gpu.py --tiny --seconds 60   # on a CPU

- `encode`: the encoder's pass over the rows, which is made once.
- `train`: the head alone, released size, random weights: the median log line of the real Trainer after the warm-up,
  and the minutes for an epoch of 1,000 hours.
- `draft`: the recordings of `--jsonl_file` with `--model`, in float32: greedy search, verified drafts, and drafts that
  are taken above a threshold. Without `--jsonl_file`, the recordings are noise.
- `released`: released size, random weights, 8 s of noise, 30 tokens. Drafts are the tokens of greedy search, of which
  a share is replaced by wrong ones.

Every measurement ends at its share of `--seconds`; with less time, `train` has fewer than 40 steps.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ctc_draft import Passes, compare, read_recordings
from transformers import PrinterCallback, TrainerCallback
from workload import WORDS, environment, make_model, make_rows

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.fast.attention import without_cudnn_attention
from hf_speechllm.model.ctc import add_ctc_head, train_ctc_head
from hf_speechllm.model.ctc_configuration import CTCHeadConfig
from hf_speechllm.model.ctc_vocabulary import CTCVocabulary, character_config
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments
from hf_speechllm.training.trainer import SpeechLLMTrainer

WARMUP_STEPS, STEPS_PER_LINE = 5, 5
MAX_STEPS = 40
DRAFT_END, TRAINING_END = 0.35, 0.85  # shares of the time after which `draft` and `train` have ended
NOISE_SECONDS, NEW_TOKENS = 8, 30
ONE_BY_ONE = 100  # recordings that are decoded one by one, at most


class StopAt(TrainerCallback):
    """Ends a run at a time, but not before the first line after the warm-up."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.deadline and state.global_step >= WARMUP_STEPS + STEPS_PER_LINE:
            control.should_training_stop = True


def head_configs(model) -> Iterator[CTCHeadConfig]:
    """Yields the configs of the heads: two types over characters and over the tokens of the LLM."""
    width = model.config.audio_adaptor_config.encoder_hidden_size
    size = model.config.llm_config.vocab_size
    for head_type in ("sanm", "linear"):
        options = {"head_type": head_type, "hidden_size": width, "num_attention_heads": 4}
        yield character_config(WORDS, upsample_rate=3, **options)
        yield CTCHeadConfig(vocabulary="llm", vocab_size=size + 1, blank_id=size, **options)


def measure_training(model, processor, tiny: bool, deadline: float) -> Iterator[dict]:
    """Yields a line for the encoder's pass, and a line for each head."""
    device = model.device
    rows = make_rows(24 if tiny else 4000)
    seconds = sum(map(sum, rows["num_frames"])) / 100
    batches = {"characters": 20.0, "llm": 20.0} if tiny else {"characters": 2400.0, "llm": 1200.0}
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with without_cudnn_attention():
            rows = add_encoded(
                rows, model, processor, "encoder", folder, device=device, bf16=device.type == "cuda",
                batch_seconds=batches["characters"], show_progress=False,
            )  # fmt: skip
        speed = seconds / (time.monotonic() - started)
        yield {"what": "encode", "audio_seconds": round(seconds), "audio_seconds_per_second": round(speed, 1)}
        configs = list(head_configs(model))
        for index, config in enumerate(configs):
            share = (deadline - time.monotonic()) / (len(configs) - index)
            torch.manual_seed(0)
            add_ctc_head(model, config)
            model.requires_grad_(False)
            train_ctc_head(model, 1.0, alone=True)
            args = SpeechLLMTrainingArguments(
                output_dir=f"{folder}/{index}", max_steps=WARMUP_STEPS + (STEPS_PER_LINE if tiny else MAX_STEPS),
                logging_steps=STEPS_PER_LINE,
                per_device_train_batch_seconds=batches[config.vocabulary], learning_rate=1e-3, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu", bf16=device.type == "cuda",
                dataloader_num_workers=0 if tiny else 8,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer = SpeechLLMTrainer(
                model=model, args=args, train_dataset=rows, processing_class=processor,
                data_collator=SpeechLLMCollator(
                    processor, ctc_vocabulary=CTCVocabulary(config, processor.tokenizer)
                ),
                callbacks=[StopAt(time.monotonic() + share)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            lines = [line for line in trainer.state.log_history if "audio_seconds_per_second" in line]
            lines = [line for line in lines if line["step"] > WARMUP_STEPS]
            speeds = sorted(line["audio_seconds_per_second"] for line in lines)
            speed = speeds[len(speeds) // 2]
            yield {
                "what": "train", "head": config.head_type, "vocabulary": config.vocabulary,
                "vocab_size": config.vocab_size, "batch_seconds": batches[config.vocabulary],
                "parameters": sum(item.numel() for item in model.ctc_head.parameters()),
                "steps": STEPS_PER_LINE * len(lines),
                "audio_seconds_per_second": round(speed, 1), "slowest": speeds[0], "fastest": speeds[-1],
                "data_wait_share": lines[-1].get("data_wait_share"), "loss": [line["loss"] for line in lines],
                "minutes_for_1000_hours": round(3600 * 1000 / speed / 60, 2),
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            }  # fmt: skip


def noise(number: int, rate: int) -> list[np.ndarray]:
    """Returns recordings of noise."""
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(NOISE_SECONDS * rate).astype(np.float32) for _ in range(number)]


def measure_drafts(name: str, jsonl_file: str | None, thresholds, device: str, deadline: float) -> Iterator[dict]:
    """Yields the lines of `ctc_draft.compare` for a trained model, in float32."""
    model = SpeechLLMForConditionalGeneration.from_pretrained(name, dtype=torch.float32).to(device)
    processor = SpeechLLMProcessor.from_pretrained(name)
    if jsonl_file:
        recordings, references = read_recordings(jsonl_file, processor.sampling_rate)
    else:
        recordings = noise(20, processor.sampling_rate)
        references = [""] * len(recordings)
    for batch_seconds, number in ((240.0, len(recordings)), (1.0, ONE_BY_ONE)):
        parts = recordings[:number], references[:number]
        for line in compare(model, processor, *parts, batch_seconds, thresholds):
            yield {"what": "draft", "dtype": "float32", **line}
            if time.monotonic() > deadline:
                return


def measure_released(model, processor, tiny: bool, deadline: float) -> Iterator[dict]:
    """Yields lines for a model with random weights, whose drafts are right apart from a share of the tokens."""
    size = model.config.llm_config.vocab_size
    config = CTCHeadConfig(
        head_type="linear", vocabulary="llm", vocab_size=size + 1, blank_id=size,
        hidden_size=model.config.audio_adaptor_config.encoder_hidden_size, num_attention_heads=4,
    )  # fmt: skip
    add_ctc_head(model, config)
    with Passes(model) as passes:
        for dtype in (torch.float32, *((torch.bfloat16,) if model.device.type == "cuda" else ())):
            model.to(dtype)
            for rows in (1, 2) if tiny else (1, 128):
                inputs = processor.apply_transcription_request(noise(rows, processor.sampling_rate)).to(model.device)
                found: list[list[list[int]]] = []

                def keep(tokens, scores, found=found):
                    found.append(tokens)

                rng, speed = np.random.default_rng(0), {}
                for wrong in (None, 0.0, 0.05, 0.1):
                    transcriber = Transcriber(model, processor, max_new_tokens=NEW_TOKENS, ctc_draft=True)
                    transcriber.reader.notice = keep
                    if wrong is None:  # greedy search
                        transcriber.drafter = None
                    for _ in range(2):  # the first is a warm-up
                        drafts = iter(
                            [int(rng.integers(size)) if rng.random() < wrong else token for token in row]
                            for row in (found[0] if wrong is not None else ())
                        )
                        transcriber.reader.vocabulary.greedy = lambda log_probabilities, drafts=drafts: next(drafts)
                        passes.count, started = 0, time.monotonic()
                        transcriber.generate(inputs)
                        seconds = time.monotonic() - started
                    speed[wrong] = seconds
                    yield {
                        "what": "released", "dtype": str(dtype).removeprefix("torch."), "recordings": rows,
                        "new_tokens": NEW_TOKENS, "wrong_tokens": wrong, "llm_passes": passes.count,
                        "seconds": round(seconds, 4), "times_as_fast": round(speed[None] / seconds, 2),
                        "different_rows": sum(a != b for a, b in zip(found[0], found[-1], strict=True)),
                    }  # fmt: skip
                    if time.monotonic() > deadline:
                        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="of all measurements")
    parser.add_argument("--parts", nargs="+", default=["draft", "train", "released"], help="measurements")
    parser.add_argument("--model", help="folder of a model that has learnt, with a CTC head over the LLM's tokens")
    parser.add_argument("--jsonl_file", help="recordings and transcripts for --model")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.99], help="of --ctc_draft_threshold")
    parser.add_argument("--output", type=Path, help="also write the lines to this file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows, for a CPU")
    args = parser.parse_args()
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {"size": "tiny" if args.tiny else "fun_asr_nano", **environment()}

    def write(lines: Iterator[dict]) -> None:
        for line in lines:
            text = json.dumps({**line, "at": round(time.monotonic() - started, 1), **facts})
            print(text, flush=True)
            if args.output:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(text + "\n")

    if args.model and "draft" in args.parts:
        end = DRAFT_END if len(args.parts) > 1 else 1.0
        write(measure_drafts(args.model, args.jsonl_file, args.thresholds, device, started + end * args.seconds))
    if not {"train", "released"} & {*args.parts}:
        return
    model, processor = make_model("tiny" if args.tiny else "fun_asr_nano", device)
    if "train" in args.parts:
        write(measure_training(model, processor, args.tiny, started + TRAINING_END * args.seconds))
    if "released" in args.parts:
        write(measure_released(model, processor, args.tiny, started + args.seconds))


if __name__ == "__main__":
    main()
