"""The batch budget: the largest that a GPU's memory takes, and what is done with a batch that it does not take."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from ..data.dataset import row_seconds
from ..data.sampler import ROW_COST, BudgetBatchSampler, Rows
from ..files import atomic_write

if TYPE_CHECKING:
    from ..model.processing import SpeechLLMProcessor
    from .arguments import SpeechLLMTrainingArguments
    from .trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

USED_SHARE = 0.88  # of the memory; the rest is for fragmentation and for what the driver needs
FIRST_PROBE = 60.0  # seconds of audio
LARGEST = 4800.0  # seconds of audio; the GPU is busy long before
STEPS_PER_EPOCH = 20  # at least, where the data allow it
OPTIMIZER_BYTES = 8  # a trained parameter: AdamW's two moments in float32
MEMORY_FILE = "batch_seconds.json"


def find_batch_seconds(trainer: SpeechLLMTrainer) -> float:
    """The largest budget, in padded seconds of audio, whose batches fit into the memory of every rank's GPU.

    Batches of the shortest, the usual and the longest rows run forward and backward at growing budgets; memory grows
    linearly with them. The result is remembered beside the caches, for the same model, options, rows and kind of GPU.

    Raises:
        ValueError: without a GPU, with an engine that shards, or if the longest row does not fit.
    """
    args, device = trainer.args, trainer.args.device
    if device.type != "cuda":
        raise ValueError("--per_device_train_batch_seconds auto measures a GPU's memory; on a CPU give a number")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "--per_device_train_batch_seconds auto can't see what DeepSpeed or FSDP will shard: give a number"
        )
    seconds = row_seconds(trainer.train_dataset)
    total = torch.cuda.get_device_properties(device).total_memory
    key = _key(trainer, seconds, total)
    # The run's own memory first: a resumed run must cut the same batches.
    folders = [Path(args.output_dir), Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE)]
    budget = next((known[key] for folder in folders if key in (known := _remembered(folder))), None)
    if budget is None:
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        later = trained * (OPTIMIZER_BYTES + (4 if args.world_size > 1 else 0))  # moments; DDP's buckets
        epoch = float(seconds.sum()) / (STEPS_PER_EPOCH * args.world_size * args.gradient_accumulation_steps)
        budget = largest_budget(
            lambda batch_seconds: _probe(trainer, seconds, batch_seconds),
            room=USED_SHARE * total - later,
            longest=float(seconds.max()),
            most=min(LARGEST, max(epoch, float(seconds.max()))),
        )
    smallest = torch.tensor(budget, device=device, dtype=torch.float64)
    if args.world_size > 1:
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    budget = float(smallest)
    if args.should_save:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / MEMORY_FILE) as file:
                json.dump({**_remembered(folder), key: budget}, file)
    logger.info("batches of up to %.0f padded seconds of audio fit", budget)
    return budget


def _remembered(folder: Path) -> dict[str, float]:
    file = folder / MEMORY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def largest_budget(probe: Callable[[float], float], room: float, longest: float, most: float) -> float:
    """The largest budget whose memory fits: each probe is chosen by the line through the two before it.

    Args:
        probe: bytes at the peak for a budget in seconds; raises `torch.OutOfMemoryError` if there are too few.
        room: bytes that there are.
        longest: seconds of the longest row, below which no budget can be.
        most: seconds above which none is wanted.

    Raises:
        ValueError: if the longest row alone does not fit.
    """
    small = min(max(longest, FIRST_PROBE), max(most, longest))

    def fits(budget: float) -> float | None:
        try:
            used = probe(budget)
        except torch.OutOfMemoryError:
            return None
        return used if used <= room else None

    used = fits(small)
    while used is None and small > longest:
        small = max(longest, small * 0.7)
        used = fits(small)
    if used is None:
        raise ValueError(
            f"the longest row ({longest:.1f} s) does not fit into the GPU's memory: give --gradient_checkpointing "
            "true, train fewer parts, or remove it"
        )
    budget = min(most, 2 * small)
    while budget > small:
        more = fits(budget)
        if more is None:
            budget = small + 0.7 * (budget - small)
            if budget - small < 0.05 * small:
                return small
            continue
        if budget >= most:
            return budget
        slope = max((more - used) / (budget - small), 1e-9)
        target = min(most, budget + 0.97 * (room - more) / slope)
        if target < 1.05 * budget:
            return budget
        small, used, budget = budget, more, target
    return small


def _probe(trainer: SpeechLLMTrainer, seconds: np.ndarray, budget: float) -> float:
    """Bytes at the peak of a forward and backward pass of batches of this budget."""
    batches = BudgetBatchSampler(seconds, budget, shuffle=False, row_cost=ROW_COST).batches(0)
    rows = Rows(trainer.train_dataset)
    peak = 0
    state = torch.cuda.get_rng_state(trainer.args.device)
    try:
        for position in {0, len(batches) // 2, len(batches) - 1}:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(trainer.args.device)
            inputs = trainer._prepare_inputs(trainer.data_collator(rows.__getitems__(batches[position].tolist())))
            trainer.model.train()
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                trainer.model(**inputs).loss.backward()
            peak = max(peak, torch.cuda.max_memory_allocated(trainer.args.device))
    finally:
        trainer.model.zero_grad(set_to_none=True)
        torch.cuda.set_rng_state(state, trainer.args.device)
        torch.cuda.empty_cache()
    return peak


def _key(trainer: SpeechLLMTrainer, seconds: np.ndarray, memory: int) -> str:
    args: SpeechLLMTrainingArguments = trainer.args
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    facts = [
        trainer.model.config.to_json_string(), trained, args.bf16, args.gradient_checkpointing, args.world_size > 1,
        args.attn_implementation, torch.cuda.get_device_name(args.device), memory, torch.__version__, len(seconds),
        round(float(seconds.sum()), 1), round(float(seconds.max()), 2), trainer.train_dataset.column_names,
        trainer.data_collator.padding_free,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def run_in_halves(trainer: SpeechLLMTrainer, step: Callable[[dict], torch.Tensor], batch: dict) -> torch.Tensor:
    """Runs a training step; where memory does not suffice, as the sum of its halves, and so on down to single rows.

    Not where gradients would be lost or ranks would fall out of step: with several processes, or with gradients of
    earlier batches accumulated. Then the error is raised with advice.

    Args:
        trainer: whose gradients are cleared before another try.
        step: adds a batch's gradients and gives its share of the loss.
        batch: of `SpeechLLMCollator`.

    Raises:
        torch.OutOfMemoryError: if it can't be helped.
    """
    args, processor, parts = trainer.args, trainer.processing_class, [batch]
    while True:
        losses: list[torch.Tensor] = []
        for part in parts:
            rows = len(part["input_ids"])
            try:
                losses.append(step(part))
            except torch.OutOfMemoryError as error:
                if rows == 1 or args.world_size > 1 or args.gradient_accumulation_steps > 1:
                    frames = part["input_features_mask"].shape[1]
                    raise torch.OutOfMemoryError(
                        f"a batch of {rows} rows of up to {frames} frames does not fit into memory: lower "
                        "--per_device_train_batch_seconds (or give auto), or set --gradient_checkpointing true"
                    ) from error
                break  # out of the handler: the error holds on to the tensors of the failed step
        else:
            return torch.stack(losses).sum()
        logger.warning("%d rows do not fit into memory and are halved; lower --per_device_train_batch_seconds", rows)
        trainer.model.zero_grad(set_to_none=True)  # begins again: some of the failed step's gradients may be there
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        at = len(losses)
        parts[at : at + 1] = split_batch(parts[at], processor)


def split_batch(batch: dict[str, Any], processor: SpeechLLMProcessor) -> list[dict]:
    """Halves of a batch of `SpeechLLMCollator`, whose losses and gradients add up to those of the whole.

    Args:
        batch: of at least two rows.
        processor: knows how many audio tokens a recording has.
    """
    half, width = len(batch["input_ids"]) // 2, batch["input_ids"].shape[1]
    placeholders = int((batch["input_ids"][:half] == processor.audio_token_id).sum())
    rate = processor.encoder_downsample_rate if "encoder_states" in batch else 1
    counts = [processor.num_audio_tokens(rate * int(frames)) for frames in batch["input_features_mask"].sum(-1)]
    recordings = int(np.searchsorted(np.cumsum([0, *counts]), placeholders))
    cuts = dict.fromkeys(("input_features", "input_features_mask", "encoder_states"), recordings)
    cuts["audio_tokens"] = placeholders
    ends = dict.fromkeys(("label_positions", "token_positions"), half * width)
    ends["frame_positions"] = recordings * batch["input_features_mask"].shape[1]
    halves: list[dict[str, Any]] = [{}, {}]
    for key, value in batch.items():
        if key in ends:
            before = value < ends[key]
            parts = value[before], value[~before] - ends[key]
        else:
            parts = value[: cuts.get(key, half)], value[cuts.get(key, half) :]
        for part, tensor in zip(halves, parts, strict=True):
            part[key] = tensor
    return halves
