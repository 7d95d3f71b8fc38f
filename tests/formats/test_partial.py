"""Checkpoints of trained parts alone: the hash that ties them to their base model."""

import torch

from hf_speechllm.formats.partial import hash_tensors


def test_hash_depends_on_names_and_values_and_not_on_dtype_or_order():
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.5]])}
    digest = hash_tensors(tensors)
    assert hash_tensors({"b": tensors["b"].bfloat16(), "a": tensors["a"].double()}) == digest
    assert hash_tensors({"a": tensors["a"], "c": tensors["b"]}) != digest
    assert hash_tensors({"a": torch.tensor([1.0, 2.5]), "b": tensors["b"]}) != digest
    assert hash_tensors({"a": tensors["a"]}) != digest
    assert hash_tensors({"a": torch.tensor([[1.0], [2.0]]).T, "b": tensors["b"]}) == digest
