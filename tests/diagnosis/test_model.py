"""Checks with a model: lengths in tokens, limits and losses."""

import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.diagnosis.corpus_checks import Corpus
from hf_speechllm.diagnosis.doctor import Examiner
from hf_speechllm.diagnosis.model_checks import ModelChecks
from hf_speechllm.diagnosis.rows import read_rows


@pytest.fixture
def checks(tiny_model):
    return ModelChecks(str(tiny_model), batch_seconds=3.0)


def test_tokens(checks, tmp_path, speech, write_rows):
    soundfile.write(tmp_path / "a.wav", speech, 16000)
    tokenizer = checks.processor.tokenizer
    count = len(tokenizer.encode("one two", add_special_tokens=False))
    rows = [("a.wav", "one two", {"text_length": count}), ("a.wav", "one two", {"text_length": count + 1})]
    path = write_rows([*rows, ("a.wav", "one two three four", {}), ("a.wav", "𒀀𒀁𒀂𒀃𒀄𒀅𒀆𒀇", {})])
    corpus = Corpus(read_rows([str(path)]), [])
    checks.loss = False
    assert [(index, kind) for index, kind, _ in checks(corpus)] == [(1, "wrong-text-length"), (3, "many-tokens")]


def test_losses_are_those_of_single_rows(checks, tiny_model, tmp_path, speech, write_rows):
    rows = []
    for number, (text, share) in enumerate((("one two", 1.0), ("three", 0.5), ("四五 six", 0.9), ("one", 0.3))):
        soundfile.write(tmp_path / f"{number}.wav", speech[: int(share * len(speech))], 16000)
        rows.append((f"{number}.wav", text))
    soundfile.write(tmp_path / "broken.wav", speech, 16000)
    (tmp_path / "broken.wav").write_bytes((tmp_path / "broken.wav").read_bytes()[:-99])
    data = read_rows([str(write_rows([*rows, ("broken.wav", "one")]))])
    corpus = Corpus(data, [measured for measured, _ in Examiner(False)(data)])
    losses = checks._losses(corpus)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        alone = [model(**processor.apply_chat_template(row.record["messages"])).loss.item() for row in data[:4]]
    assert [losses[index] for index in range(4)] == pytest.approx(alone, rel=1e-4)
    assert set(losses) == set(range(4))


def test_recording_beyond_the_limit_of_the_encoder(checks, examine, tmp_path, speech, write_rows):
    soundfile.write(tmp_path / "a.flac", np.tile(speech, 3), 16000)
    path = write_rows([("a.flac", "one two three")])
    assert checks.max_seconds > 1
    assert "too-long" in examine(path, max_seconds=2.0)["train.jsonl", 1]
