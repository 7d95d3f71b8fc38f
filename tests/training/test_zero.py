"""What is set up for DeepSpeed's stages; that training stays the same is shown in tests/test_engines.py."""

import pytest
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.utils import nvtx

from hf_speechllm.training.zero import BUCKET_SIZE, prepare


@pytest.fixture(autouse=True)
def deepspeed_as_before(monkeypatch):
    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    monkeypatch.setattr(
        partitioned_param_coordinator, "get_all_parameters", partitioned_param_coordinator.get_all_parameters
    )
    yield
    LinearFunctionForZeroStage3.forward.__dict__.pop("__signature__", None)


@pytest.mark.parametrize("trained", [True, False])
def test_frozen_layers_keep_no_graph_for_stage_3(compose_tiny, tone, trained):
    model, processor = compose_tiny()
    model.requires_grad_(False)
    model.audio_encoder.requires_grad_(trained)
    prepare(model, {"zero_optimization": {"stage": 3}})
    inputs = processor.feature_extractor(tone(0.5)[:, 0], sampling_rate=16000, return_tensors="pt")
    states, _ = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    assert states.requires_grad is trained


def test_first_trained_layer_tells_when_its_gradients_are_complete(compose_tiny):
    model, _ = compose_tiny()
    prepare(model, {"zero_optimization": {"stage": 3}})
    layer, told = model.llm.get_decoder().layers[0], []
    layer.register_full_backward_hook(lambda *args: told.append(layer.mlp.down_proj.weight.grad is not None))
    width = model.llm.config.hidden_size
    positions = torch.zeros(1, 3, dtype=torch.long)
    rotary = model.llm.get_decoder().rotary_emb(torch.zeros(1, 3, width), positions)
    layer(torch.ones(1, 3, width), position_embeddings=rotary).sum().backward()
    assert told == [True]


def test_what_a_config_says_remains():
    config = {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    prepare(torch.nn.Linear(1, 1), config)
    assert config["zero_optimization"] == {
        "stage": 1, "overlap_comm": False, "reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE
    }  # fmt: skip
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 5}}
    prepare(torch.nn.Linear(1, 1), config)
    assert config["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 5}
