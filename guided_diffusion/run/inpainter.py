"""The networks on their device, and the walk that makes them inpaint."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from guided_diffusion.accel.fused_unet import (
    FusedDiffusion,
    FusedUNet,
    fuse_convolutions,
    fused_noise,
    load_gpu_kernels,
    load_kernels,
)
from guided_diffusion.accel.graphs import Accelerated, is_compiled
from guided_diffusion.accel.layout import lay_out, set_arithmetic
from guided_diffusion.accel.memory import CallMemory, keep_freed_memory
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.dist_util import get_device, is_main
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Step, classifier_gradient
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import create_gaussian_diffusion, load_classifier, load_model
from guided_diffusion.unet import Trunk

# ---- Running -------------------------------------------------------------------------------------


class Inpainter:
    """The networks on their device, and the walk over ``times`` that makes them inpaint.

    Raises UserError for a device or checkpoint that cannot be used.
    """

    def __init__(self, conf: InpaintConf, times: list[int]) -> None:
        self.conf, self.times = conf, times
        self.device = get_device(conf.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # all calls have the same shapes
        is_fused = self.device.type == "cpu" and conf.compile is not False
        self._kernels = load_kernels() if is_fused else None  # on CPUs
        kind = partial(FusedDiffusion, self._kernels) if self._kernels else GaussianDiffusion
        self.diffusion = create_gaussian_diffusion(conf, kind=kind)
        self.model = load_model(conf, self.device)
        self.model.convert_trunk(set_arithmetic(conf.precision, conf.use_fp16, self.device))
        self.network = self._fast_network()
        self.classifier = self.gradient = None
        if conf.guided:
            self.classifier = load_classifier(conf, self.device)
            self.classifier.convert_trunk(
                set_arithmetic(conf.precision, conf.classifier_use_fp16, self.device)
            )
            self.gradient = self._fast_gradient()
        networks = [self.model, *([self.classifier] if self.classifier else [])]
        weights = sum(p.nbytes for network in networks for p in network.parameters())
        self._memory: CallMemory | None = CallMemory(self.device, weights)

    def _fast_network(self) -> Callable[..., Tensor]:
        """Return what computes ``self.model`` fastest on its device."""
        if self._kernels and self.model.dtype == torch.float32:
            return FusedUNet(self._kernels, self.model)
        if self.device.type == "cuda" and self.conf.compile == "auto":
            kernels = load_gpu_kernels(self.device, self.model.dtype)
            if kernels:
                lay_out(self.model, self.device)
                fused = FusedUNet(kernels, self.model)
                return Accelerated(fused, self.model, recorded=True)
        return self._accelerated(self.model, self.model)

    def _fast_gradient(self) -> Callable[..., Tensor]:
        """Return what computes the classifier's gradient fastest."""
        if self._kernels and self.classifier.dtype == torch.float32:
            fuse_convolutions(self._kernels, self.classifier)
            return self._classifier_gradient
        return self._accelerated(self._classifier_gradient, self.classifier)

    def _accelerated(self, function: Callable[..., Tensor], network: Trunk) -> Accelerated:
        calls, _ = count_steps(self.times)
        compiled = is_compiled(self.conf.compile, self.device, calls)
        lay_out(network, self.device, at_once=compiled)
        recorded = self.device.type == "cuda" and self.conf.compile is not False
        return Accelerated(function, network, compiled=compiled, recorded=recorded)

    def _classifier_gradient(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        return classifier_gradient(self.classifier, y, self.conf.classifier_scale)(x, timesteps)

    def _advise(self, batch_size: int) -> None:
        """Say once what memory a call takes, and what ``batch_size`` it would allow."""
        if self._memory and (known := self._memory.after_call()):
            self._memory = None
            taken, free = known
            most = max(batch_size, int(0.9 * free * batch_size / taken))  # a tenth is for gaps
            if is_main():
                tqdm.write(
                    f"batch_size {batch_size}: takes up to {taken / 1e9:.2g} GB beside the "
                    f"weights; free memory would hold about {most}"
                )

    @property
    def is_reduced(self) -> bool:
        """Whether any network computes in less than float32."""
        networks = [self.model, *([self.classifier] if self.classifier else [])]
        return any(network.dtype != torch.float32 for network in networks)

    def in_float32(self) -> "Inpainter":
        """Return the same with every network in float32, loaded anew."""
        # No precision is stated, as that would change how the other network multiplies float32.
        exact = {"precision": None, "use_fp16": False, "classifier_use_fp16": False}
        return Inpainter(dataclasses.replace(self.conf, **exact), self.times)

    def steps(self, gt: Tensor, gt_keep_mask: Tensor, seeds: Sequence[int]) -> Iterator[Step]:
        """Inpaint ``gt`` where the mask is 0, both (N, 3, S, S) on the device, from N seeds.

        Each image has a generator of its own, so that its result does not depend on the batch. It
        draws the label first, then noise. Yields a ``Step`` after every transition.
        """
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        y = self._labels(generators)

        def model(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.network(x, timesteps, *([y] if self.conf.class_cond else []))

        def cond_fn(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.gradient(x, timesteps, y)

        walk = self.diffusion.repaint(
            model,
            gt,
            gt_keep_mask,
            self.times,
            self.noise_source(generators, gt.shape),
            cond_fn=cond_fn if self.conf.guided else None,
            use_ddim=self.conf.use_ddim,
            inpa_inj_sched_prev=self.conf.inpa_inj_sched_prev,
            inpa_inj_sched_prev_cumnoise=self.conf.inpa_inj_sched_prev_cumnoise,
            inpa_inj_time_shift=self.conf.inpa_inj_time_shift,
        )
        for step in walk:
            yield step
            if step.pred_xstart is not None:
                self._advise(len(gt))

    def noise_source(
        self, generators: Sequence[torch.Generator], shape: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Return a function that draws standard normal noise (N, 3, S, S), a generator an image."""
        if self._kernels and (fused := fused_noise(self._kernels, generators, shape)):
            return fused

        def draw_noise() -> Tensor:
            noise = torch.empty(shape, device=self.device)
            for own, generator in zip(noise.unbind(), generators, strict=True):
                own.normal_(generator=generator)
            return noise

        return draw_noise

    def _labels(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a class label (N,) for each image: ``cond_y``, or drawn."""
        if self.conf.cond_y is not None:
            return torch.full((len(generators),), self.conf.cond_y, device=self.device)
        high = self.conf.num_classes
        return torch.cat(
            [torch.randint(0, high, (1,), generator=g, device=g.device) for g in generators]
        )
