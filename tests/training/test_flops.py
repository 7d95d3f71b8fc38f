"""Counts of operations equal the counts of torch."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.training.flops import FlopCounter
from hf_speechllm.training.freezing import freeze_parts
from hf_speechllm.training.lora import add_lora


@pytest.mark.parametrize(
    ("frozen", "lora"),
    [((), False), (("audio_encoder",), False), (("audio_encoder", "audio_adaptor"), False),
     (("audio_encoder", "llm"), False), (("audio_encoder", "audio_adaptor"), True), (("audio_encoder",), True)],
)  # fmt: skip
def test_operations_of_a_step(frozen, lora, compose_tiny, tiny_rows):
    model, processor = compose_tiny()
    batch = SpeechLLMCollator(processor)([tiny_rows[3]] * 3)  # one length, because padding does not count
    model.set_attn_implementation("eager")  # torch can count these products on the CPU
    freeze_parts(model, **dict.fromkeys(frozen, True))
    if lora:
        model = add_lora(model, 4, 8, 0.0, ["q_proj", "v_proj"])
    counter = FlopCounter(model)
    model.train()
    with FlopCounterMode(display=False) as counted:
        model(**batch).loss.backward()
    frames, tokens = batch["input_features_mask"].sum(-1), batch["attention_mask"].sum(-1)
    counts = {str(operation): number for operation, number in counted.get_flop_counts()["Global"].items()}
    # torch counts the gradients of a depthwise convolution as for a full convolution.
    backward = counts.pop("aten.convolution_backward", 0)
    expected = sum(counts.values()) + (2 * counts["aten.convolution"] if backward else 0)
    assert counter.count(frames, tokens, len(batch["positions"]["labels"])) == pytest.approx(expected, rel=0.06)
