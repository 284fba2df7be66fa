"""PREDICT: the UNet that estimates the noise, and the noisy classifier (Dhariwal & Nichol 2021).

Names and shapes of the parameters are those of the published checkpoints, so attribute names such
as ``in_layers`` or ``proj_out`` are fixed. Both networks share the trunk's descending half. Feature
maps are (N, C, H, W); ``emb`` is the time (and class) embedding (N, 4·model_channels).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from guided_diffusion.nn import (
    GroupNorm32,
    downsample,
    silu,
    timestep_embedding,
    upsample,
    zero_module,
)


@dataclass(frozen=True)
class TrunkConfig:
    """What both networks are built from."""

    image_size: int  # side of the square input, px
    model_channels: int  # base width C
    channel_mult: Sequence[float]  # a level's width is int(multiplier · C)
    num_res_blocks: int  # a level
    attention_resolutions: Sequence[int]  # feature-map sides with attention
    num_heads: int = 1
    num_head_channels: int = -1  # wins over num_heads unless -1
    num_heads_upsample: int = -1  # heads on the way up; -1: num_heads
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    use_new_attention_order: bool = False
    norm_groups: int = 32  # of each GroupNorm
    dropout: float = 0.0
    use_checkpoint: bool = False  # recompute activations in the backward pass
    in_channels: int = 3  # of the input picture


class Downsample(nn.Module):
    """Halve height and width with a strided convolution called ``op``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H/2, W/2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width, then a convolution called ``conv``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, 2H, 2W)."""
        return self.conv(upsample(x))


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding; ``resize`` changes both branches' size."""

    def __init__(
        self, cfg: TrunkConfig, channels: int, out_channels: int, resize: str | None = None
    ) -> None:
        super().__init__()
        self.h_upd = self.x_upd = {"up": upsample, "down": downsample, None: nn.Identity()}[resize]
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.use_checkpoint = cfg.use_checkpoint
        self.use_scale_shift_norm = cfg.use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(channels, cfg.norm_groups), nn.SiLU(), conv)
        linear = nn.Linear(4 * cfg.model_channels, out_channels * (1 + cfg.use_scale_shift_norm))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear)
        out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        norm, dropout = GroupNorm32(out_channels, cfg.norm_groups), nn.Dropout(cfg.dropout)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), dropout, out)
        is_same = out_channels == channels
        self.skip_connection = nn.Identity() if is_same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """``x`` with ``skip`` (N, C, H, W), ``emb`` (N, 4·model_channels) → (N, out, H', W')."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        norm, _, conv = self.in_layers
        h = conv(self.h_upd(silu(norm(x))))  # (N, out, H', W')
        emb = self.emb_layers(emb).type(h.dtype)[:, :, None, None]  # (N, out or 2·out, 1, 1)
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + emb)
        h = conv(dropout(silu(h)))
        x = self.skip_connection(self.x_upd(x))
        return h + x if torch.is_grad_enabled() else h.add_(x)  # h is the block's own


def attend(qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
    """Softmax attention over positions: (N, 3·C, L) → (N, C, L).

    The legacy order splits the channels into heads first and each head's 3·d rows into q, k, v;
    the new order splits q, k, v first. Scores are scaled by 1/sqrt(d). Fast where the channels of a
    position are neighbours in memory.
    """
    parts, which = ((3, num_heads), 2) if new_order else ((num_heads, 3), 3)
    split = qkv.transpose(1, 2).unflatten(2, (*parts, -1))  # (N, L, heads, 3, d) or …, 3, heads, d)
    q, k, v = (part.transpose(1, 2) for part in split.unbind(which))  # (N, heads, L, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, cfg: TrunkConfig, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = heads(channels, num_heads, cfg.num_head_channels)
        self.new_order, self.use_checkpoint = cfg.use_new_attention_order, cfg.use_checkpoint
        self.norm = GroupNorm32(channels, cfg.norm_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (N, L, C)
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)  # (N, L, 3·C)
        h = attend(qkv.transpose(1, 2), self.num_heads, self.new_order).transpose(1, 2)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)  # (N, L, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Return how many heads attend over ``channels``; ValueError where they do not divide."""
    by_number = num_head_channels == -1
    divisor = num_heads if by_number else num_head_channels
    if channels % divisor:
        kind = "heads" if by_number else "channels each"
        raise ValueError(f"{channels} channels cannot be divided into heads: {divisor} {kind}")
    return divisor if by_number else channels // divisor


class EmbedSequential(nn.Sequential):
    """Layers in a row, of which the residual blocks also take the embedding."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Feature map in, feature map out; the first layer takes ``skip`` with its input."""
        for layer in self:
            inputs = (x, emb, skip) if isinstance(layer, ResBlock) else (x,)
            is_recomputed = getattr(layer, "use_checkpoint", False) and torch.is_grad_enabled()
            x = checkpoint(layer, *inputs, use_reentrant=False) if is_recomputed else layer(*inputs)
            skip = None
        return x


