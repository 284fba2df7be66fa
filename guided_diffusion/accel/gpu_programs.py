"""The Triton programs of gpu_kernels.py; importing this needs Triton, which comes with CUDA builds.

A map is (N, pixels, C) with channels contiguous and C a multiple of 32; two stand side by side,
the second from channel ``c0`` on. A program works on a tile of BP pixels and BC channels. All
arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def load_joined(x0, x1, c0, c1, rows, channels, mask):
    """Return a tile of the joined maps; ``rows`` counts pixels over all images."""
    in_first = channels < c0
    first = tl.load(x0 + rows[:, None] * c0 + channels[None, :], mask & in_first[None, :], 0.0)
    x = first.to(tl.float32)
    if c1 > 0:
        own = channels - c0
        in_second = (own >= 0) & (own < c1)
        second = tl.load(x1 + rows[:, None] * c1 + own[None, :], mask & in_second[None, :], 0.0)
        x += second.to(tl.float32)
    return x


@triton.jit
def moments(x0, x1, c0, c1, pixels, chunks, out, BP: tl.constexpr, BC: tl.constexpr):
    """Mean and squared deviations of each channel in a chunk of BP pixels: (N, chunks, 2, C)."""
    task = tl.program_id(0).to(tl.int64)
    n, chunk = task // chunks, task % chunks
    pixel = chunk * BP + tl.arange(0, BP)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (pixel < pixels)[:, None] & (channels < c0 + c1)[None, :]
    x = load_joined(x0, x1, c0, c1, n * pixels + pixel, channels, mask)
    count = tl.minimum(pixels - chunk * BP, BP).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    squares = tl.sum(deviation * deviation, axis=0)
    own = out + task * 2 * (c0 + c1) + channels
    tl.store(own, mean, channels < c0 + c1)
    tl.store(own + c0 + c1, squares, channels < c0 + c1)


@triton.jit
def write_affine(
    mean, variance, n, channels, total, mask, weight, bias, added, added_stride, gain, offset,
    gain_stride, scale, shift, EPS: tl.constexpr, ADDED: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Store scale and shift, (N, C), of a group's channels."""
    own_scale = tl.load(weight + channels, mask, 0.0) / tl.sqrt(variance + EPS)
    own_shift = tl.load(bias + channels, mask, 0.0) - mean * own_scale
    if GAIN:
        own_gain = 1.0 + tl.load(gain + n * gain_stride + channels, mask, 0.0)
        own_scale *= own_gain
        own_shift = own_shift * own_gain
        own_shift += tl.load(offset + n * gain_stride + channels, mask, 0.0)
    if ADDED:
        own_shift += own_scale * tl.load(added + n * added_stride + channels, mask, 0.0)
    tl.store(scale + n * total + channels, own_scale, mask)
    tl.store(shift + n * total + channels, own_shift, mask)


@triton.jit
def pixels_of(chunk, pixels, PER_CHUNK: tl.constexpr):
    """Return how many pixels each chunk has, as a column."""
    return tl.minimum(pixels - chunk * PER_CHUNK, PER_CHUNK).to(tl.float32)[:, None]


