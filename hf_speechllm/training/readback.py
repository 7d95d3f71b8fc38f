"""The proof that a checkpoint can be used: what is read back gives the same logits as the model in memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from ..attention import spare_the_host
from ..checkpoints.checkpoint import CheckpointError
from ..memory_block import MemoryBlock
from ..modeling import SpeechLLMForConditionalGeneration

if TYPE_CHECKING:
    from .trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest logit
LORA_TOLERANCE = 1e-3  # an adapter is merged when it is loaded, which rounds


class ReadbackError(RuntimeError):
    """A checkpoint does not hold the model that was to be saved."""


def check_readback(trainer: SpeechLLMTrainer, folder: Path) -> None:
    """Loads a checkpoint and compares its logits with those of the trainer's model, on the last training batch.

    The first rank does it, the others wait. Where a GPU has no room for a second model, a warning says so.

    Raises:
        ReadbackError: if they differ, on all ranks alike.
    """
    problem = None
    if trainer.args.process_index == 0 and trainer.last_inputs is not None:
        try:
            problem = _compare(trainer, folder)
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


def _compare(trainer: SpeechLLMTrainer, folder: Path) -> str | None:
    args = trainer.args
    # Padded: the model that is loaded is not set up for packed rows.
    inputs = {
        key: value for key, value in trainer.last_inputs.items() if key != "labels" and not key.endswith("_positions")
    }
    model = trainer.accelerator.unwrap_model(trainer.model)
    devices = [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _without_dropout(model):
        expected = _logits(model, inputs)
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=args.attn_implementation
        )
        if any(isinstance(module, MemoryBlock) for module in model.modules()):
            spare_the_host(loaded)  # whose kernels round otherwise than torch's
        found = _logits(loaded.to(args.device).eval(), inputs)
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if difference <= (LORA_TOLERANCE if args.use_lora else TOLERANCE) * scale:
        logger.info("%s was read back: logits differ by at most %.2g of %.3g", folder, difference, scale)
        return None
    return f"logits differ by up to {difference:.3g} (the largest is {scale:.3g})"


def _logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the last position of every row, in float32, shape = (rows, vocabulary)."""
    # The class's forward pass, since Accelerate has put one with autocast in its place; it compiles no layers.
    with torch.compiler.set_stance("force_eager"):
        return type(model).forward(model, **inputs, logits_to_keep=1).logits[:, 0]


@contextlib.contextmanager
def _without_dropout(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
