"""Detection, stopping and cutting of loops at the end of hypotheses.

A loop is longer than repetitions in speech. People do not say the same digit, syllable or word 20 times in a row in
one utterance, or a clause 6 times. A model in a loop repeats until the limit of tokens.
"""

from __future__ import annotations

import torch
from transformers import StoppingCriteria

MIN_REPEATS = 20  # of any text: a trillion has 12 zeros, and a laugh has at most about 15 times "ha"
MIN_REPEATS_OF_CLAUSE = 6  # a refrain repeats 3 or 4 times
CLAUSE_BYTES = 24  # UTF-8: 5 English words, 8 Chinese characters
TAIL = 16  # characters; the shortest loop contains this tail and the tail one period earlier
REPLACEMENT = "\ufffd"  # decoded from bytes that are no character
CHECK_INTERVAL = 16  # tokens


def find_loop(text: str) -> tuple[int, int] | None:
    """Finds a loop at the end of a text.

    Args:
        text: without trailing white space.

    Returns:
        Start of the loop and length of the repeated unit, in characters; `None` without a loop. The last repetition
        may be incomplete.
    """
    # The last characters of a loop also occur one period earlier, so no search over periods is necessary.
    tail, place = text[-TAIL:], len(text) - TAIL
    if place < 1:
        return None
    starts = set()
    earlier = text.rfind(tail, 0, place + TAIL - 1)
    while earlier >= 0:
        period, start = place - earlier, earlier
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        unit = text[start : start + period]
        repeats = (len(text) - start + (" " in unit)) // period  # the last repetition lacks the trailing space
        long_enough = repeats >= MIN_REPEATS_OF_CLAUSE and len(unit.encode()) >= CLAUSE_BYTES
        # A loop with the same start as a shorter period is a multiple: 10 times "ha ha" is 20 times "ha".
        if start not in starts and (repeats >= MIN_REPEATS or long_enough):
            return start, period
        starts.add(start)
        earlier = text.rfind(tail, 0, earlier + TAIL - 1)
    return None


def cut_loop(text: str) -> tuple[str, bool]:
    """Reduces a loop at the end of a text to one occurrence, in whole words.

    Returns:
        The text, and whether the text had a loop.
    """
    loop = _loop_of_unfinished(text)
    if loop is None:
        return text, False
    start, end = loop[0], sum(loop)
    if " " in text[start:end] and not text[end - 1].isspace():
        end = text.find(" ", end)
    return text[:end].rstrip(f"{REPLACEMENT} "), True


def _loop_of_unfinished(text: str) -> tuple[int, int] | None:
    """Calls `find_loop` for a text whose last character may be incomplete."""
    text = text.rstrip()
    return find_loop(text) or find_loop(text.rstrip(REPLACEMENT))


class LoopStop(StoppingCriteria):
    """Stops the generation of rows that end in a loop.

    Args:
        tokenizer: of the LLM.
        prompt_tokens: number of prompt tokens of each row.
    """

    def __init__(self, tokenizer, prompt_tokens: int):
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Returns for each row whether it ends in a loop, shape = (rows,); checks every `CHECK_INTERVAL` tokens."""
        generated = input_ids[:, self.prompt_tokens :]
        if generated.shape[1] % CHECK_INTERVAL:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        looped = [_loop_of_unfinished(text) is not None for text in texts]
        return torch.tensor(looped, device=input_ids.device)
