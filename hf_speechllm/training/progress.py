"""How fast and how well training goes, between two lines of the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator

from .flops import FlopCounter, peak_flops


class Progress:
    """Counts audio, padding, waiting and right tokens: on the device, so that no step waits for it.

    Args:
        accelerator: gives the device and sums over ranks.
        frame_seconds: between two frames of the model's input.
        flops: counts operations.
    """

    def __init__(self, accelerator: Accelerator, frame_seconds: float, flops: FlopCounter):
        self.accelerator = accelerator
        self.frame_seconds = frame_seconds
        self.flops = flops
        self.peak_flops = peak_flops(accelerator.device)
        self.rows = 0  # since the run was started
        self.reset()

    def reset(self) -> None:
        """Begins a new line."""
        self._correct = torch.zeros((), device=self.accelerator.device)
        self._tokens = torch.zeros((), device=self.accelerator.device)
        self._audio_seconds = 0.0
        self._padded_seconds = 0.0
        self._waited_seconds = 0.0
        self._read_tokens = 0
        self._operations = 0.0
        self._started = time.perf_counter()

    def add_batches(self, batches: Iterable[dict], waited_seconds: float) -> float:
        """Counts what one step reads, and how long it waited for it; gives the floating-point operations it needs."""
        self._waited_seconds += waited_seconds
        operations = 0.0
        for batch in batches:
            mask = batch["input_features_mask"]
            self._audio_seconds += int(mask.sum()) * self.frame_seconds
            frames = mask.sum() if "tokens" in batch["positions"] else mask.numel()
            self._padded_seconds += int(frames) * self.frame_seconds
            tokens = batch["attention_mask"].sum(-1)
            self._read_tokens += int(tokens.sum())
            self.rows += len(tokens)
            operations += self.flops.step(mask.sum(-1), tokens, len(batch["positions"]["labels"]))
        self._operations += operations
        return operations

    def add_tokens(self, outputs) -> None:
        """Counts what a `SpeechLLMOutput` with a loss predicts right."""
        self._tokens += outputs.num_label_tokens
        self._correct += outputs.token_accuracy * outputs.num_label_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time of what is not training, such as validation and saving, out of the speed."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # steps that are still being computed count
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def summary(self) -> dict[str, float]:
        """Token accuracy, audio seconds and tokens per second (all ranks), shares of padding and of waiting for data,
        and, where the device's speed is known, the share of it that is used; begins a new line."""
        elapsed = time.perf_counter() - self._started
        host = [
            self._audio_seconds, self._padded_seconds, self._waited_seconds, self._read_tokens, self._operations,
        ]  # fmt: skip
        counts = torch.stack(
            [
                self._correct.double(),
                self._tokens.double(),
                *torch.tensor(host, dtype=torch.float64, device=self.accelerator.device),
            ]
        )
        correct, tokens, audio, padded, waited, read, operations = self.accelerator.reduce(counts, "sum").tolist()
        self.reset()
        ranks = self.accelerator.num_processes
        summary = {
            "token_accuracy": round(correct / max(tokens, 1), 4),
            "audio_seconds_per_second": round(audio / elapsed, 1),
            "tokens_per_second": round(read / elapsed, 1),
            "padding_share": round(1 - audio / max(padded, 1e-9), 4),
            "data_wait_share": round(waited / elapsed / ranks, 4),
        }
        if self.peak_flops is not None:
            summary["model_flop_utilization"] = round(operations / elapsed / ranks / self.peak_flops, 4)
        return summary
