"""The C++ kernels compute what PyTorch does in float64, to rounding, on every instruction set."""

import platform

import pytest
import torch
from network_cases import relative
from torch import nn
from torch.nn import functional as F

from guided_diffusion.accel import build as building
from guided_diffusion.accel import cpu_kernels
from guided_diffusion.unet import attend

try:
    building.compilers()
except building.KernelError as error:
    pytest.skip(str(error), allow_module_level=True)
KERNELS = cpu_kernels.load()

MISFIT = "expected float32|not a multiple of|and weights for|empty|neither resizes"
X86 = platform.machine() in ("x86_64", "AMD64")
# How weights are packed, and the largest error of a convolution by it.
WAYS = {
    "transformed": 3e-6, "taps": 3e-6, "1x1": 2e-6,
    "transformed bfloat16": 3e-2, "taps bfloat16": 3e-2, "1x1 bfloat16": 2e-2,
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def affine_of(count, channels):
    return random(count, channels, seed=2).abs() + 0.5, random(count, channels, seed=3)


def pack(weight, way, monkeypatch):
    """Pack weights in one of the ways."""
    if "bfloat16" in way and not KERNELS.has_bfloat16:
        pytest.skip("needs a processor that multiplies bfloat16 (AVX512_BF16)")
    monkeypatch.setattr(cpu_kernels, "_FEW_WEIGHTS", 10**9 if "transformed" in way else 0)
    return KERNELS.pack_weights(weight.bfloat16() if "bfloat16" in way else weight)


def convolution(maps, weight, bias=None, affine=None, resize=0, residual=None):
    """What ``convolve`` is to compute, in float64; all of it (N, H, W, C)."""
    x, padding = torch.cat(maps, dim=3).double(), weight.shape[2] // 2
    if affine:
        x = x * affine[0].double()[:, None, None] + affine[1].double()[:, None, None]
        x = F.silu(x) if padding else x
    x = x.permute(0, 3, 1, 2)
    if resize:
        x = F.interpolate(x, scale_factor=2) if resize > 0 else F.avg_pool2d(x, 2)
    out = F.conv2d(x, weight.double(), bias if bias is None else bias.double(), padding=padding)
    if residual is not None:
        out = out + F.interpolate(residual.double().permute(0, 3, 1, 2), out.shape[2:])
    return out.permute(0, 2, 3, 1)


# Many sizes, and of each size of weights every pair of: packing, resizing, normalisation, one or
# two maps, residual (0: none, 1: whole, 2: of half the height and width).
@pytest.mark.parametrize(
    ("way", "size", "count", "widths", "out", "resize", "has_affine", "residual"),
    [
        ("transformed", (1, 1), 1, (32,), 6, 0, False, 0),
        ("transformed", (4, 4), 5, (80,), 32, 0, True, 1),
        ("transformed", (5, 9), 3, (32,), 48, 1, True, 0),
        ("transformed", (33, 8), 5, (80,), 48, 0, False, 0),
        ("transformed", (12, 20), 2, (32, 96), 32, -1, True, 1),
        ("transformed", (12, 20), 2, (32,), 32, 0, False, 2),
        ("transformed", (6, 10), 2, (32, 96), 32, 1, False, 2),
        ("taps", (2, 3), 3, (64,), 48, 0, False, 0),
        ("taps", (4, 4), 1, (80,), 6, 1, False, 1),
        ("taps", (5, 9), 5, (64,), 32, 0, True, 1),
        ("taps", (18, 30), 3, (32,), 6, -1, False, 0),
        ("taps", (33, 8), 1, (144,), 1, 0, True, 0),
        ("taps", (12, 20), 2, (32, 96), 32, 0, True, 2),
        ("taps", (12, 20), 2, (32, 96), 32, 1, False, 1),
        ("transformed bfloat16", (5, 9), 5, (64,), 48, 0, False, 0),
        ("transformed bfloat16", (12, 20), 2, (32, 96), 32, 1, True, 2),
        ("taps bfloat16", (33, 8), 3, (80,), 6, 0, False, 0),
        ("taps bfloat16", (12, 20), 2, (32,), 32, -1, True, 1),
        ("1x1", (1, 1), 3, (32, 96), 80, 0, True, 1),
        ("1x1", (3, 5), 3, (32,), 16, 0, True, 0),
        ("1x1", (8, 8), 3, (32,), 3, 0, False, 1),
        ("1x1", (9, 15), 3, (32, 96), 48, 0, False, 0),
        ("1x1 bfloat16", (9, 15), 3, (32, 96), 48, 0, True, 1),
        ("1x1 bfloat16", (16, 16), 3, (32,), 3, 0, False, 0),
    ],
)
def test_a_convolution(way, size, count, widths, out, resize, has_affine, residual, monkeypatch):
    maps = [random(count, *size, width, seed=width) for width in widths]
    side = 1 if "1x1" in way else 3
    weight, bias = random(out, sum(widths), side, side, seed=1), random(out, seed=4)
    options = {"affine": affine_of(count, sum(widths)) if has_affine else None, "resize": resize}
    if residual:
        height, width = convolution(maps, weight, **options).shape[1:3]
        options["residual"] = random(count, height // residual, width // residual, out, seed=5)
    output = KERNELS.convolve(maps, pack(weight, way, monkeypatch), bias, **options)
    reference = convolution(maps, weight, bias, **options)
    assert output.shape == reference.shape
    assert relative(output, reference) < WAYS[way]


def test_the_result_may_take_the_residuals_place():
    x, weight, bias = random(2, 9, 9, 32), random(6, 32, 3, 3, seed=1), random(6)
    packed, residual = KERNELS.pack_weights(weight), random(2, 9, 9, 6, seed=5)
    reference = KERNELS.convolve([x], packed, bias, residual=residual)
    output = KERNELS.convolve([x], packed, bias, residual=residual, out=residual)
    assert output is residual
    assert torch.equal(output, reference)


@pytest.mark.parametrize("way", ["transformed", "taps", "transformed bfloat16"])
def test_neither_batch_nor_threads_change_a_bit(way, monkeypatch):
    x, bias, affine = random(5, 36, 36, 64), random(64), affine_of(5, 64)
    packed = pack(random(64, 64, 3, 3, seed=1), way, monkeypatch)
    product, norm = KERNELS.pack_weights(random(64, 64, 1, 1)), nn.GroupNorm(32, 64)
    qkv = random(5, 10, 10, 96)

    def outputs(rows=slice(None)):
        scale_shift = [part[rows] for part in affine]
        return [
            KERNELS.convolve([x[rows]], packed, bias, affine=scale_shift),
            KERNELS.convolve([x[rows]], product, bias),
            *KERNELS.group_norm([x[rows]], norm),
            KERNELS.attend(qkv[rows], 2, False),
        ]

    before, expected = torch.get_num_threads(), outputs()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, outputs(), expected))
    finally:
        torch.set_num_threads(before)
    for i in (0, 3):
        for alone, together in zip(outputs(slice(i, i + 1)), expected, strict=True):
            assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("way", ["transformed", "taps"])
