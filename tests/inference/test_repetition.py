"""Loops at the end of a text: distinguished from repetitions in speech, cut, and stopped during generation."""

import pytest
import torch

from hf_speechllm.inference.repetition import CHECK_INTERVAL, LoopStop, cut_loop

CLAUSE = "感谢您的收看和支持。"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 1 1 1",
        "7777777777777777",  # the digits of a card
        "a trillion is 1000000000000",
        "zero " * 12 + "one",
        "ha ha ha ha ha ha ha ha ha ha",
        "goodbye " * 18 + "goodbye",  # three at once are as long as a clause
        "哈哈哈哈哈哈哈哈哈哈哈哈",
        "we will, we will rock you, " * 3,
        "Let it snow, let it snow, let it snow!",
        CLAUSE * 4,
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28",
        "ha " * 30 + "that was funny",  # it did not end in a loop
        "half a character \ufffd",
    ],
)
def test_repetitions_in_speech_do_not_change(text):
    assert cut_loop(text) == (text, False)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("so the the" + " the" * 40, "so the"),
        ("0" * 60, "0"),
        ("it is 1" + " 1" * 40, "it is 1"),
        ("hahaha" * 20, "ha"),
        ("Well. Thank you." + " Thank you." * 30, "Well. Thank you."),
        ("Well. Thank you." + " Thank you." * 30 + " Than", "Well. Thank you."),
        ("on the wing sing" + " sing" * 25, "on the wing sing"),
        ("现在开始。" + CLAUSE * 7, "现在开始。" + CLAUSE[:-1]),
        ("嗯" + "好" * 50 + "\ufffd", "嗯好"),
        ("yes " + "\ufffd" * 80, "yes"),
        ("I do not know what that is. " * 6, "I do not know what that is."),
    ],
)
def test_a_loop_is_cut_to_one_occurrence(text, kept):
    assert cut_loop(text) == (kept, True)


def test_generation_stops_only_rows_with_a_loop(compose_tiny):
    tokenizer = compose_tiny()[1].tokenizer
    prompt = [5, 6, 7]
    looped, other = tokenizer.encode("one " * 60), tokenizer.encode("one two three four " * 60)
    length = 4 * CHECK_INTERVAL
    rows = torch.tensor([prompt + looped[:length], prompt + other[:length]])
    assert tokenizer.decode(looped[:length]).count("one") > 20
    stop = LoopStop(tokenizer, len(prompt))
    assert stop(rows, None).tolist() == [True, False]
    assert stop(rows[:, :-1], None).tolist() == [False, False]  # not looked at in between


def test_stopped_loop_has_few_tokens_and_keeps_the_text_before(compose_tiny):
    from hf_speechllm.inference.transcriber import Transcriber

    model, processor = compose_tiny(seed=2)
    generator = torch.Generator().manual_seed(0)
    waveforms = [torch.randn(samples, generator=generator).numpy() * 0.1 for samples in (8000, 16000, 32000)]
    free = Transcriber(model, processor, max_new_tokens=150).transcripts(waveforms)
    transcriber = Transcriber(model, processor, max_new_tokens=150, repetition_guard=True)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    guarded = transcriber.transcripts(waveforms)
    assert all(transcript.looped for transcript in guarded)
    assert not any(transcript.looped for transcript in free)
    assert all(loose.text.startswith(tight.text) for loose, tight in zip(free, guarded, strict=True))
    assert len(steps) < 150
