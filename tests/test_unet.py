import json
import re
from dataclasses import replace
from functools import partial

import plain
import pytest
import torch
from network_cases import GOLDEN, SMALL, golden_networks, randomised, relative
from torch import nn

from guided_diffusion.nn import GroupNorm32
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.unet import (
    AttentionBlock,
    EncoderUNetModel,
    ResBlock,
    TrunkConfig,
    UNetModel,
    heads,
)

# The published architectures (sides, widths, multipliers).
ADM = {
    "image_size": 256,
    "model_channels": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (32, 16, 8),
    "num_heads": 4,
    "num_head_channels": 64,
}
ADM_64 = {
    "image_size": 64,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "use_new_attention_order": True,
}
ADM_128 = {"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "num_head_channels": -1}
ADM_512 = {"image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)}
CLASSIFIER = {"model_channels": 128, "num_heads": 1}

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


def empty(model, changes, *arguments):
    with torch.device("meta"):
        return model(TrunkConfig(**{**ADM, **changes}), *arguments)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def small_input(n=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) * 400 + 3


@pytest.mark.parametrize(
    ("name", "model", "changes", "arguments"),
    [
        ("celeba256", UNetModel, {}, (6,)),
        ("inet256", UNetModel, {}, (6, 1000)),
        ("classifier256", EncoderUNetModel, CLASSIFIER, (1000, "attention")),
    ],
)
def test_keys_and_shapes_of_published_checkpoints(name, model, changes, arguments):
    expected = json.loads((GOLDEN / f"{name}_keys.json").read_text())
    assert shapes(empty(model, changes, *arguments)) == expected


@pytest.mark.parametrize(
    ("millions", "changes"), [(295.9, ADM_64), (421.5, ADM_128), (559.0, ADM_512)]
)
def test_number_of_parameters(millions, changes):
    network = empty(UNetModel, changes, 6, 1000)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_forward_pass_equals_golden(name):
    _, expect, model, classifier = golden_networks(name)
    with torch.inference_mode():
        y = expect["fwd_y"] if model.label_emb is not None else None
        out = model(expect["fwd_x"], expect["fwd_t"], y)
        torch.testing.assert_close(out, expect["fwd_out"], rtol=0, atol=1e-5)
        if classifier is not None:
            logits = classifier(expect["fwd_x"], expect["fwd_t"])
            torch.testing.assert_close(logits, expect["classifier_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "num_heads", "num_head_channels", "expected"), [(64, 4, -1, 4), (64, 4, 32, 2)]
)
def test_num_head_channels_wins(channels, num_heads, num_head_channels, expected):
    assert heads(channels, num_heads, num_head_channels) == expected


@pytest.mark.parametrize(("num_heads", "num_head_channels"), [(4, 48), (5, -1)])
def test_heads_that_do_not_divide(num_heads, num_head_channels):
    with pytest.raises(ValueError, match="64 channels cannot be divided"):
        heads(64, num_heads, num_head_channels)


def attending(blocks):
    return [
        i for i, block in enumerate(blocks) if any(isinstance(m, AttentionBlock) for m in block)
    ]


@pytest.mark.parametrize(
    ("sides", "inputs", "outputs"),
    [
        # Blocks on the way down: side 32 in 0, 1 and 2 (down), 16 in 3 and 4 (down), 8 in 5;
        # on the way up two each of 8, 16 and 32.
        ((), [], []),
        ((16,), [3], [2, 3]),
        ((32, 8, 4, 64), [1, 5], [0, 1, 4, 5]),
    ],
)
def test_attention_at_the_listed_sides(sides, inputs, outputs):
    cfg = TrunkConfig(32, 32, (1, 1, 2), 1, sides)
    with torch.device("meta"):
        model = UNetModel(cfg, 6)
    assert attending(model.input_blocks) == inputs
    assert attending(model.output_blocks) == outputs
    assert isinstance(model.middle_block[1], AttentionBlock)


@pytest.mark.parametrize(("up", "expected"), [(-1, {2}), (4, {4})])
def test_heads_on_the_way_up(up, expected):
    cfg = replace(SMALL, num_heads=2, num_head_channels=-1, num_heads_upsample=up)
    with torch.device("meta"):
        model = UNetModel(cfg, 6)

    def count(part):
        return {m.num_heads for m in part.modules() if isinstance(m, AttentionBlock)}

    assert count(model.input_blocks) == count(model.middle_block) == {2}
    assert count(model.output_blocks) == expected


@pytest.mark.parametrize(
    ("updown", "scale_shift", "new_order", "memory_format"),
    [
        (True, True, False, torch.contiguous_format),
        (False, True, True, torch.channels_last),
        (True, False, True, torch.contiguous_format),
        (False, False, False, torch.channels_last),
    ],
)
def test_a_plain_port_computes_the_same(updown, scale_shift, new_order, memory_format):
    cfg = replace(
        SMALL, resblock_updown=updown, use_scale_shift_norm=scale_shift,
        use_new_attention_order=new_order,
    )  # fmt: skip
    model, inputs = randomised(UNetModel(cfg, 6, 5)), (*small_input(), torch.tensor([1, 3]))
    reference = plain.unet(model, *inputs)
    model.to(memory_format=memory_format).memory_format = memory_format
    with torch.inference_mode():
        output = model(*inputs)
    assert relative(output, reference) < 1e-5
    assert output.is_contiguous()


@pytest.mark.parametrize(
    ("pool", "updown"),
    [("attention", True), ("adaptive", False), ("spatial", True), ("spatial_v2", False)],
)
def test_a_plain_classifier_computes_the_same_in_float64(pool, updown, monkeypatch):
    cfg = replace(SMALL, resblock_updown=updown, use_scale_shift_norm=updown)
    model = randomised(EncoderUNetModel(cfg, 5, pool)).double()
    model.dtype = torch.float64
    x, t = small_input()
    x, y = x.double(), torch.tensor([1, 3])
    # The network itself does these in float32.
    monkeypatch.setattr(GroupNorm32, "forward", nn.GroupNorm.forward)
    monkeypatch.setattr(model, "embed_time", lambda t: plain.embed_time(model, t))
    assert relative(plain.classifier(model, x, t), model(x, t)) < 1e-12
    plains = classifier_gradient(partial(plain.classifier, model), x, t, y, 3.0)
    assert relative(plains, classifier_gradient(model, x, t, y, 3.0)) < 1e-12


def test_resizing_by_convolution_has_its_own_names():
    with torch.device("meta"):
        names = shapes(UNetModel(replace(SMALL, resblock_updown=False), 6))
    assert names["input_blocks.2.0.op.weight"] == [32, 32, 3, 3]
    assert names["output_blocks.1.2.conv.weight"] == [64, 64, 3, 3]  # after the attention


def test_widths_are_rounded_down():
    cfg = TrunkConfig(16, 64, (0.5, 1.5), 1, ())
    with torch.device("meta"):
        names = shapes(UNetModel(cfg, 6))
    assert names["input_blocks.0.0.weight"][0] == 32
    assert names["middle_block.0.in_layers.2.weight"][0] == 96
    assert names["out.2.weight"] == [6, 32, 3, 3]


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "num_classes"), [(3, 3, None), (3, 6, 5), (1, 2, None)]
)
def test_a_fresh_network_returns_zeros(in_channels, out_channels, num_classes):
    model = UNetModel(replace(SMALL, in_channels=in_channels), out_channels, num_classes)
    x, t = small_input()
    y = torch.tensor([0, 4]) if num_classes else None
    out = model(x[:, :in_channels], t, y)
    assert out.shape == (2, out_channels, 16, 16)
    assert (out == 0).all()
    zero = {name for name, p in model.named_parameters() if "weight" in name and not p.any()}
    assert zero == {n for n, _ in model.named_parameters() if re.search(ZERO_AT_START, n)}


ZERO_AT_START = r"(out_layers\.3|proj_out|^out\.2)\.weight$"


def test_times_and_labels_matter_each_image_for_itself():
    model = randomised(UNetModel(SMALL, 6, 5))
    x, t = small_input()
    y = torch.tensor([1, 3])
    with torch.inference_mode():
        out = model(x, t, y)
        single = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(out, single, rtol=0, atol=1e-5)
        assert not torch.allclose(out, model(x, t + 50, y), atol=1e-3)
        assert not torch.allclose(out, model(x, t, y + 1), atol=1e-3)
        # The label's embedding is added to that of time.
        emb = model.embed_time(t) + model.label_emb.weight[y]
        model.embed_time, model.label_emb = lambda _: emb, None
        torch.testing.assert_close(out, model(x, t))


def test_dropout_in_training_only():
    model = randomised(UNetModel(replace(SMALL, dropout=0.5), 6))
    x, t = small_input()
    with torch.no_grad():
        calm = model(x, t)
        assert torch.equal(calm, model(x, t))
        without = randomised(UNetModel(SMALL, 6))
        torch.testing.assert_close(calm, without(x, t))
        model.train()
        assert not torch.allclose(model(x, t), model(x, t), atol=1e-3)


def test_checkpointing_changes_no_gradient(monkeypatch):
    import guided_diffusion.unet as unet

    counted = []
    original = unet.checkpoint
    monkeypatch.setattr(
        unet, "checkpoint", lambda *a, **k: (counted.append(1), original(*a, **k))[1]
    )
    x, t = small_input()
    gradients = []
    for use_checkpoint in (False, True):
        model = randomised(UNetModel(replace(SMALL, use_checkpoint=use_checkpoint), 6))
        model.train().requires_grad_()
        source = x.clone().requires_grad_()
        model(source, t).square().sum().backward()
        gradients.append([source.grad, *(p.grad for p in model.parameters())])
        assert bool(counted) == use_checkpoint
    assert len(counted) == sum(isinstance(m, ResBlock | AttentionBlock) for m in model.modules())
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    counted.clear()
    with torch.no_grad():
        model(x, t)
    assert not counted


HALF = (
    r"^(input_blocks|middle_block|output_blocks)\..*"
    r"(in_layers\.2|out_layers\.3|skip_connection|qkv|proj_out|op|conv)\.(weight|bias)$"
    r"|^input_blocks\.0\.0\."
)


@pytest.mark.parametrize(
    ("dtype", "updown", "pool"),
    [
        (torch.float16, False, None),
        (torch.bfloat16, True, None),
        (torch.float16, True, "attention"),
        (torch.bfloat16, False, "adaptive"),
        (torch.float16, True, "spatial"),
        (torch.bfloat16, True, "spatial_v2"),
    ],
)
def test_what_half_precision_converts(dtype, updown, pool):
    cfg = replace(SMALL, resblock_updown=updown)
    with torch.device("meta"):
        model = UNetModel(cfg, 6, 5) if pool is None else EncoderUNetModel(cfg, 10, pool)
    model.convert_trunk(dtype)
    for name, parameter in model.named_parameters():
        expected = dtype if re.search(HALF, name) else torch.float32
        assert parameter.dtype == expected, name
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"time_embed.0.weight", "middle_block.0.emb_layers.1.weight"} <= kept
    assert {"middle_block.0.in_layers.0.weight", "middle_block.1.norm.bias"} <= kept