def test_rounding_is_that_of_float32(way, monkeypatch):
    """Beside PyTorch's own convolution, with many channels and weights of a network's size."""
    x, weight = F.silu(random(1, 32, 32, 256)), random(64, 256, 3, 3, seed=1) / 48
    exact = convolution([x], weight)
    pytorchs = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    output = KERNELS.convolve([x], pack(weight, way, monkeypatch))
    assert (output - exact).std() < 6 * (pytorchs - exact).std()


def test_rounding_to_bfloat16_is_to_the_nearest(monkeypatch):
    """A product of 1×1 is that of the rounded numbers, summed in float32."""
    x, weight = random(2, 5, 9, 96), random(48, 96, 1, 1, seed=1)
    output = KERNELS.convolve([x], pack(weight, "1x1 bfloat16", monkeypatch))
    exact = [tensor.bfloat16().float() for tensor in (x, weight)]
    assert relative(output, convolution([exact[0]], exact[1])) < 2e-6
    x, weight = random(1, 32, 32, 256), random(64, 256, 3, 3, seed=1)
    packed, exact = pack(weight, "transformed bfloat16", monkeypatch), convolution([x], weight)
    error = (KERNELS.convolve([x], packed) - exact).std()
    # That of PyTorch's bfloat16, times about four, which the transforms cost.
    pytorchs = F.conv2d(x.permute(0, 3, 1, 2).bfloat16(), weight.bfloat16(), padding=1)
    pytorchs = (pytorchs.permute(0, 2, 3, 1) - exact).std()
    assert pytorchs < error < 6 * pytorchs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["transformed", "transformed bfloat16"])