class UNetEncoder(nn.Module):
    """Time embedding, the descending half and the middle: what both networks begin with."""

    def __init__(self, cfg: TrunkConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # of the convolutions, see convert_trunk
        self.memory_format = torch.contiguous_format  # of the feature maps, see accel/layout.py
        width = cfg.model_channels
        first, last = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.time_embed = nn.Sequential(first, nn.SiLU(), last)
        channels = int(cfg.channel_mult[0] * width)
        conv = nn.Conv2d(cfg.in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([EmbedSequential(conv)])
        self.skip_channels = [channels]  # of every input block's output
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                out = int(mult * width)
                layers = [ResBlock(cfg, channels, out), *self._attention(level, out, cfg.num_heads)]
                self._append(EmbedSequential(*layers), channels := out)
            if level < len(cfg.channel_mult) - 1:
                args = (cfg, channels, channels, "down")
                down = ResBlock(*args) if cfg.resblock_updown else Downsample(channels)
                self._append(EmbedSequential(down), channels)
        self.middle_block = EmbedSequential(
            ResBlock(cfg, channels, channels),
            AttentionBlock(cfg, channels, cfg.num_heads),
            ResBlock(cfg, channels, channels),
        )

    def _append(self, block: nn.Module, channels: int) -> None:
        self.input_blocks.append(block)
        self.skip_channels.append(channels)

    def _attention(self, level: int, channels: int, num_heads: int) -> list[nn.Module]:
        attends = self.cfg.image_size >> level in self.cfg.attention_resolutions
        return [AttentionBlock(self.cfg, channels, num_heads)] if attends else []

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Original-chain ``timesteps`` (N,) → (N, 4·model_channels) float32."""
        return self.time_embed(timestep_embedding(timesteps, self.cfg.model_channels))

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the middle's output and every input block's, all of the trunk's type."""
        h, skips = x.to(self.dtype, memory_format=self.memory_format), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle_block(h, emb), skips

    def convert_trunk(self, dtype: torch.dtype) -> None:
        """Cast the trunk's convolutions to ``dtype``; all else stays float32."""
        self.dtype = dtype
        for name in ("input_blocks", "middle_block", "output_blocks"):
            for module in getattr(self, name, nn.Module()).modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d):
                    module.to(dtype)


class Head(nn.Sequential):
    """The last normalisation and convolution, in the type of the network's input."""

    def forward(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, C, H, W) → (N, out, H, W), contiguous."""
        return super().forward(h.type(dtype)).contiguous()


class UNetModel(UNetEncoder):
    """Estimates noise, and the variance's interpolation with twice the channels of the input.

    With ``num_classes`` a label embedding is added to that of time.
    """

    def __init__(self, cfg: TrunkConfig, out_channels: int, num_classes: int | None = None) -> None:
        super().__init__(cfg)
        width = cfg.model_channels
        self.label_emb = nn.Embedding(num_classes, 4 * width) if num_classes else None
        num_heads = cfg.num_heads if cfg.num_heads_upsample == -1 else cfg.num_heads_upsample
        skip_channels, channels = list(self.skip_channels), self.skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            out = int(mult * width)
            for i in range(cfg.num_res_blocks + 1):
                block = ResBlock(cfg, channels + skip_channels.pop(), out)
                layers = [block, *self._attention(level, out, num_heads)]
                if level and i == cfg.num_res_blocks:
                    by_block = cfg.resblock_updown
                    layers.append(ResBlock(cfg, out, out, "up") if by_block else Upsample(out))
                self.output_blocks.append(EmbedSequential(*layers))
                channels = out
        conv = zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        self.out = Head(GroupNorm32(channels, cfg.norm_groups), nn.SiLU(), conv)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``x`` (N, C, S, S) in [-1, 1], ``timesteps`` and ``y`` (N,) → (N, out_channels, S, S)."""
        emb = self.embed_time(timesteps)
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        h, skips = self.encode(x, emb)
        for block in self.output_blocks:
            h = block(h, emb, skips.pop())
        return self.out(h, x.dtype)


class AttentionPool(nn.Module):
    """Attention with the mean token as its only query: (N, C, H, W) → (N, out)."""

    def __init__(self, side: int, channels: int, num_head_channels: int, out: int) -> None:
        super().__init__()
        self.num_heads = heads(channels, 1, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Prepend the mean to the positions, attend, return its row."""
        x = x.flatten(2)  # (N, C, L)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding
        h = attend(self.qkv_proj(x), self.num_heads, new_order=True)  # (N, C, L + 1)
        return self.c_proj(h)[:, :, 0]


class EncoderUNetModel(UNetEncoder):
    """The noisy classifier: logits (N, out_channels) for a picture at noise level ``timesteps``.

    ``pool`` is ``attention``, ``adaptive``, ``spatial`` or ``spatial_v2``.
    """

    def __init__(self, cfg: TrunkConfig, out_channels: int, pool: str) -> None:
        super().__init__(cfg)
        self.pool = pool
        channels = self.skip_channels[-1]
        all_channels = sum(self.skip_channels) + channels
        if pool == "attention":
            side = cfg.image_size >> (len(cfg.channel_mult) - 1)
            head = [AttentionPool(side, channels, cfg.num_head_channels, out_channels)]
            norm = GroupNorm32(channels, cfg.norm_groups)
            self.out = nn.Sequential(norm, nn.SiLU(), *head)
        elif pool == "adaptive":
            head = [nn.AdaptiveAvgPool2d(1), zero_module(nn.Conv2d(channels, out_channels, 1))]
            norm = GroupNorm32(channels, cfg.norm_groups)
            self.out = nn.Sequential(norm, nn.SiLU(), *head, nn.Flatten())
        elif pool in ("spatial", "spatial_v2"):
            first, last = nn.Linear(all_channels, 2048), nn.Linear(2048, out_channels)
            norm = GroupNorm32(2048, cfg.norm_groups)
            between = [nn.ReLU()] if pool == "spatial" else [norm, nn.SiLU()]
            self.out = nn.Sequential(first, *between, last)
        else:
            raise ValueError(f"unknown pool {pool!r}")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """``x`` (N, C, S, S) in [-1, 1], ``timesteps`` (N,) → logits (N, out_channels)."""
        h, skips = self.encode(x, self.embed_time(timesteps))
        if self.pool.startswith("spatial"):
            means = [feature.type(x.dtype).mean(dim=(2, 3)) for feature in [*skips, h]]
            return self.out(torch.cat(means, dim=-1))
        return self.out(h.type(x.dtype))
