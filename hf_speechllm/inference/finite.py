"""Detection of non-finite logits, from which search would otherwise decode texts without an error."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class LogitsCheck:
    """Checks the logits of every step of `generate`, for greedy and beam search.

    ```python
    with LogitsCheck(model) as check:
        output = model.generate(**inputs)
    check.finite(rows)
    ```

    A step costs one kernel. Nothing is copied to the host before `finite` is called.

    Args:
        model: the forward pass must return `logits`, shape = (rows times beams, tokens, vocabulary).
        keep_scores: whether to keep the log-probability of the best token of each step, for greedy search.
    """

    def __init__(self, model: PreTrainedModel, keep_scores: bool = False):
        self.model = model
        self.keep_scores = keep_scores
        self._scores: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    def __enter__(self) -> LogitsCheck:
        self._handle = self.model.register_forward_hook(self._add_sums)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    def _add_sums(self, module, arguments, output) -> None:
        # A sum is finite only if all terms are finite; the sum of normal logits fits into float32.
        self._sums.append(output.logits[:, -1].sum(-1, dtype=torch.float32))
        if self.keep_scores:
            logits = output.logits[:, -1].float()
            self._scores.append(logits.amax(-1) - logits.logsumexp(-1))

    def scores(self, steps: int) -> list[list[float]]:
        """Returns the log-probabilities of the best tokens in the last steps, for each row."""
        return torch.stack(self._scores[-steps:], dim=1).tolist() if steps else []

    def finite(self, rows: int, tokens: torch.Tensor | None = None) -> list[bool]:
        """Returns for each row whether the logits of all beams were finite.

        Args:
            rows: number of rows of the batch.
            tokens: tokens that greedy search has generated, shape = (rows, steps); with tokens, steps after the end of
                a row do not count.
        """
        finite = torch.stack(self._sums).isfinite().view(len(self._sums), rows, -1).all(2).T
        if tokens is not None:
            ends = torch.isin(tokens, torch.tensor(self._ends(), device=tokens.device)).long()
            finite[:, -tokens.shape[1] :] |= ends.cumsum(1) - ends > 0
        return finite.all(1).tolist()

    def _ends(self) -> list[int]:
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        return [token for token in (config.pad_token_id, *ends) if token is not None]
