import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool,
    EncoderUNetModel,
    ResBlock,
    TrunkConfig,
    UNetModel,
    attend,
    heads,
)

GOLDEN = Path(__file__).parent / "golden"

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

# The smallest network with every kind of block.
SMALL = TrunkConfig(16, 32, (1, 2), 1, (8,), num_heads=4, num_head_channels=16)
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


def empty(model, changes, *arguments):
    with torch.device("meta"):
        return model(TrunkConfig(**{**ADM, **changes}), *arguments)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def filled(model, seed=0):
    """Random weights everywhere, the zeros of a fresh network included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return model.eval()


def small_input(n=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) * 400 + 3


# --- published checkpoints -----------------------------------------------------------------------


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
    ("millions", "model", "changes", "arguments"),
    [
        (295.9, UNetModel, ADM_64, (6, 1000)),
        (421.5, UNetModel, ADM_128, (6, 1000)),
        (552.8, UNetModel, {}, (6,)),
        (553.8, UNetModel, {}, (6, 1000)),
        (559.0, UNetModel, ADM_512, (6, 1000)),
        (54.1, EncoderUNetModel, CLASSIFIER, (1000, "attention")),
    ],
)
def test_number_of_parameters(millions, model, changes, arguments):
    network = empty(model, changes, *arguments)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


# --- golden forward passes -----------------------------------------------------------------------


def golden_networks(name):
    conf = yaml.safe_load((GOLDEN / name / "conf.yml").read_text())
    trunk = TrunkConfig(
        image_size=conf["image_size"],
        model_channels=conf["num_channels"],
        channel_mult=tuple(int(m) for m in conf["channel_mult"].split(",")),
        num_res_blocks=conf["num_res_blocks"],
        attention_resolutions=(int(conf["attention_resolutions"]),),
        num_heads=conf["num_heads"],
        num_head_channels=conf["num_head_channels"],
    )
    model = UNetModel(trunk, 6, 1000 if conf["class_cond"] else None)
    model.load_state_dict(torch.load(GOLDEN / name / "model.pt", weights_only=True))
    if not conf["class_cond"]:
        return model.eval(), None
    trunk = TrunkConfig(
        image_size=conf["image_size"],
        model_channels=conf["classifier_width"],
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=conf["classifier_depth"],
        attention_resolutions=(int(conf["classifier_attention_resolutions"]),),
        num_head_channels=64,
    )
    classifier = EncoderUNetModel(trunk, 1000, conf["classifier_pool"])
    classifier.load_state_dict(torch.load(GOLDEN / name / "classifier.pt", weights_only=True))
    return model.eval(), classifier.eval()


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_forward_pass_equals_golden(name):
    model, classifier = golden_networks(name)
    expect = {k: torch.tensor(v) for k, v in np.load(GOLDEN / name / "expect.npz").items()}
    with torch.inference_mode():
        y = expect["fwd_y"] if model.label_emb is not None else None
        out = model(expect["fwd_x"], expect["fwd_t"], y)
        torch.testing.assert_close(out, expect["fwd_out"], rtol=0, atol=1e-5)
        if classifier is not None:
            logits = classifier(expect["fwd_x"], expect["fwd_t"])
            torch.testing.assert_close(logits, expect["classifier_logits"], rtol=0, atol=1e-5)


# --- attention -----------------------------------------------------------------------------------


def naive_attention(qkv, num_heads, new_order):
    """One head and one query at a time, in float64."""
    n, width, length = qkv.shape
    channels = width // 3
    d = channels // num_heads
    out = np.zeros((n, channels, length))
    for i in range(n):
        for head in range(num_heads):
            if new_order:  # all q, then all k, then all v; a head is a slice of each
                begins = [part * channels + head * d for part in range(3)]
            else:  # a head is 3·d rows: its q, its k, its v
                begins = [head * 3 * d + part * d for part in range(3)]
            q, k, v = (qkv[i, begin : begin + d] for begin in begins)
            for query in range(length):
                scores = np.array([q[:, query] @ k[:, j] for j in range(length)]) / math.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[i, head * d : (head + 1) * d, query] = v @ (weights / weights.sum())
    return out


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_against_loops(num_heads, new_order):
    qkv = np.random.default_rng(num_heads).normal(0, 2, (2, 3 * 16, 9))
    got = attend(torch.tensor(qkv), num_heads, new_order).numpy()
    np.testing.assert_allclose(got, naive_attention(qkv, num_heads, new_order), atol=1e-10)
    if num_heads > 1:
        other = naive_attention(qkv, num_heads, not new_order)
        assert np.abs(got - other).max() > 0.1


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block(new_order):
    cfg = replace(SMALL, use_new_attention_order=new_order)
    block = filled(AttentionBlock(cfg, 64, num_heads=4))  # of 16 channels, by num_head_channels
    x = torch.randn(2, 64, 3, 3, generator=torch.Generator().manual_seed(1))
    flat = x.flatten(2)
    qkv = block.qkv(block.norm(flat)).detach().numpy()
    weight = block.proj_out.weight.detach().numpy()[:, :, 0]
    bias = block.proj_out.bias.detach().numpy()[:, None]
    expected = flat.numpy() + weight @ naive_attention(qkv, 4, new_order) + bias
    np.testing.assert_allclose(block(x).detach().flatten(2).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "num_heads", "num_head_channels", "expected"),
    [(64, 4, -1, 4), (64, 4, 16, 4), (64, 4, 32, 2), (96, 3, -1, 3), (64, 1, -1, 1)],
)
def test_num_head_channels_wins(channels, num_heads, num_head_channels, expected):
    assert heads(channels, num_heads, num_head_channels) == expected


@pytest.mark.parametrize(("num_heads", "num_head_channels"), [(4, 48), (5, -1), (40, -1), (4, 96)])
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
        ((32,), [1], [4, 5]),
        ((16,), [3], [2, 3]),
        ((8,), [5], [0, 1]),
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


# --- blocks --------------------------------------------------------------------------------------


def group_norm(x, norm):
    groups = x.reshape(x.shape[0], 32, -1)
    spread = np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    normed = ((groups - groups.mean(-1, keepdims=True)) / spread).reshape(x.shape)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return normed * weight[:, None, None] + bias[:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


def by_torch(module, x):
    return module(torch.tensor(x, dtype=torch.float32)).detach().numpy()


def resized(x, resize):
    if resize == "up":
        return x.repeat(2, axis=2).repeat(2, axis=3)
    if resize == "down":
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return x


@pytest.mark.parametrize(
    ("resize", "scale_shift", "out_channels"),
    [
        (None, True, 32),
        (None, False, 64),
        ("up", True, 64),
        ("up", False, 32),
        ("down", True, 32),
        ("down", False, 64),
    ],
)
def test_residual_block_by_hand(resize, scale_shift, out_channels):
    cfg = replace(SMALL, use_scale_shift_norm=scale_shift)
    block = filled(ResBlock(cfg, 32, out_channels, resize))
    x = np.random.default_rng(0).normal(size=(2, 32, 4, 4))
    emb = np.random.default_rng(1).normal(size=(2, 128))
    h = resized(silu(group_norm(x, block.in_layers[0])), resize)
    h = by_torch(partial(nn.Conv2d.forward, block.in_layers[2]), h)
    e = by_torch(block.emb_layers[1], silu(emb))[:, :, None, None]
    norm, conv = block.out_layers[0], block.out_layers[3]
    if scale_shift:
        scale, shift = e[:, :out_channels], e[:, out_channels:]
        h = group_norm(h, norm) * (1 + scale) + shift
    else:
        h = group_norm(h + e, norm)
    skip = resized(x, resize)
    if out_channels != 32:
        assert block.skip_connection.kernel_size == (1, 1)
        skip = by_torch(block.skip_connection, skip)
    expected = skip + by_torch(conv, silu(h))
    got = block(torch.tensor(x).float(), torch.tensor(emb).float()).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_resizing_by_convolution_has_its_own_names():
    with torch.device("meta"):
        names = shapes(UNetModel(replace(SMALL, resblock_updown=False), 6))
    assert names["input_blocks.2.0.op.weight"] == [32, 32, 3, 3]
    assert names["output_blocks.1.2.conv.weight"] == [64, 64, 3, 3]  # after the attention
    with torch.device("meta"):
        resblocks = shapes(UNetModel(SMALL, 6))
    assert not any(re.search(r"\.(op|conv)\.", name) for name in resblocks)
    assert resblocks["input_blocks.2.0.in_layers.2.weight"] == [32, 32, 3, 3]
    assert resblocks["output_blocks.1.2.in_layers.2.weight"] == [64, 64, 3, 3]


def test_resizing_by_convolution_runs():
    model = filled(UNetModel(replace(SMALL, resblock_updown=False), 3))
    x, t = small_input()
    features = {}
    down, up = model.input_blocks[2][0], model.output_blocks[1][-1]
    for name, module in (("down", down), ("up", up)):
        module.register_forward_hook(lambda _, i, o, n=name: features.update({n: (i[0], o)}))
    assert model(x, t).shape == x.shape
    assert features["down"][1].shape[-1] == 8
    assert down.op.stride == (2, 2)
    before, after = features["up"]
    torch.testing.assert_close(
        after, nn.Conv2d.forward(up.conv, before.repeat_interleave(2, 2).repeat_interleave(2, 3))
    )


def test_skips_are_concatenated_after_the_features():
    model = filled(UNetModel(SMALL, 6))
    seen = []
    for block in [*model.input_blocks, model.middle_block, *model.output_blocks]:
        block.register_forward_hook(lambda _, i, o: seen.append(o))
    normed = []  # what each block of the way up normalises first
    for block in model.output_blocks:
        norm = block[0].in_layers[0]
        norm.register_forward_pre_hook(lambda _, i: normed.append(i[0].clone()))
    x, t = small_input()
    model(x, t)
    down, up = len(model.input_blocks), len(model.output_blocks)
    h = seen[down]  # of the middle
    for i in range(up):
        torch.testing.assert_close(normed[i], torch.cat([h, seen[down - 1 - i]], dim=1))
        h = seen[down + 1 + i]


def test_widths_are_rounded_down():
    cfg = TrunkConfig(16, 64, (0.5, 1.5), 1, ())
    with torch.device("meta"):
        names = shapes(UNetModel(cfg, 6))
    assert names["input_blocks.0.0.weight"][0] == 32
    assert names["middle_block.0.in_layers.2.weight"][0] == 96
    assert names["out.2.weight"] == [6, 32, 3, 3]


# --- the whole network ---------------------------------------------------------------------------


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
    model = filled(UNetModel(SMALL, 6, 5))
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
    model = filled(UNetModel(replace(SMALL, dropout=0.5), 6))
    x, t = small_input()
    with torch.no_grad():
        calm = model(x, t)
        assert torch.equal(calm, model(x, t))
        without = filled(UNetModel(SMALL, 6))
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
        model = filled(UNetModel(replace(SMALL, use_checkpoint=use_checkpoint), 6)).train()
        source = x.clone().requires_grad_()
        model(source, t).square().sum().backward()
        gradients.append([source.grad, *(p.grad for p in model.parameters())])
        assert bool(counted) == use_checkpoint
    assert len(counted) == sum(isinstance(m, ResBlock | AttentionBlock) for m in model.modules())
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
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
    model = filled(UNetModel(SMALL, 6) if pool is None else EncoderUNetModel(SMALL, 10, pool))
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


# --- the classifier ------------------------------------------------------------------------------

# Features of the small trunk: input blocks of 32, 32, 32 and 64 channels, a middle of 64.
POOL_SHAPES = {
    "attention": {
        "out.0.weight": [64],
        "out.0.bias": [64],
        "out.2.positional_embedding": [64, 8 * 8 + 1],
        "out.2.qkv_proj.weight": [192, 64, 1],
        "out.2.qkv_proj.bias": [192],
        "out.2.c_proj.weight": [10, 64, 1],
        "out.2.c_proj.bias": [10],
    },
    "adaptive": {
        "out.0.weight": [64],
        "out.0.bias": [64],
        "out.3.weight": [10, 64, 1, 1],
        "out.3.bias": [10],
    },
    "spatial": {
        "out.0.weight": [2048, 224],
        "out.0.bias": [2048],
        "out.2.weight": [10, 2048],
        "out.2.bias": [10],
    },
    "spatial_v2": {
        "out.0.weight": [2048, 224],
        "out.0.bias": [2048],
        "out.1.weight": [2048],
        "out.1.bias": [2048],
        "out.3.weight": [10, 2048],
        "out.3.bias": [10],
    },
}


@pytest.mark.parametrize("pool", POOLS)
def test_names_and_shapes_of_pools(pool):
    with torch.device("meta"):
        names = shapes(EncoderUNetModel(SMALL, 10, pool))
        trunk = {k: v for k, v in shapes(UNetModel(SMALL, 6)).items() if not re.match("out", k)}
    assert {k: v for k, v in names.items() if not k.startswith("out.")} == trunk
    assert {k: v for k, v in names.items() if k.startswith("out.")} == POOL_SHAPES[pool]


def naive_pool(pool, out, skips, h):
    """The logits from the trunk's features, written out in numpy."""
    parameters = {name: p.detach().double().numpy() for name, p in out.named_parameters()}

    def linear(name, x):
        weight = parameters[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + parameters[f"{name}.bias"]

    if pool == "adaptive":
        return linear("3", silu(group_norm(h, out[0])).mean((2, 3)))
    if pool == "attention":
        tokens = silu(group_norm(h, out[0])).reshape(*h.shape[:2], -1)  # (N, C, L)
        tokens = np.concatenate([tokens.mean(-1, keepdims=True), tokens], -1)
        tokens = tokens + parameters["2.positional_embedding"]
        qkv = linear("2.qkv_proj", tokens.transpose(0, 2, 1)).transpose(0, 2, 1)
        attended = naive_attention(qkv, h.shape[1] // 16, new_order=True)
        return linear("2.c_proj", attended[:, :, 0])
    x = linear("0", np.concatenate([f.mean((2, 3)) for f in [*skips, h]], axis=1))
    if pool == "spatial":
        return linear("2", np.maximum(x, 0))
    return linear("3", silu(group_norm(x[:, :, None, None], out[1])[:, :, 0, 0]))


@pytest.mark.parametrize("pool", POOLS)
def test_pools_by_hand(pool):
    model = filled(EncoderUNetModel(SMALL, 10, pool))
    x, t = small_input()
    with torch.inference_mode():
        h, skips = model.encode(x, model.embed_time(t))
        got = model(x, t)
    assert got.shape == (2, 10)
    features = [f.double().numpy() for f in (*skips, h)]
    assert [f.shape[1] for f in features] == [32, 32, 32, 64, 64]
    expected = naive_pool(pool, model.out, features[:-1], features[-1])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_attention_pool_of_equal_pixels():
    # All tokens alike and no positions: attention returns the value itself.
    pool = filled(AttentionPool(2, 32, 16, 7))
    nn.init.zeros_(pool.positional_embedding)
    pixel = torch.randn(1, 32, 1, 1, generator=torch.Generator().manual_seed(3))
    value = pool.qkv_proj(pixel.flatten(2))[:, 64:]
    torch.testing.assert_close(pool(pixel.expand(1, 32, 2, 2)), pool.c_proj(value)[:, :, 0])


def test_a_fresh_adaptive_classifier_prefers_nothing():
    x, t = small_input()
    assert (EncoderUNetModel(SMALL, 10, "adaptive")(x, t) == 0).all()


def test_unknown_pool():
    with torch.device("meta"), pytest.raises(ValueError, match="unknown pool 'max'"):
        EncoderUNetModel(SMALL, 10, "max")
