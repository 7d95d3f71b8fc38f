"""Triton kernels of `fsmn`."""

import torch
import triton
import triton.language as tl

CONVOLUTION_TILE, CORRELATION_TILE = (32, 128), (64, 32)  # frames and channels, the fastest on an H200


@triton.jit
def _load(values, segment_ids, frame, shift, own, channel, count, width, row):
    """Loads the values `shift` frames after each frame of a tile; 0 for padding and for other rows or recordings."""
    other = frame + shift
    same = (other >= 0) & (other < count) & (frame < count) & (own != 0)
    same = same & (other // row == frame // row)
    same = same & (tl.load(segment_ids + other, mask=same, other=0) == own)
    inside = same[:, None] & (channel < width)[None, :]
    at = other.to(tl.int64)[:, None] * width + channel[None, :]
    return tl.load(values + at, mask=inside, other=0.0).to(tl.float32)


# Not specialized: otherwise Triton builds the kernel again, in the middle of a run, for numbers divisible by 16.
@triton.jit(do_not_specialize=["count", "row"])
def _convolve(
    values, weight, segment_ids, result, count, width, row, left,
    SIGN: tl.constexpr, SIZE: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own = tl.load(segment_ids + frame, mask=frame < count, other=0)
    total = _load(values, segment_ids, frame, 0, own, channel, count, width, row)
    for k in tl.static_range(SIZE):
        factor = tl.load(weight + channel * SIZE + k, mask=channel < width, other=0.0).to(tl.float32)
        total += factor[None, :] * _load(
            values, segment_ids, frame, SIGN * (k - left), own, channel, count, width, row
        )
    at = frame.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(result + at, total, mask=(frame < count)[:, None] & (channel < width)[None, :])


@triton.jit(do_not_specialize=["count", "row"])
def _correlate(
    gradient, values, segment_ids, result, count, width, row, left,
    SIZE: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own = tl.load(segment_ids + frame, mask=frame < count, other=0)
    given = _load(gradient, segment_ids, frame, 0, own, channel, count, width, row)
    for k in tl.static_range(SIZE):
        total = tl.sum(given * _load(values, segment_ids, frame, k - left, own, channel, count, width, row), axis=0)
        at = (tl.program_id(0) * SIZE + k) * width + channel
        tl.store(result + at, total, mask=channel < width)


def _grid(values: torch.Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    rows, frames, channels = values.shape
    return triton.cdiv(rows * frames, tile[0]), triton.cdiv(channels, tile[1])


def _run(values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int, sign: int) -> torch.Tensor:
    values, result = values.contiguous(), torch.empty_like(values, memory_format=torch.contiguous_format)
    rows, frames, channels = values.shape
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _convolve[_grid(values, CONVOLUTION_TILE)](
            values, weight.contiguous(), segment_ids.contiguous(), result, rows * frames, channels, frames, left,
            SIGN=sign, SIZE=weight.shape[1], FRAMES=CONVOLUTION_TILE[0], CHANNELS=CONVOLUTION_TILE[1],
        )  # fmt: skip
    return result


@torch.library.custom_op("hf_speechllm::fsmn_conv", mutates_args=())
def fsmn_conv(values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int) -> torch.Tensor:
    """Adds a weighted sum of the neighbouring frames in the same recording to each frame; 0 for padding.

    Args:
        values: shape = (rows, frames, channels).
        weight: shape = (channels, kernel size).
        segment_ids: shape = (rows, frames); 0 for padding, equal for frames of the same recording.
        left: number of frames before a frame that the kernel covers.

    Returns:
        Shape = (rows, frames, channels), dtype of the values; computed in float32.
    """
    return _run(values, weight, segment_ids, left, sign=1)


@torch.library.custom_op("hf_speechllm::fsmn_conv_backward", mutates_args=())
def fsmn_conv_backward(
    gradient: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `fsmn_conv` with respect to values and weight."""
    gradient, values = gradient.contiguous(), values.contiguous()
    rows, frames, channels = values.shape
    grid, size = _grid(values, CORRELATION_TILE), weight.shape[1]
    parts = torch.empty((grid[0], size, channels), dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        _correlate[grid](
            gradient, values, segment_ids.contiguous(), parts, rows * frames, channels, frames, left,
            SIZE=size, FRAMES=CORRELATION_TILE[0], CHANNELS=CORRELATION_TILE[1],
        )  # fmt: skip
    return _run(gradient, weight, segment_ids, left, sign=-1), parts.sum(0).t().to(weight.dtype).contiguous()


@fsmn_conv.register_fake
def _(values, weight, segment_ids, left):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@fsmn_conv_backward.register_fake
def _(gradient, values, weight, segment_ids, left):
    values = torch.empty_like(values, memory_format=torch.contiguous_format)
    return values, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    values, weight, segment_ids, ctx.left = inputs
    ctx.save_for_backward(values, weight, segment_ids)


def _backward(ctx, gradient):
    values, weight, segment_ids = ctx.saved_tensors
    return *fsmn_conv_backward(gradient, values, weight, segment_ids, ctx.left), None, None


fsmn_conv.register_autograd(_backward, setup_context=_save)
