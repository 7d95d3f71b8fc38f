"""Measures training of native speech LLMs against a plain loop with the native processor; prints JSON lines.

python benchmarks/native_throughput.py --model_types qwen3_asr glmasr --seconds 60 --batch_seconds 240
python benchmarks/native_throughput.py --size tiny --seconds 5 --batch_seconds 20   # on a CPU

The models have the size of the class's default config and random weights. The plain loop is what a script per model
does: random batches with the same number of rows, labels of the native processor (which cover the prompt), logits at
every position, AdamW. Both compute in bfloat16 with float32 weights on a GPU, train all parameters that have
gradients, and read the same recordings with the same number of loader processes.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from torch.utils.data import DataLoader
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from workload import environment

from hf_speechllm.data.dataset import prepare_rows, row_seconds
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.sampler import ROW_COST, BudgetBatchSampler
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.model.native_families import fixed_seconds, max_feature_frames
from hf_speechllm.model.native_modeling import native_class
from hf_speechllm.model.native_processing import NativeProcessor
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.trainer import SpeechLLMTrainer

_spec = importlib.util.spec_from_file_location(
    "tiny_models", Path(__file__).resolve().parents[1] / "tests/native/conftest.py"
)
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)


def make_corpus(folder: Path, rows: int, rate: int, seed: int = 0) -> Path:
    """Writes recordings of noise of 2 to 20 s, with three words per second, and their JSONL."""
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(rows):
        seconds = float(np.clip(rng.lognormal(1.9, 0.5), 2, 20))
        path = folder / f"{index}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * rate)), rate)
        text = " ".join(rng.choice(tiny_models.TEXTS[0].split(), int(3 * seconds)))
        messages = transcription_messages(str(path), transcription_prompt(), text)
        lines.append(json.dumps({"messages": messages, "speech_length": int(100 * seconds)}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def make_model(model_type: str, size: str):
    """Returns model, native processor and our processor."""
    torch.manual_seed(0)
    config, native = tiny_models.BUILDERS[model_type]()
    tokenizer = native.tokenizer
    if size == "released":
        extractor = type(native.feature_extractor)
        native.feature_extractor = extractor(feature_size=config.__class__().audio_config.num_mel_bins)
        config = type(config)()
        if hasattr(config.audio_config, "output_dim"):  # defaults of parts of different models
            config.audio_config.output_dim = config.text_config.hidden_size
    else:
        config.text_config.vocab_size = len(tokenizer)
    for name in ("audio_token_id", "audio_token_index"):
        if name in config.to_dict():
            setattr(config, name, tokenizer.convert_tokens_to_ids(native.audio_token))
    base = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    model = native_class(base)(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, native, NativeProcessor(native, model_type)


def mean_rows(model, rows, batch_seconds: float) -> int:
    """Returns the mean number of rows in the batches of `SpeechLLMTrainer`."""
    cost = max(ROW_COST, fixed_seconds(model.config))
    return round(len(rows) / len(BudgetBatchSampler(row_seconds(rows), batch_seconds, row_cost=cost)))


def plain_loop(model, native, processor, number, options, device) -> dict:
    """Trains with a plain loop; returns audio seconds per second after the warm-up, and peak memory in GB."""
    lines = [json.loads(line) for line in Path(options.jsonl).read_text().splitlines()]
    random.Random(0).shuffle(lines)

    def collate(batch):
        texts, waveforms = [], []
        for line in batch:
            path = line["messages"][1]["content"].split("!")[1].split("<|")[0]
            waveforms.append(soundfile.read(path, dtype="float32")[0])
            messages = [
                {"role": "user", "content": [{"type": "audio", "audio": ""}]},
                {"role": "assistant", "content": [{"type": "text", "text": line["messages"][2]["content"]}]},
            ]
            texts += native.apply_chat_template([messages], tokenize=False)
        inputs = native(text=texts, audio=waveforms, output_labels=True, return_tensors="pt")
        return sum(map(len, waveforms)) / processor.sampling_rate, dict(inputs)

    loader = DataLoader(
        lines * 100, number, collate_fn=collate, num_workers=options.workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-5)
    base = type(model).__mro__[2]
    seconds, started, steps = 0.0, 0.0, 0
    for steps, (audio, inputs) in enumerate(loader):
        if steps == options.warmup:
            _synchronize(device)
            seconds, started = 0.0, time.perf_counter()
        inputs = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = base.forward(model, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += audio
        if steps > options.warmup and time.perf_counter() - started > options.seconds:
            break
    _synchronize(device)
    return _result(seconds / (time.perf_counter() - started), steps - options.warmup, number, device)


def trainer_loop(model, processor, rows, options, device, folder) -> dict:
    """Trains with `SpeechLLMTrainer`; returns the same as `plain_loop`."""
    steps = options.warmup + options.steps
    args = SpeechLLMTrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_seconds=options.batch_seconds, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu",
        dataloader_num_workers=options.workers, bf16=device.type == "cuda", learning_rate=1e-5,
    )  # fmt: skip
    trainer = SpeechLLMTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "audio_seconds_per_second" in line][options.warmup :]
    speed = float(np.median([line["audio_seconds_per_second"] for line in lines]))
    return _result(speed, len(lines), mean_rows(model, rows, options.batch_seconds), device)


def _synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _result(speed, steps, rows, device) -> dict:
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {"audio_seconds_per_second": round(speed, 1), "steps": steps, "rows": rows, "peak_memory_gb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_types", nargs="+", default=["qwen3_asr", "glmasr"])
    parser.add_argument("--size", choices=["released", "tiny"], default="released")
    parser.add_argument("--batch_seconds", type=float, default=240.0)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=40.0, help="of the plain loop after its warm-up")
    parser.add_argument("--steps", type=int, default=20, help="of the Trainer after its warm-up")
    parser.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--freeze_audio_encoder", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model_type in options.model_types:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model, native, processor = make_model(model_type, options.size)
            freeze_parts(model, audio_encoder=options.freeze_audio_encoder)
            model.to(device).train()
            options.jsonl = str(make_corpus(folder, options.rows, processor.sampling_rate))
            data = DataOptions(train_file=[options.jsonl], cache_dir=str(folder), preprocessing_num_workers=1)
            data.compute_features_per_epoch(model_type)
            rows, _ = prepare_rows([options.jsonl], processor, max_feature_frames(model.config), data)
            number = mean_rows(model, rows, options.batch_seconds)
            common = {
                "model_type": model_type, "size": options.size, "batch_seconds": options.batch_seconds,
                "parameters": sum(item.numel() for item in model.parameters()), **environment(),
            }  # fmt: skip
            for name in ("plain loop", "SpeechLLMTrainer"):
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    if name == "plain loop":
                        result = plain_loop(model, native, processor, number, options, device)
                    else:
                        result = trainer_loop(model, processor, rows, options, device, str(folder / "run"))
                except torch.OutOfMemoryError:
                    result = {"out_of_memory": True}
                print(json.dumps({"loop": name, **result, **common}), flush=True)
                model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
