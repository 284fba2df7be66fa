"""Every fast way computes what the exact one does, and steps aside where it does not work."""

import contextlib
import copy
import os
import sys
import tempfile
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

import network_cases
import numpy as np
import pytest
import torch
from network_cases import SMALL, randomised, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.accel import accelerate as door
from guided_diffusion.accel import graphs, layout
from guided_diffusion.accel.accelerate import Checked, accelerate, accelerate_gradient
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io import cache
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, ResBlock

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import plain

CPU = torch.device("cpu")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10, 700])
Y = torch.tensor([1, 3])


unet = partial(network_cases.unet, num_classes=5)


@pytest.fixture
def network():
    return unet()


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


# ---- Compilation ---------------------------------------------------------------------------------


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
    no_kernels(monkeypatch)
    run = accelerate(network, CPU, True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            assert relative(run(X, T, Y), reference) < 1e-5
    assert set(seen) == {"ResBlock", "AttentionBlock", "Head"}
    assert sum(isinstance(m, ResBlock) for m in network.modules()) == seen.count("ResBlock")
    assert not any(m._compiled_call_impl for m in network.modules())  # its twin's are


def no_kernels(monkeypatch):
    """Let ``compile: true`` on a CPU compile, as without a C++ compiler."""
    monkeypatch.setattr(door, "_cpu_kernels", lambda *_: None)


def test_a_classifiers_gradient_compiles_too(monkeypatch):
    classifier = randomised(EncoderUNetModel(SMALL, 7, "attention"))
    gradient = partial(classifier_gradient, scale=2.0)
    with torch.inference_mode():
        reference = gradient(classifier, X, T, Y)
        seen = with_backend(monkeypatch, "aot_eager")
        no_kernels(monkeypatch)
        run = accelerate_gradient(gradient, classifier, CPU, True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compile:")
            assert relative(run(X, T, Y), reference) < 1e-5
    assert seen


def test_where_no_compiler_works_one_warning_and_the_exact_network(network, monkeypatch):
    reference = network(X, T, Y)

    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand a long story")

    with_backend(monkeypatch, broken)
    no_kernels(monkeypatch)
    run = accelerate(network, CPU, True)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="compile: .* does not work: .*going on") as caught:
            first = run(X, T, Y)
        assert [each.category for each in caught].count(UserWarning) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = run(X, T, Y)
    assert relative(first, reference) < 1e-5
    assert torch.equal(first, second)


def test_compiled_code_that_is_wrong_is_not_used(network, monkeypatch):
    """As bfloat16 in the place of float32 would be."""
    reference = network(X, T, Y)

    def rounding(graph, inputs):
        def run(*arguments):
            return tuple(out.bfloat16().float() for out in graph(*arguments))

        return run

    with_backend(monkeypatch, rounding)
    no_kernels(monkeypatch)
    run = accelerate(network, CPU, True)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="is wrong by"):
            assert relative(run(X, T, Y), reference) < 1e-5
        assert relative(run(X, T, Y), reference) < 1e-5


def test_full_memory_is_no_reason_to_give_up_compiling():
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    run = graphs.FixedBatch(full, compiled=True)
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(X, T, Y)


def test_the_folder_of_compiled_code_is_stable_and_the_users_choice(monkeypatch, tmp_path):
    run = graphs.FixedBatch(lambda x: x, compiled=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr(cache, "_CACHE", str(tmp_path / "own"))
    run(X[:1])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    run(X)  # a larger batch, compiled anew
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "own").chmod(0o777)
    run(torch.cat([X, X]))
    private = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert private != tmp_path / "own"
    assert private.stat().st_mode & 0o077 == 0


