"""``compile: true``: torch.compile computes the same, or one warning says that it does not."""

import copy
import dataclasses
import os
from functools import partial

import network_cases
import pytest
import torch
from network_cases import SMALL, randomised, relative
from run_cases import ROOT

from guided_diffusion.accel import accelerate as door
from guided_diffusion.accel.accelerate import CompiledBatch, accelerate
from guided_diffusion.accel.layout import trunk_dtype
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.io import paths
from guided_diffusion.run.inpainter import Inpainter, classifier_gradient
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10, 700, 4])
Y = torch.tensor([1, 3, 0])
pytestmark = pytest.mark.filterwarnings("error:compile")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu: compiles for it"
)


@pytest.fixture
def network():
    return network_cases.unet(num_classes=5)


def with_backend(monkeypatch, backend):
    """Let networks compile on a CPU by another backend than the slow C++ one."""
    monkeypatch.setattr(door, "_cpu_kernels", lambda *_: None)  # as without a C++ compiler
    monkeypatch.setattr(paths, "_CACHE", "unused")
    if backend:
        compile = torch.compile
        monkeypatch.setattr(
            torch,
            "compile",
            lambda network, **options: compile(network, dynamic=False, backend=backend),
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param(None, marks=pytest.mark.slow)])
def test_a_compiled_network_computes_the_same(network, monkeypatch, backend, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    reference = network(X, T, Y)
    with_backend(monkeypatch, backend)
    run = accelerate(network, CPU, True)
    with torch.inference_mode():
        for count in (3, 3, 1):
            output = run(X[:count], T[:count], Y[:count])
            assert relative(output, reference[:count]) < 1e-5


def test_a_compiled_classifiers_gradient_is_the_same(monkeypatch):
    classifier = randomised(EncoderUNetModel(SMALL, 7, "attention"))
    gradient = partial(classifier_gradient, scale=2.0)
    with torch.inference_mode():
        reference = gradient(classifier, X, T, Y)
        with_backend(monkeypatch, "aot_eager")
        run = accelerate(classifier, CPU, True, gradient=gradient)
        assert isinstance(run._fast, CompiledBatch)
        assert relative(run(X, T, Y), reference) < 1e-5


def test_compiled_code_is_kept_where_the_user_says_or_in_our_folder(monkeypatch, tmp_path, network):
    monkeypatch.setattr(paths, "_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    door.compiled(network, CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    door.compiled(network, CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")


class Graph:
    """What a CUDA graph does: one output tensor, which every call writes over."""

    def __init__(self, room=9):
        self.room, self.calls, self.output = room, [], torch.empty(9, 3, 16, 16)

    def __call__(self, x, t):
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError
        assert x.is_contiguous()
        assert t.is_contiguous()  # other strides would be compiled anew
        self.calls.append((len(x), x.count_nonzero().item()))
        self.output[: len(x)] = x * t[:, None, None, None]
        return self.output[: len(x)]


def test_a_smaller_batch_is_padded_and_outputs_are_copies():
    graph = Graph()
    run = CompiledBatch(graph, CPU)
    outputs = [run(X[:count], T[:1].expand(count)) for count in (2, 1, 3, 2)]
    assert [count for count, _ in graph.calls] == [2, 2, 3, 3]
    for output, count in zip(outputs, (2, 1, 3, 2), strict=True):
        assert torch.equal(output, 10 * X[:count])


def test_after_full_memory_a_smaller_batch_is_not_padded():
    graph = Graph()
    run = CompiledBatch(graph, CPU)
    run(X, T)
    graph.room = 2
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(X[:2], T[:2])
    assert torch.equal(run(X[:2], T[:2])[1], 700 * X[1])


def test_a_gpus_first_output_is_that_of_a_replayed_graph():
    """It is recorded at the second call, with other inputs than the first that counts."""
    graph = Graph()
    run = CompiledBatch(graph, GPU)
    for _ in range(2):
        run(X, T)
    assert graph.calls == [(3, 0), (3, 0), (3, X.numel()), (3, X.numel())]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("precision", "most"),
    [("float32", 1e-4), ("tf32", 1e-2), ("float16", 1e-2), ("bfloat16", 5e-2)],
)
@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.usefixtures("switches")
def test_a_gpu_computes_the_same(network, precision, most, is_gradient):
    gradient = None
    if is_gradient:
        network = randomised(EncoderUNetModel(SMALL, 7, "attention"))
        gradient = partial(classifier_gradient, scale=2.0)
    reference = (partial(gradient, network) if gradient else network)(X, T, Y)
    network = copy.deepcopy(network).to(GPU)
    network.convert_trunk(trunk_dtype(precision, False, GPU))
    run = accelerate(network, GPU, True, gradient=gradient)
    inputs = [tensor.to(GPU) for tensor in (X, T, Y)]
    with torch.inference_mode():
        outputs = [run(*(tensor[:count] for tensor in inputs)) for count in (3, 1, 3)]
    for output in outputs:  # after all calls: a graph's own output would have been written over
        assert relative(output.cpu(), reference[: len(output)]) < most


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compile", ["auto", True, False])
def test_a_walk_waits_for_nothing_and_brings_nothing_to_the_gpu(compile):
    conf = load_conf(ROOT / "confs/demo.yml", InpaintConf)
    changes = {"model_path": str(ROOT / conf.model_path), "device": "cuda", "compile": compile}
    times = get_schedule_jump(t_T=20, jump_length=5, jump_n_sample=2)
    inpainter = Inpainter(dataclasses.replace(conf, **changes), times)
    gt = torch.zeros(2, 3, 64, 64, device=GPU)
    try:
        with torch.inference_mode():
            for number, _ in enumerate(inpainter.steps(gt, gt, [0, 1])):
                if number == 1:  # what is made once is made
                    torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
