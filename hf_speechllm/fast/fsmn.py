"""The memory block (FSMN) of SAN-M, for packed recordings too; on a GPU a single kernel.

The block is a depthwise convolution over time, added to the attention:
`SAN-M: Memory Equipped Self-Attention for End-to-End Speech Recognition <https://arxiv.org/abs/2006.01713>`_.
torch's convolution takes a third of the time of an encoder layer.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn
from torch.nn import functional
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoFSMN

from .versions import is_tested

logger = logging.getLogger(__name__)


class FSMN(FunAsrNanoFSMN):
    """FSMN block with the weight of the block in transformers.

    Attributes:
        kernel: whether to use `fsmn_kernel.fsmn_conv` on a GPU.
    """

    kernel: bool

    def forward(self, hidden_states: torch.Tensor, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Adds a weighted sum of the neighbouring frames to each frame.

        Args:
            hidden_states: shape = (rows, frames, channels).
            input_features_mask: shape = (rows, frames); 0 for padding. In an int32 mask, each number other than 0 is
                the ID of a recording.

        Returns:
            Shape = (rows, frames, channels).
        """
        left = (self.conv.kernel_size[0] - 1) // 2
        arguments = hidden_states, self.conv.weight.squeeze(1), input_features_mask, left
        if hidden_states.is_cuda and self.kernel:
            from .fsmn_kernel import fsmn_conv

            result = fsmn_conv(*arguments)
        elif input_features_mask.dtype == torch.int32:
            result = fsmn_conv_torch(*arguments)
        else:
            return super().forward(hidden_states, input_features_mask)
        return functional.dropout(result, p=self.dropout, training=self.training)


def use_fsmn(model: nn.Module) -> None:
    """Replaces the FSMN blocks of transformers' SAN-M encoder by `FSMN`; weights and names do not change."""
    if not is_tested("FSMN kernel"):
        return
    kernel = torch.cuda.is_available() and kernel_works()
    for module in model.modules():
        if type(module) is FunAsrNanoFSMN:
            module.__class__ = FSMN
        if isinstance(module, FSMN):
            module.kernel = kernel


def use_transformers_fsmn(model: nn.Module) -> None:
    """Undoes `use_fsmn`."""
    for module in model.modules():
        if type(module) is FSMN:
            module.__class__ = FunAsrNanoFSMN


@functools.cache
def kernel_works() -> bool:
    """Whether Triton is installed and can build a kernel; Triton needs a C compiler."""
    try:
        from .fsmn_kernel import fsmn_conv

        values = torch.zeros(1, 1, 1, device="cuda")
        fsmn_conv(values, values[0], values[0], 0)
    except Exception as error:  # Triton raises many kinds of errors: of the compiler, the linker, the driver
        logger.warning("torch computes the FSMN blocks of the encoder, which is slower: Triton fails: %s", error)
        return False
    return True


def fsmn_conv_torch(values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int) -> torch.Tensor:
    """Computes the same as `fsmn_kernel.fsmn_conv` with torch operations, on any device.

    Args:
        values: shape = (rows, frames, channels).
        weight: shape = (channels, kernel size).
        segment_ids: shape = (rows, frames); 0 for padding, equal for frames of the same recording.
        left: number of frames before a frame that the kernel covers.
    """
    segment_ids = segment_ids.unsqueeze(-1)
    right = weight.shape[1] - 1 - left
    padded, neighbours = (functional.pad(item, (0, 0, left, right)) for item in (values, segment_ids))
    result = values * (segment_ids != 0)
    for shift, factor in enumerate(weight.unbind(1)):
        frames = slice(shift, shift + values.shape[1])
        same_segment = (neighbours[:, frames] == segment_ids) & (segment_ids != 0)
        result = result + factor.to(values.dtype) * padded[:, frames] * same_segment
    return result
