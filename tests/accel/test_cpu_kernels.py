"""The C++ kernels compute what PyTorch does in float64, to rounding, on every instruction set."""

import ctypes
import functools
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_cases import affine_of, convolution, pointwise, random
from network_cases import relative
from torch import nn
from torch.nn import functional as F

from guided_diffusion.accel import build as building
from guided_diffusion.accel import cpu_kernels
from guided_diffusion.unet import attend

try:
    building._compilers()
except building.KernelError as error:
    pytest.skip(str(error), allow_module_level=True)
KERNELS = cpu_kernels.load()

MISFIT = "expected float32|not a multiple of|and weights for|nothing is left|lie differently"
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(params=["transformed", "as they are"])
def pack(request, monkeypatch):
    """Pack weights in one of the two ways."""
    few = 10**9 if request.param == "transformed" else 0
    monkeypatch.setattr(cpu_kernels, "_FEW_WEIGHTS", few)
    return KERNELS.pack_weights


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 9), (16, 16), (18, 30), (33, 8)])
@pytest.mark.parametrize(("count", "channels", "out"), [(1, 32, 6), (3, 64, 48), (5, 80, 32)])
def test_a_convolution_of_any_size(pack, size, count, channels, out):
    x, weight = random(count, *size, channels), random(out, channels, 3, 3, seed=1)
    bias = random(out, seed=4)
    output = KERNELS.convolve([x], pack(weight), bias)
    assert output.shape == (count, *size, out)
    assert relative(output, convolution([x], weight, bias)) < 3e-6


@pytest.mark.parametrize("resize", [-1, 0, 1])
@pytest.mark.parametrize("has_affine", [False, True])
@pytest.mark.parametrize("widths", [(32,), (32, 96)])
def test_what_comes_before_and_after_it(pack, resize, has_affine, widths):
    maps = [random(2, 12, 20, width, seed=width) for width in widths]
    weight, bias = random(32, sum(widths), 3, 3, seed=1), random(32, seed=4)
    options = {"affine": affine_of(2, sum(widths)) if has_affine else None, "resize": resize}
    plain = convolution(maps, weight, bias, **options)
    sizes = [plain.shape]
    if resize >= 0:
        sizes.append((2, plain.shape[1] // 2, plain.shape[2] // 2, 32))
    for shape in sizes:
        residual = random(*shape, seed=5)
        output = KERNELS.convolve(maps, pack(weight), bias, residual=residual, **options)
        reference = convolution(maps, weight, bias, residual=residual, **options)
        assert relative(output, reference) < 3e-6
    output = KERNELS.convolve(maps, pack(weight), bias, **options)
    assert relative(output, plain) < 3e-6


def test_the_result_may_take_the_residuals_place(pack):
    x, weight, bias = random(2, 9, 9, 32), random(6, 32, 3, 3, seed=1), random(6)
    residual = random(2, 9, 9, 6, seed=5)
    reference = KERNELS.convolve([x], pack(weight), bias, residual=residual)
    output = KERNELS.convolve([x], pack(weight), bias, residual=residual, out=residual)
    assert output is residual
    assert torch.equal(output, reference)


def test_neither_batch_nor_threads_change_a_bit(pack):
    x, weight, bias = random(5, 36, 36, 64), random(64, 64, 3, 3, seed=1), random(64)
    affine, norm = affine_of(5, 64), nn.GroupNorm(32, 64)
    packed, before = pack(weight), torch.get_num_threads()
    expected = KERNELS.convolve([x], packed, bias, affine=affine)
    scale, shift = KERNELS.group_norm([x], norm)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(KERNELS.convolve([x], packed, bias, affine=affine), expected)
            assert torch.equal(KERNELS.group_norm([x], norm)[0], scale)
    finally:
        torch.set_num_threads(before)
    for i, image in enumerate(x.split(1)):
        own = [part[i : i + 1] for part in affine]
        assert torch.equal(KERNELS.convolve([image], packed, bias, affine=own)[0], expected[i])
        assert torch.equal(KERNELS.group_norm([image], norm)[1][0], shift[i])


def test_rounding_is_that_of_float32(pack):
    """Beside PyTorch's own convolution, with many channels and weights of a network's size."""
    x, weight = F.silu(random(1, 32, 32, 256)), random(64, 256, 3, 3, seed=1) / 48
    bias = torch.zeros(64)
    exact = convolution([x], weight, bias)
    own = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    output = KERNELS.convolve([x], pack(weight), bias)
    assert (output - exact).std() < 6 * (own - exact).std()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x, weight = random(2, 8, 8, 32), random(32, 32, 3, 3, seed=1)
    x[1, 2, 2, 5] = value
    packed = KERNELS.pack_weights(weight)
    output = KERNELS.convolve([x], packed, torch.zeros(32), affine=affine_of(2, 32))
    assert not output[1, 2, 2].isfinite().any()
    assert output[0].isfinite().all()
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 32))
    assert not scale[1, 5].isfinite()


