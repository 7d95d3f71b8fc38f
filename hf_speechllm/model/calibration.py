"""Calibration of the confidence of words; without the packages that scoring needs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass

SMALLEST = 1e-6  # probabilities are clipped before their log-odds are computed


@dataclass(frozen=True)
class Calibration:
    """Logistic regression: log-odds of a correct word = `bias` + sum of weight times log-odds of a probability.

    Args:
        bias: constant.
        ctc, llm: weights of the probabilities of CTC head and LLM.
    """

    bias: float
    ctc: float
    llm: float

    def __call__(self, ctc: float | None, llm: float | None) -> float | None:
        """Returns the probability that a word is correct; `None` if a probability with a weight is unknown."""
        score = self.bias
        for weight, value in ((self.ctc, ctc), (self.llm, llm)):
            if weight and value is None:
                return None
            score += weight * log_odds(value) if weight and value is not None else 0.0
        return 1 / (1 + math.exp(-score))

    def save(self) -> dict[str, float]:
        """Returns the JSON object that `read` reads."""
        return asdict(self)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a calibration.

        Raises:
            ValueError: if the file is not the `confidence.json` of `hf-speechllm score`.
            OSError: if the file cannot be read.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = {name: float(value) for name, value in json.load(file).items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a confidence.json of `hf-speechllm score`: {error}") from error


def log_odds(value: float) -> float:
    """Returns the log-odds of a probability."""
    value = min(max(value, SMALLEST), 1 - SMALLEST)
    return math.log(value / (1 - value))
