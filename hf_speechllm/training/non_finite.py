"""Non-finite steps (loss or gradient): skipped on all ranks, counted and described; too many end the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..audio.waveform import AudioError
from ..data.collator import ENCODED_COLUMNS, SpeechLLMCollator
from ..files import atomic_write
from .errors import FaultError

logger = logging.getLogger(__name__)

BAD_STEPS_FOLDER = "bad_steps"  # in the output folder
Rows = list[dict[str, Any]]


@dataclass
class _Step:
    """A step whose gradient norm the host has not read."""

    number: int
    norm: torch.Tensor
    losses: list[torch.Tensor]
    batches: Callable[[], Iterable[Rows]]
    copied: torch.cuda.Event | None = None


@dataclass
class NonFiniteStepGuard:
    """Skips steps with a non-finite loss or gradient on all ranks; all ranks have the same gradient norm.

    A fused optimizer skips the step according to a flag on the device. The host reads the norm after the launch of the
    next step, which avoids a host-device sync. DeepSpeed skips and counts non-finite steps without this class.

    Args:
        output_dir: folder of the run; descriptions of skipped steps are in the subfolder `bad_steps`.
        rank: of this process.
        max_in_a_row: largest number of consecutive skipped steps; one more ends the run.
        collator: computes the features of the described rows.

    Attributes:
        count: number of known skipped steps.
        losses: losses of the current step's batches.
    """

    output_dir: str | Path
    rank: int
    max_in_a_row: int
    collator: SpeechLLMCollator
    count: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    _in_a_row: int = 0
    _unread: _Step | None = None
    _optimizer: tuple[torch.optim.Optimizer, bool] | None = None  # optimizer, and whether it supports `found_inf`
    _skipped_by_deepspeed: int = 0  # before the current step

    def add_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Records the loss of a batch.

        Returns:
            The loss, or 0 for a non-finite loss: otherwise the mean in the log would be NaN.
        """
        self.losses.append(loss)
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def start_batch(self, engine: Any) -> None:
        """Records the number of steps that DeepSpeed has skipped; must be called before each batch.

        Args:
            engine: the trained model, as wrapped by the engine.
        """
        self._skipped_by_deepspeed = getattr(engine, "skipped_steps", 0)

    def check(
        self,
        step: int,
        norm: torch.Tensor | float | None,
        engine: Any,
        optimizer: Any,
        batches: Callable[[], Iterable[Rows]],
    ) -> None:
        """Makes the optimizer skip the step if the gradient norm is not finite.

        Args:
            step: number of the step.
            norm: gradient norm over all ranks; `None` if DeepSpeed has skipped the first step.
            engine: the trained model, as wrapped by the engine.
            optimizer: of the trainer, wrapped or not.
            batches: returns the rows of the step's batches, for the description.

        Raises:
            FaultError: after more than `max_in_a_row` skipped steps in a row.
        """
        self.resolve()
        norm = torch.as_tensor(0.0 if norm is None else norm).detach()
        if isinstance(norm, DTensor):  # with FSDP
            norm = norm.full_tensor()
        current = _Step(step, norm, self.losses, batches)
        self.losses = []
        if hasattr(engine, "skipped_steps"):  # DeepSpeed, which has already done the step
            self._check_deepspeed(engine, current)
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if self._can_skip(optimizer):
            optimizer.found_inf = (~torch.isfinite(norm)).float()
            if norm.is_cuda:
                current.norm = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
                current.copied = torch.cuda.Event()
                current.copied.record()
            self._unread = current
            return
        if not torch.isfinite(norm):
            engine.zero_grad(set_to_none=True)
        self._close(current)

    def resolve(self) -> None:
        """Reads the norm of the last step, and counts the step if it was skipped.

        Raises:
            FaultError: see `check`.
        """
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        if step.copied is not None:
            step.copied.synchronize()
        self._close(step)

    def _check_deepspeed(self, engine: Any, step: _Step) -> None:
        if engine.skipped_steps > self._skipped_by_deepspeed:
            step.norm = torch.tensor(torch.inf)  # some stages return the norm of the previous step
        elif not torch.isfinite(step.norm):
            raise FaultError(
                f"DeepSpeed did not skip step {step.number} with a non-finite gradient: install DeepSpeed 0.19.8 or "
                "newer and resume with --resume_from_checkpoint last"
            )
        self._close(step)

    def _can_skip(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._optimizer is None or self._optimizer[0] is not optimizer:  # cached: the check reads all parameters
            self._optimizer = optimizer, _supports_found_inf(optimizer)
        return self._optimizer[1]

    def _close(self, step: _Step) -> None:
        norm = float(step.norm)
        if torch.isfinite(step.norm):
            self._in_a_row = 0
            return
        self.count += 1
        self._in_a_row += 1
        path = self._describe_step(step, norm)
        logger.warning("step %d is skipped: non-finite gradient; %s describes the batches", step.number, path)
        if self._in_a_row > self.max_in_a_row:
            raise FaultError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient (--max_bad_steps "
                f"{self.max_in_a_row}); files in {path.parent} describe the batches. Correct the rows or lower the "
                "learning rate, and resume with --resume_from_checkpoint last"
            )

    def _describe_step(self, step: _Step, norm: float) -> Path:
        path = Path(self.output_dir) / BAD_STEPS_FOLDER / f"step-{step.number}-rank-{self.rank}.json"
        batches = [
            {"loss": repr(loss.item()), "rows": [self._describe_row(row) for row in rows]}
            for loss, rows in zip(step.losses, step.batches(), strict=False)
        ]
        with atomic_write(path) as file:
            json.dump({"step": step.number, "gradient_norm": repr(norm), "batches": batches}, file, indent=1)
        return path

    def _describe_row(self, row: dict[str, Any]) -> dict[str, Any]:
        description: dict[str, Any] = {"file": row["file"], "line": row["line"], "recordings": row["recordings"]}
        try:
            batch = self.collator([row])
        except AudioError as error:
            return {**description, "error": str(error)}
        description["supervised_tokens"] = len(batch["positions"]["labels"])
        for name in ("input_features", *ENCODED_COLUMNS):
            if name in batch:
                values = batch[name].float()
                finite = values[torch.isfinite(values)]
                description[name] = {
                    "shape": list(values.shape),
                    "not_finite": values.numel() - finite.numel(),
                    **{key: float(getattr(finite, key)()) for key in ("min", "max", "mean", "std") if len(finite)},
                }
        return description


def _supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is a fused Adam, with or without FSDP, which skips a step if `found_inf` is 1."""
    groups = optimizer.param_groups
    return (
        isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
        and all(group.get("fused") for group in groups)
        and all(type(parameter.data) in (torch.Tensor, DTensor) for group in groups for parameter in group["params"])
    )
