"""Defaults for the stages of DeepSpeed. `tests/test_engines.py` tests that training results stay the same."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from hf_speechllm.fast.deepspeed import BUCKET_SIZE, PERSISTENT_SIZE, match_adapter_dtypes, set_zero_defaults


@pytest.mark.parametrize("trained", [True, False])
def test_frozen_layers_keep_no_graph_for_stage_3(compose_tiny, tone, trained):
    model, processor = compose_tiny()
    model.requires_grad_(False)
    model.audio_encoder.requires_grad_(trained)
    set_zero_defaults(model, {"zero_optimization": {"stage": 3}})
    inputs = processor.feature_extractor(tone(0.5)[:, 0], sampling_rate=16000, return_tensors="pt")
    states, _ = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    assert states.requires_grad is trained


def test_backward_hook_of_the_first_trained_layer_runs_after_its_gradients(compose_tiny):
    model, _ = compose_tiny()
    set_zero_defaults(model, {"zero_optimization": {"stage": 3}})
    layer, complete = model.llm.get_decoder().layers[0], []
    layer.register_full_backward_hook(lambda *args: complete.append(layer.mlp.down_proj.weight.grad is not None))
    width = model.llm.config.hidden_size
    positions = torch.zeros(1, 3, dtype=torch.long)
    rotary = model.llm.get_decoder().rotary_emb(torch.zeros(1, 3, width), positions)
    layer(torch.ones(1, 3, width), position_embeddings=rotary).sum().backward()
    assert complete == [True]


def test_adapters_get_the_dtype_in_which_deepspeed_loaded_the_model():
    loaded, adapter = nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)
    loaded.weight.ds_id = loaded.bias.ds_id = 0  # DeepSpeed marks loaded parameters in this way
    model = nn.Sequential(loaded, adapter)
    engine = SimpleNamespace(module=model)
    DeepSpeedEngine._cast_module_mixed_precision(engine, torch.bfloat16, None, is_zero_init_model=True)
    assert adapter.weight.dtype == torch.float32  # once DeepSpeed casts it, `match_adapter_dtypes` can go
    match_adapter_dtypes(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    match_adapter_dtypes(model)
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]


def test_values_in_the_config_take_precedence():
    config = {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    set_zero_defaults(torch.nn.Linear(1, 1), config)
    assert config["zero_optimization"] == {
        "stage": 1, "overlap_comm": False, "reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE
    }  # fmt: skip
    config = {"zero_optimization": {"stage": 3, "contiguous_gradients": True, "reduce_bucket_size": 5}}
    set_zero_defaults(torch.nn.Linear(1, 1), config)
    assert config["zero_optimization"] == {
        "stage": 3, "contiguous_gradients": True, "reduce_bucket_size": 5,
        "stage3_param_persistence_threshold": PERSISTENT_SIZE
    }  # fmt: skip
