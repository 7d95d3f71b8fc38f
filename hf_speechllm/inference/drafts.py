"""Drafts of the CTC head, which the LLM verifies in one forward pass instead of one pass per token.

With a threshold, texts that are probable enough according to the head are taken without the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
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


@dataclass
class Prompts:
    """Prompts of a batch with one recording per row.

    Args:
        ids: tokens of each prompt.
        embeddings: of these tokens, with the recording in place of the placeholders, shape = (tokens, width) each.
    """

    ids: list[list[int]]
    embeddings: list[torch.Tensor]


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
        states, mask = self.model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
        self.reader.hear(states, mask)
        log_probabilities, lengths = self.model.ctc_head(states, mask)
        found, rest = self._drafts(log_probabilities, lengths, max_new_tokens)
        if all(found.finished):
            return found
        valid = inputs["attention_mask"].bool()
        embeddings = self.model.embed(inputs["input_ids"], states, mask)
        prompts = Prompts(
            [ids[kept].tolist() for ids, kept in zip(inputs["input_ids"], valid, strict=True)],
            [rows[kept] for rows, kept in zip(embeddings, valid, strict=True)],
        )
        active, rounds = [row for row, finished in enumerate(found.finished) if not finished], 0
        while active:
            self._verify(prompts, active, rest, found, max_new_tokens)
            rounds += 1
            active = [
                row for row in active
                if not found.finished[row] and rest[row] and len(found.tokens[row]) >= MIN_GAIN * (rounds - 1)
            ]  # fmt: skip
        rows = [row for row, finished in enumerate(found.finished) if not finished]
        if rows:
            done = [found.tokens[row] for row in rows]
            more = find(self._extended(prompts, rows, done), max_new_tokens - min(map(len, done)))
            for row, ids, values, ok in zip(rows, more.tokens, more.scores, more.finite, strict=True):
                found.tokens[row] = [*found.tokens[row], *ids][:max_new_tokens]
                found.scores[row] = [*found.scores[row], *values][:max_new_tokens]
                found.finite[row] = found.finite[row] and ok
        return found

    def _drafts(
        self, log_probabilities: torch.Tensor, lengths: torch.Tensor, max_new_tokens: int
    ) -> tuple[Verified, list[list[int]]]:
        """Returns the texts that are taken without the LLM, and all drafts with an end token."""
        drafts = [
            self.reader.vocabulary.greedy(item[:length])
            for item, length in zip(log_probabilities, lengths.tolist(), strict=True)
        ]
        rest = [[*draft, self._ends()[0]] for draft in drafts]
        rows = len(drafts)
        found = Verified([[] for _ in range(rows)], [[] for _ in range(rows)], [True] * rows, [False] * rows)
        if self.threshold is not None:
            blank = self.reader.vocabulary.blank
            for row, probability in enumerate(text_probabilities(log_probabilities, lengths, drafts, blank)):
                if probability >= self.threshold and len(rest[row]) <= max_new_tokens:
                    found.tokens[row], found.finished[row] = rest[row], True
        return found, rest

    def _verify(
        self, prompts: Prompts, active: list[int], rest: list[list[int]], found: Verified, max_new_tokens: int
    ) -> None:
        """Verifies the rest of the drafts of active rows in one forward pass."""
        drafts = [rest[row][: max_new_tokens - len(found.tokens[row])] for row in active]
        batch = self._extended(prompts, active, [found.tokens[row] for row in active])
        padded = pad_sequence([torch.tensor(draft) for draft in drafts], batch_first=True)
        valid = pad_sequence([torch.ones(len(draft), dtype=torch.long) for draft in drafts], batch_first=True)
        attention = torch.cat([batch["attention_mask"], valid.to(self.model.device)], dim=1)
        embeddings = self.model.get_input_embeddings()(padded.to(self.model.device))
        logits = self.model(
            inputs_embeds=torch.cat([batch["inputs_embeds"], embeddings], dim=1), attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0), logits_to_keep=padded.shape[1] + 1, use_cache=False,
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
            found.tokens[row] += new
            found.scores[row] += scores[place][: len(new)]
            found.finite[row] &= all(finite[place][: len(new)])
            found.finished[row] = bool(ends) or len(found.tokens[row]) >= max_new_tokens
            rest[row] = draft[agreed + 1 :]  # as if the LLM had replaced one token

    def _extended(self, prompts: Prompts, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> BatchFeature:
        """Returns a batch of some prompts, each with tokens after it, padded on the left."""
        table, device = self.model.get_input_embeddings(), self.model.device
        columns = {"input_ids": [[*prompts.ids[row], *added] for row, added in zip(rows, tokens, strict=True)]}
        batch = BatchFeature(
            {name: value.to(device) for name, value in self.processor.pad_tokens(columns, "left").items()}
        )
        after = [table(torch.tensor(added, dtype=torch.long, device=device)) for added in tokens]
        sequences = [torch.cat([prompts.embeddings[row], more]) for row, more in zip(rows, after, strict=True)]
        batch["inputs_embeds"] = pad_sequence(sequences, batch_first=True, padding_side="left")
        return batch

    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return list(end) if isinstance(end, (list, tuple)) else [end]


def text_probabilities(
    log_probabilities: torch.Tensor, lengths: torch.Tensor, texts: Sequence[Sequence[int]], blank: int
) -> list[float]:
    """Returns the probability of each text according to a CTC head; see `text_log_probabilities`."""
    return text_log_probabilities(log_probabilities, lengths, texts, blank).exp().tolist()
