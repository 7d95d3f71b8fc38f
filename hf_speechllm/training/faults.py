"""Faults that a run survives, or ends at with a reason: steps that are not finite, recordings that vanish, loader
processes that die or hang."""

from __future__ import annotations

import copy
import json
import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ..audio.waveform import AudioError
from ..data.bad_rows import BadDataError, BadRow
from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..files import atomic_write
from .preemption import kill_workers

if TYPE_CHECKING:
    from .trainer import SpeechLLMTrainer

logger = logging.getLogger(__name__)

LOST_ROWS = "lost_rows"  # key of a batch: rows that were left out, as pairs of place and reason
BAD_STEPS_FOLDER = "bad_steps"


class FaultError(RuntimeError):
    """A fault that ends the run; the message says what happened and how to go on."""


@dataclass
class SparingCollator:
    """A collator that leaves out rows whose recordings can't be read any more, and names them in the batch.

    If a batch has no other row, silence without labels takes its place, so that all ranks do the same steps.

    Args:
        collator: does the work.
    """

    collator: SpeechLLMCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """As the collator; with `lost_rows` if there are any."""
        try:
            return self.collator(rows)
        except AudioError:
            lost, good = [], []
        for row in rows:
            try:
                self.collator.row_inputs(row)
                good.append(row)
            except AudioError as error:
                lost.append(((row["file"], row["line"]), str(error)))
        return {**self.collator(good or [self._silence(rows[0])]), LOST_ROWS: lost}

    def _silence(self, row: dict[str, Any]) -> dict[str, Any]:
        size = self.collator.processor.feature_extractor.feature_size
        features = [np.zeros((frames, size), dtype=np.float32).tobytes() for frames in row["num_frames"]]
        return {**row, "features": features, "supervised": False}


@dataclass
class LostRows:
    """Rows that this rank could not read in the run.

    Args:
        max_bad_fraction: the share of all rows that may be lost.
        total: number of all rows.
    """

    max_bad_fraction: float
    total: int
    places: set[tuple[str, int]] = field(default_factory=set)

    def take(self, batch: dict[str, Any]) -> None:
        """Takes the lost rows out of a batch and notes them.

        Raises:
            BadDataError: if this rank alone has lost too many.
        """
        for place, reason in batch.pop(LOST_ROWS, ()):
            if place not in self.places:
                self.places.add(place)
                row = BadRow(place[0], place[1], reason)
                logger.warning("left out: %s", row)
                self.check(len(self.places), f", the last one: {row}")

    def check(self, lost: int, last: str = "") -> None:
        """Ends the run if more rows are lost than are allowed.

        Raises:
            BadDataError: then.
        """
        if lost > self.max_bad_fraction * self.total:
            raise BadDataError(
                f"{lost} of {self.total} rows were lost in training{last}\nBring the recordings back and go on with "
                f"--resume_from_checkpoint last, or raise --max_bad_fraction (now {self.max_bad_fraction:g})"
            )


@dataclass
class _Step:
    """A step whose gradient may not be finite: what is needed to tell of it later."""

    number: int
    norm: torch.Tensor
    losses: list[torch.Tensor]
    epoch: int
    dealt: int  # batches of the epoch since the run was started or resumed, with those of this step


