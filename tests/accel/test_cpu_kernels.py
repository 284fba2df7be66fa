"""The C++ kernels compute what PyTorch does in float64, to rounding, on every instruction set."""

import ctypes
import platform

import pytest
import torch
from kernel_cases import affine_of, convolution, group_norm, pointwise, random
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

MISFIT = "expected float32|not a multiple of|and weights for|empty|different strides"
X86 = platform.machine() in ("x86_64", "AMD64")
needs_bfloat16 = pytest.mark.skipif(
    not KERNELS.has_bfloat16, reason="needs a processor that multiplies bfloat16 (AVX512_BF16)"
)
# How weights are packed, and the largest error of a convolution by it.
TRANSFORMED, TAPS = ("transformed", 3e-6), ("taps", 3e-6)
BFLOAT16 = pytest.param(("transformed bfloat16", 3e-2), marks=needs_bfloat16)
BFLOAT16_TAPS = pytest.param(("taps bfloat16", 3e-2), marks=needs_bfloat16)


def pack(weight, way, monkeypatch):
    """Pack weights in one of the ways."""
    monkeypatch.setattr(cpu_kernels, "_FEW_WEIGHTS", 10**9 if "transformed" in way[0] else 0)
    return KERNELS.pack_weights(weight.bfloat16() if "bfloat16" in way[0] else weight)


@pytest.mark.parametrize(
    ("way", "size", "count", "channels", "out"),
    [
        (TRANSFORMED, (1, 1), 1, 32, 6),
        (TAPS, (2, 3), 3, 64, 48),
        (TRANSFORMED, (4, 4), 5, 80, 32),
        (TAPS, (4, 4), 1, 80, 6),
        (TRANSFORMED, (5, 9), 3, 32, 48),
        (TAPS, (5, 9), 5, 64, 32),
        (TRANSFORMED, (16, 16), 1, 64, 32),
        (TAPS, (18, 30), 3, 32, 6),
        (TRANSFORMED, (33, 8), 5, 80, 48),
        (TAPS, (33, 8), 1, 144, 1),
        (BFLOAT16.values[0], (5, 9), 5, 64, 48),
        (BFLOAT16_TAPS.values[0], (33, 8), 3, 80, 6),
    ],
)
def test_a_convolution_of_any_size(way, size, count, channels, out, monkeypatch):
    if "bfloat16" in way[0] and not KERNELS.has_bfloat16:
        pytest.skip("needs a processor that multiplies bfloat16 (AVX512_BF16)")
    x, weight = random(count, *size, channels), random(out, channels, 3, 3, seed=1)
    bias = random(out, seed=4)
    output = KERNELS.convolve([x], pack(weight, way, monkeypatch), bias)
    assert output.shape == (count, *size, out)
    assert relative(output, convolution([x], weight, bias)) < way[1]


