"""Every fast way computes what the exact one does, and steps aside where it does not work."""

import contextlib
import copy
import os
import platform
import re
import sys
import tempfile
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.accel import graphs, layout, memory
from guided_diffusion.accel.memory import file_mappings
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.nn import UpConv2d
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, ResBlock, TrunkConfig, UNetModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import plain

CPU = torch.device("cpu")
SMALL = TrunkConfig(16, 32, (1, 2), 1, (8,), num_heads=4, num_head_channels=16)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10, 700])
Y = torch.tensor([1, 3])


def randomised(network):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval().requires_grad_(False)


def unet(**changes):
    cfg = TrunkConfig(**{**vars(SMALL), **changes})
    return randomised(UNetModel(cfg, 6, num_classes=5))


def relative(output, reference):
    return ((output - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture
def network():
    return unet()


@pytest.fixture
def switches():
    """Put torch's global switches back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- Equality of the ways ------------------------------------------------------------------------


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
@pytest.mark.parametrize("use_new_attention_order", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_network_is_a_plain_ports(
    resblock_updown, use_scale_shift_norm, use_new_attention_order, memory_format
):
    model = unet(
        resblock_updown=resblock_updown,
        use_scale_shift_norm=use_scale_shift_norm,
        use_new_attention_order=use_new_attention_order,
    )
    reference = plain.unet(model, X, T, Y)
    model.to(memory_format=memory_format).memory_format = memory_format
    with torch.inference_mode():
        output = model(X, T, Y)
    assert relative(output, reference) < 1e-5
    assert output.is_contiguous()


def test_work_in_place_leaves_inputs_alone_and_equals_training(network):
    x, t = X.clone(), T.clone()
    recorded = network(x.requires_grad_(), t, Y)
    with torch.inference_mode():
        x = X.clone()
        assert relative(network(x, t, Y), recorded.detach()) < 1e-6
        assert torch.equal(x, X)
        assert torch.equal(t, T)


def laid_out(network):
    """Which convolutions are ready, by name."""
    ready = {}
    for name, module in network.named_modules():
        if isinstance(module, UpConv2d):
            ready[name] = module._folded is not None
        elif isinstance(module, nn.Conv2d):
            ready[name] = module.weight.is_contiguous(memory_format=torch.channels_last)
    return ready


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_weights_are_laid_out_at_once_or_at_the_first_call(resblock_updown, at_once):
    network = unet(resblock_updown=resblock_updown)
    assert any(isinstance(m, UpConv2d) for m in network.modules())
    reference = network(X, T, Y)
    layout.lay_out(network, CPU, at_once=at_once)
    assert network.memory_format == torch.channels_last
    assert all(laid_out(network).values()) == at_once
    with torch.inference_mode():
        first = network(X, T, Y)
        assert relative(first, reference) < 1e-5
        assert all(laid_out(network).values())
        assert torch.equal(network(X, T, Y), first)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_gradient_passes_through_weights_laid_out_in_inference_mode():
    network = unet()
    expected = torch.autograd.grad(network(x := X.clone().requires_grad_(), T, Y).sum(), x)[0]
    layout.lay_out(network, CPU, at_once=False)
    with torch.inference_mode():
        network(X, T, Y)
    assert relative(torch.autograd.grad(network(x, T, Y).sum(), x)[0], expected) < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_weights_laid_out_leave_no_copy_in_memory(tmp_path):
    """A mapped checkpoint's pages go as its weights are copied; the file is as it was."""
    torch.save({"weight": torch.randn(1024, 1024, 3, 3)}, tmp_path / "model.pt")  # 38 MB
    weight = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)["weight"]
    with torch.device("meta"):
        conv = nn.Conv2d(1024, 1024, 3)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    layout._lay_out_weights(conv, file_mappings())

    def resident():
        address, text = weight.data_ptr(), Path("/proc/self/smaps").read_text()
        for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
            start, end = (int(edge, 16) for edge in entry.split()[0].split("-"))
            if start <= address < end:
                return int(re.search(r"Rss: +(\d+)", entry)[1])  # kB
        raise AssertionError("the weight is in no mapping")

    assert resident() < 100
    assert torch.equal(weight, conv.weight)  # read from the file again
    assert resident() > 30_000


def test_half_precision_stays_close(network):
    reference = network(X, T, Y)
    network.convert_trunk(torch.bfloat16)
    layout.lay_out(network, CPU)
    error = relative(network(X, T, Y), reference)
    assert 1e-6 < error < 0.05


def test_precision_sets_how_float32_is_multiplied(switches):
    torch.backends.cudnn.allow_tf32 = True
    assert layout.set_arithmetic("float32", False, CPU) == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert layout.set_arithmetic("tf32", False, CPU) == torch.float32
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert layout.set_arithmetic(None, False, CPU) == torch.float32
    assert torch.backends.cuda.matmul.allow_tf32  # nothing said, nothing changed
    assert layout.set_arithmetic("bfloat16", False, CPU) == torch.bfloat16
    gpu = torch.device("cuda", 0)
    assert layout.set_arithmetic(None, True, gpu) == torch.float16
    assert layout.set_arithmetic("float16", False, gpu) == torch.float16


@pytest.mark.parametrize("said", [("float16", False), (None, True)])
def test_half_precision_on_a_cpu_is_said_and_not_done(said):
    with pytest.warns(UserWarning, match="half precision is for GPUs"):
        assert layout.set_arithmetic(*said, CPU) == torch.float32


def test_freed_memory_is_kept():
    """Once warm, a call asks the system for no pages; without glibc nothing breaks either."""
    resource = pytest.importorskip("resource")
    memory.keep_freed_memory()
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")

    def faults():
        large = torch.ones(64 * 2**20 // 4)  # 64 MB: 16,384 pages
        del large
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(20):  # glibc sets the first seven leftovers of an alignment aside, in its tcache
        before = faults()
    assert faults() - before < 1000


def test_without_glibc_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.keep_freed_memory()


# ---- Compilation and its fallback ----------------------------------------------------------------


def with_backend(monkeypatch, backend):
    """Let blocks compile by another backend than the slow C++ one."""
    compile = nn.Module.compile
    seen = []

    def replaced(module, **options):
        seen.append(type(module).__name__)
        compile(module, **options, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", replaced)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/repaint-unused")
    torch._dynamo.reset()
    return seen


def test_compiled_blocks_compute_the_same(network, monkeypatch):
    reference = network(X, T, Y)
    seen = with_backend(monkeypatch, "aot_eager")
    run = graphs.Accelerated(network, network, compiled=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert relative(run(X, T, Y), reference) < 1e-5
    assert set(seen) == {"ResBlock", "AttentionBlock", "Head"}
    assert sum(isinstance(m, ResBlock) for m in network.modules()) == seen.count("ResBlock")


def test_a_classifiers_gradient_compiles_too(monkeypatch):
    classifier = randomised(EncoderUNetModel(SMALL, 7, "attention"))

    def gradient(x, timesteps, y):
        return classifier_gradient(classifier, x, timesteps, y, 2.0)

    with torch.inference_mode():
        reference = gradient(X, T, Y)
        with_backend(monkeypatch, "aot_eager")
        run = graphs.Accelerated(gradient, classifier, compiled=True)
        assert relative(run(X, T, Y), reference) < 1e-5


def test_where_no_compiler_works_one_warning_and_the_exact_network(network, monkeypatch):
    reference = network(X, T, Y)

    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand a long story")

    with_backend(monkeypatch, broken)
    run = graphs.Accelerated(network, network, compiled=True)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="compile: does not work here") as caught:
            first = run(X, T, Y)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = run(X, T, Y)
    assert relative(first, reference) < 1e-6
    assert torch.equal(first, second)


def test_full_memory_is_no_reason_to_give_up_compiling(network):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    run = graphs.Accelerated(full, network, compiled=True)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(X, T, Y)
    assert run._is_compiled


@pytest.mark.parametrize("calls", [0, 210, 2410])
def test_auto_compiles_on_gpus_for_long_walks(calls):
    gpu = torch.device("cuda", 0)
    long = calls == 2410
    assert [graphs.is_compiled("auto", device, calls) for device in (CPU, gpu)] == [False, long]
    assert [graphs.is_compiled(True, device, calls) for device in (CPU, gpu)] == [True, True]
    assert [graphs.is_compiled(False, device, calls) for device in (CPU, gpu)] == [False, False]


def test_the_folder_of_compiled_code_is_stable_and_the_users_choice(network, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("HOME", "/home/somebody")
    graphs._compile_blocks(network)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    graphs._compile_blocks(network)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/home/somebody/.cache/repaint"


@pytest.mark.slow
def test_the_real_compiler_computes_the_same(network, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    reference = network(X, T, Y)
    compiled = copy.deepcopy(network)
    layout.lay_out(compiled, CPU)
    run = graphs.Accelerated(compiled, compiled, compiled=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert relative(run(X, T, Y), reference) < 1e-5


# ---- CUDA graphs, with a stand-in for the GPU ----------------------------------------------------


@pytest.fixture
def recordings(monkeypatch):
    """Let recordings run on the CPU: replaying calls the function again on the same buffers."""
    made = []

    class Graph:
        def replay(self):
            owner = next(o for o in made if o._graph is self)
            owner._output.copy_(owner._again(*owner._inputs))

    init = graphs.CudaRecording.__init__

    def noting(self, function, inputs):
        self._again = function
        made.append(self)
        init(self, function, inputs)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(graphs.CudaRecording, "__init__", noting)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    return made


def test_recordings_follow_their_inputs_and_hand_out_copies(network, recordings, monkeypatch):
    with_backend(monkeypatch, "eager")
    run = graphs.Accelerated(network, network, compiled=True, recorded=True)
    with torch.inference_mode():
        first = run(X, T, Y)
        kept = first.clone()
        second = run(X + 1, T + 5, Y - 1)
        assert len(recordings) == 1
        assert torch.equal(first, kept)  # the second replay did not write into it
        assert relative(second, network(X + 1, T + 5, Y - 1)) < 1e-6
        smaller = run(X[:1], T[:1], Y[:1])
        assert len(smaller) == 1
        assert relative(smaller, network(X[:1], T[:1], Y[:1])) < 1e-6
        assert len(recordings) == 1  # filled up to the batch that is recorded
        three = [torch.cat([tensor, tensor[:1]]) for tensor in (X, T, Y)]
        assert relative(run(*three), network(*three)) < 1e-6
        assert len(recordings) == 2  # a larger one is recorded anew


@pytest.mark.parametrize("compiled", [True, False])
def test_a_recording_that_fails_leaves_the_network_as_it_is(
    network, recordings, monkeypatch, compiled
):
    with_backend(monkeypatch, "eager")
    monkeypatch.delattr(torch.cuda, "CUDAGraph")
    run = graphs.Accelerated(network, network, compiled=compiled, recorded=True)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="a CUDA graph does not work here") as caught:
            assert relative(run(X, T, Y), network(X, T, Y)) < 1e-6
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(X, T, Y)
    assert run._is_compiled == compiled


def test_full_memory_while_recording_is_told_as_such(network, recordings, monkeypatch):
    @contextlib.contextmanager
    def graph(_):
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise RuntimeError("the recording was invalidated")  # noqa: B904 - as torch does it

    monkeypatch.setattr(torch.cuda, "graph", graph)
    calls = []

    def function(*inputs):
        calls.append(1)
        if len(calls) > graphs._WARM_UP_CALLS:
            raise torch.cuda.OutOfMemoryError
        return network(*inputs)

    run = graphs.Accelerated(function, network, recorded=True)
    with torch.inference_mode(), pytest.raises(torch.cuda.OutOfMemoryError):
        run(X, T, Y)
    assert run._is_recorded


def test_after_full_memory_a_smaller_batch_is_not_filled_up(network, recordings):
    room = 2

    def function(*inputs):
        if len(inputs[0]) > room:
            raise torch.cuda.OutOfMemoryError
        return network(*inputs)

    run = graphs.Accelerated(function, network, recorded=True)
    with torch.inference_mode():
        run(X, T, Y)
        room = 1
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(X[:1], T[:1], Y[:1])  # is filled up to two
        assert relative(run(X[:1], T[:1], Y[:1]), network(X[:1], T[:1], Y[:1])) < 1e-6


def test_an_error_of_the_network_itself_is_raised(network, recordings):
    def wrong(*_):
        raise ValueError("the network's own")

    run = graphs.Accelerated(wrong, network, recorded=True)
    with pytest.raises(ValueError, match="the network's own"):
        run(X, T, Y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("precision", "most"),
    [("float32", 1e-4), ("tf32", 1e-2), ("float16", 1e-2), ("bfloat16", 5e-2)],
)
def test_a_gpu_computes_the_same(network, switches, precision, most, compiled):
    gpu = torch.device("cuda", 0)
    reference = network(X, T, Y)
    fast_one = copy.deepcopy(network).to(gpu)
    fast_one.convert_trunk(layout.set_arithmetic(precision, False, gpu))
    layout.lay_out(fast_one, gpu)
    run = graphs.Accelerated(fast_one, fast_one, compiled=compiled, recorded=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        for count in (2, 1, 2):  # recorded, filled up, replayed
            output = run(*(tensor[:count].to(gpu) for tensor in (X, T, Y)))
            assert relative(output.cpu(), reference[:count]) < most


def test_what_a_call_takes_of_a_gpus_memory(monkeypatch):
    """10 units of weights and 4 of activations; 100 units in all, 20 of others."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 14)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 15)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (65, 100))
    assert memory.CallMemory(torch.device("cuda", 0), 10).after_call() == (4, 80 - 10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_call_takes_of_a_cpus_memory():
    measured = memory.CallMemory(CPU, 0)
    torch.ones(2**24)  # at the first call weights are packed, which is not counted
    assert measured.after_call() is None
    torch.ones(2**25)
    taken, free = measured.after_call()
    assert 2**27 <= taken < 2**27 + 2**24
    assert free > taken


def test_where_nobody_tells_how_much_memory_there_is(monkeypatch):
    monkeypatch.setattr(memory.Path, "read_text", lambda _: "VmPeak: 3 kB")
    measured = memory.CallMemory(CPU, 0)
    assert [measured.after_call() for _ in range(3)] == [None] * 3
    monkeypatch.setattr(memory.Path, "read_text", None)  # is not asked again, which costs time
    assert measured.after_call() is None


# ---- Nothing waits for the device ----------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes every operation that goes to a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


# Reading a value back, and bringing one to the device.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
COPYING = {"lift_fresh", "lift_fresh_copy", "_to_copy", "copy_", "scalar_tensor", "tensor"}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_ddim": True}, {"inpa_inj_sched_prev_cumnoise": True}, {"guided": True}],
    ids=str,
)
def test_the_loop_never_waits_for_the_device_nor_copies_to_it(options):
    """On ``meta`` tensors reading a value back is impossible, and copies are seen by name."""
    options = dict(options)
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20))
    times = get_schedule_jump(20, 1, 4, 3)
    gt = torch.empty(2, 3, 16, 16, device="meta")

    def cond_fn(x, timesteps):
        return x.clone()

    steps = diffusion.repaint(
        lambda x, timesteps: x.new_empty(2, 6, 16, 16),
        gt,
        gt,
        times,
        lambda: torch.empty_like(gt),
        cond_fn=cond_fn if options.pop("guided", False) else None,
        **options,
    )
    with torch.inference_mode(), Operations() as operations:
        next(steps)  # before the first step, tables may go to the device
        operations.names.clear()
        count = sum(1 for _ in steps)
    assert count == len(times) - 2
    assert "mul" in operations.names
    assert not set(operations.names) & (WAITING | COPYING)


def test_a_plain_port_does_both():
    """The test above can fail: its means see what the plain loop does."""
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20))
    gt = torch.zeros(2, 3, 16, 16)
    steps = plain.repaint(
        diffusion,
        lambda x, timesteps: x.new_zeros(2, 6, 16, 16),
        gt,
        gt,
        get_schedule_jump(20, 1, 4, 3),
        lambda: torch.zeros_like(gt),
    )
    with Operations() as operations:
        list(islice(steps, 5))
    assert "_local_scalar_dense" in operations.names
    assert set(operations.names) & COPYING


def test_a_plain_port_samples_the_same():
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    gt, mask = X.clamp(-1, 1), (X > 0).float()
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20))
    times = get_schedule_jump(20, 1, 4, 3)

    def inputs(generator):
        network = unet()
        return (
            lambda x, timesteps: network(x, timesteps, Y),
            gt,
            mask,
            times,
            lambda: torch.randn(gt.shape, generator=generator),
        )

    with torch.inference_mode():
        *_, ours = diffusion.repaint(*inputs(generators[0]))
        *_, theirs = plain.repaint(diffusion, *inputs(generators[1]))
    assert (ours.x - theirs).abs().max() < 1e-4