def test_silu_of_every_size(pack):
    """Through a convolution that returns the middle of its input."""
    x = torch.linspace(-200, 200, 64 * 64 * 16).view(1, 64, 64, 16)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    affine = torch.ones(1, 16), torch.zeros(1, 16)
    output = KERNELS.convolve([x], pack(weight), affine=affine)
    assert torch.allclose(output.double(), F.silu(x.double()), rtol=0, atol=2e-4)  # 1e-6 of 200
    small = x / 100
    output = KERNELS.convolve([small], pack(weight), affine=affine)
    assert torch.allclose(output.double(), F.silu(small.double()), rtol=0, atol=3e-6)


def test_the_exponential_is_exact_to_rounding():
    """Where nothing but 1 / (1 + e^-x) is left: halving averages four equal values, unpadded."""
    x = torch.linspace(-20, 20, 16 * 500).view(1, 500, 1, 16)
    maps = x.expand(1, 500, 4, 16).repeat_interleave(4, dim=1).contiguous()
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    affine = torch.ones(1, 16), torch.zeros(1, 16)
    for channel in (0, 7):  # alone in its tile's sums, so that others' rounding does not reach it
        own = torch.zeros_like(maps)
        own[..., channel] = maps[..., channel]
        output = KERNELS.convolve([own], KERNELS.pack_weights(weight), affine=affine)
        expected = F.silu(own[..., channel].double())
        middle = output[0, :, 1, channel].double()
        assert ((middle - expected[0, :, 1]) / expected[0, :, 1]).abs().max() < 3e-5


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (8, 8), (13, 17), (32, 32)])
@pytest.mark.parametrize("widths", [(32,), (64,), (32, 64)])
@pytest.mark.parametrize("groups", [32, 8])
def test_normalisation(size, widths, groups):
    maps = [random(3, *size, width, seed=width) for width in widths]
    norm = nn.GroupNorm(groups, sum(widths))
    with torch.no_grad():
        norm.weight.copy_(random(sum(widths), seed=5))
        norm.bias.copy_(random(sum(widths), seed=6))
    x = torch.cat(maps, dim=3).permute(0, 3, 1, 2).double()
    reference = F.group_norm(x, groups, norm.weight.double(), norm.bias.double(), norm.eps)
    own = {name: random(3, sum(widths), seed=i) for i, name in enumerate(("gain", "offset"), 7)}
    for count, scaled in [(1, False), (1, True), (3, True)]:
        condition = {name: rows[:count] for name, rows in own.items()} if scaled else {}
        scale, shift = KERNELS.group_norm(maps, norm, **condition)
        output = x * scale[:, :, None, None] + shift[:, :, None, None]
        expected = reference
        if scaled:
            gain, offset = (rows[:count, :, None, None] for rows in own.values())
            expected = (1 + gain) * expected + offset
        assert relative(output, expected) < 3e-6


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("widths", [(64,), (32, 64)])
def test_what_is_added_before_normalisation(count, widths):
    maps = [random(3, 5, 9, width, seed=width) for width in widths]
    norm, added = nn.GroupNorm(32, sum(widths)), random(count, sum(widths), seed=9) * 3
    own = {name: random(3, sum(widths), seed=i) for i, name in enumerate(("gain", "offset"), 7)}
    x = torch.cat(maps, dim=3).permute(0, 3, 1, 2).double()
    expected = F.group_norm(x + added.double()[:, :, None, None], 32)
    for condition in ({}, own):
        scale, shift = KERNELS.group_norm(maps, norm, added=added, **condition)
        output = x * scale[:, :, None, None] + shift[:, :, None, None]
        if condition:
            gain, offset = (rows[:, :, None, None] for rows in own.values())
            expected = (1 + gain) * expected + offset
        assert relative(output, expected) < 3e-6


