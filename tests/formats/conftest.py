"""Fixtures that create tiny checkpoints."""

import pytest
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.formats.composition import compose, train_tokenizer
from hf_speechllm.formats.loading import Checkpoint
from hf_speechllm.formats.saving import write_checkpoint


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["hello world", "请转写", "语音转写成中文：", "热词列表：[]"], vocab_size=300)


@pytest.fixture
def make_model(tokenizer):
    """Makes a random tiny Fun-ASR-Nano and its processor."""

    def make(seed=0, tied=True, adaptor=None, **llm):
        torch.manual_seed(seed)
        model, processor = compose(
            {
                "audio_encoder_config": {
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "intermediate_size": 24,
                    "num_hidden_layers": 5,
                    "num_timestamp_prediction_layers": 2,
                },
                "audio_adaptor_config": {
                    "projector_hidden_size": 20,
                    "num_attention_heads": 4,
                    "use_low_frame_rate": True,
                    **(adaptor or {}),
                },
                "llm_config": {
                    "model_type": "qwen3",
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "max_position_embeddings": 512,
                    "tie_word_embeddings": tied,
                    "eos_token_id": 2,
                    **llm,
                },
            },
            tokenizer,
        )
        for parameter in model.parameters():  # a new model has ones and zeros in some tensors
            torch.nn.init.normal_(parameter, std=0.3)
        return model.eval(), processor

    return make


@pytest.fixture
def make_checkpoint(make_model, tmp_path):
    """Writes a tiny checkpoint in a layout and returns its folder."""

    def make(layout, name=None, model=None, processor=None, **options):
        if model is None:
            model, processor = make_model(**options)
        folder = tmp_path / (name or layout)
        write_checkpoint(Checkpoint.of(model), processor, folder, layout, force=True)
        return folder

    return make


@pytest.fixture
def logits():
    """Returns logits for a padded batch of two recordings; logits of padding are zero."""

    def compute(model: SpeechLLMForConditionalGeneration, processor):
        generator = torch.Generator().manual_seed(0)
        waveforms = [torch.randn(samples, generator=generator).numpy() * 0.1 for samples in (9000, 16000)]
        inputs = processor.apply_transcription_request(waveforms)
        with torch.no_grad():
            values = model(**inputs).logits.float()
        return values * inputs["attention_mask"].unsqueeze(-1)

    return compute
