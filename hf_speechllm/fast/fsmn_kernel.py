"""The kernels of `fsmn`, in Triton."""

import torch
import triton
import triton.language as tl

CONVOLVED, CORRELATED = (32, 128), (64, 32)  # frames and channels of a tile, the fastest on an H200


@triton.jit
def _load(values, segment_ids, frame, shift, own, channel, count, width, row):
    """A tile's values `shift` frames away, zero where another row or recording, or padding, lies there."""
    other = frame + shift
    near = (other >= 0) & (other < count) & (frame < count) & (own != 0)
    near = near & (other // row == frame // row)
    near = near & (tl.load(segment_ids + other, mask=near, other=0) == own)
    inside = near[:, None] & (channel < width)[None, :]
    at = other.to(tl.int64)[:, None] * width + channel[None, :]
    return tl.load(values + at, mask=inside, other=0.0).to(tl.float32)


# Not specialized: a kernel is else built anew, in the middle of a run, for segment_ids that 16 divides.
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
    with torch.cuda.device_of(values):  # Triton takes the current one
        _convolve[_grid(values, CONVOLVED)](
            values, weight.contiguous(), segment_ids.contiguous(), result, rows * frames, channels, frames, left,
            SIGN=sign, SIZE=weight.shape[1], FRAMES=CONVOLVED[0], CHANNELS=CONVOLVED[1],
        )  # fmt: skip
    return result


@torch.library.custom_op("hf_speechllm::fsmn_conv", mutates_args=())
def fsmn_conv(values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int) -> torch.Tensor:
    """Adds to each frame a weighted sum of its neighbours in the same recording; 0 where padding is.

    Args:
        values: shape = (rows, frames, channels).
        weight: shape = (channels, kernel size).
        segment_ids: shape = (rows, frames); 0 for padding, equal for frames of the same recording.
        left: frames that the kernel reaches back.

    Returns:
        Shape = (rows, frames, channels); computed in float32, in the dtype of the values.
    """
    return _run(values, weight, segment_ids, left, sign=1)


@torch.library.custom_op("hf_speechllm::fsmn_conv_backward", mutates_args=())
def fsmn_conv_backward(
    gradient: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, segment_ids: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `remember` for values and weight."""
    gradient, values = gradient.contiguous(), values.contiguous()
    rows, frames, channels = values.shape
    grid, size = _grid(values, CORRELATED), weight.shape[1]
    parts = torch.empty((grid[0], size, channels), dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        _correlate[grid](
            gradient, values, segment_ids.contiguous(), parts, rows * frames, channels, frames, left,
            SIZE=size, FRAMES=CORRELATED[0], CHANNELS=CORRELATED[1],
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
