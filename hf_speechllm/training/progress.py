"""Throughput, MFU and token accuracy between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from ..model.ctc import is_trained_alone
from ..model.modeling import PARTS
from ..model.native_families import is_native
from ..model.processing import SpeechLLMProcessor
from .flops import FlopCounter, peak_flops


class Progress:
    """Counts audio, padding, waiting time and correct tokens; counts tokens on the device, without host-device syncs.

    Args:
        accelerator: of the trainer.
        model: to be trained, with frozen parts and adapters.
        processor: of the model.
        columns: columns of the training rows, which show what is cached.
    """

    def __init__(self, accelerator: Accelerator, model: Any, processor: SpeechLLMProcessor, columns: Collection[str]):
        self.accelerator = accelerator
        # Between two frames of the model's input.
        encoded = "encoder_states" in columns
        self.frame_seconds = processor.encoder_frame_seconds if encoded else processor.frame_seconds
        cached = PARTS[:2] if "audio_tokens" in columns else PARTS[:1] if "encoder_states" in columns else ()
        self.flops = None if is_native(model) else FlopCounter(model, cached)
        self.peak_flops = None if is_native(model) else peak_flops(accelerator.device)
        self.reports_accuracy = not is_trained_alone(model)
        self.rows = 0  # since the start of this process
        self.reset()

    def reset(self) -> None:
        """Resets the counts of a log line."""
        self._correct = torch.zeros((), device=self.accelerator.device)
        self._tokens = torch.zeros((), device=self.accelerator.device)
        self._ctc_loss = torch.zeros((), device=self.accelerator.device)
        self._steps = 0
        self._audio_seconds = 0.0
        self._padded_seconds = 0.0
        self._waited_seconds = 0.0
        self._read_tokens = 0
        self._operations = 0.0
        self._started = time.perf_counter()

    def add_batches(self, batches: Iterable[dict], waited_seconds: float) -> float:
        """Counts the batches of one step and the time of waiting for these; returns the floating-point operations."""
        if not self.rows:  # what precedes the first step is no training: preparation, validation before training
            self._started = time.perf_counter() - waited_seconds
        self._waited_seconds += waited_seconds
        self._steps += 1
        operations = 0.0
        for batch in batches:
            tokens = batch["attention_mask"].sum(-1)
            self._read_tokens += int(tokens.sum())
            self.rows += len(tokens)
            if self.flops is None:
                seconds = batch["positions"]["audio_seconds"]
                self._audio_seconds += float(seconds.sum())
                self._padded_seconds += float(seconds.max()) * len(seconds)
                continue
            mask = batch["input_features_mask"]
            self._audio_seconds += int(mask.sum()) * self.frame_seconds
            frames = mask.sum() if "tokens" in batch["positions"] else mask.numel()
            self._padded_seconds += int(frames) * self.frame_seconds
            operations += self.flops.count(mask.sum(-1), tokens, len(batch["positions"]["labels"]))
        self._operations += operations
        return operations

    def add_tokens(self, outputs) -> None:
        """Counts the correct tokens of a `SpeechLLMOutput` with a loss, and adds the loss of the CTC head, if any."""
        if (ctc_loss := getattr(outputs, "ctc_loss", None)) is not None:
            self._ctc_loss += ctc_loss.detach()
        if outputs.token_accuracy is None:
            return
        self._tokens += outputs.num_label_tokens
        self._correct += outputs.token_accuracy * outputs.num_label_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block, such as validation or saving, from the throughput."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # queued training steps count
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def summary(self) -> dict[str, float]:
        """Returns the values of a log line and resets the counts: token accuracy, audio seconds and tokens per second
        (all ranks), the loss of a CTC head beside the LLM's, shares of padding and of waiting for data, and MFU if the
        peak speed of the device is known."""
        elapsed = time.perf_counter() - self._started
        host = [
            self._audio_seconds, self._padded_seconds, self._waited_seconds, self._read_tokens, self._operations,
        ]  # fmt: skip
        counts = torch.stack(
            [
                self._correct.double(),
                self._tokens.double(),
                self._ctc_loss.double(),
                *torch.tensor(host, dtype=torch.float64, device=self.accelerator.device),
            ]
        )
        correct, tokens, ctc, audio, padded, waited, read, operations = self.accelerator.reduce(counts, "sum").tolist()
        steps = max(1, self._steps)
        self.reset()
        ranks = self.accelerator.num_processes
        summary = {
            **({"token_accuracy": round(correct / max(tokens, 1), 4)} if self.reports_accuracy else {}),
            **({"ctc_loss": round(ctc / steps, 4)} if ctc else {}),
            "audio_seconds_per_second": round(audio / elapsed, 1),
            "tokens_per_second": round(read / elapsed, 1),
            "padding_share": round(1 - audio / max(padded, 1e-9), 4),
            "data_wait_share": round(waited / elapsed / ranks, 4),
        }
        if self.peak_flops is not None:
            summary["model_flop_utilization"] = round(operations / elapsed / ranks / self.peak_flops, 4)
        return summary