class BadSteps:
    """Leaves out steps whose loss or gradient is not finite, on all ranks alike: they share the gradient's norm.

    A fused optimizer leaves the step out by itself, by a flag that stays on the device; the host reads the norm when
    the next step is launched, and so never waits for the GPU. DeepSpeed also does so, and counts.

    Args:
        trainer: whose steps these are.

    Attributes:
        count: steps that were left out since the start, and are known.
    """

    def __init__(self, trainer: SpeechLLMTrainer):
        self.trainer = trainer
        self.count = 0
        self.losses: list[torch.Tensor] = []  # of the batches of the step
        self._in_a_row = 0
        self._open: tuple[_Step, torch.cuda.Event | None] | None = None
        self._known: tuple[torch.optim.Optimizer, bool] | None = None  # whether it can leave a step out
        self._skipped_by_deepspeed = 0  # before the step

    def begin(self, model) -> None:
        """To be called before a batch."""
        self._skipped_by_deepspeed = getattr(model, "skipped_steps", 0)

    def check(self, model, grad_norm: torch.Tensor | float | None) -> None:
        """Sees to it that the optimizer does nothing if the norm is not finite.

        Args:
            model: as it is trained; an engine's.
            grad_norm: `None` where DeepSpeed has left out the first step.

        Raises:
            FaultError: after more than `--max_bad_steps` such steps in a row.
        """
        self.settle()
        trainer, position = self.trainer, self.trainer.position
        epoch, dealt = (position.epoch, position.dealt - position.skipped) if position is not None else (0, 0)
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm).detach()
        if isinstance(norm, DTensor):  # FSDP's
            norm = norm.full_tensor()
        step = _Step(trainer.state.global_step + 1, norm, self.losses, epoch, dealt)
        self.losses = []
        if trainer.is_deepspeed_enabled:  # whose step is over
            self._check_deepspeed(model, step)
            return
        optimizer = self._skipping_optimizer()
        if optimizer is not None:
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            event = None
            if norm.is_cuda:
                step.norm = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._open = step, event
            return
        if not torch.isfinite(norm):
            model.zero_grad(set_to_none=True)
        self._close(step)

    def _check_deepspeed(self, engine, step: _Step) -> None:
        if engine.skipped_steps > self._skipped_by_deepspeed:
            step.norm = torch.tensor(torch.inf)  # that of some stages is of the step before
        elif not torch.isfinite(step.norm):
            raise FaultError(
                f"DeepSpeed has taken step {step.number} although its gradient is not finite: go on from the last "
                "checkpoint with --resume_from_checkpoint last and a newer DeepSpeed (0.19.8 leaves such steps out)"
            )
        self._close(step)

    def settle(self) -> None:
        """Counts the last step if it was left out.

        Raises:
            FaultError: as `check`.
        """
        if self._open is None:
            return
        (step, event), self._open = self._open, None
        if event is not None:
            event.synchronize()
        self._close(step)

    def _skipping_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, if it can leave a step out by itself."""
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if self._known is None or self._known[0] is not optimizer:  # not in each step: it looks at every parameter
            self._known = optimizer, _is_fused(optimizer)
        return optimizer if self._known[1] else None

    def _close(self, step: _Step) -> None:
        norm = float(step.norm)
        if np.isfinite(norm):
            self._in_a_row = 0
            return
        self.count += 1
        self._in_a_row += 1
        limit = self.trainer.args.max_bad_steps
        path = self._dump(step, [loss.item() for loss in step.losses], norm)
        logger.warning(
            "step %d is left out: its gradient is not finite; the batch is described in %s", step.number, path
        )
        if self._in_a_row > limit:
            raise FaultError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite (--max_bad_steps "
                f"{limit}); their batches are described in {path.parent}. Go on from the last checkpoint with "
                "--resume_from_checkpoint last and a lower learning rate, or mend the rows"
            )

    def _dump(self, step: _Step, losses: Sequence[float], norm: float) -> Path:
        trainer = self.trainer
        folder = Path(trainer.args.output_dir) / BAD_STEPS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step.number}-rank-{trainer.args.process_index}.json"
        batches = [
            {"loss": repr(loss), "rows": [self._describe(row) for row in rows]}
            for loss, rows in zip(losses, self._batches(step), strict=False)
        ]
        with atomic_write(path) as file:
            json.dump({"step": step.number, "gradient_norm": repr(norm), "batches": batches}, file, indent=1)
        return path

    def _batches(self, step: _Step) -> Iterator[list[dict[str, Any]]]:
        """The rows of a step's batches; unknown, and so empty, of a stream."""
        position, number = self.trainer.position, len(step.losses)
        if position is None:
            yield from [[]] * number
            return
        sampler = copy.copy(position.sampler)
        sampler.set_epoch(step.epoch)  # the run may be in the next one already
        first = step.dealt - number
        for keys in islice(iter(sampler), first, first + number):
            yield self.trainer.train_loader.dataset.__getitems__(keys)

    def _describe(self, row: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"file": row["file"], "line": row["line"], "recordings": row["recordings"]}
        try:
            batch = self.trainer.data_collator([row])
        except AudioError as error:
            return {**told, "error": str(error)}
        told["supervised_tokens"] = len(batch["label_positions"])
        for name in ("input_features", *ENCODED_COLUMNS):
            if name in batch:
                values = batch[name].float()
                finite = values[torch.isfinite(values)]
                told[name] = {
                    "shape": list(values.shape),
                    "not_finite": values.numel() - finite.numel(),
                    **{key: float(getattr(finite, key)()) for key in ("min", "max", "mean", "std") if len(finite)},
                }
        return told


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is a fused Adam of plain tensors or FSDP's, which heeds `found_inf`."""
    groups = optimizer.param_groups
    return (
        isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
        and all(group.get("fused") for group in groups)
        and all(type(parameter.data) in (torch.Tensor, DTensor) for group in groups for parameter in group["params"])
    )


def fault_counts(trainer: SpeechLLMTrainer) -> dict[str, int]:
    """What was left out so far, for the log; called by all ranks.

    Raises:
        BadDataError: if all ranks together have lost too many rows.
    """
    counts = {}
    trainer.bad_steps.settle()
    if trainer.reads_recordings:
        lost = torch.tensor(len(trainer.lost_rows.places), device=trainer.args.device)
        counts["bad_rows"] = int(trainer.accelerator.reduce(lost, "sum"))
        trainer.lost_rows.check(counts["bad_rows"])
    elif trainer.stream_loader is not None:
        counts["bad_rows"] = trainer.stream_loader.bad_rows
    counts["bad_steps"] = trainer.bad_steps.count
    return {name: count for name, count in counts.items() if count}


def loader_fault(error: Exception, timeout_seconds: float) -> FaultError | None:
    """What to tell of an error of a loader: `None` if none of its processes died or hung.

    Those that are left are killed: one that hangs would keep this process from ending.
    """
    text = f"{type(error).__name__}: {error}"
    # The second: a batch was on its way whose memory the dead process would have handed over.
    frames = traceback.extract_tb(error.__traceback__)
    handing_over = any(Path(frame.filename).parts[-2:] == ("multiprocessing", "reductions.py") for frame in frames)
    if "DataLoader worker" not in text and "DataLoader timed out" not in text and not handing_over:
        return None
    kill_workers()
    if "timed out" in text:
        return FaultError(
            f"no batch came from the loader's processes for {timeout_seconds:g} s: a file system or server may hang. "
            "Go on with --resume_from_checkpoint last; --dataloader_timeout_seconds sets how long to wait"
        )
    return FaultError(
        f"a process of the loader died: {text}. If the machine ran out of memory, lower --dataloader_num_workers or "
        "--dataloader_prefetch_factor. Go on with --resume_from_checkpoint last"
    )
