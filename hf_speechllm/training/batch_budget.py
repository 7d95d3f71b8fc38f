"""Measures the largest batch budget that fits into GPU memory, for `--per_device_train_batch_seconds auto`."""

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
from ..data.sampler import BudgetBatchSampler, KeyedRows
from ..files import atomic_write
from .arguments import SpeechLLMTrainingArguments

logger = logging.getLogger(__name__)

USED_SHARE = 0.88  # share of the GPU memory; fragmentation and the driver need the rest
FIRST_PROBE = 60.0  # seconds of audio
LARGEST = 4800.0  # seconds of audio; smaller batches already use the GPU fully
STEPS_PER_EPOCH = 20  # minimum, if the data are sufficient
OPTIMIZER_BYTES = 8  # per trained parameter: two float32 moments of AdamW
MEMORY_FILE = "batch_seconds.json"


def find_batch_seconds(
    args: SpeechLLMTrainingArguments,
    model: nn.Module,
    rows: Any,
    collator: SpeechLLMCollator,
    backward: Callable[[dict], None],
    sharded: bool = False,
) -> float:
    """Measures the largest budget, in padded seconds of audio, whose batches fit into the GPU memory of every rank.

    Runs forward and backward passes of batches with the shortest, median and longest rows at growing budgets; memory
    grows linearly with the budget. Stores the result in the output folder and the cache folder, for runs with the same
    model, options, rows and GPU type.

    Args:
        args: of the run.
        model: to be trained.
        rows: training rows, a `datasets.Dataset`.
        collator: training collator.
        backward: runs the forward and backward pass of a batch of the collator.
        sharded: whether DeepSpeed or FSDP will shard the model.

    Returns:
        Seconds.

    Raises:
        ValueError: without a GPU, if the model is sharded, or if the longest row does not fit.
    """
    device = args.device
    if device.type != "cuda":
        raise ValueError("--per_device_train_batch_seconds auto measures GPU memory; set a number of seconds on a CPU")
    if sharded:
        raise ValueError(
            "--per_device_train_batch_seconds auto cannot measure a model that DeepSpeed or FSDP shards; set a number "
            "of seconds"
        )
    seconds = row_seconds(rows)
    total = torch.cuda.get_device_properties(device).total_memory
    key = _key(args, model, rows, collator, seconds, total)
    # The output folder comes first: a resumed run must form the same batches.
    folders = [Path(args.output_dir), *(Path(file["filename"]).parent for file in rows.cache_files[:1])]
    budget = next((stored[key] for folder in folders if key in (stored := _read_stored(folder))), None)
    if budget is None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # Allocated later: moments of the optimizer, buckets of DDP.
        reserved = trained * (OPTIMIZER_BYTES + (4 if args.world_size > 1 else 0))
        per_step = float(seconds.sum()) / (STEPS_PER_EPOCH * args.world_size * args.gradient_accumulation_steps)

        cost = collator.row_cost_of(rows)

        def probe(batch_seconds: float) -> float:
            batches = BudgetBatchSampler(seconds, batch_seconds, shuffle=False, row_cost=cost).batches(0)
            chosen = sorted({0, len(batches) // 2, len(batches) - 1})
            examples = KeyedRows(rows)
            inputs = (collator(examples.__getitems__(batches[index].tolist())) for index in chosen)
            return _peak_memory(model, inputs, backward, device)

        budget = largest_budget(
            probe,
            available=USED_SHARE * total - reserved,
            longest=float(seconds.max()),
            limit=min(LARGEST, max(per_step, float(seconds.max()))),
        )
    if args.world_size > 1:
        smallest = torch.tensor(budget, device=device, dtype=torch.float64)
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        budget = float(smallest)
    if args.should_save:
        for folder in folders:
            with atomic_write(folder / MEMORY_FILE) as file:
                json.dump({**_read_stored(folder), key: budget}, file)
    logger.info("batches of up to %.0f padded seconds of audio fit into GPU memory", budget)
    return budget


def _read_stored(folder: Path) -> dict[str, float]:
    file = folder / MEMORY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def largest_budget(probe: Callable[[float], float], available: float, longest: float, limit: float) -> float:
    """Searches the largest budget that fits; extrapolates the memory of the two previous probes linearly.

    Args:
        probe: returns the peak memory in bytes for a budget in seconds; raises `torch.OutOfMemoryError` if the budget
            does not fit.
        available: available memory, in bytes.
        longest: duration of the longest row, in seconds: the smallest possible budget.
        limit: largest budget to return, in seconds.

    Returns:
        Seconds.

    Raises:
        ValueError: if the longest row does not fit.
    """
    small = min(max(longest, FIRST_PROBE), max(limit, longest))

    def fits(budget: float) -> float | None:
        try:
            used = probe(budget)
        except torch.OutOfMemoryError:
            return None
        return used if used <= available else None

    used = fits(small)
    while used is None and small > longest:
        small = max(longest, small * 0.7)
        used = fits(small)
    if used is None:
        raise ValueError(
            f"the longest row ({longest:.1f} s) does not fit into the GPU memory: set --gradient_checkpointing true, "
            "train fewer parts, or remove the row"
        )
    budget = min(limit, 2 * small)
    while budget > small:
        more = fits(budget)
        if more is None:
            budget = small + 0.7 * (budget - small)
            if budget - small < 0.05 * small:
                return small
            continue
        if budget >= limit:
            return budget
        slope = max((more - used) / (budget - small), 1e-9)
        target = min(limit, budget + 0.97 * (available - more) / slope)
        if target < 1.05 * budget:
            return budget
        small, used, budget = budget, more, target
    return small


def _peak_memory(model: nn.Module, batches: Any, backward: Callable[[dict], None], device: torch.device) -> float:
    """Measures the peak memory of forward and backward passes, in bytes; restores gradients and random state."""
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
    values = [
        model.config.to_json_string(), trained, args.bf16, args.gradient_checkpointing, args.world_size > 1,
        args.run_options.get("attn_implementation"),
        torch.cuda.get_device_name(args.device), memory, torch.__version__, len(seconds),
        round(float(seconds.sum()), 1), round(float(seconds.max()), 2), rows.column_names, collator.padding_free,
        collator.row_cost_of(rows),
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
