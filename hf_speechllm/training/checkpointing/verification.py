"""The proof that a checkpoint can be used: what is read back gives the same logits as the model in memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from ...fast.attention import spare_the_host
from ...fast.fsmn import MemoryBlock
from ...formats.checkpoint import CheckpointError
from ...model.modeling import SpeechLLMForConditionalGeneration

if TYPE_CHECKING:
    from ..trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest logit
LORA_TOLERANCE = 1e-3  # an adapter is merged when it is loaded, which rounds
HALF_TOLERANCE = 5e-2  # where an engine computes in bfloat16 or float16


class ReadbackError(RuntimeError):
    """A checkpoint does not hold the model that was to be saved."""


def check_readback(trainer: SpeechLLMTrainer, folder: Path) -> None:
    """Loads a checkpoint and compares its logits with those of the trainer's model, on the last training batch.

    The first rank does it, the others wait; where DeepSpeed or FSDP spread weights over ranks, all compute the model's
    logits. Where a GPU has no room for a second model, or such an engine has written shards alone, a warning says so.

    Raises:
        ReadbackError: if they differ, on all ranks alike.
    """
    batch = trainer.last_inputs
    if batch is None:
        return
    first, sharded, problem = trainer.args.process_index == 0, trainer.writer.sharded, None
    expected = _logits_in_memory(trainer, batch) if sharded else None
    if first and sharded and not any(folder.glob("*.safetensors")):
        logger.warning("%s is not read back: it has shards alone", folder)
    elif first:
        try:
            expected = _logits_in_memory(trainer, batch) if expected is None else expected
            problem = _compare(trainer, folder, batch, expected)
        except (OSError, CheckpointError) as error:
            problem = str(error)
        except torch.OutOfMemoryError:
            logger.warning("%s is not read back: there is no memory for a second model", folder)
    if trainer.args.world_size > 1:
        problem = broadcast_object_list([problem])[0]
    if problem is not None:
        raise ReadbackError(
            f"{folder}, read back, is not the model in memory: {problem}. The run ends, since what it saves can't be "
            "used (--check_first_checkpoint false would go on all the same)"
        )


def _logits_in_memory(trainer: SpeechLLMTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if trainer.writer.sharded:
        model = forward = trainer.model_wrapped
    else:
        # The class's forward pass: Accelerate has put one with autocast in its place.
        model = trainer.accelerator.unwrap_model(trainer.model)
        forward = partial(type(model).forward, model)
    was_training = model.training
    model.eval()
    try:
        with _without_traces(trainer):
            return _logits(forward, batch)
    finally:
        model.train(was_training)


def _compare(
    trainer: SpeechLLMTrainer, folder: Path, batch: dict[str, torch.Tensor], expected: torch.Tensor
) -> str | None:
    args, halves = trainer.args, {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = halves.get(trainer.accelerator.mixed_precision, torch.float32) if trainer.writer.sharded else torch.float32
    autocast = trainer.accelerator.autocast() if trainer.is_fsdp_enabled else contextlib.nullcontext()
    with _without_traces(trainer):
        with _without_zero(trainer):
            model = SpeechLLMForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, attn_implementation=args.attn_implementation
            )
        if any(isinstance(module, MemoryBlock) for module in trainer.model.modules()):
            spare_the_host(model)  # whose kernels round otherwise than torch's
        with autocast:
            found = _logits(model.to(args.device).eval(), batch)
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    tolerance = LORA_TOLERANCE if args.use_lora else TOLERANCE
    if difference <= (tolerance if dtype == torch.float32 else HALF_TOLERANCE) * scale:
        logger.info("%s was read back: logits differ by at most %.2g of %.3g", folder, difference, scale)
        return None
    return f"logits differ by up to {difference:.3g} (the largest is {scale:.3g})"


def _logits(model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the last position of every row, shape = (rows, vocabulary)."""
    # Padded: the model that is loaded is not set up for packed rows.
    inputs = {key: value for key, value in batch.items() if key != "labels" and not key.endswith("_positions")}
    return model(**inputs, logits_to_keep=1).logits[:, 0].float()


@contextlib.contextmanager
def _without_traces(trainer: SpeechLLMTrainer):
    """No gradients, no compilation, and random numbers go on as if nothing had been computed."""
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _without_zero(trainer: SpeechLLMTrainer):
    """One rank loads a model whole; transformers has DeepSpeed's stage 3 spread it over all, which wait elsewhere."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.dschf)