def test_what_compiling_needs_is_put_back(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    seen = []

    def function(x):
        seen.append(torch._dynamo.config.cache_size_limit)
        return x

    filters, limit = list(warnings.filters), torch._dynamo.config.cache_size_limit
    run = graphs.FixedBatch(function, compiled=True)
    for _ in range(2):
        run(X)
    assert seen == [graphs._MOST_SHAPES, limit]
    assert warnings.filters == filters
    assert torch._dynamo.config.cache_size_limit == limit


@pytest.mark.slow
def test_the_real_compiler_computes_the_same(network, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    reference = network(X, T, Y)
    no_kernels(monkeypatch)
    run = accelerate(network, CPU, True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert relative(run(X, T, Y), reference) < 1e-5


# ---- CUDA graphs, with a stand-in for the GPU ----------------------------------------------------


@pytest.fixture
def runners(monkeypatch):
    """Let graphs run on the CPU: replaying calls the function again on the same buffers."""
    made = []

    class Graph:
        def replay(self):
            owner = next(o for o in made if o._graph is self)
            owner._output.copy_(owner._again(*owner._inputs))

    init = graphs.CudaGraphRunner.__init__

    def noting(self, function, inputs):
        self._again = function
        made.append(self)
        init(self, function, inputs)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(graphs.CudaGraphRunner, "__init__", noting)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    return made


def recorded(network):
    return Checked(graphs.FixedBatch(network, recorded=True), network, network)


def test_graphs_follow_their_inputs_and_hand_out_copies(network, runners):
    run = recorded(network)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run(X, T, Y)
        kept = first.clone()
        second = run(X + 1, T + 5, Y - 1)
        assert len(runners) == 1
        assert torch.equal(first, kept)  # the second replay did not write into it
        assert relative(second, network(X + 1, T + 5, Y - 1)) < 1e-6
        smaller = run(X[:1], T[:1], Y[:1])
        assert len(smaller) == 1
        assert relative(smaller, network(X[:1], T[:1], Y[:1])) < 1e-6
        assert len(runners) == 1  # filled up to the batch that is recorded
        three = [torch.cat([tensor, tensor[:1]]) for tensor in (X, T, Y)]
        assert relative(run(*three), network(*three)) < 1e-6
        assert len(runners) == 2  # a larger one is recorded anew


def test_a_graph_that_cannot_be_recorded_leaves_the_network_as_it_is(network, runners, monkeypatch):
    monkeypatch.delattr(torch.cuda, "CUDAGraph")
    run = recorded(network)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="does not work: .*CUDAGraph.*; going on") as caught:
            assert relative(run(X, T, Y), network(X, T, Y)) < 1e-6
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(X, T, Y)


@pytest.mark.parametrize("stale", [0, 1, 2])
def test_a_replay_that_does_not_read_an_input_is_found_out(network, runners, monkeypatch, stale):
    call = graphs.CudaGraphRunner.__call__

    def planted(self, *inputs):
        inputs = list(inputs)
        inputs[stale] = self._inputs[stale].clone()
        return call(self, *inputs)

    monkeypatch.setattr(graphs.CudaGraphRunner, "__call__", planted)
    run = recorded(network)
    with torch.inference_mode(), pytest.warns(UserWarning, match="is wrong by"):
        assert relative(run(X, T, Y), network(X, T, Y)) < 1e-6


def test_full_memory_while_recording_is_told_as_such(network, runners, monkeypatch):
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

    run = Checked(graphs.FixedBatch(function, recorded=True), network, network)
    for _ in range(2):
        calls.clear()
        with torch.inference_mode(), pytest.raises(torch.cuda.OutOfMemoryError):
            run(X, T, Y)


def test_after_full_memory_a_smaller_batch_is_not_filled_up(network, runners):
    room = 2

    def function(*inputs):
        if len(inputs[0]) > room:
            raise torch.cuda.OutOfMemoryError
        return network(*inputs)

    run = Checked(graphs.FixedBatch(function, recorded=True), network, network)
    with torch.inference_mode():
        run(X, T, Y)
        room = 1
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(X[:1], T[:1], Y[:1])  # is filled up to two
        assert relative(run(X[:1], T[:1], Y[:1]), network(X[:1], T[:1], Y[:1])) < 1e-6


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
    own = copy.deepcopy(network).to(gpu)
    own.convert_trunk(layout.set_arithmetic(precision, False, gpu))
    layout.lay_out(own, gpu)
    fast = graphs.with_compiled_blocks(own) if compiled else own
    run = Checked(graphs.FixedBatch(fast, compiled=compiled, recorded=True), own, own)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for count in (2, 1, 2):  # recorded, filled up, replayed
            output = run(*(tensor[:count].to(gpu) for tensor in (X, T, Y)))
            assert relative(output.cpu(), reference[:count]) < most


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


@pytest.mark.parametrize("predict_v", [False, True])
def test_a_plain_port_samples_the_same(predict_v):
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    gt, mask = X.clamp(-1, 1), (X > 0).float()
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20), predict_v=predict_v)
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
