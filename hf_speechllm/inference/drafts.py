"""Drafts of the CTC head, which the LLM verifies in one forward pass instead of one pass per token.

With a threshold, texts that are probable enough according to the head are taken without the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import BatchFeature

from ..model.ctc import text_log_probabilities
from ..model.processing import SpeechLLMProcessor
from .ctc_reader import CTCReader
from .search import Generated

# After an error, the rest of a draft is verified again, if all rounds but one gave this many tokens on average.
MIN_GAIN = 3


@dataclass
class Verified(Generated):
    """Verified beginnings of texts; `finished`: whether a text is complete, or has the maximum length."""

    finished: list[bool]


class Drafter:
    """Computes drafts and verifies them. Verified tokens are those of greedy search, apart from rounding.

    Args:
        reader: of a CTC head over the LLM's tokens.
        processor: of the model.
        threshold: probability of a draft, from 0 to 1, from which it is the text, without scores and without the LLM;
            `None`: the LLM verifies all drafts.

    Raises:
        ValueError: if the head has another vocabulary.
    """

    def __init__(self, reader: CTCReader, processor: SpeechLLMProcessor, threshold: float | None = None):
        if reader.model.config.ctc_head_config.vocabulary != "llm":
            raise ValueError(
                "--ctc_draft requires a CTC head over the LLM's tokens; train one with --ctc_vocabulary llm"
            )
        self.reader = reader
        self.model = reader.model
        self.processor = processor
        self.threshold = threshold

    @torch.inference_mode()
    def search(
        self, inputs: BatchFeature, max_new_tokens: int, find: Callable[[BatchFeature, int], Generated]
    ) -> Generated:
        """Decodes a batch: verifies drafts, and lets greedy search complete the texts.

        Args:
            inputs: of the processor, on the device, padded on the left.
            max_new_tokens: maximum number of tokens of a text.
            find: greedy search for a batch with a maximum number of tokens.
        """
        if len(inputs.get("input_features", ())) != len(inputs["input_ids"]):
            return find(inputs, max_new_tokens)  # dialogues with several recordings
        found = self.verify(inputs, max_new_tokens)
        rows = [row for row, finished in enumerate(found.finished) if not finished]
        if rows:
            done = [found.tokens[row] for row in rows]
            more = find(extended(inputs, rows, done, self.processor), max_new_tokens - min(map(len, done)))
            for row, ids, values, ok in zip(rows, more.tokens, more.scores, more.finite, strict=True):
                found.tokens[row] = [*found.tokens[row], *ids][:max_new_tokens]
                found.scores[row] = [*found.scores[row], *values][:max_new_tokens]
                found.finite[row] = found.finite[row] and ok
        return found

    @torch.inference_mode()
    def verify(self, inputs: BatchFeature, max_new_tokens: int) -> Verified:
        """Verifies drafts for a batch with one recording per row; arguments as for `search`."""
        rows = len(inputs["input_ids"])
        states, mask = self.model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
        self.reader.hear(states, mask)
        log_probabilities, lengths = self.model.ctc_head(states, mask)
        drafts = [
            [token for token in self.reader.vocabulary.greedy(item[:length]) if token != self.processor.audio_token_id]
            for item, length in zip(log_probabilities, lengths.tolist(), strict=True)
        ]
        rest = [[*draft, self._ends()[0]] for draft in drafts]
        found = Verified([[] for _ in range(rows)], [[] for _ in range(rows)], [True] * rows, [False] * rows)
        if self.threshold is not None:
            blank = self.reader.vocabulary.blank
            for row, probability in enumerate(text_probabilities(log_probabilities, lengths, drafts, blank)):
                if probability >= self.threshold and len(rest[row]) <= max_new_tokens:
                    found.tokens[row], found.finished[row] = rest[row], True
        active = [row for row, finished in enumerate(found.finished) if not finished]
        rounds = 0
        while active:
            self._verify(inputs, active, rest, found, states, mask, max_new_tokens)
            rounds += 1
            active = [
                row for row in active
                if not found.finished[row] and rest[row] and len(found.tokens[row]) >= MIN_GAIN * (rounds - 1)
            ]  # fmt: skip
        return found

    def _verify(self, inputs, active, rest, found: Verified, states, mask, max_new_tokens) -> None:
        """Verifies the rest of the drafts of active rows in one forward pass."""
        drafts = [rest[row][: max_new_tokens - len(found.tokens[row])] for row in active]
        sequence = extended(inputs, active, [found.tokens[row] for row in active], self.processor)
        width, longest = sequence["input_ids"].shape[1], max(map(len, drafts))
        ids = functional.pad(sequence["input_ids"], (0, longest), value=0)
        attention = functional.pad(sequence["attention_mask"], (0, longest), value=0)
        for place, draft in enumerate(drafts):
            ids[place, width : width + len(draft)] = torch.tensor(draft, device=ids.device)
            attention[place, width : width + len(draft)] = 1
        logits = self.model(
            input_ids=ids, attention_mask=attention, encoder_states=states[active], input_features_mask=mask[active],
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0), logits_to_keep=longest + 1, use_cache=False,
        ).logits.float()  # fmt: skip
        best = logits.argmax(-1).tolist()
        scores = (logits.amax(-1) - logits.logsumexp(-1)).tolist()
        finite = logits.sum(-1).isfinite().tolist()
        for place, (row, draft) in enumerate(zip(active, drafts, strict=True)):
            agreed = next((at for at, token in enumerate(draft) if token != best[place][at]), len(draft))
            room = max_new_tokens - len(found.tokens[row])
            count = min(agreed + 1, room)  # the token after the agreed ones is the LLM's own
            new = best[place][:count]
            ends = [at for at, token in enumerate(new) if token in self._ends()]
            new = new[: ends[0] + 1] if ends else new
            if new[-1] == self.processor.audio_token_id:  # in a prompt, a placeholder: left to greedy search
                new, draft = new[:-1], []
            found.tokens[row] += new
            found.scores[row] += scores[place][: len(new)]
            found.finite[row] &= all(finite[place][: len(new)])
            found.finished[row] = bool(ends) or len(found.tokens[row]) >= max_new_tokens
            rest[row] = draft[agreed + 1 :]  # as if the LLM had replaced one token

    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return list(end) if isinstance(end, (list, tuple)) else [end]


def text_probabilities(
    log_probabilities: torch.Tensor, lengths: torch.Tensor, texts: Sequence[Sequence[int]], blank: int
) -> list[float]:
    """Returns the probability of each text according to a CTC head; see `text_log_probabilities`."""
    return text_log_probabilities(log_probabilities, lengths, texts, blank).exp().tolist()


def extended(
    inputs: BatchFeature, rows: Sequence[int], tokens: Sequence[Sequence[int]], processor: SpeechLLMProcessor
) -> BatchFeature:
    """Returns a batch of some rows, whose prompts continue with tokens; padded on the left.

    Args:
        inputs: batch with one recording per row.
        rows: indices of the rows.
        tokens: of each of these rows.
    """
    prompts = [inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist() for row in rows]
    columns = {"input_ids": [[*prompt, *added] for prompt, added in zip(prompts, tokens, strict=True)]}
    batch = {
        name: value.to(inputs["input_ids"].device) for name, value in processor.pad_tokens(columns, "left").items()
    }
    places = list(rows)
    audio = {name: inputs[name][places] for name in ("input_features", "input_features_mask")}
    return BatchFeature({**batch, **audio})
