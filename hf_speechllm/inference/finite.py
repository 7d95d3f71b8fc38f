"""Logits that are not finite: found while a batch is decoded, since search makes texts of them all the same."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class LogitsWatch:
    """Watches the logits of every step of `generate`, for greedy and beam search, with or without CUDA graphs.

    ```python
    with LogitsWatch(model) as watch:
        output = model.generate(**inputs)
    watch.finite(rows)
    ```

    Nothing is copied to the host before `finite` is called: a step costs one kernel.

    Args:
        model: whose forward pass returns `logits`, shape = (rows times beams, tokens, vocabulary).
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._sums: list[torch.Tensor] = []

    def __enter__(self) -> LogitsWatch:
        self._handle = self.model.register_forward_hook(self._look)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    def _look(self, module, arguments, output) -> None:
        # A sum is finite only if all of its terms are; float32 holds that of any logits of sound weights.
        self._sums.append(output.logits[:, -1].sum(-1, dtype=torch.float32))

    def finite(self, rows: int, tokens: torch.Tensor | None = None) -> list[bool]:
        """Whether the logits of each row were finite, those of all its beams.

        Args:
            rows: of the batch.
            tokens: what greedy search has generated, shape = (rows, steps): steps behind the end of a row, in which it
                is only padded, then do not count.
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
