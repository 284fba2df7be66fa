"""The yardstick: both networks and the loop as a straightforward port writes them.

Eager, in one type, every tensor in its own memory: group normalisation in float32 and cast back,
scale and shift as separate operations, attention as an explicit softmax; the loop looks its
coefficients up on the host in float64, makes a tensor of them for every step, and synchronises
with the device once a step. It takes our modules for their weights alone and calls none of their
``forward``, so that nothing done to make those fast makes this fast.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    UNetEncoder,
    UNetModel,
    Upsample,
)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise in the type of the norm's own weights, which is float32."""
    h = x.type(norm.weight.dtype)
    return F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps).type(x.dtype)


def conv3x3(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve with the weights of ``conv``, whatever else it would do."""
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def res_block(block: ResBlock, x: Tensor, emb: Tensor, resize: str | None) -> Tensor:
    """(N, C, H, W) → (N, out, H', W')."""
    h = F.silu(group_norm(block.in_layers[0], x))
    if resize == "up":
        h, x = (F.interpolate(part, scale_factor=2, mode="nearest") for part in (h, x))
    if resize == "down":
        h, x = (F.avg_pool2d(part, 2) for part in (h, x))
    h = conv3x3(block.in_layers[2], h)
    emb_out = block.emb_layers[1](F.silu(emb)).type(h.dtype)[..., None, None]
    if block.use_scale_shift_norm:
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = group_norm(block.out_layers[0], h) * (1 + scale) + shift
    else:
        h = group_norm(block.out_layers[0], h + emb_out)
    h = block.out_layers[3](F.silu(h))
    skip = block.skip_connection
    return (x if isinstance(skip, nn.Identity) else skip(x)) + h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over positions, a head each: three of (N·heads, d, L) → (N·heads, d, L)."""
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight = torch.softmax(weight.type(exact), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v)


def attention(block: AttentionBlock, x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C, H, W)."""
    n, c, *size = x.shape
    x = x.reshape(n, c, -1)
    qkv = block.qkv(group_norm(block.norm, x))
    heads, d = block.num_heads, c // block.num_heads
    if block.new_order:
        q, k, v = (part.reshape(n * heads, d, -1) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(n * heads, 3 * d, -1).split(d, dim=1)
    h = attend(q, k, v).reshape(n, c, -1)
    return (x + block.proj_out(h)).reshape(n, c, *size)


def attention_pool(pool: AttentionPool, x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, out)."""
    n, c, *_ = x.shape
    x = x.reshape(n, c, -1)
    x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + pool.positional_embedding
    heads, d = pool.num_heads, c // pool.num_heads
    q, k, v = (part.reshape(n * heads, d, -1) for part in pool.qkv_proj(x).chunk(3, dim=1))
    return pool.c_proj(attend(q, k, v).reshape(n, c, -1))[:, :, 0]


def layers(block: nn.Sequential, h: Tensor, emb: Tensor, resize: str | None) -> Tensor:
    """Run one entry of ``input_blocks``, ``middle_block`` or ``output_blocks``."""
    for i, layer in enumerate(block):
        if isinstance(layer, ResBlock):
            is_last = i == len(block) - 1
            h = res_block(layer, h, emb, resize if is_last else None)
        elif isinstance(layer, AttentionBlock):
            h = attention(layer, h)
        elif isinstance(layer, Upsample):
            h = conv3x3(layer.conv, F.interpolate(h, scale_factor=2, mode="nearest"))
        else:
            h = layer.op(h) if isinstance(layer, Downsample) else conv3x3(layer, h)
    return h


def embed_time(model: UNetEncoder, timesteps: Tensor) -> Tensor:
    """(N,) → (N, 4·model_channels)."""
    half = model.cfg.model_channels // 2
    exact = model.time_embed[0].weight.dtype
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=exact) / half)
    args = timesteps[:, None].type(exact) * rates.to(timesteps.device)[None]
    return model.time_embed(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


def encode(model: UNetEncoder, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the middle's output and every input block's."""
    levels, per_level = len(model.cfg.channel_mult), model.cfg.num_res_blocks + 1
    h, hs = x.type(model.dtype), []
    for i, block in enumerate(model.input_blocks):
        is_down = i % per_level == 0 and 0 < i < levels * per_level
        h = layers(block, h, emb, "down" if is_down else None)
        hs.append(h)
    return layers(model.middle_block, h, emb, None), hs


def unet(model: UNetModel, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
    """(N, 3, S, S) → (N, 3 or 6, S, S)."""
    levels, per_level = len(model.cfg.channel_mult), model.cfg.num_res_blocks + 1
    emb = embed_time(model, timesteps)
    if model.label_emb is not None:
        emb = emb + model.label_emb(y)
    h, hs = encode(model, x, emb)
    for i, block in enumerate(model.output_blocks):
        is_up = len(block) > 1 and (i + 1) % per_level == 0 and i + 1 < levels * per_level
        h = layers(block, torch.cat([h, hs.pop()], dim=1), emb, "up" if is_up else None)
    h = h.type(x.dtype)
    return model.out[2](F.silu(group_norm(model.out[0], h)))


def classifier(model: EncoderUNetModel, x: Tensor, timesteps: Tensor) -> Tensor:
    """(N, 3, S, S) → logits (N, classes)."""
    h, hs = encode(model, x, embed_time(model, timesteps))
    if model.pool.startswith("spatial"):
        means = [feature.type(x.dtype).mean(dim=(2, 3)) for feature in [*hs, h]]
        first, *norm, _, last = model.out
        h = first(torch.cat(means, dim=-1))
        return last(F.silu(group_norm(norm[0], h)) if norm else F.relu(h))
    norm, _, pool, *rest = model.out
    h = F.silu(group_norm(norm, h.type(x.dtype)))
    if model.pool == "attention":
        return attention_pool(pool, h)
    return rest[0](h.mean(dim=(2, 3), keepdim=True)).flatten(1)


def repaint(
    diffusion: GaussianDiffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    gt: Tensor,
    gt_keep_mask: Tensor,
    times: list[int],
    draw_noise: Callable[[], Tensor],
) -> Iterator[Tensor]:
    """Walk ``times``; yields x after every transition."""
    n, device = len(gt), gt.device

    def at(table: np.ndarray, t: Tensor) -> Tensor:
        values = torch.from_numpy(table).to(device)[t].float()
        return values[:, None, None, None].expand(gt.shape)

    d = diffusion
    x, is_first = draw_noise(), True
    for t_last, t_cur in pairwise(times):
        t = torch.tensor([t_last] * n, device=device)
        if t_cur > t_last:
            beta = at(d.betas, t + 1)
            x = torch.sqrt(1 - beta) * x + torch.sqrt(beta) * draw_noise()
            yield x
            continue
        noise = draw_noise()
        if not is_first:
            weighed_gt = at(d.sqrt_alphas_cumprod, t) * gt
            weighed_noise = at(d.sqrt_one_minus_alphas_cumprod, t) * draw_noise()
            x = gt_keep_mask * (weighed_gt + weighed_noise) + (1 - gt_keep_mask) * x
        is_first = False
        output = model(x, torch.tensor(d.timestep_map, device=device)[t])
        eps, values = torch.split(output, x.shape[1], dim=1)
        low, high = at(d.posterior_log_variance_clipped, t), at(np.log(d.betas), t)
        fraction = (values + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        if d.predict_v:  # then eps is v
            x0 = at(d.sqrt_alphas_cumprod, t) * x - at(d.sqrt_one_minus_alphas_cumprod, t) * eps
        else:
            x0 = at(d.sqrt_recip_alphas_cumprod, t) * x - at(d.sqrt_recipm1_alphas_cumprod, t) * eps
        x0 = x0.clamp(-1, 1)
        mean = at(d.posterior_mean_coef1, t) * x0 + at(d.posterior_mean_coef2, t) * x
        nonzero = (t != 0).float().view(-1, 1, 1, 1)
        x = mean + nonzero * torch.exp(0.5 * log_variance) * noise
        x.flatten()[0].item()  # as a progress display or a check for NaN does
        yield x
