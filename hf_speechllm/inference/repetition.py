"""Hypotheses that end in a loop: found, stopped and cut.

A loop is told from what people do repeat by its length: nobody says the same digit, syllable or word twenty times in a
row in one utterance, or a whole clause six times, but a model that loops goes on until it may not.
"""

from __future__ import annotations

import torch
from transformers import StoppingCriteria

MIN_REPEATS = 20  # of anything, however short: a trillion has twelve zeros, a laugh hardly fifteen "ha"
MIN_REPEATS_OF_CLAUSE = 6  # a refrain comes back three or four times
CLAUSE_BYTES = 24  # UTF-8: five English words, eight Chinese characters
TAIL = 16  # characters; within the shortest loop, with its last period before it
REPLACEMENT = "\ufffd"  # what bytes are decoded to that make no character
CHECK_INTERVAL = 16  # tokens


def find_loop(text: str) -> tuple[int, int] | None:
    """The loop in which a text ends.

    Args:
        text: without white space at its end.

    Returns:
        Where the loop starts, and the length of what is repeated, both in characters; `None` if there is no loop. The
        last repetition may be incomplete.
    """
    # A loop's last characters stand one period before them, too; so candidates are found without comparing periods.
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
        repeats = (len(text) - start + (" " in unit)) // period  # the last one has lost the space behind it
        long_enough = repeats >= MIN_REPEATS_OF_CLAUSE and len(unit.encode()) >= CLAUSE_BYTES
        # What starts where a shorter period did repeats a multiple of it: ten times "ha ha" is twenty times "ha".
        if start not in starts and (repeats >= MIN_REPEATS or long_enough):
            return start, period
        starts.add(start)
        earlier = text.rfind(tail, 0, earlier + TAIL - 1)
    return None


def cut_loop(text: str) -> tuple[str, bool]:
    """Cuts the loop in which a text ends down to one occurrence, whole words of it.

    Returns:
        The text, and whether there was a loop.
    """
    loop = _loop_of_unfinished(text)
    if loop is None:
        return text, False
    start, end = loop[0], sum(loop)
    if " " in text[start:end] and not text[end - 1].isspace():
        end = text.find(" ", end)
    return text[:end].rstrip(f"{REPLACEMENT} "), True


def _loop_of_unfinished(text: str) -> tuple[int, int] | None:
    """As `find_loop`, of a text whose last character may be half-generated."""
    text = text.rstrip()
    return find_loop(text) or find_loop(text.rstrip(REPLACEMENT))


class LoopStop(StoppingCriteria):
    """Ends the generation of rows that have run into a loop.

    Args:
        tokenizer: of the LLM.
        prompt_tokens: how many tokens of each row are the prompt.
    """

    def __init__(self, tokenizer, prompt_tokens: int):
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Whether each row, shape = (rows,), is in a loop; looked at every `CHECK_INTERVAL` tokens."""
        generated = input_ids[:, self.prompt_tokens :]
        if generated.shape[1] % CHECK_INTERVAL:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        looped = [_loop_of_unfinished(text) is not None for text in texts]
        return torch.tensor(looped, device=input_ids.device)