@pytest.mark.parametrize("pool", [None, "attention", "spatial_v2"])
def test_bfloat16_is_close_to_float32(pool):
    model = randomised(UNetModel(SMALL, 6) if pool is None else EncoderUNetModel(SMALL, 10, pool))
    x, t = small_input()
    types = []
    model.middle_block.register_forward_hook(lambda _, i, o: types.append((i[0].dtype, o.dtype)))
    with torch.inference_mode():
        exact = model(x, t)
        model.convert_trunk(torch.bfloat16)
        rounded = model(x, t)
    assert types == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.05


# Features of the small trunk: input blocks of 32, 32, 32 and 64 channels, a middle of 64.
# The head's weights; each has a bias of its first side.
POOL_SHAPES = {
    "attention": {"0": [64], "2.qkv_proj": [192, 64, 1], "2.c_proj": [10, 64, 1]},
    "adaptive": {"0": [64], "3": [10, 64, 1, 1]},
    "spatial": {"0": [2048, 224], "2": [10, 2048]},
    "spatial_v2": {"0": [2048, 224], "1": [2048], "3": [10, 2048]},
}


@pytest.mark.parametrize("pool", POOLS)
def test_names_and_shapes_of_pools(pool):
    with torch.device("meta"):
        names = shapes(EncoderUNetModel(SMALL, 10, pool))
        trunk = {k: v for k, v in shapes(UNetModel(SMALL, 6)).items() if not re.match("out", k)}
    assert {k: v for k, v in names.items() if not k.startswith("out.")} == trunk
    expected = {f"out.{k}.weight": shape for k, shape in POOL_SHAPES[pool].items()}
    expected |= {f"out.{k}.bias": shape[:1] for k, shape in POOL_SHAPES[pool].items()}
    if pool == "attention":
        expected["out.2.positional_embedding"] = [64, 8 * 8 + 1]
    assert {k: v for k, v in names.items() if k.startswith("out.")} == expected


def test_a_fresh_adaptive_classifier_prefers_nothing():
    x, t = small_input()
    assert (EncoderUNetModel(SMALL, 10, "adaptive")(x, t) == 0).all()


def test_unknown_pool():
    with torch.device("meta"), pytest.raises(ValueError, match="unknown pool 'max'"):
        EncoderUNetModel(SMALL, 10, "max")
