"""Word times and confidence from the CTC head, for the recordings of a batch that the LLM transcribes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..model import chat
from ..model.calibration import Calibration
from ..model.ctc_vocabulary import CTCVocabulary
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import CTC_HEAD, is_native
from ..model.processing import SpeechLLMProcessor
from .alignment import Word, align, split_words
from .segments import Segment

NO_HEAD = (
    "the model has no CTC head, which word times and all --ctc_* options require; train a head with `hf-speechllm "
    "finetune --ctc_head auto`, all other parts frozen"
)
# A word whose CTC probability is below the first number is unheard; a text is contradicted if the share of unheard
# words is above the second.
UNHEARD, CONTRADICTED = 0.05, 0.5


def no_head(model_or_config: Any) -> str:
    """Returns why a model has no CTC head, and what to do."""
    if is_native(model_or_config):
        config = getattr(model_or_config, "config", model_or_config)
        return f"{config.model_type} models have no CTC head; leave out word times and all --ctc_* options"
    return NO_HEAD


@dataclass(frozen=True)
class Evidence:
    """Evidence for the text of a row.

    Args:
        log_probabilities: of the CTC head, for the last recording, shape = (frames, vocabulary).
        tokens: generated tokens; empty after beam search.
        scores: log-probabilities of the tokens.
    """

    log_probabilities: torch.Tensor
    tokens: Sequence[int] = ()
    scores: Sequence[float] = ()


class CTCReader:
    """Reads texts, word times and confidence from the CTC head of a model.

    Args:
        model: on the target device.
        processor: of the model.
        guard: whether a text that the CTC head contradicts is replaced by the text of the CTC head.
        calibration: converts probabilities of a word to its confidence.

    Raises:
        ValueError: if the model has no CTC head, or the head's vocabulary is unusable.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        guard: bool = False,
        calibration: Calibration | None = None,
    ):
        if getattr(model, CTC_HEAD, None) is None:
            raise ValueError(no_head(model))
        self.model = model
        self.tokenizer = processor.tokenizer
        self.guard = guard
        self.calibration = calibration
        config = model.config.ctc_head_config
        self.vocabulary = CTCVocabulary(config, processor.tokenizer, model.ctc_tensors)
        self.frame_seconds = processor.encoder_frame_seconds / config.upsample_rate
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generated: tuple[list[list[int]], list[list[float]]] = ([], [])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps the encoder states that the adaptor receives in the block, so that the encoder runs once."""
        self._states, self._generated = [], ([], [])
        handle = self.model.audio_adaptor.register_forward_pre_hook(
            lambda module, arguments: self.hear(*arguments[:2])
        )
        try:
            yield
        finally:
            handle.remove()

    def hear(self, states: torch.Tensor, mask: torch.Tensor) -> None:
        """Keeps encoder states of all recordings of a batch, of which the adaptor may receive a part."""
        self._states.append((states, mask))

    def notice(self, tokens: list[list[int]], scores: list[list[float]]) -> None:
        """Keeps the tokens of greedy search and their log-probabilities, by row."""
        self._generated = tokens, scores

    def evidence(self, counts: Sequence[int]) -> list[Evidence]:
        """Returns the evidence for each row since `listening`.

        Args:
            counts: number of recordings of each row; the text answers the last one.
        """
        states, mask = self._states[0]
        last = torch.tensor(counts, device=states.device).cumsum(0) - 1
        log_probabilities, lengths = self.model.ctc_head(states[last], mask[last])
        heard = [item[:length] for item, length in zip(log_probabilities, lengths.tolist(), strict=True)]
        tokens, scores = self._generated
        self._states, self._generated = [], ([], [])
        if not scores:
            return [Evidence(item) for item in heard]
        return [Evidence(*item) for item in zip(heard, tokens, scores, strict=True)]

    def segment(self, segment: Segment, evidence: Evidence) -> Segment:
        """Adds words and confidence to a decoded segment; flags, or with `guard` replaces, a contradicted text."""
        frames = max(1, round((segment.end - segment.start) / self.frame_seconds))
        log_probabilities = evidence.log_probabilities[:frames]
        words = self.words(log_probabilities, segment.text, segment.start)
        contradicted = is_contradicted(words)
        if contradicted and self.guard:
            own = self.vocabulary.decode(self.vocabulary.greedy(log_probabilities))
            segment = replace(segment, text=own)
            words = self.words(log_probabilities, own, segment.start)
        else:
            words = self._with_llm(words, segment.text, evidence)
        if self.calibration is not None:
            words = tuple(replace(word, calibrated=self.calibration(word.ctc, word.llm)) for word in words)
        return replace(segment, words=words, confidence=mean_confidence(words), contradicted=contradicted)

    def words(self, log_probabilities: torch.Tensor, text: str, start: float) -> tuple[Word, ...]:
        """Aligns a text; see `alignment.align`."""
        return align(log_probabilities, text, self.vocabulary, self.frame_seconds, start)

    def _with_llm(self, words: Sequence[Word], text: str, evidence: Evidence) -> tuple[Word, ...]:
        """Adds the probabilities of the LLM to words."""
        spans = token_spans(self.tokenizer, evidence.tokens, text)
        if not spans:
            return tuple(words)
        result = []
        for word, (first, last) in zip(words, split_words(text), strict=True):
            scores = [score for (a, b), score in zip(spans, evidence.scores, strict=False) if a < last and first < b]
            llm = math.exp(min(0.0, sum(scores) / len(scores))) if scores else None
            result.append(replace(word, llm=llm))
        return tuple(result)


def is_contradicted(words: Sequence[Word]) -> bool:
    """Whether the CTC head contradicts a text: most words that it could hear are unheard."""
    heard = [word.ctc for word in words if word.ctc is not None]
    return sum(probability < UNHEARD for probability in heard) > CONTRADICTED * len(heard)


def mean_confidence(words: Sequence[Word]) -> float | None:
    """Returns the geometric mean of the confidence of words; `None` without a word that has one."""
    known = [word.confidence for word in words if word.confidence is not None]
    return math.exp(sum(math.log(max(value, 1e-10)) for value in known) / len(known)) if known else None


def token_spans(tokenizer: Any, tokens: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Returns start and end of each generated token in a text; empty if the text is not that of the tokens."""
    spans, decoded = [], ""
    for count in range(1, len(tokens) + 1):
        longer = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        spans.append((len(decoded), len(longer)))
        decoded = longer
    shift = len(decoded) - len(decoded.lstrip())
    if chat.clean_answer(decoded) != decoded.strip() or not decoded.strip().startswith(text):
        return []
    return [(max(0, start - shift), max(0, end - shift)) for start, end in spans]