@triton.jit
def affine_of_moments(
    moments, pixels, chunks, total, weight, bias, added, added_stride, gain, offset, gain_stride,
    scale, shift, PER_CHUNK: tl.constexpr, EPS: tl.constexpr, ADDED: tl.constexpr,
    GAIN: tl.constexpr, GROUPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scale and shift of one group of one image, from its chunks' moments; BC holds a group."""
    task = tl.program_id(0).to(tl.int64)
    n, group, size = task // GROUPS, task % GROUPS, total // GROUPS
    channels = group * size + tl.arange(0, BC)
    own = tl.arange(0, BC) < size
    extra = tl.zeros([BC], tl.float32)
    if ADDED:
        extra += tl.load(added + n * added_stride + channels, own, 0.0)
    sums = tl.zeros([BP, BC], tl.float32)
    for first in range(0, chunks, BP):
        chunk = first + tl.arange(0, BP)
        mask = (chunk < chunks)[:, None] & own[None, :]
        place = moments + (n * chunks + chunk)[:, None] * 2 * total + channels[None, :]
        means = tl.load(place, mask, 0.0) + extra[None, :]
        sums += tl.where(mask, means * pixels_of(chunk, pixels, PER_CHUNK), 0.0)
    numbers = pixels * size
    mean = tl.sum(tl.sum(sums, axis=0), axis=0) / numbers
    sums = tl.zeros([BP, BC], tl.float32)
    for first in range(0, chunks, BP):
        chunk = first + tl.arange(0, BP)
        mask = (chunk < chunks)[:, None] & own[None, :]
        place = moments + (n * chunks + chunk)[:, None] * 2 * total + channels[None, :]
        deviation = tl.load(place, mask, 0.0) + extra[None, :] - mean
        squares = deviation * deviation * pixels_of(chunk, pixels, PER_CHUNK)
        sums += tl.where(mask, squares + tl.load(place + total, mask, 0.0), 0.0)
    variance = tl.sum(tl.sum(sums, axis=0), axis=0) / numbers
    write_affine(
        mean, variance, n, channels, total, own, weight, bias, added, added_stride, gain, offset,
        gain_stride, scale, shift, EPS, ADDED, GAIN,
    )  # fmt: skip


@triton.jit
def affine_of_small(
    x0, x1, c0, c1, pixels, weight, bias, added, added_stride, gain, offset, gain_stride, scale,
    shift, EPS: tl.constexpr, ADDED: tl.constexpr, GAIN: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scale and shift of one group of one image, all of which is in one tile."""
    task = tl.program_id(0).to(tl.int64)
    n, group, total = task // GROUPS, (task % GROUPS).to(tl.int32), c0 + c1
    channels = tl.multiple_of(group * SIZE, ALIGN) + tl.arange(0, BC)
    own = tl.arange(0, BC) < SIZE
    pixel = tl.arange(0, BP)
    mask = (pixel < pixels)[:, None] & own[None, :]
    x = load_joined(x0, x1, c0, c1, n * pixels + pixel, channels, mask)
    if ADDED:
        x += tl.load(added + n * added_stride + channels, own, 0.0)[None, :].to(tl.float32)
    numbers = pixels * SIZE
    mean = tl.sum(tl.sum(tl.where(mask, x, 0.0), axis=0), axis=0) / numbers
    deviation = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(tl.sum(deviation * deviation, axis=0), axis=0) / numbers
    write_affine(
        mean, variance, n, channels, total, own, weight, bias, added, added_stride, gain, offset,
        gain_stride, scale, shift, EPS, ADDED, GAIN,
    )  # fmt: skip


@triton.jit
def activate(x, scale, shift, SILU: tl.constexpr):
    """Return scale x + shift, or its SiLU."""
    x = x * scale[None, :] + shift[None, :]
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def apply_affine(
    x0, x1, c0, c1, height, width, scale, shift, out, AFFINE: tl.constexpr, SILU: tl.constexpr,
    RESIZE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Normalise, activate and resize the joined maps into one, (N, H', W', C).

    RESIZE 1 doubles height and width, -1 halves them to the mean of each 2x2.
    """
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    total = c0 + c1
    own_scale, own_shift = channels.to(tl.float32) * 0.0 + 1.0, channels.to(tl.float32) * 0.0
    if AFFINE:
        own_scale = tl.load(scale + n * total + channels, channels < total, 0.0)
        own_shift = tl.load(shift + n * total + channels, channels < total, 0.0)
    first = n * height * width
    if RESIZE == 1:
        pixels = 4 * height * width
        row, column = pixel // (2 * width) // 2, pixel % (2 * width) // 2
        source = row * width + column
    elif RESIZE == -1:
        own_width = width // 2
        pixels = (height // 2) * own_width
        source = pixel // own_width * 2 * width + pixel % own_width * 2
    else:
        pixels = height * width
        source = pixel
    mask = (pixel < pixels)[:, None] & (channels < total)[None, :]
    x = load_joined(x0, x1, c0, c1, first + source, channels, mask)
    x = activate(x, own_scale, own_shift, SILU)
    if RESIZE == -1:
        for i in tl.static_range(1, 4):
            place = first + source + i // 2 * width + i % 2
            more = load_joined(x0, x1, c0, c1, place, channels, mask)
            x += activate(more, own_scale, own_shift, SILU)
        x *= 0.25
    place = out + (n * pixels + pixel)[:, None] * total + channels[None, :]
    tl.store(place, x.to(out.dtype.element_ty), mask)


@triton.jit
def add(
    h, bias, residual, out, height, width, total, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    DOUBLED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add bias and residual to ``h``; if DOUBLED, the latter has half of height and width."""
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    pixels = height * width
    mask = (pixel < pixels)[:, None] & (channels < total)[None, :]
    place = (n * pixels + pixel)[:, None] * total + channels[None, :]
    x = tl.load(h + place, mask, 0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + channels, channels < total, 0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        source = place
        if DOUBLED:
            half = pixel // width // 2 * (width // 2) + pixel % width // 2
            source = (n * (pixels // 4) + half)[:, None] * total + channels[None, :]
        x += tl.load(residual + source, mask, 0.0).to(tl.float32)
    tl.store(out + place, x.to(out.dtype.element_ty), mask)
