"""Steps of greedy search on a GPU: keys and values stay where they are, and a step is one CUDA graph.

A step of the LLM launches a thousand kernels for one token of each row, which takes the host longer than the GPU; and
transformers' cache copies all keys and values into a new tensor in every step.
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

ROOM = 32  # steps that a cache has room for, at least, when it is made or grows; a graph serves that many
ALIGNMENT = 16  # a cache's length is a multiple of it, as attention kernels want that of masks


def supports_cuda_graphs(llm: PreTrainedModel) -> bool:
    """Whether `CudaGraphDecoder` can stand in for an LLM's: if all layers look at all tokens, with torch's attention.

    Nothing may depend on values that the host would have to look at: experts that tokens choose, or position
    embeddings that change with the longest row.
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
class Preallocation:
    """What the layers of a cache share.

    Args:
        position: where the next token goes, shape = (1,), on the device, as a graph needs it.
        length: tokens held.
        size: tokens that there is room for, those held among them.
    """

    position: torch.Tensor
    length: int = 0
    size: int = 0


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer, with room behind them, which steps fill in place."""

    def __init__(self, room: Preallocation):
        super().__init__()
        self.room = room

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Takes keys and values, shape = (rows, heads, tokens, width), of a prompt or, one token, of a step.

        Returns:
            Keys and values of all tokens; in a step with the room behind them, which the mask hides.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.room.position, key_states)
        self.values.index_copy_(2, self.room.position, value_states)
        return self.keys, self.values

    def resize(self) -> None:
        """Makes as much room as `room` says."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Zeros, since what is masked is still multiplied, and nothing times NaN is NaN.
            new = old.new_zeros(*old.shape[:2], self.room.size, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.room.length


class PreallocatedKVCache(Cache):
    """A key-value cache whose room is filled in place.

    Args:
        num_layers: of the LLM.
        device: of the LLM.
    """

    def __init__(self, num_layers: int, device: torch.device):
        # Layers don't know the cache: it would stay in memory until Python looks for cycles.
        self.room = Preallocation(torch.zeros(1, dtype=torch.long, device=device))
        super().__init__(layers=[PreallocatedLayer(self.room) for _ in range(num_layers)])

    def grow(self) -> None:
        """Makes room for `ROOM` more tokens."""
        self.room.size = -(-(self.room.length + ROOM) // ALIGNMENT) * ALIGNMENT
        for layer in self.layers:
            layer.resize()


class CudaGraphDecoder:
    """Stands in for an LLM's forward pass while a batch is decoded greedily.

    ```python
    with steps:
        model.generate(**inputs, **{CACHE: steps.new_cache()}, do_sample=False)
    ```

    Args:
        llm: without its head; `supports_cuda_graphs` must hold.
        graphs: whether steps are captured as CUDA graphs; without, they are only computed in place.
    """

    def __init__(self, llm: PreTrainedModel, graphs: bool = True):
        self.llm = llm
        self.graphs = graphs
        self.graph: torch.cuda.CUDAGraph | None = None  # the latest, kept so that the next one takes its memory
        self.stream: torch.cuda.Stream | None = None
        self.steps_in_room = 0
        self.inputs: tuple[torch.Tensor, ...] = ()  # embeddings, positions, mask, where a graph reads them
        self.output: torch.Tensor | None = None  # where it leaves the hidden states

    def __enter__(self) -> CudaGraphDecoder:
        self.replaced = vars(self.llm).get("forward")
        self.plain = self.llm.forward
        self.llm.forward = self
        return self

    def __exit__(self, *exception) -> None:
        if self.replaced is None:
            del self.llm.forward
        else:
            self.llm.forward = self.replaced
        self.inputs, self.output = (), None

    def new_cache(self) -> PreallocatedKVCache:
        """For a batch."""
        return PreallocatedKVCache(self.llm.config.num_hidden_layers, self.llm.device)

    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        use_cache: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The prompts of a batch, or a token of each row; arguments and result as the LLM's.

        Args:
            inputs_embeds: shape = (rows, tokens, width).
            attention_mask: shape = (rows, tokens so far), 0 for padding; `None` without any.
            position_ids: shape = (rows, tokens).
            **kwargs: the `PreallocatedKVCache`, under its name in the installed release, and what else an LLM takes.
        """
        cache = find_cache(kwargs)
        room = cache.room
        if room.length == 0:
            output = self.plain(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
            room.length = inputs_embeds.shape[1]
            return output
        if room.length >= room.size:
            cache.grow()
            mask = inputs_embeds.new_full((len(inputs_embeds), 1, 1, room.size), torch.finfo(inputs_embeds.dtype).min)
            self.inputs = (inputs_embeds.clone(), position_ids.clone(), mask)
            self.steps_in_room = 0
        embeds, positions, mask = self.inputs
        embeds.copy_(inputs_embeds)
        positions.copy_(position_ids)
        seen = mask[:, 0, 0, : room.length + 1]
        if attention_mask is None:
            seen.fill_(0.0)
        else:
            seen.masked_fill_(attention_mask.bool(), 0.0)
        room.position.fill_(room.length)
        # The first step is computed as it is: what kernels set up when they are first used can't be captured.
        if self.graphs and self.steps_in_room == 1:
            self._capture(cache)
        if self.graphs and self.steps_in_room > 0:
            self.graph.replay()
        else:
            self.output = self._run(cache)
        self.steps_in_room += 1
        room.length += 1
        return BaseModelOutputWithPast(last_hidden_state=self.output, **{CACHE: cache})

    def _run(self, cache: PreallocatedKVCache) -> torch.Tensor:
        embeds, positions, mask = self.inputs
        return self.plain(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache}
        ).last_hidden_state

    def _capture(self, cache: PreallocatedKVCache) -> None:
        """Makes `graph` of a step. Not with `torch.cuda.graph`, which empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.llm.device)
        self.stream = self.stream or torch.cuda.Stream(self.llm.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                # Other threads compute features meanwhile, which must not disturb it.
                graph.capture_begin(self.graph.pool() if self.graph else None, capture_error_mode="thread_local")
                try:
                    self.output = self._run(cache)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            logger.warning("no CUDA graph of a step of the LLM, which makes decoding slower: %s", error)
            self.graphs = False
            return
        current.wait_stream(self.stream)
        self.graph = graph
