"""Clipping and AdamW on the local shards of FSDP2 compute the same as torch does on sharded tensors."""

import copy

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_speechllm.fast import versions
from hf_speechllm.fast.fsdp import AdamWOnShards, clip_shards, keep_output_dtype, sharded_optimizer


@pytest.fixture
def sharded():
    """A model sharded by FSDP2 on one rank, and the same model without FSDP2."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    yield model, plain
    torch.distributed.destroy_process_group()


def test_the_loss_stays_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # once it is None, `keep_output_dtype` can go
    keep_output_dtype(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    keep_output_dtype(plugin)
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_steps_equal_those_of_plain_tensors(sharded, monkeypatch, max_norm):
    seen, fused = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **kw: (seen.extend(lists[0]), fused(*lists, **kw)))
    inputs = torch.randn(5, 4)
    models = []
    for model in sharded:
        optimizer = sharded_optimizer(torch.optim.AdamW)(model.parameters(), lr=1e-2, fused=True)
        assert type(optimizer) is AdamWOnShards
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            norm = clip_shards(model.parameters(), max_norm)
            if norm is None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        weights = [getattr(parameter, "_local_tensor", parameter.data) for parameter in model.parameters()]
        models.append([norm, *weights])
    torch.testing.assert_close(models[0], models[1])
    assert isinstance(next(sharded[0].parameters()), DTensor) and len(seen) == 24
    assert not any(isinstance(tensor, DTensor) for tensor in seen)


def test_torch_handles_other_gradients_and_optimizers(sharded):
    model, plain = sharded
    plain(torch.ones(1, 4)).sum().backward()
    assert clip_shards(plain.parameters(), 1.0) is None and clip_shards([], 1.0) is None
    assert sharded_optimizer(torch.optim.SGD) is torch.optim.SGD


def test_torch_handles_everything_in_untested_releases(sharded, monkeypatch, caplog):
    monkeypatch.setattr(versions, "tested_ranges", lambda: {"torch": SpecifierSet("<1")})
    versions.is_tested.cache_clear()
    model, _ = sharded
    model(torch.ones(1, 4)).sum().backward()
    try:
        assert clip_shards(model.parameters(), 1.0) is None
        assert sharded_optimizer(torch.optim.AdamW) is torch.optim.AdamW
        assert caplog.text.count("FSDP2 on shards is off") == 1
    finally:
        versions.is_tested.cache_clear()
