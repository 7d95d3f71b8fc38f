"""Rescoring of the hypotheses of beam search by the CTC head, as in hybrid CTC/attention models."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor

from ..model.ctc import text_log_probabilities
from ..model.processing import SpeechLLMProcessor
from .ctc_reader import CTCReader


class BeamScores(LogitsProcessor):
    """Keeps the log-probabilities of the tokens that beam search may choose, in each step.

    `generate(output_scores=True)` would keep the whole vocabulary: 0.6 MB per step and beam for 152,000 tokens.

    Args:
        config: of the search.
    """

    def __init__(self, config: GenerationConfig):
        ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        self.kept = max(2, 1 + len(ends)) * config.num_beams  # candidates of a step of beam search in transformers
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keeps the best of the scores, shape = (rows times beams, vocabulary), and returns all unchanged."""
        values, ids = scores.topk(min(self.kept, scores.shape[-1]))
        self.steps.append((values, ids))
        return scores

    def sums(self, tokens: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of each text with its end token, shape = (texts,).

        Args:
            tokens: generated tokens, shape = (texts, steps).
            beams: `beam_indices` of `generate`, shape = (texts, steps); -1 after the end of a text.
        """
        total = torch.zeros(len(tokens), device=tokens.device)
        for (values, ids), chosen, rows in zip(self.steps, tokens.T, beams.T, strict=False):
            # A candidate that is not kept has the score of the last kept one: they are tied.
            score = values[rows].where(ids[rows] == chosen[:, None], values[rows, -1:]).amax(-1)
            total += score.where(rows >= 0, 0.0)
        return total.masked_fill(beams[:, 0] < 0, -torch.inf)  # places that beam search has not filled


class Rescorer:
    """Chooses among the hypotheses of beam search.

    The best hypothesis has the largest (1 - weight) log P_LLM(text, end) + weight log P_CTC(text | audio). Both
    are sums over the text, in the search too, without length normalisation, as in ESPnet by default (Watanabe et al.,
    2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition"). The text is tokenized as in training.
    A text with more tokens than the head can align has the CTC probability 0; if all texts have, the best one of the
    LLM stays.

    Args:
        reader: of the CTC head.
        processor: of the model.
        weight: of the CTC head, above 0 and below 1.
        num_beams: number of beams.

    Raises:
        ValueError: if the weight is out of range, or there is only one beam.
    """

    def __init__(self, reader: CTCReader, processor: SpeechLLMProcessor, weight: float, num_beams: int):
        if num_beams < 2:
            raise ValueError("ctc_weight requires num_beams above 1: it chooses among the hypotheses of beam search")
        if not 0 < weight < 1:
            raise ValueError(f"ctc_weight is {weight}; it must be at least 0 and below 1")
        self.reader = reader
        self.model = reader.model
        self.processor = processor
        self.weight = weight

    def best(
        self,
        input_ids: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor,
        tokens: torch.Tensor,
        scores: torch.Tensor,
    ) -> list[int]:
        """Returns the index of the best hypothesis of each row; for a row with several recordings, that of the LLM.

        Args:
            input_ids: prompts, shape = (rows, prompt tokens).
            states, mask: of all recordings, from `encode_audio`.
            tokens: generated tokens, shape = (rows times beams, steps); of each row, the first hypothesis is the best
                one of the LLM.
            scores: log-probabilities of the LLM, shape = (rows times beams,).
        """
        is_audio = input_ids == self.model.config.audio_token_id
        counts = (is_audio & ~functional.pad(is_audio[:, :-1], (1, 0))).sum(1).tolist()
        vocabulary = self.reader.vocabulary
        targets = [vocabulary.encode(text) for text in self.processor.transcripts(tokens)]
        beams, place, best = len(tokens) // len(counts), 0, []
        for row, count in enumerate(counts):
            first = row * beams
            if count == 1:  # one recording at a time: log-probabilities over the LLM's tokens are large
                heard, length = self.model.ctc_head(states[place : place + 1], mask[place : place + 1])
                texts = targets[first : first + beams]
                ctc = text_log_probabilities(
                    heard.expand(beams, -1, -1), length.expand(beams), texts, vocabulary.blank
                )
                total = (1 - self.weight) * scores[first : first + beams] + self.weight * ctc
                first += int(total.argmax())  # the first one, if all are -inf
            best.append(first)
            place += count
        return best
