"""The networks on their device, and the walk that makes them inpaint."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from guided_diffusion.accel.accelerate import accelerate, arithmetic, precision_on, trunk_dtype
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.dist_util import get_device
from guided_diffusion.gaussian_diffusion import Step, noise_source
from guided_diffusion.run.windows import Windows
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_sampler,
    load_classifier,
    load_model,
)


class Inpainter:
    """The networks on their device, and the walk over ``times`` that makes them inpaint.

    Raises UserError for a device or checkpoint that cannot be used.
    """

    def __init__(self, conf: InpaintConf, times: list[int]) -> None:
        self.conf, self.times = conf, times
        self.device = get_device(conf.device)
        self.diffusion = create_gaussian_diffusion(conf)
        self.model = load_model(conf, self.device)
        self.model.convert_trunk(trunk_dtype(conf.precision, conf.use_fp16, self.device))
        self.network = accelerate(self.model, self.device, conf.compile, conf.check)
        self.classifier = self.gradient = None
        if conf.guided:
            self.classifier = load_classifier(conf, self.device)
            dtype = trunk_dtype(conf.precision, conf.classifier_use_fp16, self.device)
            self.classifier.convert_trunk(dtype)
            gradient = partial(classifier_gradient, scale=conf.classifier_scale)
            self.gradient = accelerate(
                self.classifier, self.device, conf.compile, conf.check, gradient
            )

    @property
    def is_reduced(self) -> bool:
        """Whether any network computes in less than float32."""
        networks = (self.model, self.classifier)
        return any(network and network.dtype != torch.float32 for network in networks)

    def in_float32(self) -> "Inpainter":
        """Return the same with every network in float32, loaded anew."""
        exact = {"precision": None, "use_fp16": False, "classifier_use_fp16": False}
        return Inpainter(dataclasses.replace(self.conf, **exact), self.times)

    def with_walk(self, conf: InpaintConf, times: list[int]) -> "Inpainter":
        """Return the same networks with another walk; ``conf`` has to describe these networks."""
        other = copy.copy(self)
        other.conf, other.times = conf, times
        other.diffusion = create_gaussian_diffusion(conf)
        return other

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """Let torch multiply float32 as ``precision`` says while the block runs."""
        return arithmetic(precision_on(self.device, self.conf.precision, self.conf.use_fp16))

    def steps(
        self, gt: Tensor, gt_keep_mask: Tensor, seeds: Sequence[int], windows_at_once: int = 1
    ) -> Iterator[Step]:
        """Inpaint ``gt`` where the mask is 0, both (N, C, S, S) on the device, from N seeds.

        A picture larger than the network, of which there is one then, goes through it in windows,
        so many at once. Each image has a generator of its own, which draws the label first, then
        noise: its result does not depend on the batch. Yields a ``Step`` after every transition.
        """
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        y = self._labels(generators)
        network = self.network
        if gt.shape[2:] != (self.conf.image_size, self.conf.image_size):
            network = Windows(network, self.conf.image_size, gt_keep_mask, windows_at_once)
        return self.diffusion.p_sample_loop_progressive(
            partial(network, y=y) if self.conf.class_cond else network,
            gt,
            gt_keep_mask,
            self.times,
            noise_source(generators, gt),
            sampler=create_sampler(self.conf),
            cond_fn=partial(self.gradient, y=y) if self.conf.guided else None,
            inpa_inj_time_shift=self.conf.inpa_inj_time_shift,
        )

    def _labels(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a class label (N,) for each image: ``cond_y``, or drawn."""
        if self.conf.cond_y is not None:
            return torch.full((len(generators),), self.conf.cond_y, device=self.device)
        high = self.conf.num_classes
        return torch.cat(
            [torch.randint(0, high, (1,), generator=g, device=g.device) for g in generators]
        )


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    timesteps: Tensor,
    y: Tensor,
    scale: float,
) -> Tensor:
    """Return scale · ∇_x log p(y | x), of the shape of ``x`` (ADM, section 4.1)."""
    # A tensor made in inference mode cannot be differentiated; its copy outside can.
    with torch.inference_mode(False), torch.enable_grad():
        x_in = x.clone().requires_grad_()
        log_probs = torch.log_softmax(classifier(x_in, timesteps.clone()), dim=-1)
        selected = log_probs.gather(1, y.clone()[:, None])
        return torch.autograd.grad(selected.sum(), x_in)[0] * scale