def test_what_is_not_finite_stays_so(way, value, monkeypatch):
    x, weight = random(2, 8, 8, 32), random(32, 32, 3, 3, seed=1)
    x[1, 2, 2, 5] = value
    packed = pack(weight, way, monkeypatch)
    output = KERNELS.convolve([x], packed, torch.zeros(32), affine=affine_of(2, 32))
    assert not output[1, 2, 2].isfinite().any()
    assert output[0].isfinite().all()
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 32))
    assert not scale[1, 5].isfinite()


def middle(channels):
    """Return weights of a convolution that returns its input."""
    weight = torch.zeros(channels, channels, 3, 3)
    weight[:, :, 1, 1] = torch.eye(channels)
    return KERNELS.pack_weights(weight)


def test_silu_of_every_size():
    x = torch.linspace(-200, 200, 64 * 64 * 16).view(1, 64, 64, 16)
    affine = torch.ones(1, 16), torch.zeros(1, 16)
    output = KERNELS.convolve([x], middle(16), affine=affine)
    assert torch.allclose(output.double(), F.silu(x.double()), rtol=0, atol=2e-4)  # 1e-6 of 200
    small = x / 100
    output = KERNELS.convolve([small], middle(16), affine=affine)
    assert torch.allclose(output.double(), F.silu(small.double()), rtol=0, atol=3e-6)


def test_the_exponential_is_exact_to_rounding():
    """Where nothing but 1 / (1 + e^-x) is left: halving averages four equal values, unpadded."""
    x = torch.linspace(-20, 20, 16 * 500).view(1, 500, 1, 16)
    maps = x.expand(1, 500, 4, 16).repeat_interleave(4, dim=1).contiguous()
    affine = torch.ones(1, 16), torch.zeros(1, 16)
    for channel in (0, 7):  # alone in its tile's sums, so that others' rounding does not reach it
        alone = torch.zeros_like(maps)
        alone[..., channel] = maps[..., channel]
        output = KERNELS.convolve([alone], middle(16), affine=affine)
        expected = F.silu(alone[..., channel].double())
        centre = output[0, :, 1, channel].double()
        assert ((centre - expected[0, :, 1]) / expected[0, :, 1]).abs().max() < 3e-5


# ---- Normalisation -------------------------------------------------------------------------------


def group_norm(maps, norm, added=None, gain_offset=None):
    """The joined maps, normalised, in float64."""
    x = torch.cat(maps, dim=3).double().permute(0, 3, 1, 2)
    if added is not None:
        x = x + added.double()[:, :, None, None]
    parameters = (part.detach().double() for part in (norm.weight, norm.bias))
    x = F.group_norm(x, norm.num_groups, *parameters, norm.eps)
    if gain_offset is not None:
        gain, offset = gain_offset.double()[:, :, None, None].chunk(2, dim=1)
        x = (1 + gain) * x + offset
    return x.permute(0, 2, 3, 1)


# Every pair of: size, widths, groups, rows that are added, rows of gain and offset.
@pytest.mark.parametrize(
    ("size", "widths", "groups", "added", "gain"),
    [
        ((2, 2), (32,), 32, 0, 1),
        ((2, 2), (32, 64), 8, 1, 3),
        ((3, 5), (64,), 8, 3, 0),
        ((3, 5), (32, 64), 32, 0, 3),
        ((8, 8), (32,), 8, 1, 0),
        ((8, 8), (64,), 32, 3, 1),
        ((13, 17), (32, 64), 32, 3, 1),
        ((13, 17), (32,), 8, 3, 3),
        ((32, 32), (64,), 8, 1, 1),
        ((32, 32), (32, 64), 32, 0, 0),
    ],
)
def test_normalisation(size, widths, groups, added, gain):
    maps, total = [random(3, *size, width, seed=width) for width in widths], sum(widths)
    norm = nn.GroupNorm(groups, total).requires_grad_(False)
    norm.weight.copy_(random(total, seed=5))
    norm.bias.copy_(random(total, seed=6))
    conditions = {"added": random(added, total, seed=9) * 3} if added else {}
    if gain:
        conditions["gain_offset"] = random(gain, 2 * total, seed=7)
    scale, shift = KERNELS.group_norm(maps, norm, **conditions)
    output = torch.cat(maps, dim=3) * scale[:, None, None] + shift[:, None, None]
    assert relative(output, group_norm(maps, norm, **conditions)) < 3e-6


