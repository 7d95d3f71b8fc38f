"""Greedy decoding on a GPU with a preallocated key-value cache and one CUDA graph per step.

A decoding step launches about 1,000 kernels for one token of each row; the launches take the host longer than the GPU
takes for the kernels. The cache of transformers copies all keys and values into a new tensor in every step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicLayer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..model.kv_cache import CACHE, find_cache
from ..model.packing import PADDING_FREE
from .versions import is_tested

logger = logging.getLogger(__name__)

GROWTH = 32  # tokens by which a cache grows, at least; a graph is valid until the next growth
ALIGNMENT = 16  # the capacity of a cache is a multiple of this number, as attention kernels require for masks


def supports_cuda_graphs(llm: PreTrainedModel) -> bool:
    """Whether `CudaGraphDecoder` supports an LLM: all layers must use full attention, computed by torch.

    The host must not need tensor values. Mixtures of experts, and position embeddings that depend on the longest row,
    are not supported.
    """
    config = llm.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        is_tested("CUDA-graph decoding")
        and config._attn_implementation in ("sdpa", PADDING_FREE)
        and layer_types == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and rope not in ("dynamic", "longrope")
        and not any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    )


@dataclass
class CacheState:
    """State that the layers of a cache share.

    Args:
        position: index of the next token, shape = (1,), on the device of the cache, because graphs read it there.
        length: number of tokens in the cache.
        capacity: number of tokens that fit into the cache.
    """

    position: torch.Tensor
    length: int = 0
    capacity: int = 0


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer, in tensors with free space that decoding steps fill in place."""

    def __init__(self, state: CacheState):
        super().__init__()
        self.state = state

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Adds the keys and values of a prompt, or of one token per row in a step.

        Args:
            key_states, value_states: shape = (rows, heads, tokens, head size).

        Returns:
            Keys and values of all tokens. In a step, free space follows, which the mask hides.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.state.position, key_states)
        self.values.index_copy_(2, self.state.position, value_states)
        return self.keys, self.values

    def resize(self) -> None:
        """Enlarges the tensors to `state.capacity` tokens."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Zeros, because attention multiplies masked values by 0, and 0 times NaN is NaN.
            new = old.new_zeros(*old.shape[:2], self.state.capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        """Returns the number of tokens in the cache."""
        return self.state.length


class PreallocatedKVCache(Cache):
    """A key-value cache that decoding steps fill in place.

    Args:
        num_layers: of the LLM.
        device: of the LLM.
    """

    def __init__(self, num_layers: int, device: torch.device):
        # Layers have no reference to the cache: a reference cycle would keep the cache in memory until garbage
        # collection.
        self.state = CacheState(torch.zeros(1, dtype=torch.long, device=device))
        super().__init__(layers=[PreallocatedLayer(self.state) for _ in range(num_layers)])

    def grow(self) -> None:
        """Adds space for at least `GROWTH` tokens."""
        self.state.capacity = -(-(self.state.length + GROWTH) // ALIGNMENT) * ALIGNMENT
        for layer in self.layers:
            layer.resize()


class CudaGraphDecoder:
    """Replaces the forward pass of an LLM while a batch is decoded greedily.

    ```python
    with decoder:
        model.generate(**inputs, **{CACHE: decoder.new_cache()}, do_sample=False)
    ```

    Args:
        llm: without the head; `supports_cuda_graphs(llm)` must be true.
        graphs: whether to capture steps as CUDA graphs; otherwise steps only fill the cache in place.
    """

    def __init__(self, llm: PreTrainedModel, graphs: bool = True):
        self.llm = llm
        self.graphs = graphs
        self.graph: torch.cuda.CUDAGraph | None = None  # the latest graph; the next graph reuses the memory
        self.stream: torch.cuda.Stream | None = None
        self.steps_since_growth = 0
        self.inputs: tuple[torch.Tensor, ...] = ()  # embeddings, positions and mask that the graph reads
        self.output: torch.Tensor | None = None  # hidden states that the graph writes

    def __enter__(self) -> CudaGraphDecoder:
        self.instance_forward = vars(self.llm).get("forward")
        self.original_forward = self.llm.forward
        self.llm.forward = self
        return self

    def __exit__(self, *exception) -> None:
        if self.instance_forward is None:
            del self.llm.forward
        else:
            self.llm.forward = self.instance_forward
        self.inputs, self.output = (), None

    def new_cache(self) -> PreallocatedKVCache:
        """Returns an empty cache for one batch."""
        return PreallocatedKVCache(self.llm.config.num_hidden_layers, self.llm.device)

    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        use_cache: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the prompts of a batch, or one step; arguments and result are the same as for the LLM.

        Args:
            inputs_embeds: shape = (rows, tokens, width).
            attention_mask: shape = (rows, tokens so far), 0 for padding; `None` if there is no padding.
            position_ids: shape = (rows, tokens).
            **kwargs: the `PreallocatedKVCache`, under the name `CACHE`, and other arguments of the LLM.
        """
        cache = find_cache(kwargs)
        state = cache.state
        if state.length == 0:
            output = self.original_forward(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
            state.length = inputs_embeds.shape[1]
            return output
        if state.length >= state.capacity:
            cache.grow()
            shape = len(inputs_embeds), 1, 1, state.capacity
            mask = inputs_embeds.new_full(shape, torch.finfo(inputs_embeds.dtype).min)
            self.inputs = (inputs_embeds.clone(), position_ids.clone(), mask)
            self.steps_since_growth = 0
        embeds, positions, mask = self.inputs
        embeds.copy_(inputs_embeds)
        positions.copy_(position_ids)
        visible = mask[:, 0, 0, : state.length + 1]
        if attention_mask is None:
            visible.fill_(0.0)
        else:
            visible.masked_fill_(attention_mask.bool(), 0.0)
        state.position.fill_(state.length)
        # The first step runs without a graph: the initialization of kernels at first use cannot be captured.
        if self.graphs and self.steps_since_growth == 1:
            self._capture(cache)
        if self.graphs and self.steps_since_growth > 0:
            self.graph.replay()
        else:
            self.output = self._run(cache)
        self.steps_since_growth += 1
        state.length += 1
        return BaseModelOutputWithPast(last_hidden_state=self.output, **{CACHE: cache})

    def _run(self, cache: PreallocatedKVCache) -> torch.Tensor:
        embeds, positions, mask = self.inputs
        return self.original_forward(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache}
        ).last_hidden_state

    def _capture(self, cache: PreallocatedKVCache) -> None:
        """Captures a step as `graph`, without `torch.cuda.graph`, which empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.llm.device)
        self.stream = self.stream or torch.cuda.Stream(self.llm.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                # Other threads compute features meanwhile and must not invalidate the capture.
                graph.capture_begin(self.graph.pool() if self.graph else None, capture_error_mode="thread_local")
                try:
                    self.output = self._run(cache)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            logger.warning("decoding runs without CUDA graphs, which is slower: capturing a step failed: %s", error)
            self.graphs = False
            return
        current.wait_stream(self.stream)
        self.graph = graph
