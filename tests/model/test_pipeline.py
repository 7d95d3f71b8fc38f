"""The model in `transformers.pipeline`."""

import numpy as np
import pytest
from transformers import pipeline

from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.model.chat import ChatError, transcription_messages, transcription_prompt


# Not a core test: older releases of transformers need librosa for this pipeline.
def test_any_to_any_returns_the_text_of_generate(tiny_model):
    waveform = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    messages = transcription_messages(waveform, transcription_prompt("en"))
    transcribe = pipeline("any-to-any", model=str(tiny_model), device="cpu")
    options = {"max_new_tokens": 8}
    result = transcribe(text=messages, return_full_text=False, **options)[0]["generated_text"]
    inputs = transcribe.processor.apply_chat_template(messages)
    ids = transcribe.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert result == transcribe.processor.decode(ids, skip_special_tokens=True) != ""


def test_unsupported_pipeline_names_alternatives(tiny_model):
    with pytest.raises(AttributeError, match=r'^a speech LLM needs a prompt.*Transcriber.*pipeline\("any-to-any"\)$'):
        pipeline("automatic-speech-recognition", model=str(tiny_model), device="cpu")


@pytest.mark.core
def test_unsupported_options_of_a_pipeline_are_refused(tiny_model):
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    messages = transcription_messages(np.zeros(16000, np.float32), transcription_prompt(), "one")
    with pytest.raises(ChatError, match="continue_final_message is not supported"):
        processor.apply_chat_template(messages, continue_final_message=True)
    with pytest.raises(ValueError, match="processor_kwargs are not supported: padding"):
        processor.apply_chat_template(messages, processor_kwargs={"padding": True})
    with pytest.raises(TypeError, match="hotword"):
        processor.apply_chat_template(messages, hotword=["one"])