def test_normalisation_far_from_zero_and_of_one_huge_value():
    """The variance is not lost beside a large mean, as that of squares less the square would be."""
    far, huge = random(1, 32, 32, 64) + 1000, random(1, 16, 16, 64)
    huge[0, 0, 0] = 1e6
    for x, most in ((far, 1e-4), (huge, 3e-6)):
        scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 64))
        pairs = x.double().view(-1, 32, 2).transpose(0, 1).flatten(1)  # of channels
        expected = (pairs.var(dim=1, correction=0) + 1e-5).rsqrt().repeat_interleave(2)
        assert relative(scale[0], expected) < most


def test_normalisation_of_a_huge_constant():
    """Rounding does not take the variance below zero."""
    x = (1e8 * (1 + random(64) / 3)).expand(1, 7, 9, 64).contiguous()
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(64, 64))
    assert scale.isfinite().all()


# ---- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_order", "size", "heads", "width"),
    [
        (False, (1, 1), 1, 64),
        (True, (3, 3), 2, 48),
        (False, (8, 8), 5, 20),
        (True, (7, 11), 5, 20),
        (False, (7, 11), 4, 8),
        (True, (32, 32), 3, 32),
    ],
)
def test_attention(new_order, size, heads, width):
    qkv = random(2, *size, 3 * heads * width) * 2
    output = KERNELS.attend(qkv, heads, new_order)
    assert output.shape == (2, *size, heads * width)
    reference = attend(qkv.double().flatten(1, 2).transpose(1, 2), heads, new_order).transpose(1, 2)
    assert relative(output.flatten(1, 2), reference) < 5e-6


def test_attention_with_scores_that_overflow_unless_the_largest_is_subtracted():
    qkv = random(1, 8, 8, 96) * 30
    output = KERNELS.attend(qkv, 1, False)
    reference = attend(qkv.double().flatten(1, 2).transpose(1, 2), 1, False).transpose(1, 2)
    assert relative(output.flatten(1, 2), reference) < 1e-4
    qkv[0, 3, 4, 5] = float("nan")
    assert not KERNELS.attend(qkv, 1, False)[0, 3, 4].isfinite().any()


