"""Audio adaptors: map encoder frames to embeddings of the LLM's width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoderLayer

from .configuration import AudioAdaptorConfig
from .packing import PaddingFreeBatch


class AudioAdaptor(PreTrainedModel):
    """Stacks `downsample_rate` frames and projects them to the LLM's width; type `transformer` adds attention blocks.

    The original is `EncoderProjector...Transformer` in FunASR's `models/llm_asr/adaptor.py`. The adaptor is a
    `PreTrainedModel` so that transformers resolves its attention implementation. A plain module would silently attend
    to padding.
    """

    config_class = AudioAdaptorConfig
    config: AudioAdaptorConfig
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FunAsrNanoEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AudioAdaptorConfig):
        super().__init__(config)
        stacked = config.encoder_hidden_size * config.downsample_rate
        self.linear1 = nn.Linear(stacked, config.projector_hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear2 = nn.Linear(config.projector_hidden_size, config.hidden_size)
        blocks = config.num_hidden_layers if config.adaptor_type == "transformer" else 0
        self.blocks = nn.ModuleList(FunAsrNanoEncoderLayer(config, use_fsmn=False) for _ in range(blocks))
        self.post_init()

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns encoder frames into audio tokens.

        Args:
            hidden_states: shape = (batch, encoder frames, encoder width).
            mask: shape = (batch, encoder frames); 1 for frames of the recording, 0 for padding.
            positions: `packing.non_padding_positions(mask)`, to compute padding-free; ignored if frames are stacked.

        Returns:
            Audio tokens, shape = (batch, tokens, LLM width), and their lengths, shape = (batch,): `ceil(frames / k)`.
        """
        # A checkpoint may store each part in a different dtype. `dtype` ignores the integers of quantised weights.
        hidden_states = hidden_states.to(self.dtype)
        k = self.config.downsample_rate
        lengths = (mask.sum(-1) + k - 1) // k
        if positions is not None and k == 1:
            packing = PaddingFreeBatch(mask, positions)
            hidden_states = self.linear2(self.act(self.linear1(packing.unpad(hidden_states))))
            for block in self.blocks:
                hidden_states = block(hidden_states, None, **packing.attention)
            return packing.pad(hidden_states), lengths
        if k > 1:
            # Zeroes the padding: the last stack of a short recording must be the same alone and in a batch.
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
            hidden_states = functional.pad(hidden_states, (0, 0, 0, -hidden_states.shape[1] % k))
            hidden_states = hidden_states.reshape(hidden_states.shape[0], -1, hidden_states.shape[2] * k)
        hidden_states = self.linear2(self.act(self.linear1(hidden_states)))
        if self.blocks:
            valid = torch.arange(hidden_states.shape[1], device=lengths.device) < lengths.unsqueeze(-1)
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=valid
            )
            for block in self.blocks:
                hidden_states = block(hidden_states, attention_mask)
        return hidden_states, lengths
