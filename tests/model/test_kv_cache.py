"""The key-value cache is accepted under both names."""

import pytest
import torch
from transformers import DynamicCache

from hf_speechllm.model.kv_cache import CACHE, CACHE_NAMES, find_cache

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_accepts_the_cache_under_either_name(compose_tiny, tiny_config, name):
    model, _ = compose_tiny(tiny_config())
    model.eval()
    ids = torch.tensor([[5, 9, 7, 8]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config.get_text_config())
        output = model(input_ids=ids[:, :3], use_cache=True, **{name: cache})
        assert output[CACHE] is cache and cache.get_seq_length() == 3
        last = model(input_ids=ids[:, 3:], **{name: cache}).logits
    torch.testing.assert_close(last, expected[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_cache_under_both_names_is_an_error():
    cache = DynamicCache()
    assert find_cache({"cache": None, "past_key_values": cache}) is cache
    assert find_cache({}) is None
    with pytest.raises(ValueError, match="cache and past_key_values"):
        find_cache({"cache": cache, "past_key_values": cache})