# Every pair of: how weights are packed, resizing, normalisation, widths of maps, residual.
@pytest.mark.parametrize(
    ("way", "resize", "has_affine", "widths", "residual"),
    [
        (TRANSFORMED, -1, True, (32, 96), "whole"),
        (TRANSFORMED, 0, False, (32,), "half"),
        (TRANSFORMED, 1, True, (32,), "none"),
        (TAPS, -1, False, (32,), "none"),
        (TAPS, 0, True, (32, 96), "half"),
        (TAPS, 1, False, (32, 96), "whole"),
        (TRANSFORMED, 0, True, (32, 96), "none"),
        (TAPS, 0, True, (32,), "whole"),
        (TRANSFORMED, 1, False, (32, 96), "half"),
        pytest.param(*(BFLOAT16.values[0], 1, True, (32, 96), "half"), marks=needs_bfloat16),
        pytest.param(*(BFLOAT16_TAPS.values[0], -1, True, (32,), "whole"), marks=needs_bfloat16),
    ],
)
def test_what_comes_before_and_after_it(way, resize, has_affine, widths, residual, monkeypatch):
    maps = [random(2, 12, 20, width, seed=width) for width in widths]
    weight, bias = random(32, sum(widths), 3, 3, seed=1), random(32, seed=4)
    options = {"affine": affine_of(2, sum(widths)) if has_affine else None, "resize": resize}
    if residual != "none":
        height, width = convolution(maps, weight, bias, **options).shape[1:3]
        divisor = 2 if residual == "half" else 1
        options["residual"] = random(2, height // divisor, width // divisor, 32, seed=5)
    output = KERNELS.convolve(maps, pack(weight, way, monkeypatch), bias, **options)
    assert relative(output, convolution(maps, weight, bias, **options)) < way[1]


def test_the_result_may_take_the_residuals_place():
    x, weight, bias = random(2, 9, 9, 32), random(6, 32, 3, 3, seed=1), random(6)
    packed, residual = KERNELS.pack_weights(weight), random(2, 9, 9, 6, seed=5)
    reference = KERNELS.convolve([x], packed, bias, residual=residual)
    output = KERNELS.convolve([x], packed, bias, residual=residual, out=residual)
    assert output is residual
    assert torch.equal(output, reference)


@pytest.mark.parametrize("way", [TRANSFORMED, TAPS, BFLOAT16])
def test_neither_batch_nor_threads_change_a_bit(way, monkeypatch):
    x, bias, affine = random(5, 36, 36, 64), random(64), affine_of(5, 64)
    packed = pack(random(64, 64, 3, 3, seed=1), way, monkeypatch)
    product, norm = KERNELS.pack_weights(random(64, 64, 1, 1)), nn.GroupNorm(32, 64)
    qkv = random(5, 10, 10, 96)

    def outputs(rows=slice(None)):
        scale_shift = [part[rows] for part in affine]
        return [
            KERNELS.convolve([x[rows]], packed, bias, affine=scale_shift),
            KERNELS.pointwise([x[rows]], product, bias),
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


@pytest.mark.parametrize("way", [TRANSFORMED, TAPS])
def test_rounding_is_that_of_float32(way, monkeypatch):
    """Beside PyTorch's own convolution, with many channels and weights of a network's size."""
    x, weight = F.silu(random(1, 32, 32, 256)), random(64, 256, 3, 3, seed=1) / 48
    bias = torch.zeros(64)
    exact = convolution([x], weight, bias)
    pytorchs = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    output = KERNELS.convolve([x], pack(weight, way, monkeypatch), bias)
    assert (output - exact).std() < 6 * (pytorchs - exact).std()


@needs_bfloat16
def test_rounding_to_bfloat16_is_to_the_nearest():
    """A product of 1×1 is that of the rounded numbers, summed in float32."""
    x, weight, bias = random(2, 5, 9, 96), random(48, 96, 1, 1, seed=1), random(48)
    exact = [tensor.bfloat16().float() for tensor in (x, weight)]
    output = KERNELS.pointwise([x], KERNELS.pack_weights(weight.bfloat16()), bias)
    assert relative(output, pointwise([exact[0]], exact[1], bias)) < 2e-6
    weight = random(64, 256, 3, 3, seed=1)
    x = random(1, 32, 32, 256)
    packed = KERNELS.pack_weights(weight.bfloat16())
    error = KERNELS.convolve([x], packed) - convolution([x], weight, torch.zeros(64))
    # That of PyTorch's bfloat16, times about four, which the transforms cost.
    pytorchs = F.conv2d(x.permute(0, 3, 1, 2).bfloat16(), weight.bfloat16(), padding=1)
    pytorchs = pytorchs.permute(0, 2, 3, 1) - convolution([x], weight, torch.zeros(64))
    assert pytorchs.std() < error.std() < 6 * pytorchs.std()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", [TRANSFORMED, BFLOAT16])
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
        conditions |= {"gain": random(gain, total, seed=7), "offset": random(gain, total, seed=8)}
    scale, shift = KERNELS.group_norm(maps, norm, **conditions)
    output = torch.cat(maps, dim=3) * scale[:, None, None] + shift[:, None, None]
    assert relative(output, group_norm(maps, norm, **conditions)) < 3e-6


def expected_scale(x):
    """Return 1 / sqrt(variance + eps) of each pair of channels of one map."""
    pairs = x.double().view(-1, 32, 2).transpose(0, 1).flatten(1)
    return (pairs.var(dim=1, correction=0) + 1e-5).rsqrt().repeat_interleave(2)


def test_normalisation_far_from_zero():
    """The variance is not lost beside a large mean, as that of squares less the square would be."""
    x = random(1, 32, 32, 64) + 1000
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 64))
    assert relative(scale[0], expected_scale(x)) < 1e-4


def test_normalisation_of_a_map_with_one_huge_value():
    x = random(1, 16, 16, 64)
    x[0, 0, 0] = 1e6
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 64))
    assert relative(scale[0], expected_scale(x)) < 3e-6


def test_normalisation_of_a_huge_constant():
    """Rounding does not take the variance below zero."""
    x = (1e8 * (1 + random(64) / 3)).expand(1, 7, 9, 64).contiguous()
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(64, 64))
    assert scale.isfinite().all()


# ---- Pointwise convolutions and attention --------------------------------------------------------