def test_normalisation_far_from_zero():
    """The variance is not lost beside a large mean, as that of squares less the square would be."""
    x = random(1, 32, 32, 64) + 1000
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 64))
    groups = x.double().view(-1, 32, 2).transpose(0, 1).flatten(1)
    expected = (groups.var(dim=1, correction=0) + 1e-5).rsqrt().repeat_interleave(2)
    assert relative(scale[0], expected) < 1e-4


def test_normalisation_of_a_huge_constant():
    """Rounding does not take the variance below zero."""
    x = (1e8 * (1 + random(64) / 3)).expand(1, 7, 9, 64).contiguous()
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(64, 64))
    assert scale.isfinite().all()


def test_normalisation_of_a_map_with_one_huge_value():
    x = random(1, 16, 16, 64)
    x[0, 0, 0] = 1e6
    scale, _ = KERNELS.group_norm([x], nn.GroupNorm(32, 64))
    groups = x.double().view(-1, 32, 2).transpose(0, 1).flatten(1)
    expected = (groups.var(dim=1, correction=0) + 1e-5).rsqrt().repeat_interleave(2)
    assert relative(scale[0], expected) < 3e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"maps": [random(2, 8, 8, 32).double()]},
        {"maps": [random(2, 8, 8, 32).bfloat16()]},
        {"maps": [random(2, 8, 8, 64)[..., ::2]]},
        {"maps": [random(2, 8, 32, 8).transpose(2, 3)]},
        {"maps": [random(2, 8, 8, 24), random(2, 8, 8, 8)]},
        {"maps": [random(2, 8, 8, 16), random(2, 8, 4, 16)]},
        {"maps": [random(2, 8, 8, 48)]},
        {"maps": [random(0, 8, 8, 32)]},
        {"maps": [random(2, 1, 8, 32)], "resize": -1},
        {"bias": random(32)},
        {"bias": random(96)[::2]},
        {"bias": random(48).half()},
        {"affine": (random(1, 32), random(2, 32))},
        {"affine": (random(2, 1).expand(2, 32), random(2, 32))},
        {"residual": random(2, 8, 8, 32)},
        {"residual": random(2, 3, 3, 48)},
        {"maps": [random(2, 5, 4, 32)], "residual": random(2, 1, 5, 48)},  # a quarter, not a half
        {"maps": [random(2, 8, 8, 32).to("meta")]},
        {"out": random(2, 8, 8, 16)},
    ],
)
def test_what_does_not_fit_is_refused(changed):
    """It would read or write beyond a tensor's memory."""
    packed = KERNELS.pack_weights(random(48, 32, 3, 3))
    right = {"maps": [random(2, 8, 8, 32)], "weight": packed, "bias": random(48)}
    assert KERNELS.convolve(**right).shape == (2, 8, 8, 48)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.convolve(**{**right, **changed})


