"""Greedy and beam search for one batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature

from ..fast.attention import without_cudnn_attention
from ..model.generation import transcribing
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.native_families import is_native
from .finite import LogitsCheck
from .repetition import LoopStop
from .rescoring import BeamScores, Rescorer


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
    rescorer: Rescorer | None = None,
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
        rescorer: chooses among the hypotheses of beam search; `None`: the LLM chooses.
    """
    ids = inputs["input_ids"]
    rows, prompt_tokens = ids.shape
    options: dict[str, Any] = {}
    if loop_stop_tokenizer is not None:
        options["stopping_criteria"] = [LoopStop(loop_stop_tokenizer, prompt_tokens)]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    if rescorer is not None:
        # The rescorer adds sums, so the search keeps the hypotheses with the largest sums, not means: a loop has a
        # large mean.
        settings |= {"num_return_sequences": num_beams, "return_dict_in_generate": True, "length_penalty": 0.0}
    attention = without_cudnn_attention() if fast else nullcontext()
    check = LogitsCheck(model, keep_scores and num_beams == 1)
    with attention, transcribing(model, **settings) as config, check:
        if num_beams > 1 and not is_native(model):
            # Otherwise `generate` encodes each recording once per beam, and mixes up the recordings of a dialogue.
            states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs["inputs_embeds"] = model.embed(ids, states, mask)
        if rescorer is None:
            tokens = model.generate(**inputs, generation_config=config, **options)[:, prompt_tokens:]
        else:
            kept = BeamScores(config)
            output = model.generate(**inputs, generation_config=config, logits_processor=[kept], **options)
            tokens, beams = output.sequences[:, prompt_tokens:], output.beam_indices
            del output  # the key-value cache
            tokens = tokens[rescorer.best(ids, states, mask, tokens, kept.sums(tokens, beams))]
    scores = check.scores(tokens.shape[1]) if check.keep_scores else [[] for _ in range(rows)]
    return Generated(tokens.tolist(), scores, check.finite(rows, tokens if num_beams == 1 else None))
