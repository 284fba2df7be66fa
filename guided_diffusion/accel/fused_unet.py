"""PREDICT in fused kernels, on a CPU.

Computes what ``UNetModel.forward`` does, to rounding. Feature maps are (N, H, W, C) here; ``emb``
is SiLU of the embedding, (1 or N, 4·model_channels). Both are float32; where a convolution's
weights are bfloat16, so is what it multiplies. No module that is given is changed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_diffusion.accel.cpu_kernels import Affine, Kernels, Packed
from guided_diffusion.accel.layout import swap_modules, twin
from guided_diffusion.accel.memory import forget_pages
from guided_diffusion.nn import downsample, upsample
from guided_diffusion.unet import (
    AttentionBlock,
    Downsample,
    EmbedSequential,
    ResBlock,
    UNetEncoder,
    UNetModel,
    Upsample,
)

Layer = Callable[[list[Tensor], Tensor], Tensor]  # of one map or two joined ones, and ``emb``


class PackedConv:
    """A convolution of 3×3 or 1×1, also 1-D, whose weights are packed at the first call."""

    def __init__(
        self, kernels: Kernels, conv: nn.Conv1d | nn.Conv2d, *, has_bias: bool = True
    ) -> None:
        self._kernels, self._conv, self._has_bias = kernels, conv, has_bias
        self._weight: Packed | None = None
        self._bias: Tensor | None = None
        self._transposed: Packed | None = None  # the weights of ``gradient``

    def __call__(
        self,
        *maps: Tensor,
        affine: Affine | None = None,
        resize: int = 0,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As ``Kernels.convolve``."""
        if self._weight is None:
            self._weight = self._kernels.pack_weights(self._conv.weight)
            self._bias = self._conv.bias.float() if self._has_bias else None
            forget_pages(self._conv.weight)
        options = {"affine": affine, "resize": resize, "residual": residual, "out": out}
        return self._kernels.convolve(maps, self._weight, self._bias, **options)

    def gradient(self, grad: Tensor) -> Tensor:
        """(N, H, W, out) → (N, H, W, C): a loss's gradient at the input from that at the output."""
        weight = self._conv.weight
        if self._transposed is None:
            self._transposed = self._kernels.pack_weights(weight.flip(2, 3).transpose(0, 1))
            forget_pages(weight)
        return self._kernels.convolve([grad], self._transposed)


class FusedResBlock:
    """``ResBlock`` of one map or two joined ones."""

    def __init__(self, kernels: Kernels, block: ResBlock) -> None:
        self._kernels, self._block = kernels, block
        skip = block.skip_connection
        self._conv_skip = PackedConv(kernels, skip) if isinstance(skip, nn.Conv2d) else None
        self._resize = int(block.h_upd is upsample) - int(block.h_upd is downsample)
        # Its bias is added in the normalisation, which saves a pass.
        self._conv_in = PackedConv(kernels, block.in_layers[2], has_bias=False)
        self._conv_out = PackedConv(kernels, block.out_layers[3])

    def __call__(self, maps: list[Tensor], emb: Tensor) -> Tensor:
        """One or two (N, H, W, C) → (N, H', W', out)."""
        block, group_norm = self._block, self._kernels.group_norm
        affine = group_norm(maps, block.in_layers[0])
        h = self._conv_in(*maps, affine=affine, resize=self._resize)
        bias = block.in_layers[2].bias.float()[None]
        norm, emb_out = block.out_layers[0], block.emb_layers[1](emb)
        if block.use_scale_shift_norm:
            affine = group_norm([h], norm, added=bias, gain_offset=emb_out)
        else:
            affine = group_norm([h], norm, added=bias + emb_out)
        residual, is_new = self._skip(maps)
        return self._conv_out(h, affine=affine, residual=residual, out=residual if is_new else None)

    def _skip(self, maps: list[Tensor]) -> tuple[Tensor, bool]:
        """Return the other branch, and whether it is a new tensor, which may be written over."""
        if self._conv_skip:
            return self._conv_skip(*maps), True
        if self._resize < 0:
            return _channels_last(downsample(maps[0].permute(0, 3, 1, 2))), True
        if len(maps) == 1:
            return maps[0], False
        return torch.cat(maps, dim=3), True


