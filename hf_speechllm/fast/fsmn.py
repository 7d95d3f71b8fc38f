"""SAN-M's memory block for recordings that lie one after the other in a row, and, on a GPU, in one kernel.

The block (FSMN) is a convolution over time, of each channel by itself, that stands beside the attention:
`SAN-M: Memory Equipped Self-Attention for End-to-End Speech Recognition <https://arxiv.org/abs/2006.01713>`_.
torch's own takes a third of the time of an encoder layer.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn
from torch.nn import functional
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoFSMN

logger = logging.getLogger(__name__)


class MemoryBlock(FunAsrNanoFSMN):
    """transformers' block, with the same weight.

    Attributes:
        kernel: whether to use that of `memory_kernel` on a GPU.
    """

    kernel: bool

    def forward(self, hidden_states: torch.Tensor, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Adds to each frame a weighted sum of its neighbours.

        Args:
            hidden_states: shape = (rows, frames, channels).
            input_features_mask: shape = (rows, frames); 0 for padding. If of 32-bit integers, frames with different
                numbers belong to different recordings.

        Returns:
            Shape = (rows, frames, channels).
        """
        left = (self.conv.kernel_size[0] - 1) // 2
        arguments = hidden_states, self.conv.weight.squeeze(1), input_features_mask, left
        if hidden_states.is_cuda and self.kernel:
            from .fsmn_kernel import remember

            result = remember(*arguments)
        elif input_features_mask.dtype == torch.int32:
            result = remember_in_torch(*arguments)
        else:
            return super().forward(hidden_states, input_features_mask)
        return functional.dropout(result, p=self.dropout, training=self.training)


def use_memory_blocks(model: nn.Module) -> None:
    """Has an encoder of transformers compute its memory blocks as `MemoryBlock` does."""
    kernel = torch.cuda.is_available() and kernel_works()
    for module in model.modules():
        if type(module) is FunAsrNanoFSMN:
            module.__class__ = MemoryBlock
        if isinstance(module, MemoryBlock):
            module.kernel = kernel


@functools.cache
def kernel_works() -> bool:
    """Whether Triton is there and can build a kernel, for which it needs a C compiler."""
    try:
        from .fsmn_kernel import remember

        values = torch.zeros(1, 1, 1, device="cuda")
        remember(values, values[0], values[0], 0)
    except Exception as error:  # of Triton, the compiler, the linker, the driver
        logger.warning("the encoder's memory blocks are computed by torch, which is slower: Triton fails: %s", error)
        return False
    return True


def remember_in_torch(values: torch.Tensor, weight: torch.Tensor, numbers: torch.Tensor, left: int) -> torch.Tensor:
    """What `memory_kernel.remember` computes, on any device.

    Args:
        values: shape = (rows, frames, channels).
        weight: shape = (channels, kernel size).
        numbers: shape = (rows, frames); 0 for padding, equal for frames of the same recording.
        left: frames that the kernel reaches back.
    """
    numbers = numbers.unsqueeze(-1)
    right = weight.shape[1] - 1 - left
    padded, neighbours = (functional.pad(item, (0, 0, left, right)) for item in (values, numbers))
    result = values * (numbers != 0)
    for shift, factor in enumerate(weight.unbind(1)):
        frames = slice(shift, shift + values.shape[1])
        near = (neighbours[:, frames] == numbers) & (numbers != 0)
        result = result + factor.to(values.dtype) * padded[:, frames] * near
    return result
