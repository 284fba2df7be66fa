"""Every Triton program that a network launches compiles for GPUs, on a machine without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from triton_stand_in import StandIn

from guided_diffusion.accel import fused_unet, gpu_kernels
from guided_diffusion.unet import TrunkConfig, UNetModel

ROOT = Path(__file__).resolve().parents[2]
SMALL = TrunkConfig(64, 32, (1, 4), 1, (), num_heads=4, num_head_channels=32)
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
PROGRAMS = {"moments", "affine_of_moments", "affine_of_small", "apply_affine", "add"}

# Run without the interpreter, which would take the place of the programs to be compiled.
COMPILE = """
import inspect, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from guided_diffusion.accel import gpu_programs

target = GPUTarget("cuda", int(sys.argv[1]), 32)
for name, arguments, keywords in json.load(sys.stdin):
    options = {key: keywords.pop(key) for key in ("num_warps",) if key in keywords}
    program = getattr(gpu_programs, name)
    names = [name for name in program.arg_names if name not in keywords]
    types = dict(zip(names, arguments, strict=True))
    constants = {name: None for name, kind in types.items() if kind is None}
    constants |= {name: 1 for name, kind in types.items() if kind == "one"} | keywords
    signature = {
        name: "constexpr" if name in constants else types[name].removesuffix(" of 16")
        for name in program.arg_names
    }
    attributes = {
        (program.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items() if kind and kind.endswith(" of 16")
    }
    source = ASTSource(program, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"], name
    print(name, compiled.metadata.shared)
"""


class Recorder(StandIn):
    """Notes what each launch would be compiled for."""

    def __init__(self):
        self.launches = {}

    def __getattr__(self, name):
        launch = super().__getattr__(name)

        class Noting:
            def __getitem__(_, grid):
                def run(*arguments, **keywords):
                    seen = [name, [kind_of(argument) for argument in arguments], keywords]
                    self.launches[json.dumps(seen)] = seen
                    launch[grid](*arguments, **keywords)

                return run

        return Noting()


def kind_of(argument):
    """Return what Triton compiles for: a type, and whether a multiple of 16, or the constant 1."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        aligned = argument.data_ptr() % 16 == 0
        return TYPES[argument.dtype] + " of 16" * aligned
    return "one" if argument == 1 else "i32" + " of 16" * (argument % 16 == 0)


def launches_of(dtype, monkeypatch):
    """Return what networks of a type launch, of every kind of network."""
    recorder = Recorder()
    monkeypatch.setattr(
        gpu_kernels.GpuKernels, "__init__", lambda self: setattr(self, "_programs", recorder)
    )
    for changes in ({}, {"resblock_updown": False}, {"use_scale_shift_norm": False}):
        network = UNetModel(TrunkConfig(**{**vars(SMALL), **changes}), 6)
        network.convert_trunk(dtype)
        for parameter in network.requires_grad_(False).parameters():
            nn.init.normal_(parameter, std=0.1)
        with torch.inference_mode():
            x = torch.zeros(3, 3, 64, 64)
            run = fused_unet.FusedUNet(gpu_kernels.GpuKernels(), network.eval())
            run(x, torch.tensor([5, 100, 900]))
            run(x, torch.tensor([5])) if changes else None
    return list(recorder.launches.values())


def test_a_network_launches_every_program(monkeypatch):
    launches = launches_of(torch.float32, monkeypatch)
    assert {name for name, *_ in launches} == PROGRAMS
    resizes = {keywords.get("RESIZE") for _, _, keywords in launches}
    assert {-1, 0, 1} <= resizes


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_program_compiles(dtype, architecture, monkeypatch, tmp_path):
    launches = launches_of(dtype, monkeypatch)
    own = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture],
        input=json.dumps(launches), capture_output=True, text=True, env=os.environ | own,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    lines = [line.split() for line in compiled.stdout.splitlines()]
    assert {name for name, _ in lines} == PROGRAMS
    assert all(int(shared) <= 99 * 1024 for _, shared in lines)  # bytes that a block may have
