"""Fused network and sampler compute what those in PyTorch do, and step aside where they cannot."""

import copy
import dataclasses

import plain
import pytest
import torch
from network_cases import SMALL, randomised, relative, unet
from run_cases import ROOT

from guided_diffusion.accel import build, cpu_kernels, fused_unet
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.run.inpainter import Inpainter, classifier_gradient
from guided_diffusion.unet import EncoderUNetModel

pytestmark = pytest.mark.usefixtures("kernels")


def built(network):
    return fused_unet.FusedUNet(cpu_kernels.load(), network)


def inputs(count, size=16, channels=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.randint(0, 1000, (count,), generator=generator)


def exact(network, *arguments):
    double = copy.deepcopy(network).double()
    double.dtype = torch.float64
    x, *others = arguments
    return plain.unet(double, x.double(), *others)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 1, "out_channels": 1, "use_scale_shift_norm": False},
        {"resblock_updown": False, "use_new_attention_order": True, "num_head_channels": 32},
        {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (4, 8)},
        {"num_heads": 2, "num_head_channels": -1, "num_heads_upsample": 8, "norm_groups": 8},
        {"image_size": 20, "attention_resolutions": (10,), "dropout": 0.5, "use_checkpoint": True},
        {"num_res_blocks": 0, "channel_mult": (1, 2)},
        {"num_classes": 5},
    ],
)
def test_every_kind_of_network(changes):
    network = unet(**changes)
    x, t = inputs(3, network.cfg.image_size, network.cfg.in_channels)
    y = [torch.tensor([4, 0, 2])] if "num_classes" in changes else []
    run = built(network)
    for times in (t, t[:1].expand(3)):
        with torch.inference_mode():
            output = run(x, times, *y)
        reference = exact(network, x, times, *y)
        assert output.shape == reference.shape
        assert output.is_contiguous()
        assert relative(output, reference) < 2e-5
    assert relative(network(x, times, *y), reference) < 2e-5


@pytest.mark.parametrize(
    "changes", [{}, {"resblock_updown": False, "use_scale_shift_norm": False, "in_channels": 1}]
)
def test_a_network_in_bfloat16(changes):
    """Its products are rounded as PyTorch's are, and everything else is not."""
    if not cpu_kernels.load().has_bfloat16:
        pytest.skip("needs a processor that multiplies bfloat16 (AVX512_BF16)")
    network = unet(**changes)
    x, t = inputs(3, network.cfg.image_size, network.cfg.in_channels)
    reference = exact(network, x, t)
    network.convert_trunk(torch.bfloat16)
    with torch.inference_mode():
        errors = [(run(x, t) - reference).std() for run in (built(network), network)]
    assert 0.1 * errors[1] < errors[0] < 2 * errors[1]


def test_a_batch_at_one_time_computes_each_image_alone():
    """That the embedding is computed once changes nothing, nor does the batch."""
    run, (x, t) = built(unet()), inputs(3)
    together = run(x, t[:1].expand(3))
    for i in range(3):
        assert torch.equal(run(x[i : i + 1], t[:1])[0], together[i])


def test_network_and_inputs_are_left_as_they_are():
    network, (x, t) = unet(), inputs(2)
    modules, state = list(network.modules()), network.state_dict(keep_vars=True)
    before, values = x.clone(), copy.deepcopy(state)
    run = built(network)
    assert torch.equal(run(x, t), run(x, t))
    assert torch.equal(x, before)
    assert list(network.modules()) == modules
    for name, tensor in network.state_dict(keep_vars=True).items():
        assert tensor is state[name]
        assert torch.equal(tensor, values[name])


@pytest.mark.parametrize(
    ("pool", "resblock_updown"),
    [("attention", False), ("adaptive", True), ("spatial", False), ("spatial_v2", True)],
)
def test_a_classifiers_gradient(pool, resblock_updown):
    cfg = dataclasses.replace(SMALL, resblock_updown=resblock_updown, num_head_channels=32)
    classifier = randomised(EncoderUNetModel(cfg, 10, pool))
    x, t = inputs(3)
    y = torch.tensor([4, 0, 2])
    before = classifier_gradient(classifier, x, t, y, 2.0)
    twin = fused_unet.with_fused_convolutions(cpu_kernels.load(), classifier)
    with torch.inference_mode():
        gradient = classifier_gradient(twin, x, t, y, 2.0)
        assert torch.equal(classifier_gradient(classifier, x, t, y, 2.0), before)
    assert not torch.equal(gradient, before)  # it did go another way
    assert relative(gradient, before) < 1e-4


def inpainter(**changes):
    conf = load_conf(ROOT / "confs/demo.yml", InpaintConf)
    own = {"model_path": str(ROOT / conf.model_path), "device": "cpu"}
    conf = dataclasses.replace(conf, **{**own, **changes})
    return Inpainter(conf, [2, 1, 0, -1])


def is_fused(network):
    return isinstance(getattr(network, "_fast", None), fused_unet.FusedUNet)


def test_a_run_on_a_cpu_uses_it_unless_told_otherwise():
    for compile in ("auto", True):
        assert is_fused(inpainter(compile=compile).network)
    assert not is_fused(inpainter(compile=False).network)
    has_bfloat16 = cpu_kernels.load().has_bfloat16
    assert is_fused(inpainter(precision="bfloat16").network) == has_bfloat16


def test_without_kernels_one_warning_and_the_network_itself(monkeypatch):
    def fail():
        raise build.KernelError("no C++ compiler found (g++)")

    monkeypatch.setattr(cpu_kernels, "load", fail)
    with pytest.warns(UserWarning, match="going on without: no C\\+\\+ compiler") as caught:
        network = inpainter().network
    assert len(caught) == 1
    assert not is_fused(network)
    guided = {"classifier_path": "absent.pt", "classifier_scale": 0.0}
    with pytest.warns(UserWarning, match="going on without") as caught:
        inpainter(**guided)
    assert len(caught) == 1


def test_full_memory_is_told_as_such(monkeypatch):
    """The batch is halved on it."""
    run = inpainter()
    monkeypatch.setattr(cpu_kernels.load()._library, "convolve", lambda *_: -1)
    with pytest.raises(MemoryError):
        run.network(*inputs(1, 64))


def test_the_shipped_model_is_as_exact_as_the_plain_port():
    """On the model whose pictures people see; both compared with float64."""
    fast, slow = inpainter(), inpainter(compile=False)
    x, t = inputs(2, 64)
    with torch.inference_mode():
        reference = exact(slow.model, x, t)
        errors = [(run(x, t) - reference).std() for run in (fast.network, slow.network)]
    assert errors[0] < 8 * errors[1]