def test_a_normalisation_that_does_not_fit_is_refused():
    x, norm = random(2, 4, 4, 64), nn.GroupNorm(32, 64)
    KERNELS.group_norm([x], norm)
    rows = random(3, 64)
    for gain in ((rows, rows), (rows[:2], rows[:1]), (rows[:2, ::2], rows[:2, ::2])):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.group_norm([x], norm, gain=gain[0], offset=gain[1])
    for alone in ({"gain": rows[:1]}, {"offset": rows[:1]}):
        with pytest.raises(ValueError, match="come together"):
            KERNELS.group_norm([x], norm, **alone)
    for added in (rows, rows[:1, :32], rows[:1].double()):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.group_norm([x], norm, added=added)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.group_norm([x], nn.GroupNorm(32, 32))
    norm.weight = nn.Parameter(torch.ones(1).expand(64), requires_grad=False)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.group_norm([x], norm)


def test_defaults_of_new_tensors_do_not_matter(pack):
    x, weight, bias = random(1, 8, 8, 32), random(32, 32, 3, 3), random(32)
    expected, before = KERNELS.convolve([x], pack(weight), bias), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(KERNELS.convolve([x], pack(weight), bias), expected)
    finally:
        torch.set_default_dtype(before)


def test_weights_in_another_order_in_memory(pack):
    weight, x, bias = random(32, 64, 3, 3), random(1, 8, 8, 64), torch.zeros(32)
    turned = weight.contiguous(memory_format=torch.channels_last)
    outputs = [KERNELS.convolve([x], pack(w), bias) for w in (weight, turned)]
    assert torch.equal(*outputs)


# ---- Pointwise convolutions, attention, noise, steps ---------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 15), (16, 16)])
@pytest.mark.parametrize("widths", [(32,), (32, 96)])
@pytest.mark.parametrize("out", [3, 16, 48, 80])
def test_a_pointwise_convolution(size, widths, out):
    maps = [random(3, *size, width, seed=width) for width in widths]
    weight, bias = random(out, sum(widths), 1, 1, seed=1), random(out, seed=4)
    packed = KERNELS.pack_weights(weight)
    for options in (
        {},
        {"affine": affine_of(3, sum(widths))},
        {"residual": random(3, *size, out, seed=5)},
        {"affine": affine_of(3, sum(widths)), "residual": random(3, *size, out, seed=5)},
    ):
        output = KERNELS.pointwise(maps, packed, bias, **options)
        assert relative(output, pointwise(maps, weight, bias, **options)) < 2e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"maps": [random(2, 8, 8, 32).double()]},
        {"maps": [random(2, 8, 8, 64)[..., ::2]]},
        {"maps": [random(2, 8, 8, 48)]},
        {"bias": random(32)},
        {"bias": random(96)[::2]},
        {"affine": (random(1, 32), random(2, 32))},
        {"residual": random(2, 8, 8, 32)},
        {"weight": KERNELS.pack_weights(random(48, 32, 3, 3))},
        {"maps": [random(0, 8, 8, 32)]},
        {"maps": [random(2, 0, 8, 32)]},
    ],
)
def test_a_pointwise_convolution_that_does_not_fit_is_refused(changed):
    packed = KERNELS.pack_weights(random(48, 32, 1, 1))
    right = {"maps": [random(2, 8, 8, 32)], "weight": packed, "bias": random(48)}
    assert KERNELS.pointwise(**right).shape == (2, 8, 8, 48)
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.pointwise(**{**right, **changed})
    with pytest.raises(ValueError, match=MISFIT):
        KERNELS.convolve([random(2, 8, 8, 32)], packed, random(48))


@pytest.mark.parametrize("shape", [(1, 32, 2, 2), (48, 32, 5, 5), (48, 32, 3, 1)])
def test_weights_of_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="no kernels for weights"):
        KERNELS.pack_weights(random(*shape))


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (8, 8), (7, 11), (32, 32)])
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (4, 8), (3, 32), (2, 48), (5, 20)])
def test_attention(new_order, size, heads, width):
    qkv = random(2, *size, 3 * heads * width) * 2
    output = KERNELS.attend(qkv, heads, new_order)
    assert output.shape == (2, *size, heads * width)
    reference = attend(qkv.double().flatten(1, 2).transpose(1, 2), heads, new_order).transpose(1, 2)
    assert relative(output.flatten(1, 2), reference) < 5e-6


