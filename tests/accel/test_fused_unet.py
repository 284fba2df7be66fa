"""Fused network and sampler compute what those in PyTorch do, and step aside where they cannot."""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion.accel import build, cpu_kernels, fused_unet
from guided_diffusion.accel.memory import file_mappings
from guided_diffusion.config.keys import InpaintConf, load_conf
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, classifier_gradient
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import plain

SMALL = TrunkConfig(16, 32, (1, 2), 1, (8,), num_heads=4, num_head_channels=16)
ROOT = Path(__file__).resolve().parents[2]


def randomised(network):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval().requires_grad_(False)


def unet(out_channels=6, num_classes=None, **changes):
    cfg = TrunkConfig(**{**vars(SMALL), **changes})
    return randomised(UNetModel(cfg, out_channels, num_classes))


@pytest.fixture(autouse=True)
def _compiler():
    try:
        build._compilers()
    except build.KernelError as error:
        pytest.skip(str(error))


def built(network):
    return fused_unet.FusedUNet(cpu_kernels.load(), network)


def inputs(count, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator), torch.randint(
        0, 1000, (count,), generator=generator
    )


def exact(network, *arguments):
    double = copy.deepcopy(network).double()
    double.dtype = torch.float64
    x, *others = arguments
    return plain.unet(double, x.double(), *others)


def relative(output, reference):
    return ((output - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 3},
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"use_new_attention_order": True, "num_head_channels": 32},
        {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (4, 8)},
        {"num_heads": 2, "num_head_channels": -1, "num_heads_upsample": 8},
        {"image_size": 20, "attention_resolutions": (10,)},
        {"dropout": 0.5, "use_checkpoint": True},
        {"num_res_blocks": 0, "channel_mult": (1, 2)},
    ],
)
def test_every_kind_of_network(changes):
    network = unet(**changes)
    x, t = inputs(3, changes.get("image_size", 16))
    with torch.inference_mode():
        output = built(network)(x, t)
    reference = exact(network, x, t)
    assert output.shape == reference.shape
    assert output.is_contiguous()
    assert relative(output, reference) < 2e-5
    assert relative(network(x, t), reference) < 2e-5


def test_classes():
    network = unet(num_classes=5)
    x, t = inputs(3)
    y = torch.tensor([4, 0, 2])
    run = built(network)
    for times in (t, t[:1].expand(3)):
        assert relative(run(x, times, y), exact(network, x, times, y)) < 2e-5


def test_a_batch_at_one_time_computes_each_image_alone():
    """That the embedding is computed once changes nothing, nor does the batch."""
    network = unet()
    run = built(network)
    x, t = inputs(3)
    together = run(x, t[:1].expand(3))
    assert relative(together, exact(network, x, t[:1].expand(3))) < 2e-5
    for i in range(3):
        assert torch.equal(run(x[i : i + 1], t[:1])[0], together[i])


def test_inputs_are_left_as_they_are():
    run = built(unet())
    x, t = inputs(2)
    before = x.clone()
    first = run(x, t)
    assert torch.equal(x, before)
    assert torch.equal(run(x, t), first)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_checkpoints_pages_go_as_weights_are_packed(tmp_path):
    conv = nn.Conv2d(1024, 1024, 3, padding=1)
    torch.save(conv.state_dict(), tmp_path / "conv.pt")  # 38 MB
    state = torch.load(tmp_path / "conv.pt", mmap=True, weights_only=True)
    conv.load_state_dict(state, assign=True)
    conv.requires_grad_(False)
    own = fused_unet.Conv3x3(cpu_kernels.load(), conv, file_mappings())
    expected = conv.weight.sum()  # reads all of it
    resident = resident_pages(conv.weight)
    own(torch.randn(1, 4, 4, 1024))
    assert resident > 9000
    assert resident_pages(conv.weight) < 100
    assert conv.weight.sum() == expected