class FusedAttention:
    """``AttentionBlock``."""

    def __init__(self, kernels: Kernels, block: AttentionBlock) -> None:
        self._kernels, self._block = kernels, block
        self._qkv = PackedConv(kernels, block.qkv)
        self._proj_out = PackedConv(kernels, block.proj_out)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H, W, C) → (N, H, W, C)."""
        block = self._block
        qkv = self._qkv(x, affine=self._kernels.group_norm([x], block.norm))  # (N, H, W, 3·C)
        h = self._kernels.attend(qkv, block.num_heads, block.new_order)
        return self._proj_out(h, residual=x)


class FusedUNet:
    """``model`` in inference, by kernels; its parameters may not change afterwards."""

    def __init__(self, kernels: Kernels, model: UNetModel) -> None:
        self._model, self._kernels = model, kernels
        self._input_blocks = [self._fused(block) for block in model.input_blocks[1:]]
        self._middle_block = self._fused(model.middle_block)
        self._output_blocks = [self._fused(block) for block in model.output_blocks]
        self._conv_out = PackedConv(kernels, model.out[2])

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``UNetModel.forward``."""
        model = self._model
        if timesteps.stride() == (0,):  # one time for all images: no result depends on the batch
            timesteps = timesteps[:1]
        emb = model.embed_time(timesteps)
        if model.label_emb is not None:
            emb = emb + model.label_emb(y)
        emb = F.silu(emb)
        x = x.to(model.dtype, memory_format=torch.channels_last)
        h = _channels_last(model.input_blocks[0](x, emb)).float()
        skips = [h]
        for block in self._input_blocks:
            h = _run(block, [h], emb)
            skips.append(h)
        h = _run(self._middle_block, [h], emb)
        for block in self._output_blocks:
            h = _run(block, [h, skips.pop()], emb)
        affine = self._kernels.group_norm([h], model.out[0])
        return self._conv_out(h, affine=affine).permute(0, 3, 1, 2).contiguous()

    def _fused(self, block: EmbedSequential) -> list[Layer]:
        return [self._fused_layer(layer) for layer in block]

    def _fused_layer(self, layer: nn.Module) -> Layer:
        if isinstance(layer, ResBlock):
            return FusedResBlock(self._kernels, layer)
        if isinstance(layer, AttentionBlock):
            attention = FusedAttention(self._kernels, layer)
            return lambda maps, emb: attention(*maps)
        if isinstance(layer, Upsample):
            conv = PackedConv(self._kernels, layer.conv)
            return lambda maps, emb: conv(*maps, resize=1)
        if isinstance(layer, Downsample):
            return lambda maps, emb: _downsampled(layer, *maps)
        raise TypeError(f"no kernels for {type(layer).__name__}")


def _downsampled(layer: Downsample, x: Tensor) -> Tensor:
    return _channels_last(layer(x.permute(0, 3, 1, 2).type(layer.op.weight.dtype)).float())


def _run(layers: list[Layer], maps: list[Tensor], emb: Tensor) -> Tensor:
    for layer in layers:
        maps = [layer(maps, emb)]
    return maps[0]


def samples(kernels: Kernels, network: UNetEncoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the kernels' outputs of two blocks on a small map, each with the blocks' own.

    They are the first residual block and the first attention block, (1, channels, 8, 8).
    """

    def first(kind: type) -> Any:
        return next(module for module in network.modules() if isinstance(module, kind))

    generator, dtype = torch.Generator().manual_seed(0), network.dtype
    block, attention = first(ResBlock), first(AttentionBlock)
    emb = torch.randn(1, block.emb_layers[1].in_features, generator=generator)
    x = torch.randn(1, block.in_layers[0].num_channels, 8, 8, generator=generator)
    output = FusedResBlock(kernels, block)([_channels_last(x)], F.silu(emb))
    yield output.permute(0, 3, 1, 2), block(x.type(dtype), emb)
    x = torch.randn(1, attention.norm.num_channels, 8, 8, generator=generator)
    output = FusedAttention(kernels, attention)(_channels_last(x))
    yield output.permute(0, 3, 1, 2), attention(x.type(dtype))


# ---- With a gradient -----------------------------------------------------------------------------


def with_fused_convolutions(kernels: Kernels, network: UNetEncoder) -> UNetEncoder:
    """Return a twin of a network whose 3×3 convolutions are the kernels', in a gradient too.

    It computes float32 on a CPU, and gradients at its inputs only. Its parameters may not change
    afterwards.
    """
    network = twin(network)
    network.memory_format = torch.channels_last
    swap_modules(network, nn.Conv2d, lambda conv: _fused_convolution(kernels, conv))
    return network


def _fused_convolution(kernels: Kernels, conv: nn.Conv2d) -> nn.Module:
    """Return a convolution by the kernels, or ``conv`` itself if they cannot compute it."""
    has_kernel = (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
    is_first = conv.in_channels <= 3  # of the picture: too few channels
    return FusedConv2d(kernels, conv) if has_kernel and not is_first else conv


class FusedConv2d(nn.Module):
    """A 3×3 convolution by the kernels through which a gradient passes."""

    def __init__(self, kernels: Kernels, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = PackedConv(kernels, conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out, H, W), both channels_last."""
        return _Convolution.apply(x, self._conv)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: PackedConv) -> Tensor:
        ctx.conv = conv
        return conv(_channels_last(x)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.gradient(_channels_last(grad)).permute(0, 3, 1, 2), None


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