def test_attention_with_scores_that_overflow_unless_the_largest_is_taken_off():
    qkv = random(1, 8, 8, 96) * 30
    output = KERNELS.attend(qkv, 1, False)
    reference = attend(qkv.double().flatten(1, 2).transpose(1, 2), 1, False).transpose(1, 2)
    assert relative(output.flatten(1, 2), reference) < 1e-4
    qkv[0, 3, 4, 5] = float("nan")
    assert not KERNELS.attend(qkv, 1, False)[0, 3, 4].isfinite().any()


def test_attention_that_does_not_fit_is_refused():
    for qkv, heads in ((random(1, 4, 4, 96), 5), (random(1, 4, 4, 32), 1)):
        with pytest.raises(ValueError, match="are not q, k and v"):
            KERNELS.attend(qkv, heads, False)
    for qkv in (random(1, 4, 4, 192)[..., ::2], random(1, 4, 4, 96).double()):
        with pytest.raises(ValueError, match=MISFIT):
            KERNELS.attend(qkv, 1, False)


def test_neither_batch_nor_threads_change_a_bit_of_attention_and_products():
    qkv, before = random(3, 10, 10, 96), torch.get_num_threads()
    packed, bias = KERNELS.pack_weights(random(96, 96, 1, 1)), random(96)
    calls = (
        lambda x: KERNELS.attend(x, 2, False),
        lambda x: KERNELS.pointwise([x], packed, bias),
    )
    expected = [call(qkv) for call in calls]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for call, all_of_them in zip(calls, expected, strict=True):
                assert torch.equal(call(qkv), all_of_them)
                assert torch.equal(call(qkv[1:2])[0], all_of_them[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not X86, reason="names levels of x86-64")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_other_instruction_sets(level, monkeypatch, tmp_path):
    flags = [flag for flag in building._FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(building, "_FLAGS", [*flags, f"-march={level}"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    other = cpu_kernels.load.__wrapped__()
    x, bias = random(2, 9, 13, 96), random(48, seed=4)
    norm, weight = nn.GroupNorm(32, 96), random(48, 96, 3, 3, seed=1)
    affine = other.group_norm([x], norm)
    own = KERNELS.group_norm([x], norm)
    assert max(map(relative, affine, own)) < 1e-6
    for few, resize in product((0, 10**9), (-1, 0, 1)):
        monkeypatch.setattr(cpu_kernels, "_FEW_WEIGHTS", few)
        options = {"affine": affine, "resize": resize}
        output = other.convolve([x], other.pack_weights(weight), bias, **options)
        assert relative(output, convolution([x], weight, bias, **options)) < 3e-6
    weight = weight[:, :, :1, :1]
    output = other.pointwise([x], other.pack_weights(weight), bias, affine=affine)
    assert relative(output, pointwise([x], weight, bias, affine)) < 2e-6
    assert relative(other.attend(x, 2, True), KERNELS.attend(x, 2, True)) < 3e-6


# ---- Building ------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Build in an empty folder; returns the function and the folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return cpu_kernels.load.__wrapped__, tmp_path / "cache"


def works(built):
    x = random(1, 8, 8, 32)
    weight = random(32, 32, 3, 3)
    built.convolve([x], built.pack_weights(weight), torch.zeros(32))
    return True


def test_it_is_built_once(build, monkeypatch):
    load, folder = build
    assert works(load())
    (library,) = folder.iterdir()
    before = library.stat()
    monkeypatch.setattr(building, "_build", None)
    assert works(load())
    assert library.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("what", ["source", "compiler", "processor", "flags"])
def test_what_it_depends_on_changes_its_name(build, monkeypatch, tmp_path, what):
    load, folder = build
    load()
    if what == "source":
        for name in building._SOURCES:
            text = (building._FOLDER / name).read_text()
            (tmp_path / name).write_text(text + "// another\n" * name.endswith(".h"))
        monkeypatch.setattr(building, "_FOLDER", tmp_path)
    elif what == "compiler":
        run = building._run
        monkeypatch.setattr(building, "_run", lambda c: run(c) + "2" * (c[-1] == "--version"))
    elif what == "processor":
        read = Path.read_text
        other = "flags : fpu\nmodel name : another\n"
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path, **options: (
                other if str(path) == "/proc/cpuinfo" else read(path, **options)
            ),
        )
    else:
        monkeypatch.setattr(building, "_FLAGS", [*building._FLAGS, "-g"])
    load()
    assert len(list(folder.iterdir())) == 2


def compiler_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler(build, monkeypatch):
    load, _ = build
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(building.KernelError, match="no C\\+\\+ compiler found"):
        load()


@pytest.mark.parametrize("text", ["echo no such option >&2; exit 1", "exit 3"])
def test_a_compiler_that_fails(build, monkeypatch, tmp_path, text):
    load, folder = build
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "cxx", text))
    with pytest.raises(building.KernelError, match="fails: no "):
        load()
    assert list(folder.glob("*.so")) == []


def test_a_compiler_that_writes_rubbish(build, monkeypatch, tmp_path):
    load, folder = build
    script = 'for last; do :; done; [ "$last" = --version ] || echo rubbish > "$last"'
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "cxx", script))
    with pytest.raises(building.KernelError):
        load()
    assert list(folder.glob("*.so")) == []


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.98])
def test_a_library_that_was_cut_short_is_built_anew(build, share):
    """Loading it would crash the process, or worse, would not."""
    load, folder = build
    load()
    (library,) = folder.iterdir()
    whole = library.read_bytes()
    for spoilt in (whole[: int(share * len(whole))], whole[:5000] + bytes(5000) + whole[10000:]):
        library.unlink()  # this process has the file mapped
        library.write_bytes(spoilt)
        assert works(load())
        # Built again under the name of what it holds, so that the next start finds it.
        assert any(building._is_whole(path) for path in folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(build):
    load, folder = build
    folder.mkdir(mode=0o500)
    assert works(load())
    assert list(folder.iterdir()) == []


def test_a_cache_that_is_no_folder(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert works(cpu_kernels.load.__wrapped__())


@pytest.mark.parametrize(
    "kind", ["open to all", "open to a group", "open on the way", "relative", "no programs"]
)
def test_a_folder_that_does_not_serve_is_left_alone(build, monkeypatch, tmp_path, kind):
    load, folder = build
    folder.mkdir()
    if kind == "open to all":
        folder.chmod(0o777)
    elif kind == "open to a group":
        folder.chmod(0o770)
    elif kind == "open on the way":
        tmp_path.chmod(0o770)
    elif kind == "relative":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
        monkeypatch.chdir(tmp_path)
    else:
        open_library = ctypes.CDLL

        def refuse(path):
            if str(folder) in path:
                raise OSError("failed to map segment from shared object")
            return open_library(path)

        monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert works(load())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["open to a group", "a link", "somebody else's", "of the folder"])
def test_a_library_that_others_may_change_is_not_loaded(build, monkeypatch, tmp_path, kind):
    load, folder = build
    load()
    (library,) = folder.iterdir()
    if kind == "open to a group":
        library.chmod(0o770)
    elif kind == "a link":
        library.rename(tmp_path / library.name)
        library.symlink_to(tmp_path / library.name)
    elif os.geteuid() != 0:
        pytest.skip("needs root")
    else:
        os.chown(library if kind == "somebody else's" else folder, 12345, 12345)
    opened, open_library = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: opened.append(path) or open_library(path))
    assert works(load())
    if kind == "of the folder":
        assert not any(str(folder) in path for path in opened)
    else:  # built anew in its place
        assert building._is_whole(library)