# ---- What is refused: a kernel would read or write beyond a tensor's memory ----------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"maps": [random(2, 8, 8, 32).double()]},
        {"maps": [random(2, 8, 8, 64)[..., ::2]]},
        {"maps": [random(2, 8, 32, 8).transpose(2, 3)]},
        {"maps": [random(2, 8, 8, 24), random(2, 8, 8, 8)]},
        {"maps": [random(2, 8, 8, 16), random(2, 8, 4, 16)]},
        {"maps": [random(2, 8, 8, 48)]},
        {"maps": [random(0, 8, 8, 32)]},
        {"maps": [random(2, 8, 8, 32).to("meta")]},
        {"maps": [random(2, 1, 8, 32)], "resize": -1},
        {"bias": random(32)},
        {"bias": random(96)[::2]},
        {"affine": (random(1, 32), random(2, 32))},
        {"affine": (random(2, 1).expand(2, 32), random(2, 32))},
        {"residual": random(2, 8, 8, 32)},
        {"residual": random(2, 3, 3, 48)},
        {"maps": [random(2, 5, 4, 32)], "residual": random(2, 1, 5, 48)},  # a quarter, not a half
        {"out": random(2, 8, 8, 16)},
        {"weight": KERNELS.pack_weights(random(48, 16, 3, 3))},
        {"weight": KERNELS.pack_weights(random(48, 32, 1, 1)), "resize": 1},
        {"weight": KERNELS.pack_weights(random(48, 32, 1, 1)), "residual": random(2, 4, 4, 48)},
    ],
)
def test_a_convolution_that_does_not_fit_is_refused(changed):
    packed = KERNELS.pack_weights(random(48, 32, 3, 3))
    right = {"maps": [random(2, 8, 8, 32)], "weight": packed, "bias": random(48)}
    assert KERNELS.convolve(**right).shape == (2, 8, 8, 48)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.convolve(**{**right, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"gain_offset": random(3, 128)},
        {"gain_offset": random(2, 256)[:, ::2]},
        {"added": random(2, 32)},
        {"added": random(1, 64).double()},
        {"norm": nn.GroupNorm(32, 32)},
        {"maps": [random(2, 4, 4, 128)[..., ::2]]},
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(changed):
    right = {"maps": [random(2, 4, 4, 64)], "norm": nn.GroupNorm(32, 64)}
    KERNELS.group_norm(**right)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.group_norm(**{**right, **changed})


def test_attention_that_does_not_fit_is_refused():
    for qkv, heads in ((random(1, 4, 4, 96), 5), (random(1, 4, 4, 32), 1)):
        with pytest.raises(ValueError, match="are not q, k and v"):
            KERNELS.attend(qkv, heads, False)
    for qkv in (random(1, 4, 4, 192)[..., ::2], random(1, 4, 4, 96).double()):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.attend(qkv, 1, False)


def test_weights_of_other_sizes_and_types_are_refused(monkeypatch):
    for weight in (random(1, 32, 2, 2), random(48, 32, 3, 1), random(16, 16, 3, 3).double()):
        with pytest.raises(ValueError, match=f"no kernels for weights|{MISFIT}"):
            KERNELS.pack_weights(weight)
    monkeypatch.setattr(KERNELS, "has_bfloat16", False)
    with pytest.raises(ValueError, match="does not multiply bfloat16"):
        KERNELS.pack_weights(random(16, 16, 3, 3).bfloat16())


@pytest.mark.parametrize("name", ["convolve", "group_norm", "attend"])
def test_a_structure_that_cpp_declares_otherwise_is_not_read(name):
    with pytest.raises(building.KernelError, match=f"{name}: expected 8 bytes, found"):
        KERNELS._run(name, x=None)


# ---- Whatever the surroundings -------------------------------------------------------------------


def test_neither_default_type_nor_strides_of_weights_matter():
    x, weight, bias = random(1, 8, 8, 64), random(32, 64, 3, 3), random(32)
    expected, before = KERNELS.convolve([x], KERNELS.pack_weights(weight), bias), torch.float32
    turned = weight.contiguous(memory_format=torch.channels_last)
    view = torch.stack([weight, weight + 9], dim=-1)[..., 0]
    torch.set_default_dtype(torch.float64)
    try:
        for own in (turned, view):
            assert torch.equal(KERNELS.convolve([x], KERNELS.pack_weights(own), bias), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(not X86, reason="names levels of x86-64")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_other_instruction_sets(level, monkeypatch, tmp_path):
    flags = [flag for flag in building._FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(building, "_FLAGS", [*flags, f"-march={level}"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    other = cpu_kernels.load.__wrapped__()
    assert not other.has_bfloat16
    x, bias = random(2, 9, 13, 96), random(48, seed=4)
    norm, weight = nn.GroupNorm(32, 96), random(48, 96, 3, 3, seed=1)
    affine = other.group_norm([x], norm)
    assert max(map(relative, affine, KERNELS.group_norm([x], norm))) < 1e-6
    for few, resize in ((0, -1), (10**9, 0), (0, 1)):
        monkeypatch.setattr(cpu_kernels, "_FEW_WEIGHTS", few)
        options = {"affine": affine, "resize": resize}
        output = other.convolve([x], other.pack_weights(weight), bias, **options)
        assert relative(output, convolution([x], weight, bias, **options)) < 3e-6
    weight = weight[:, :, :1, :1]
    output = other.convolve([x], other.pack_weights(weight), bias, affine=affine)
    assert relative(output, convolution([x], weight, bias, affine)) < 2e-6
    assert relative(other.attend(x, 2, True), KERNELS.attend(x, 2, True)) < 3e-6
