"""Measures the throughput of the real Trainer loop from cached features; prints a JSON line for each configuration.

python benchmarks/train_throughput.py --modes llm_only adaptor_only:encoder all lora:encoder --batch_seconds auto
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 benchmarks/train_throughput.py ...
python benchmarks/train_throughput.py --size tiny --modes llm_only all --batch_seconds 60 --steps 6   # on a CPU

`--naive SECONDS` also measures, before the Trainer, a plain loop with the same model and rows: random batches, padded
to the longest row, autocast, logits at every position, AdamW with default options. Other options are passed to the
Trainer (`--compile_layers true`).
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch.nn import functional
from workload import environment, make_model, make_rows

from hf_speechllm.cli.arguments import parse_arguments
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import row_seconds
from hf_speechllm.data.encoder_cache import add_encoded
from hf_speechllm.data.sampler import KeyedRows
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora
from hf_speechllm.training.trainer import SpeechLLMTrainer

CONFIGS = Path(__file__).resolve().parents[1] / "recipes/configs"


def read_options(mode: str, options, folder: str, others: list[str]):
    """Returns the options of a run in a mode."""
    name, _, level = mode.partition(":")
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    config.pop("save_steps"), config.pop("save_total_limit")
    config |= {
        "model_name_or_path": options.size, "train_file": "made-up", "max_steps": options.warmup + options.steps,
        "per_device_train_batch_seconds": options.batch_seconds, "logging_steps": max(1, options.steps // 4),
        "cache_level": level or "fbank", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": options.device == "cpu", "output_dir": folder, "cache_dir": folder,
    }  # fmt: skip
    file = Path(folder) / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return parse_arguments([str(file), *others])


def prepare(model, parts):
    """Sets which parts of a model are trained, and adds LoRA adapters."""
    model.requires_grad_(True)
    freeze_parts(model, parts.freeze_audio_encoder, parts.freeze_audio_adaptor, parts.freeze_llm)
    if parts.use_lora:
        model = add_lora(model, parts.lora_r, parts.lora_alpha, parts.lora_dropout, parts.lora_target_modules)
    return model


def measure(run, options, model, processor, rows) -> dict:
    """Trains with the Trainer; returns the median log line after the warm-up."""
    args = run.training
    model = prepare(model, run.parts)
    if run.data.cache_level != "fbank":
        rows = add_encoded(
            rows, model, processor, run.data.cache_level, run.data.cache_dir, device=args.device, bf16=bool(args.bf16),
            batch_seconds=args.per_device_train_batch_seconds or 240.0,
        )  # fmt: skip
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = SpeechLLMTrainer(
        model=model, args=args, train_dataset=rows, data_collator=SpeechLLMCollator(processor),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    memory = torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else None
    engine = type(trainer.model_wrapped).__name__
    if run.parts.use_lora:
        trainer.model.unload()
    lines = [line for line in trainer.state.log_history if "audio_seconds_per_second" in line]
    lines = sorted(
        (line for line in lines if line["step"] > options.warmup), key=lambda line: line["audio_seconds_per_second"]
    )
    keys = ("audio_seconds_per_second", "padding_share", "data_wait_share", "model_flop_utilization")
    result = {key: lines[len(lines) // 2].get(key) for key in keys}
    return {
        "engine": engine, "processes": args.world_size, **result, "batch_seconds": args.per_device_train_batch_seconds,
        "peak_memory_gb": memory,
    }  # fmt: skip


def measure_naive(run, options, base, processor, rows) -> float:
    """Returns the throughput of a plain loop in audio seconds per second; only fbank is cached."""
    model = prepare(base, run.parts)
    seconds = row_seconds(rows)
    size = max(1, int(options.naive / seconds.max()))
    collator = SpeechLLMCollator(processor)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    loader = torch.utils.data.DataLoader(
        KeyedRows(rows), batch_sampler=[order[i : i + size] for i in range(0, len(order), size)], collate_fn=collator,
        num_workers=0 if options.device == "cpu" else 4,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    model.train()
    audio, started = 0.0, 0.0
    for step, batch in enumerate(loader):
        if step == options.warmup + options.naive_steps:
            break
        if step == options.warmup:
            synchronize(options.device)
            audio, started = 0.0, time.perf_counter()
        audio += float(batch["input_features_mask"].sum()) * processor.frame_seconds
        batch = {key: value.to(options.device) for key, value in batch.items() if key != "positions"}
        labels = batch.pop("labels")
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            logits = model(**batch).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronize(options.device)
    speed = audio / (time.perf_counter() - started)
    optimizer.zero_grad()
    if run.parts.use_lora:
        model.unload()
    return speed


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="fun_asr_nano", help="a model of recipes/configs/models")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["llm_only"],
        help="files of recipes/configs; :encoder or :adaptor caches its output",
    )
    parser.add_argument("--batch_seconds", default="600", help="padded audio seconds in a batch")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=4, help="steps before the measurement")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--naive", type=float, default=0.0, help="also measure a plain loop with batches of this many seconds"
    )
    parser.add_argument("--naive_steps", type=int, default=8)
    options, others = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in finetune
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    model, processor = make_model(options.size, options.device)
    rows = make_rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {mode: read_options(mode, options, folder, others) for mode in options.modes}
        naive = {}
        if options.naive:  # before the Trainer, which changes the model's attention
            naive = {mode: measure_naive(run, options, model, processor, rows) for mode, run in arguments.items()}
        for mode, run in arguments.items():
            line = {"mode": mode, "size": options.size, "steps": options.steps, "options": others}
            line |= measure(run, options, model, processor, rows)
            if naive:
                line |= {"naive": naive[mode], "ratio": line["audio_seconds_per_second"] / naive[mode]}
            if run.training.should_log:
                print(json.dumps({**line, **environment()}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