def test_a_umask_that_opens_files_to_a_group(build):
    before = os.umask(0o002)
    try:
        load, folder = build
        load()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(building._is_whole(path) for path in folder.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_a_build_that_is_killed_leaves_nothing_for_good(build, monkeypatch, tmp_path):
    load, folder = build
    (command, *_), *_ = building._compilers()
    script = f"""case "$*" in *--version*) exec {command} --version;; esac; sleep 60"""
    environment = {**os.environ, "CXX": compiler_script(tmp_path / "cxx", script)}
    program = "from guided_diffusion.accel import cpu_kernels; cpu_kernels.load()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, start_new_session=True
    )
    while not (folder.exists() and any(folder.iterdir())):
        assert process.poll() is None
        time.sleep(0.05)
    own = folder / f"building-{platform.node()}-{os.getpid()}-x"  # one that is under way
    own.mkdir()
    load()
    assert len(list(folder.iterdir())) == 3  # nor is the other touched while it runs
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    load()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]
    assert own.exists()


@pytest.mark.parametrize("structure", cpu_kernels._STRUCTURES)
def test_a_structure_that_cpp_declares_otherwise_is_found_at_loading(structure, monkeypatch):
    longer = type(structure.__name__, (structure,), {"_fields_": [("more", ctypes.c_int64)]})
    changed = [longer if one is structure else one for one in cpu_kernels._STRUCTURES]
    monkeypatch.setattr(cpu_kernels, "_STRUCTURES", changed)
    with pytest.raises(building.KernelError, match=f"{structure.__name__}: expected .* bytes"):
        cpu_kernels.load.__wrapped__()


