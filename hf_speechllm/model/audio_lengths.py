"""Numbers of encoder frames and audio tokens of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOW_FRAME_RATE = 8  # with `use_low_frame_rate`, the LLM receives the first 1/8 of the adaptor's frames
Convolution = Sequence[int]  # kernel, stride, padding
MAX_KERNEL, MAX_WINDOW = 10_000, 100_000


def after_convolutions(length: Any, convolutions: Sequence[Convolution], window: int = 0) -> Any:
    """Returns the length after strided convolutions over time.

    Args:
        length: number of input frames or samples; an integer, or an integer tensor.
        convolutions: kernel, stride and padding of each convolution.
        window: if positive, the convolutions run on windows of this length, separately.
    """
    if window:
        whole = after_convolutions(window, convolutions)
        return length // window * whole + after_convolutions(length % window, convolutions)
    for kernel, stride, padding in convolutions:
        length = (length + 2 * padding - kernel) // stride + 1
    return length


def num_audio_tokens(num_frames: int, downsample_rate: int, use_low_frame_rate: bool) -> int:
    """Returns the number of audio tokens of a recording.

    Args:
        num_frames: encoder frames.
        downsample_rate: encoder frames per adaptor frame.
        use_low_frame_rate: whether only the first `ceil(n / 8)` adaptor frames are kept. The original computes this
            number as the output length of three strided convolutions; the results agree for every length.
    """
    tokens = -(-num_frames // downsample_rate)
    return -(-tokens // LOW_FRAME_RATE) if use_low_frame_rate else tokens


def check_convolutions(convolutions: Any, window: Any) -> None:
    """Checks values from a processor's file.

    Raises:
        ValueError: if a value has a wrong type or an impossible value.
    """
    for convolution in [] if convolutions is None else convolutions if isinstance(convolutions, list) else [None]:
        numbers = convolution if isinstance(convolution, (list, tuple)) and len(convolution) == 3 else [None]
        if not all(type(number) is int and 0 <= number <= MAX_KERNEL for number in numbers) or 0 in numbers[:2]:
            raise ValueError(
                f"encoder_convolutions is {str(convolutions)[:50]!r}; it must be a list of [kernel, stride, padding]"
            )
    if type(window) is not int or not 0 <= window <= MAX_WINDOW:
        raise ValueError(f"encoder_window is {str(window)[:50]!r}; it must be a number of frames up to {MAX_WINDOW}")
