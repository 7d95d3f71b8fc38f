"""Verification of a checkpoint: read back, it gives the same logits as the model in memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from ...fast.attention import disable_host_syncs
from ...fast.fsmn import FSMN
from ...formats.checkpoint import CheckpointError
from ...model.modeling import SpeechLLMForConditionalGeneration
from ..arguments import SpeechLLMTrainingArguments
from ..lora import uses_lora

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest logit
LORA_TOLERANCE = 1e-3  # an adapter is merged when it is loaded, which rounds
HALF_TOLERANCE = 5e-2  # where an engine computes in bfloat16 or float16


class VerificationError(RuntimeError):
    """A checkpoint does not hold the model that was to be saved."""


@dataclass
class CheckpointVerifier:
    """Loads a checkpoint and compares its logits with those of the model in memory.

    The first rank does it, the others wait; where DeepSpeed or FSDP shard weights, all ranks compute the model's
    logits. If a GPU has no room for a second model, or such an engine has written shards only, a warning says so.

    Args:
        accelerator: of the run.
        args: of the run.
        sharded: whether DeepSpeed or FSDP shards the weights.
    """

    accelerator: Accelerator
    args: SpeechLLMTrainingArguments
    sharded: bool

    def verify(self, folder: Path, engine: Any, batch: dict[str, torch.Tensor]) -> None:
        """Verifies a checkpoint.

        Args:
            folder: of the checkpoint.
            engine: the model as it is trained, wrapped or not.
            batch: of training, on the device.

        Raises:
            VerificationError: if the logits differ, on all ranks alike.
        """
        first, problem = self.args.process_index == 0, None
        expected = self._logits_in_memory(engine, batch) if self.sharded else None
        if first and self.sharded and not any(folder.glob("*.safetensors")):
            logger.warning("%s is not verified: it has shards only", folder)
        elif first:
            try:
                expected = self._logits_in_memory(engine, batch) if expected is None else expected
                problem = self._compare(folder, engine, batch, expected)
            except (OSError, CheckpointError) as error:
                problem = str(error)
            except torch.OutOfMemoryError:
                logger.warning("%s is not verified: there is no memory for a second model", folder)
        if self.args.world_size > 1:
            problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise VerificationError(
                f"{folder}, read back, is not the model in memory: {problem}. The run ends, since what it saves can't "
                "be used (--check_first_checkpoint false continues all the same)"
            )

    def _logits_in_memory(self, engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.sharded:
            model = forward = engine
        else:
            # The forward pass of the class: Accelerate has replaced the model's by one with autocast.
            model = self.accelerator.unwrap_model(engine)
            forward = partial(type(model).forward, model)
        was_training = model.training
        model.eval()
        try:
            with self._without_traces():
                return _logits(forward, batch)
        finally:
            model.train(was_training)

    def _compare(
        self, folder: Path, engine: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor
    ) -> str | None:
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = halves.get(self.accelerator.mixed_precision, torch.float32) if self.sharded else torch.float32
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        with self._without_traces():
            with self._without_zero():
                model = SpeechLLMForConditionalGeneration.from_pretrained(
                    folder, dtype=dtype, attn_implementation=self.args.run_options.get("attn_implementation")
                )
            if any(isinstance(module, FSMN) for module in engine.modules()):
                disable_host_syncs(model)  # its kernels round otherwise than torch's
            with self.accelerator.autocast() if fsdp else contextlib.nullcontext():
                found = _logits(model.to(self.args.device).eval(), batch)
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        tolerance = LORA_TOLERANCE if uses_lora(self.accelerator.unwrap_model(engine)) else TOLERANCE
        if difference <= (tolerance if dtype == torch.float32 else HALF_TOLERANCE) * scale:
            logger.info("%s is verified: logits differ by at most %.2g of %.3g", folder, difference, scale)
            return None
        return f"logits differ by up to {difference:.3g} (the largest is {scale:.3g})"

    @contextlib.contextmanager
    def _without_traces(self):
        """No gradients, no compilation, and random numbers continue as if nothing had been computed."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield

    @contextlib.contextmanager
    def _without_zero(self):
        """One rank loads a whole model; with DeepSpeed's stage 3 transformers would shard it over all, which wait."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None:
            yield
            return
        from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(plugin.dschf)


def _logits(model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the last position of every row, shape = (rows, vocabulary)."""
    # Padded: the model that is loaded is not set up for packed rows.
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "positions")}
    return model(**inputs, logits_to_keep=1).logits[:, 0].float()
