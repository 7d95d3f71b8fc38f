"""Atomic writing of checkpoints: into a temporary folder, with a manifest, then renamed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import apply_umask
from ...formats import partial
from ..arguments import SpeechLLMTrainingArguments
from ..freezing import part_of, trained_parts
from ..lora import uses_lora
from .lineage import finish_abandoning
from .manifest import write_manifest
from .retention import RetentionGuard
from .selection import delete_checkpoints
from .weights import frozen_tensors

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # errors of a full disk: Python, safetensors, torch.save


class SaveError(RuntimeError):
    """A checkpoint cannot be written; earlier checkpoints are unchanged."""


def remove_partial_checkpoints(output_dir: str | Path) -> None:
    """Removes incomplete checkpoints of a killed run, and completes interrupted renaming."""
    for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.old"):
        replaced = path.with_name(path.name[1:].removesuffix(".old"))
        if not replaced.exists():
            path.rename(replaced)
    finish_abandoning(output_dir)
    for kind in ("tmp", "old"):
        for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


class CheckpointedRun(Protocol):
    """Interface of the trainer for `CheckpointWriter`."""

    args: SpeechLLMTrainingArguments
    state: TrainerState
    accelerator: Accelerator
    model: Any
    optimizer: Any
    lr_scheduler: Any
    retention_guard: RetentionGuard | None

    def write_rank_state(self, folder: Path) -> None:
        """Writes the state of this rank: random state, position in a stream."""

    def write_run_state(self, folder: Path) -> None:
        """Writes the state of the run: logs, position in the rows, dependencies, lineage."""

    def write_weights(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes weights on the first rank."""

    def write_shards(self, folder: Path) -> None:
        """Writes weights and optimizer of a sharded model; called on all ranks."""

    def verify_checkpoint(self, folder: Path) -> None:
        """Raises an error on all ranks if a checkpoint differs from the model in memory."""


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        run: the trainer.
        sharded: whether DeepSpeed or FSDP shards the weights.

    Raises:
        ValueError: if an option is not supported with DeepSpeed or FSDP.
    """

    def __init__(self, run: CheckpointedRun, sharded: bool):
        self.run = run
        self.sharded = sharded
        args = run.args
        for option in ("async_save", "save_only_trained"):
            if sharded and getattr(args, option):
                raise ValueError(f"--{option} is not supported with DeepSpeed or FSDP; leave it out")
        if sharded and args.average_best:
            raise ValueError(
                "--average_best is not supported with DeepSpeed or FSDP; average the checkpoints after training with "
                "`hf-speechllm average`"
            )
        # Checkpoints of LoRA runs contain only trained parts anyway.
        self.partial = args.save_only_trained and not uses_lora(run.model)
        self._frozen_hash: str | None = None
        self._verified = not args.check_first_checkpoint
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(self) -> None:
        """Saves a checkpoint of the current step.

        Raises:
            SaveError: on all ranks, if the checkpoint cannot be written.
            VerificationError: on all ranks, if the first checkpoint of the run differs from the model in memory.
        """
        self.finish()
        run, args = self.run, self.run.args
        final = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{run.state.global_step}"
        staging = final.with_name(f".{final.name}.tmp")
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        run.accelerator.wait_for_everyone()
        self._set_best_checkpoint(final)
        if self.sharded:  # all ranks must take part, so errors of one rank cannot be handled here
            run.write_shards(staging)
            self._write_states(staging)
            problem = None
        else:
            problem = self._write(staging, final)
        self._raise_on_all_ranks(problem, final)
        if self._thread is None:
            self._publish(staging, final)

    def finish(self) -> None:
        """Waits for a checkpoint that is written in the background.

        Raises:
            SaveError: on all ranks, if the checkpoint cannot be written.
        """
        if not self.run.args.async_save:
            return
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        problem, self._problem = self._problem, None
        self._raise_on_all_ranks(problem, Path(self.run.args.output_dir))
        if thread is not None:
            self._delete_others()

    def _write(self, staging: Path, final: Path) -> str | None:
        """Writes the files of this rank; returns an error message or `None`."""
        run, args = self.run, self.run.args
        try:
            self._write_states(staging)
            if not args.should_save:
                return None
            weights, optimizer = self._weights(), None
            if not args.save_only_model:
                torch.save(run.lr_scheduler.state_dict(), staging / "scheduler.pt")
                optimizer = run.optimizer.state_dict()
            if args.async_save and self._verified:
                copies: dict[tuple, torch.Tensor] = {}
                arguments = staging, final, copy_to_cpu(weights, copies), copy_to_cpu(optimizer, copies)
                self._thread = threading.Thread(target=self._write_in_background, args=arguments)
                self._thread.start()
            else:
                self._write_weights(staging, weights, optimizer)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            return f"{type(error).__name__}: {error}"
        return None

    def _write_states(self, staging: Path) -> None:
        if not self.run.args.save_only_model:
            self.run.write_rank_state(staging)
        if self.run.args.should_save:
            self.run.write_run_state(staging)

    def _weights(self) -> dict[str, torch.Tensor]:
        model = self.run.model
        weights = model.state_dict()
        if not self.partial:
            return weights
        if self._frozen_hash is None:
            self._frozen_hash = partial.hash_tensors(frozen_tensors(model))
        parts = trained_parts(model)
        return {name: tensor for name, tensor in weights.items() if part_of(name) in parts}

    def _write_weights(self, staging: Path, weights: dict[str, torch.Tensor], optimizer: dict | None) -> None:
        self.run.write_weights(staging, weights)
        apply_umask(staging)
        if self.partial:
            partial.write_reference(staging, self.run.model.name_or_path, str(self._frozen_hash))
        if optimizer is not None:
            torch.save(optimizer, staging / "optimizer.pt")

    def _write_in_background(self, staging: Path, final: Path, weights: dict, optimizer: dict | None) -> None:
        try:
            self._write_weights(staging, weights, optimizer)
            finalize_checkpoint(staging, final)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._problem = f"{type(error).__name__}: {error}"

    def _publish(self, staging: Path, final: Path) -> None:
        problem = None
        if self.run.args.should_save:
            try:
                finalize_checkpoint(staging, final)
            except OSError as error:
                shutil.rmtree(staging, ignore_errors=True)
                problem = f"{type(error).__name__}: {error}"
        self._raise_on_all_ranks(problem, final)
        if not self._verified:
            self._verified = True
            self.run.verify_checkpoint(final)
        self._delete_others()

    def _delete_others(self) -> None:
        if self.run.args.should_save:
            delete_checkpoints(self.run.args, self.run.state, self.run.retention_guard)

    def _set_best_checkpoint(self, final: Path) -> None:
        state = self.run.state
        if state.best_global_step:
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if best == final or best.is_dir():
                state.best_model_checkpoint = str(best)

    def _raise_on_all_ranks(self, problem: str | None, path: Path) -> None:
        """Raises a `SaveError` on all ranks if one rank has a problem."""
        problems = gather_object([problem]) if self.run.args.world_size > 1 else [problem]
        for text in problems:
            if text is not None:
                raise SaveError(
                    f"{path}: a checkpoint cannot be written: {text}\nEarlier checkpoints are unchanged. Correct the "
                    "error (is the disk full?) and resume with --resume_from_checkpoint last"
                )


def save_callback_states(state: TrainerState, items: Iterable[Any]) -> None:
    """Stores the states of callbacks and control in the trainer's state, from which transformers restores them."""
    for item in items:
        if isinstance(item, ExportableState):
            name = type(item).__name__
            if isinstance(state.stateful_callbacks[name], list):
                state.stateful_callbacks[name].append(item.state())
            else:
                state.stateful_callbacks[name] = item.state()


def finalize_checkpoint(staging: Path, final: Path) -> None:
    """Writes the manifest and renames a written folder; replaces an existing folder of the same name."""
    write_manifest(staging)
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # a damaged checkpoint, or a checkpoint after the one from which the run resumed
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "nt":  # Windows cannot open folders
        return
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def copy_to_cpu(tree: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    """Copies nested dicts and lists, and the tensors inside to CPU memory; shared tensors stay shared.

    Args:
        copies: earlier copies, by a key of the original tensor.
    """
    if isinstance(tree, torch.Tensor):
        key = (tree.device, tree.data_ptr(), tree.shape, tree.stride(), tree.dtype)
        if tree.numel() == 0 or key not in copies:
            copies[key] = tree.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value, copies) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_to_cpu(value, copies) for value in tree)
    return tree
