"""Verification of a checkpoint: compares logits of the saved model and of the model in memory."""

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
from ...model.ctc import CTC_INPUTS
from ...model.modeling import SpeechLLMForConditionalGeneration
from ..arguments import SpeechLLMTrainingArguments
from ..lora import uses_lora

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative to the largest logit
LORA_TOLERANCE = 1e-3  # loading merges the adapter, which rounds
HALF_TOLERANCE = 5e-2  # for engines that compute in bfloat16 or float16


class VerificationError(RuntimeError):
    """A checkpoint differs from the model in memory."""


@dataclass
class CheckpointVerifier:
    """Loads a checkpoint and compares the logits with the logits of the model in memory.

    The first rank compares, and the others wait. With DeepSpeed or FSDP, all ranks compute the logits of the sharded
    model. Logs a warning, without comparison, if a second model does not fit into GPU memory, or if the checkpoint
    contains shards only.

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
            engine: the trained model, wrapped or not.
            batch: training batch on the device.

        Raises:
            VerificationError: on all ranks, if the logits differ.
        """
        first, problem = self.args.process_index == 0, None
        expected = self._logits_in_memory(engine, batch) if self.sharded else None
        if first and self.sharded and not any(folder.glob("*.safetensors")):
            logger.warning("%s is not verified: the checkpoint contains shards only", folder)
        elif first:
            try:
                expected = self._logits_in_memory(engine, batch) if expected is None else expected
                problem = self._compare(folder, engine, batch, expected)
            except (OSError, CheckpointError) as error:
                problem = str(error)
            except torch.OutOfMemoryError:
                logger.warning("%s is not verified: a second model does not fit into memory", folder)
        if self.args.world_size > 1:
            problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise VerificationError(
                f"{folder} is not the model in memory: {problem}. The run ends, because the checkpoints are unusable; "
                "report this error, or continue with --check_first_checkpoint false"
            )

    def _logits_in_memory(self, engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.sharded:
            model = forward = engine
        else:
            # The forward pass of the class, because Accelerate replaces the model's by a forward pass with autocast.
            model = self.accelerator.unwrap_model(engine, keep_torch_compile=False)
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
                disable_host_syncs(model)  # the fast kernels round differently
            with self.accelerator.autocast() if fsdp else contextlib.nullcontext():
                found = _logits(model.to(self.args.device).eval(), batch)
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        tolerance = (
            LORA_TOLERANCE if uses_lora(self.accelerator.unwrap_model(engine, keep_torch_compile=False)) else TOLERANCE
        )
        if difference <= (tolerance if dtype == torch.float32 else HALF_TOLERANCE) * scale:
            logger.info("%s is verified: logits differ by at most %.2g of %.3g", folder, difference, scale)
            return None
        return f"logits differ by up to {difference:.3g} (the largest is {scale:.3g})"

    @contextlib.contextmanager
    def _without_traces(self):
        """Disables gradients and compilation, and restores the random state after the block."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield

    @contextlib.contextmanager
    def _without_zero(self):
        """Disables ZeRO-3 in transformers while the block loads a whole model on one rank; other ranks wait."""
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
    """Computes logits at the last position of every row, shape = (rows, vocabulary)."""
    # Padded batches, because the loaded model does not support packed rows.
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "positions", *CTC_INPUTS)}
    return model(**inputs, logits_to_keep=1).logits[:, 0].float()
