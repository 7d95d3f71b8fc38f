"""Sentences sampled from a causal LLM, for example as texts of synthetic speech."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

BATCH_SIZE = {"cpu": 64, "cuda": 1024}  # texts at once
NEW_TOKENS = 128
MAX_EMPTY_ROUNDS = 5  # consecutive batches without a new sentence


@torch.inference_mode()
def sample_sentences(
    name: str,
    count: int,
    clean: Callable[[list[str]], list[str]],
    prompts: Sequence[str] = ("",),
    seed: int = 0,
    report: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Samples different sentences from an LLM, reproducibly on the same hardware.

    Args:
        name: folder or Hub id of the LLM, or a GGUF file.
        count: number of sentences.
        clean: returns the usable sentences of sampled texts.
        prompts: beginnings of texts, used in turn, which are not part of the sentences; "": the start token.
        seed: seed of the samples.
        report: called with the number of sentences after every batch.

    Raises:
        ValueError: if the LLM gives no new sentences.
    """
    path = Path(name)
    folder, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device).eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    beginnings = (tokenizer.encode(text, add_special_tokens=False) or [start] for text in itertools.cycle(prompts))
    set_seed(seed)
    found: dict[str, None] = {}
    empty = 0
    while len(found) < count:
        rows = list(itertools.islice(beginnings, BATCH_SIZE[device.type]))
        width = max(map(len, rows))
        inputs = torch.tensor([[start] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        outputs = model.generate(
            inputs,
            attention_mask=mask,
            do_sample=True,
            top_p=0.95,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
        before = len(found)
        texts = tokenizer.batch_decode(outputs[:, inputs.shape[1] :], skip_special_tokens=True)
        # The first sentence may continue the prompt, the last one is usually incomplete and has no final period.
        found.update(dict.fromkeys(clean([line for text in texts for line in text.splitlines()])))
        empty = empty + 1 if len(found) == before else 0
        if empty == MAX_EMPTY_ROUNDS:
            raise ValueError(f"{name}: the last {empty} batches of texts have no new sentence; change --text_prompt")
        report(len(found))
    return list(found)[:count]