def resident_pages(tensor):
    """Return how many KiB of the mapping that holds ``tensor`` are in memory, over four."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found = start <= tensor.data_ptr() < end
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) // 4
    raise LookupError("no such mapping")


# ---- With a gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_a_classifiers_gradient(pool, resblock_updown):
    cfg = dataclasses.replace(SMALL, resblock_updown=resblock_updown, num_head_channels=32)
    classifier = randomised(EncoderUNetModel(cfg, 10, pool))
    x, t = inputs(3)
    y = torch.tensor([4, 0, 2])
    before = classifier_gradient(classifier, y, 2.0)(x, t)
    fused_unet.fuse_convolutions(cpu_kernels.load(), classifier)
    with torch.inference_mode():
        gradient = classifier_gradient(classifier, y, 2.0)(x, t)
    assert not torch.equal(gradient, before)  # it did go another way
    assert relative(gradient, before) < 1e-4


# ---- The sampler ---------------------------------------------------------------------------------

BETAS = np.linspace(1e-3, 0.3, 20)


def both(**options):
    """The chain in PyTorch and in kernels."""
    times = list(range(20))
    return (
        GaussianDiffusion(BETAS, times, **options),
        fused_unet.FusedDiffusion(cpu_kernels.load(), BETAS, times, **options),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_sigma": False},
        {"predict_xstart": True},
        {"clip_denoised": False},
        {"predict_xstart": True, "learn_sigma": False, "clip_denoised": False},
    ],
)
@pytest.mark.parametrize("size", [5, 16])
def test_every_step_of_the_loop(options, size):
    plain_chain, chain = both(**options)
    generator = torch.Generator().manual_seed(3)
    channels = 6 if plain_chain.learn_sigma else 3
    x, noise = torch.randn(2, 2, 3, size, size, generator=generator).unbind()
    output = torch.randn(2, channels, size, size, generator=generator)
    inputs = [x.clone(), noise.clone(), output.clone()]
    for t in (0, 1, 7, 19):
        expected = plain_chain.denoise(output, x, t, noise)
        for own, other in zip(chain.denoise(output, x, t, noise), expected, strict=True):
            assert torch.allclose(own, other, rtol=2e-6, atol=2e-6)
        for name in ("undo", "q_sample"):
            own, other = (getattr(c, name)(x, t, noise) for c in (chain, plain_chain))
            assert torch.allclose(own, other, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, inputs, [x, noise, output]))  # as they were
    assert relative(chain.denoise(output, x, 7, noise, x)[0],
                    plain_chain.denoise(output, x, 7, noise, x)[0]) < 1e-6  # fmt: skip


def test_a_number_that_is_lost_is_lost_in_its_place_alone():
    _, chain = both()
    x, noise, output = torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.ones(1, 6, 8, 8)
    output[0, 1, 2, 3] = float("nan")
    x_next, x_start = chain.denoise(output, x, 5, noise)
    for picture in (x_next, x_start):
        assert picture.isfinite().sum() == picture.numel() - 1
        assert picture[0, 1, 2, 3].isnan()
    output[0, 1, 2, 3] = 1
    output[0, 4, 2, 3] = float("nan")  # of the variance
    assert chain.denoise(output, x, 5, noise)[0][0, 1, 2, 3].isnan()


def test_a_walk_of_both_ends_at_the_same_picture():
    plain_chain, chain = both()
    times = get_schedule_jump(t_T=20, jump_length=5, jump_n_sample=3)
    generator = torch.Generator().manual_seed(0)
    gt = torch.rand(2, 3, 12, 12, generator=generator) * 2 - 1
    mask = (gt > 0).float()

    def model(x, timesteps):
        return torch.cat([x * 0.5, torch.tanh(x)], dim=1)

    ends = []
    for each in (plain_chain, chain):
        noise = torch.Generator().manual_seed(5)
        draw = lambda noise=noise: torch.randn(gt.shape, generator=noise)  # noqa: E731
        *_, last = each.repaint(model, gt, mask, times, draw)
        ends.append(last.x)
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [0, 1, 7, 623, 624, 1000])
@pytest.mark.parametrize("size", [4, 6, 17, 64])
def test_noise_is_that_of_torch(labels, size):
    """From wherever the generators are, over many draws; the last of odd sizes are drawn anew."""
    shape, seeds = (3, 3, size, size), (0, 5, 2**31 + 12)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        torch.randint(0, 1000, (labels,), generator=generator)
    draw = fused_unet.fused_noise(cpu_kernels.load(), generators, shape)
    for _ in range(5):
        expected = torch.stack([torch.empty(shape[1:]).normal_(generator=g) for g in generators])
        noise = draw()
        assert noise.shape == shape
        assert torch.allclose(noise, expected, rtol=0, atol=2e-6)


def test_noise_of_a_million_numbers_is_normal():
    draw = fused_unet.fused_noise(
        cpu_kernels.load(), [torch.Generator().manual_seed(1)], (1, 1, 1000, 1000)
    )
    noise = draw().double().flatten()
    assert noise.isfinite().all()
    assert abs(noise.mean()) < 0.005
    assert abs(noise.std() - 1) < 0.005
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 0.002
    assert 4.3 < noise.abs().max() < 5.9


def test_noise_that_would_be_another_is_left_to_torch(monkeypatch):
    generators = [torch.Generator().manual_seed(1)]
    assert fused_unet.fused_noise(cpu_kernels.load(), generators, (1, 3, 8, 8))
    assert (
        fused_unet.fused_noise(cpu_kernels.load(), generators, (1, 3, 2, 2)) is None
    )  # drawn otherwise
    monkeypatch.setattr(cpu_kernels.Kernels, "draw_normal", lambda *_: torch.zeros(1, 16))
    assert fused_unet.fused_noise(cpu_kernels.load(), generators, (1, 3, 8, 8)) is None
    run = inpainter()
    draw = run.noise_source(generators, (1, 3, 8, 8))
    expected = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw()[0], expected)


# ---- Where it is used ----------------------------------------------------------------------------


def inpainter(**changes):
    conf = load_conf(ROOT / "confs/demo.yml", InpaintConf)
    own = {"model_path": str(ROOT / conf.model_path), "device": "cpu"}
    conf = dataclasses.replace(conf, **{**own, **changes})
    return Inpainter(conf, [2, 1, 0, -1])


def test_a_run_on_a_cpu_uses_it_unless_told_otherwise():
    for compile in ("auto", True):
        assert isinstance(inpainter(compile=compile).network, fused_unet.FusedUNet)
        assert isinstance(inpainter(compile=compile).diffusion, fused_unet.FusedDiffusion)
    assert not isinstance(inpainter(compile=False).network, fused_unet.FusedUNet)
    assert not isinstance(inpainter(compile=False).diffusion, fused_unet.FusedDiffusion)
    assert not isinstance(inpainter(precision="bfloat16").network, fused_unet.FusedUNet)


def test_the_shipped_model_is_as_exact_as_the_plain_port():
    """On the model whose pictures people see; both compared with float64."""
    fast, slow = inpainter(), inpainter(compile=False)
    x, t = inputs(2, 64)
    with torch.inference_mode():
        reference = exact(slow.model, x, t)
        errors = [(run(x, t) - reference).std() for run in (fast.network, slow.network)]
    assert errors[0] < 8 * errors[1]


def test_without_kernels_one_warning_and_the_network_itself(monkeypatch):
    def fail():
        raise build.KernelError("no C++ compiler found (g++)")

    monkeypatch.setattr(fused_unet, "load", fail)
    with pytest.warns(UserWarning, match="going on without: no C\\+\\+ compiler") as caught:
        network = inpainter().network
    assert len(caught) == 1
    assert not isinstance(network, fused_unet.FusedUNet)
    guided = {"classifier_path": "absent.pt", "classifier_scale": 0.0}
    with pytest.warns(UserWarning, match="going on without") as caught:
        inpainter(**guided)
    assert len(caught) == 1


def test_weights_that_are_views_in_the_checkpoint(tmp_path):
    """They keep their strides on disk, and the kernels read memory."""
    state = torch.load(ROOT / "data/pretrained/demo64.pt", weights_only=True)
    x, t = inputs(1, 64)
    outputs = []
    for kind in ("whole", "views"):
        own = {name: tensor.float() for name, tensor in state.items()}
        if kind == "views":
            own = {
                name: torch.stack([tensor, tensor + 9], dim=-1)[..., 0]
                for name, tensor in own.items()
            }
        torch.save(own, tmp_path / f"{kind}.pt")
        network = inpainter(model_path=str(tmp_path / f"{kind}.pt")).network
        assert isinstance(network, fused_unet.FusedUNet)
        outputs.append(network(x, t))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("images", "times"), [(3, 2), (1, 3)])
def test_as_many_times_as_images(images, times):
    x, t = inputs(3)
    with pytest.raises(ValueError, match="rows"):
        built(unet())(x[:images], t[:times])


def test_full_memory_is_told_as_such(monkeypatch):
    """The batch is halved on it."""
    run = inpainter()
    monkeypatch.setattr(cpu_kernels.load()._library, "convolve", lambda *_: 1)
    with pytest.raises(MemoryError):
        run.network(*inputs(1, 64))
