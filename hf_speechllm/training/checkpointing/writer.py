"""Checkpoints that appear whole or not at all: written aside, listed in a manifest, renamed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...formats import partial
from ..freezing import part_of, trained_parts
from .manifest import write_manifest
from .selection import delete_checkpoints
from .verification import check_readback

if TYPE_CHECKING:
    from ..trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # a full disk: of Python, safetensors, torch.save


class SaveError(RuntimeError):
    """A checkpoint can't be written; earlier ones are as they were."""


def clean_up(output_dir: str | Path) -> None:
    """Removes what a run that was killed has left half-written, and finishes what it was about to rename."""
    for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.old"):
        replaced = path.with_name(path.name[1:].removesuffix(".old"))
        if not replaced.exists():
            path.rename(replaced)
    for kind in ("tmp", "old"):
        for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """Writes the checkpoints of a trainer.

    Raises:
        ValueError: if `--async_save` or `--save_only_trained` are asked for with DeepSpeed or FSDP, whose processes
            write their shards together.
    """

    def __init__(self, trainer: SpeechLLMTrainer):
        self.trainer = trainer
        args = trainer.args
        self.sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        for option in ("async_save", "save_only_trained"):
            if self.sharded and getattr(args, option):
                raise ValueError(f"--{option} can't be had with DeepSpeed or FSDP")
        self.partial = args.save_only_trained and not args.use_lora  # LoRA runs save what is trained anyway
        self._frozen_hash: str | None = None
        self._checked = not args.check_first_checkpoint
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(self) -> None:
        """Saves a checkpoint of the step that was just done.

        Raises:
            SaveError: if it can't be written, on all ranks alike.
            ReadbackError: if the run's first checkpoint does not give the logits of the model in memory.
        """
        self.finish()
        trainer, args = self.trainer, self.trainer.args
        final = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        staging = final.with_name(f".{final.name}.tmp")
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        self._note_best(final)
        if self.sharded:  # the ranks wait for each other in there, so one can't go on without the others
            self._write_together(staging)
            problem = None
        else:
            problem = self._attempt(staging, final)
        self._agree(problem, final)
        if self._thread is None:
            self._publish(staging, final)

    def finish(self) -> None:
        """Waits for a checkpoint that is being written in the background.

        Raises:
            SaveError: if it could not be written, on all ranks alike.
        """
        if not self.trainer.args.async_save:
            return
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        problem, self._problem = self._problem, None
        self._agree(problem, Path(self.trainer.args.output_dir))
        if thread is not None:
            delete_checkpoints(self.trainer)

    def _attempt(self, staging: Path, final: Path) -> str | None:
        """Writes what this rank has to write; gives what went wrong."""
        trainer, args = self.trainer, self.trainer.args
        try:
            self._write_small(staging)
            if not args.should_save:
                return None
            weights, optimizer = self._weights(), None
            if not args.save_only_model:
                torch.save(trainer.lr_scheduler.state_dict(), staging / "scheduler.pt")
                optimizer = trainer.optimizer.state_dict()
            if args.async_save and self._checked:
                copies: dict[tuple, torch.Tensor] = {}
                arguments = staging, final, copy_to_cpu(weights, copies), copy_to_cpu(optimizer, copies)
                self._thread = threading.Thread(target=self._write_in_background, args=arguments)
                self._thread.start()
            else:
                self._write_large(staging, weights, optimizer)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            return f"{type(error).__name__}: {error}"
        return None

    def _write_small(self, staging: Path) -> None:
        trainer = self.trainer
        if not trainer.args.save_only_model:
            trainer._save_scaler(str(staging))
            trainer._save_rng_state(str(staging))
        if not trainer.args.should_save:
            return
        state = trainer.state
        for item in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(item, ExportableState):
                name = type(item).__name__
                if isinstance(state.stateful_callbacks[name], list):
                    state.stateful_callbacks[name].append(item.state())
                else:
                    state.stateful_callbacks[name] = item.state()
        state.save_to_json(str(staging / "trainer_state.json"))
        if trainer.position is not None:
            trainer.position.save(staging)

    def _write_together(self, staging: Path) -> None:
        trainer = self.trainer
        trainer.save_model(str(staging), _internal_call=True)
        if not trainer.args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(staging))
        self._write_small(staging)

    def _weights(self) -> dict[str, torch.Tensor]:
        model = self.trainer.model
        weights = model.state_dict()
        if not self.partial:
            return weights
        if self._frozen_hash is None:
            self._frozen_hash = partial.hash_tensors(frozen_tensors(model))
        parts = trained_parts(model)
        return {name: tensor for name, tensor in weights.items() if part_of(name) in parts}

    def _write_large(self, staging: Path, weights: dict[str, torch.Tensor], optimizer: dict | None) -> None:
        self.trainer._save(str(staging), state_dict=weights)
        if self.partial:
            partial.write_reference(staging, str(self.trainer.args.model_name_or_path), str(self._frozen_hash))
        if optimizer is not None:
            torch.save(optimizer, staging / "optimizer.pt")

    def _write_in_background(self, staging: Path, final: Path, weights: dict, optimizer: dict | None) -> None:
        try:
            self._write_large(staging, weights, optimizer)
            complete(staging, final)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._problem = f"{type(error).__name__}: {error}"

    def _publish(self, staging: Path, final: Path) -> None:
        problem = None
        if self.trainer.args.should_save:
            try:
                complete(staging, final)
            except OSError as error:
                shutil.rmtree(staging, ignore_errors=True)
                problem = f"{type(error).__name__}: {error}"
        self._agree(problem, final)
        if not self._checked:
            self._checked = True
            check_readback(self.trainer, final)
        if self.trainer.args.should_save:
            delete_checkpoints(self.trainer)

    def _note_best(self, final: Path) -> None:
        state = self.trainer.state
        if state.best_global_step:
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if best == final or best.is_dir():
                state.best_model_checkpoint = str(best)

    def _agree(self, problem: str | None, place: Path) -> None:
        """Ends all ranks if one has a problem."""
        problems = gather_object([problem]) if self.trainer.args.world_size > 1 else [problem]
        for text in problems:
            if text is not None:
                raise SaveError(
                    f"a checkpoint can't be written ({place}): {text}\nEarlier checkpoints are as they were. Mend "
                    "this (is the disk full?) and go on with --resume_from_checkpoint last"
                )


def frozen_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of the parts that are not trained, under the names that a base model has for them."""
    parts, tied = trained_parts(model), model.all_tied_weights_keys
    return {
        name: tensor for name, tensor in model.state_dict().items() if part_of(name) not in parts and name not in tied
    }


def complete(staging: Path, final: Path) -> None:
    """Gives a folder that is written its manifest and its name; a folder of that name is replaced."""
    write_manifest(staging)
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # a damaged one, or one that the run went back behind
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def copy_to_cpu(tree: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    """A copy of nested dicts and lists whose tensors are copies in the CPU's memory; shared ones stay shared.

    Args:
        copies: those made so far, by what they are copies of.
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
