"""The CTC head: frame-wise probabilities of tokens from the audio encoder's output, for training and alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoderLayer

from .adaptors import AudioAdaptor
from .configuration import AudioAdaptorConfig
from .ctc_configuration import CTCHeadConfig
from .gradient_checkpointing import require_gradient
from .native_families import CTC_HEAD

CTC_INPUTS = ("ctc_targets", "ctc_target_lengths")  # inputs of the model with one entry per recording


class CTCHead(PreTrainedModel):
    """Maps encoder states to log-probabilities of tokens and the blank.

    The parameters are frozen until `train_ctc_head` is called, because a loss without `ctc_targets` does not use them.

    Attributes:
        loss_weight: factor of the CTC loss beside the loss of the LLM.
        trained_alone: whether a forward pass with `ctc_targets` computes the CTC loss only, without adaptor and LLM.
    """

    config_class = CTCHeadConfig
    config: CTCHeadConfig
    main_input_name = "encoder_states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FunAsrNanoEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CTCHeadConfig):
        super().__init__(config)
        width = config.hidden_size
        if config.head_type == "transformer":
            self.decoder = AudioAdaptor._from_config(_decoder_config(config))
        else:
            layers = config.num_hidden_layers if config.head_type == "sanm" else 0
            self.layers = nn.ModuleList(FunAsrNanoEncoderLayer(config) for _ in range(layers))
        self.upsampling = nn.Linear(width, width * config.upsample_rate) if config.upsample_rate > 1 else None
        self.output = nn.Linear(width, config.vocab_size)
        self.loss_weight = 1.0
        self.trained_alone = False
        self.post_init()
        self.requires_grad_(False)

    def forward(self, encoder_states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes log-probabilities, in float32.

        Args:
            encoder_states: shape = (recordings, encoder frames, encoder width).
            mask: shape = (recordings, encoder frames), 0 for padding.

        Returns:
            Log-probabilities, shape = (recordings, frames, `vocab_size`), and the number of frames of each recording,
            shape = (recordings,); `upsample_rate` frames per encoder frame.
        """
        states = require_gradient(encoder_states.to(self.dtype), self)
        if self.config.head_type == "transformer":
            states, _ = self.decoder(states, mask)
        elif self.layers:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=states, attention_mask=mask.bool()
            )
            for layer in self.layers:
                states = layer(states, attention_mask, input_features_mask=mask)
        if self.upsampling is not None:
            states = functional.relu(self.upsampling(states)).view(len(states), -1, self.config.hidden_size)
        lengths = mask.sum(-1) * self.config.upsample_rate
        return self.output(states).float().log_softmax(-1), lengths

    def loss(
        self,
        encoder_states: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        label_lengths: torch.Tensor,
        num_items: torch.Tensor | int,
    ) -> torch.Tensor:
        """Computes the summed CTC loss of the recordings, divided by `num_items`.

        A recording with fewer frames than its labels need has no influence.

        Args:
            encoder_states, mask: see `forward`.
            labels: shape = (recordings, labels), padded on the right with any id.
            label_lengths: shape = (recordings,); -1 for recordings without a transcript.
            num_items: supervised tokens of the optimizer step.

        Returns:
            Scalar.
        """
        log_probabilities, lengths = self(encoder_states, mask)
        losses = functional.ctc_loss(
            log_probabilities.transpose(0, 1), labels, lengths, label_lengths.clamp(min=0),
            blank=self.config.blank_id, reduction="none", zero_infinity=True,
        )  # fmt: skip
        # Multiplied, not selected: every parameter then has a gradient in every step, which DDP requires.
        return (losses * (label_lengths >= 0)).sum() / num_items


def _decoder_config(config: CTCHeadConfig) -> AudioAdaptorConfig:
    return AudioAdaptorConfig(
        encoder_hidden_size=config.hidden_size,
        **{
            name: getattr(config, name)
            for name in (
                "hidden_size", "projector_hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size", "hidden_act", "hidden_dropout", "attention_dropout", "layer_norm_eps",
            )
        },
    )  # fmt: skip


def add_ctc_head(model, config: CTCHeadConfig) -> None:
    """Adds a CTC head with random weights to a model without one.

    Args:
        model: `SpeechLLMForConditionalGeneration`; its config gets `ctc_head_config`.
        config: `hidden_size` must be the width of the encoder's output.
    """
    model.config.ctc_head_config = config
    model.ctc_head = CTCHead._from_config(config).to(model.device)
    model._no_split_modules = {*model._no_split_modules, CTCHead.__name__}


def train_ctc_head(model, loss_weight: float, alone: bool) -> None:
    """Makes the parameters of the CTC head trainable.

    Args:
        model: `SpeechLLMForConditionalGeneration` with a CTC head.
        loss_weight: factor of the CTC loss beside the loss of the LLM.
        alone: whether only the head is trained, so that the loss of the LLM is not computed.
    """
    model.ctc_head.requires_grad_(True)
    model.ctc_head.loss_weight = loss_weight
    model.ctc_head.trained_alone = alone
    model.train(model.training)


def is_trained_alone(model) -> bool:
    """Whether a forward pass with `ctc_targets` computes the loss of the CTC head only."""
    return getattr(model, CTC_HEAD, None) is not None and model.ctc_head.trained_alone


def text_log_probabilities(
    log_probabilities: torch.Tensor, lengths: torch.Tensor, texts: Sequence[Sequence[int]], blank: int
) -> torch.Tensor:
    """Returns the log-probability of each text according to a CTC head: of the sum over its alignments.

    Source: Graves et al., 2006. A text with more tokens than frames can align has the probability 0.

    Args:
        log_probabilities: shape = (recordings, frames, vocabulary).
        lengths: frames of each recording, shape = (recordings,).
        texts: ids of each text, without blanks.
        blank: id of the blank.

    Returns:
        Shape = (recordings,).
    """
    ids, sizes = (value.to(lengths.device) for value in pad_ctc_targets(texts).values())
    return -functional.ctc_loss(
        log_probabilities.transpose(0, 1), ids, lengths, sizes, blank=blank, reduction="none"
    )  # fmt: skip


def pad_ctc_targets(labels: Sequence[Sequence[int] | None]) -> dict[str, torch.Tensor]:
    """Pads labels to the inputs `CTC_INPUTS` of the model.

    Args:
        labels: ids of each recording; `None` for a recording without a transcript.
    """
    lengths = [-1 if item is None else len(item) for item in labels]
    padded = torch.zeros(len(labels), max(1, *lengths), dtype=torch.long)
    for row, item in zip(padded, labels, strict=True):
        row[: len(item or ())] = torch.tensor(item or (), dtype=torch.long)
    return dict(zip(CTC_INPUTS, (padded, torch.tensor(lengths)), strict=True))