# Every pair of: size, widths, outputs, normalisation, residual.
@pytest.mark.parametrize(
    ("size", "widths", "out", "has_affine", "has_residual"),
    [
        ((1, 1), (32,), 3, False, False),
        ((1, 1), (32, 96), 80, True, True),
        ((3, 5), (32,), 16, True, False),
        ((3, 5), (32, 96), 48, False, True),
        ((8, 8), (32,), 80, False, True),
        ((8, 8), (32, 96), 3, True, False),
        ((9, 15), (32, 96), 16, False, True),
        ((9, 15), (32,), 48, True, False),
        ((16, 16), (32,), 3, True, True),
        ((16, 16), (32, 96), 80, False, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pointwise_convolution(size, widths, out, has_affine, has_residual, dtype):
    if dtype == torch.bfloat16 and not KERNELS.has_bfloat16:
        pytest.skip("needs a processor that multiplies bfloat16 (AVX512_BF16)")
    maps = [random(3, *size, width, seed=width) for width in widths]
    weight, bias = random(out, sum(widths), 1, 1, seed=1), random(out, seed=4)
    options = {"affine": affine_of(3, sum(widths))} if has_affine else {}
    options |= {"residual": random(3, *size, out, seed=5)} if has_residual else {}
    output = KERNELS.pointwise(maps, KERNELS.pack_weights(weight.type(dtype)), bias, **options)
    most = 2e-6 if dtype == torch.float32 else 2e-2
    assert relative(output, pointwise(maps, weight, bias, **options)) < most


@pytest.mark.parametrize(
    ("new_order", "size", "heads", "width"),
    [
        (False, (1, 1), 1, 64),
        (True, (1, 1), 4, 8),
        (False, (3, 3), 3, 32),
        (True, (3, 3), 2, 48),
        (False, (8, 8), 5, 20),
        (True, (8, 8), 1, 64),
        (False, (7, 11), 4, 8),
        (True, (7, 11), 5, 20),
        (False, (32, 32), 2, 48),
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
        {"weight": KERNELS.pack_weights(random(48, 32, 1, 1))},
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
        {"maps": [random(2, 8, 8, 48)]},
        {"maps": [random(2, 0, 8, 32)]},
        {"bias": random(32)},
        {"affine": (random(1, 32), random(2, 32))},
        {"residual": random(2, 8, 8, 32)},
        {"weight": KERNELS.pack_weights(random(48, 32, 3, 3))},
    ],
)
def test_a_pointwise_convolution_that_does_not_fit_is_refused(changed):
    packed = KERNELS.pack_weights(random(48, 32, 1, 1))
    right = {"maps": [random(2, 8, 8, 32)], "weight": packed, "bias": random(48)}
    assert KERNELS.pointwise(**right).shape == (2, 8, 8, 48)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.pointwise(**{**right, **changed})


def test_a_normalisation_that_does_not_fit_is_refused():
    x, norm = random(2, 4, 4, 64), nn.GroupNorm(32, 64)
    KERNELS.group_norm([x], norm)
    rows = random(3, 64)
    for gain in ((rows, rows), (rows[:2], rows[:1]), (rows[:2, ::2], rows[:2, ::2])):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.group_norm([x], norm, gain=gain[0], offset=gain[1])
    for alone in ({"gain": rows[:1]}, {"offset": rows[:1]}):
        with pytest.raises(ValueError, match="given together"):
            KERNELS.group_norm([x], norm, **alone)
    for added in (rows, rows[:1, :32], rows[:1].double()):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.group_norm([x], norm, added=added)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.group_norm([x], nn.GroupNorm(32, 32))
    norm.weight = nn.Parameter(torch.ones(1).expand(64), requires_grad=False)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.group_norm([x], norm)


def test_attention_that_does_not_fit_is_refused():
    for qkv, heads in ((random(1, 4, 4, 96), 5), (random(1, 4, 4, 32), 1)):
        with pytest.raises(ValueError, match="are not q, k and v"):
            KERNELS.attend(qkv, heads, False)
    for qkv in (random(1, 4, 4, 192)[..., ::2], random(1, 4, 4, 96).double()):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.attend(qkv, 1, False)


@pytest.mark.parametrize("shape", [(1, 32, 2, 2), (48, 32, 3, 1)])
def test_weights_of_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="no kernels for weights"):
        KERNELS.pack_weights(random(*shape))


def test_weights_of_other_types_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.pack_weights(random(16, 16, 3, 3).double())
    monkeypatch.setattr(type(KERNELS), "has_bfloat16", False)
    with pytest.raises(ValueError, match="does not multiply bfloat16"):
        KERNELS.pack_weights(random(16, 16, 3, 3).bfloat16())


@pytest.mark.parametrize("structure", cpu_kernels._STRUCTURES)
def test_a_structure_that_cpp_declares_otherwise_is_found_at_loading(structure, monkeypatch):
    longer = type(structure.__name__, (structure,), {"_fields_": [("more", ctypes.c_int64)]})
    changed = [longer if each is structure else each for each in cpu_kernels._STRUCTURES]
    monkeypatch.setattr(cpu_kernels, "_STRUCTURES", changed)
    with pytest.raises(building.KernelError, match=f"{structure.__name__}: expected .* bytes"):
        cpu_kernels.load.__wrapped__()


# ---- Whatever the surroundings -------------------------------------------------------------------


def test_neither_default_type_nor_strides_of_weights_matter():
    x, weight, bias = random(1, 8, 8, 64), random(32, 64, 3, 3), random(32)
    expected, before = KERNELS.convolve([x], KERNELS.pack_weights(weight), bias), torch.float32
    turned = weight.contiguous(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(KERNELS.convolve([x], KERNELS.pack_weights(turned), bias), expected)
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
    output = other.pointwise([x], other.pack_weights(weight), bias, affine=affine)
    assert relative(output, pointwise([x], weight, bias, affine)) < 2e-6
    assert relative(other.attend(x, 2, True), KERNELS.attend(x, 2, True)) < 3e-6
