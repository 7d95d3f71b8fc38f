"""Greedy and beam search for one batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from transformers import BatchFeature

from ..fast.attention import without_cudnn_attention
from ..model.generation import transcribing
from ..model.modeling import SpeechLLMForConditionalGeneration
from .finite import LogitsCheck
from .repetition import LoopStop


@dataclass
class Generated:
    """Result of a search, for each row.

    Args:
        tokens: generated tokens.
        scores: log-probabilities of the tokens, if they were kept.
        finite: whether the logits were finite in all steps on which the tokens depend.
    """

    tokens: list[list[int]]
    scores: list[list[float]]
    finite: list[bool]


def search(
    model: SpeechLLMForConditionalGeneration,
    inputs: BatchFeature,
    max_new_tokens: int,
    *,
    num_beams: int = 1,
    loop_stop_tokenizer=None,
    fast: bool = True,
    keep_scores: bool = False,
) -> Generated:
    """Decodes a batch of the processor.

    Args:
        model: on the device of the inputs.
        inputs: padded on the left.
        max_new_tokens: maximum number of tokens of a text.
        num_beams: number of beams; 1 is greedy search.
        loop_stop_tokenizer: tokenizer of the LLM, to stop loops; `None`: loops are not stopped.
        fast: whether attention of cuDNN is disabled.
        keep_scores: whether to return the scores of greedy search.
    """
    rows, prompt_tokens = inputs["input_ids"].shape
    options = {}
    if loop_stop_tokenizer is not None:
        options["stopping_criteria"] = [LoopStop(loop_stop_tokenizer, prompt_tokens)]
    attention = without_cudnn_attention() if fast else nullcontext()
    settings = transcribing(model, max_new_tokens=max_new_tokens, num_beams=num_beams)
    check = LogitsCheck(model, keep_scores and num_beams == 1)
    with attention, settings as config, check:
        output = model.generate(**inputs, generation_config=config, **options)
    tokens = output[:, prompt_tokens:]
    scores = check.scores(tokens.shape[1]) if check.keep_scores else [[] for _ in range(rows)]
    return Generated(tokens.tolist(), scores, check.finite(rows, tokens if num_beams == 1 else None))
