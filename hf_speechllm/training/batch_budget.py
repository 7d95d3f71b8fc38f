"""The batch budget that `--per_device_train_batch_seconds auto` measures: the largest that a GPU's memory takes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.collator import SpeechLLMCollator
from ..data.dataset import row_seconds
from ..data.sampler import ROW_COST, BudgetBatchSampler, KeyedRows
from ..files import atomic_write
from .arguments import SpeechLLMTrainingArguments

logger = logging.getLogger(__name__)

USED_SHARE = 0.88  # of the memory; the rest is for fragmentation and for what the driver needs
FIRST_PROBE = 60.0  # seconds of audio
LARGEST = 4800.0  # seconds of audio; the GPU is busy long before
STEPS_PER_EPOCH = 20  # at least, where the data allow it
OPTIMIZER_BYTES = 8  # per trained parameter: AdamW's two moments in float32
MEMORY_FILE = "batch_seconds.json"


def find_batch_seconds(
    args: SpeechLLMTrainingArguments,
    model: nn.Module,
    rows: Any,
    collator: SpeechLLMCollator,
    backward: Callable[[dict], None],
    sharded: bool = False,
) -> float:
    """Measures the largest budget, in padded seconds of audio, whose batches fit into the memory of every rank's GPU.

    Batches of the shortest, the median and the longest rows run forward and backward at growing budgets; memory grows
    linearly with them. The result is stored in the output folder and the cache folder, for the same model, options,
    rows and kind of GPU.

    Args:
        args: of the run.
        model: to be trained.
        rows: training rows, a `datasets.Dataset`.
        collator: of training.
        backward: runs the forward and backward pass of a batch of the collator.
        sharded: whether DeepSpeed or FSDP will shard the model.

    Returns:
        Seconds.

    Raises:
        ValueError: without a GPU, if the model is sharded, or if the longest row does not fit.
    """
    device = args.device
    if device.type != "cuda":
        raise ValueError("--per_device_train_batch_seconds auto measures a GPU's memory; on a CPU give a number")
    if sharded:
        raise ValueError(
            "--per_device_train_batch_seconds auto can't see what DeepSpeed or FSDP will shard: give a number"
        )
    seconds = row_seconds(rows)
    total = torch.cuda.get_device_properties(device).total_memory
    key = _key(args, model, rows, collator, seconds, total)
    # The output folder first: a resumed run must cut the same batches.
    folders = [Path(args.output_dir), *(Path(file["filename"]).parent for file in rows.cache_files[:1])]
    budget = next((known[key] for folder in folders if key in (known := _read_known(folder))), None)
    if budget is None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        later = trained * (OPTIMIZER_BYTES + (4 if args.world_size > 1 else 0))  # moments; DDP's buckets
        epoch = float(seconds.sum()) / (STEPS_PER_EPOCH * args.world_size * args.gradient_accumulation_steps)

        def probe(batch_seconds: float) -> float:
            batches = BudgetBatchSampler(seconds, batch_seconds, shuffle=False, row_cost=ROW_COST).batches(0)
            chosen = sorted({0, len(batches) // 2, len(batches) - 1})
            examples = KeyedRows(rows)
            inputs = (collator(examples.__getitems__(batches[index].tolist())) for index in chosen)
            return _peak_memory(model, inputs, backward, device)

        budget = largest_budget(
            probe,
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
                json.dump({**_read_known(folder), key: budget}, file)
    logger.info("batches of up to %.0f padded seconds of audio fit into memory", budget)
    return budget


def _read_known(folder: Path) -> dict[str, float]:
    file = folder / MEMORY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def largest_budget(probe: Callable[[float], float], room: float, longest: float, most: float) -> float:
    """Searches the largest budget that fits: each probe is chosen by the line through the two before it.

    Args:
        probe: returns the peak memory of a budget (seconds), in bytes; raises `torch.OutOfMemoryError` if it does not
            fit.
        room: available memory, in bytes.
        longest: duration of the longest row, in seconds, below which no budget can be.
        most: largest wanted budget, in seconds.

    Returns:
        Seconds.

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
            f"the longest row ({longest:.1f} s) does not fit into the GPU's memory: set --gradient_checkpointing "
            "true, train fewer parts, or remove the row"
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


def _peak_memory(model: nn.Module, batches: Any, backward: Callable[[dict], None], device: torch.device) -> float:
    """Peak memory of forward and backward passes, in bytes; gradients and random numbers are as before."""
    peak = 0
    state = torch.cuda.get_rng_state(device)
    try:
        for batch in batches:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            backward(batch)
            peak = max(peak, torch.cuda.max_memory_allocated(device))
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.set_rng_state(state, device)
        torch.cuda.empty_cache()
    return peak


def _key(
    args: SpeechLLMTrainingArguments,
    model: Any,
    rows: Any,
    collator: SpeechLLMCollator,
    seconds: np.ndarray,
    memory: int,
) -> str:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    facts = [
        model.config.to_json_string(), trained, args.bf16, args.gradient_checkpointing, args.world_size > 1,
        args.run_options.get("attn_implementation"),
        torch.cuda.get_device_name(args.device), memory, torch.__version__, len(seconds),
        round(float(seconds.sum()), 1), round(float(seconds.max()), 2), rows.column_names, collator.padding_free,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