def test_no_folder_at_all(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(building.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(building.KernelError, match="No usable temporary"):
        cpu_kernels.load.__wrapped__()


def test_options_in_cxx(build, monkeypatch):
    load, _ = build
    (command, *_), *_ = building._compilers()
    monkeypatch.setenv("CXX", f"{command} -O1")
    assert works(load())


def test_a_second_compiler_serves_where_the_first_fails(build, monkeypatch, tmp_path):
    load, _ = build
    (good, *_), *_ = building._compilers()
    bad = compiler_script(tmp_path / "bad", "exit 1")
    monkeypatch.setattr(building, "_COMPILERS", (bad, good))
    monkeypatch.delenv("CXX", raising=False)
    assert works(load())


def test_a_library_of_something_else_is_built_anew(build):
    load, folder = build
    load()
    (library,) = folder.iterdir()
    source = folder.parent / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    (command, *_), *_ = building._compilers()
    subprocess.run([command, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert works(load())


@pytest.mark.parametrize("text", ["#!/nowhere/sh", "\x7fELF"])
def test_a_compiler_that_cannot_be_run(build, monkeypatch, tmp_path, text):
    load, _ = build
    path = tmp_path / "cxx"
    path.write_text(text)
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(building.KernelError, match="cannot be run"):
        load()


@pytest.mark.parametrize("text", ["g++ 'open", '"'])
def test_a_quotation_that_does_not_end(build, monkeypatch, text):
    load, _ = build
    monkeypatch.setenv("CXX", text)
    with pytest.raises(building.KernelError, match=r"CXX=.*: No closing quotation"):
        load()


def test_an_empty_cxx_is_none(build, monkeypatch):
    load, _ = build
    monkeypatch.setenv("CXX", " ")
    assert works(load())


def test_a_compiler_that_does_not_write_utf8(build, monkeypatch, tmp_path):
    load, _ = build
    script = r"printf 'error: \377\376' >&2; exit 1"
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "cxx", script))
    with pytest.raises(building.KernelError, match="fails: error"):
        load()


def test_a_failure_is_not_remembered(build, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "load", functools.cache(cpu_kernels.load.__wrapped__))
    monkeypatch.setenv("CXX", "absent")
    with pytest.raises(building.KernelError, match="absent"):
        cpu_kernels.load()
    monkeypatch.delenv("CXX")
    assert works(cpu_kernels.load())
