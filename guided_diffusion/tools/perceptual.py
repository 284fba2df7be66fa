"""LPIPS: how different two pictures look to a network (Zhang et al., CVPR 2018), version 0.1.

Both pictures go through AlexNet. After each of its five convolutions the features of every place
are scaled to length one, their squared differences are weighted by a trained head, and the mean
over all places is the layer's share; LPIPS is the sum over layers. 0 is "the same".

The heads come with torchmetrics; AlexNet's weights are those of torchvision, which is not imported:
a torchvision that does not fit its torch cannot be.
"""

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.weights import check_fits, shapes_of

# Where torchvision, and lpips by it, get AlexNet; the name holds the beginning of its SHA-256.
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
MIN_SIDE = 31  # pixels; the two poolings of a smaller picture leave nothing


class LPIPS(nn.Module):
    """LPIPS 0.1 with AlexNet; its parameters are random until they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(  # those of torchvision's alexnet(), but for the last pooling
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        widths = (64, 192, 384, 256, 256)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        # ImageNet's mean and deviation, moved from pixels in [0, 1] to [-1, 1].
        self.shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        self.scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        self.eval().requires_grad_(False)

    def directions(self, x: Tensor) -> list[Tensor]:
        """Return the five layers' features, each place of length one; x is (N, 3, H, W)."""
        h, found = (x - self.shift) / self.scale, []
        for layer in self.features:
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    @torch.inference_mode()
    def forward(self, x: Tensor, y: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        """Return LPIPS of the whole pictures and of their holes, each (N,).

        ``x`` and ``y`` are (N, 3, H, W) in [-1, 1], at least 31 pixels wide and high; ``hole`` is
        bool (N, H, W). Of the hole: each layer's map of weighted differences is enlarged to the
        picture's size (bilinear, ``align_corners=False``, as lpips does with ``spatial=True``),
        their sum averaged over the hole's pixels; NaN without a hole. A place of the map sees up to
        195 pixels around it, so known pixels next to the hole count too. (Zhang et al., eq. 1.)
        """
        whole = torch.zeros(len(x))
        maps = torch.zeros(len(x), *x.shape[2:])
        for head, ours, theirs in zip(
            self.heads, self.directions(x), self.directions(y), strict=True
        ):
            layer = head((ours - theirs).square())
            whole += layer.mean((1, 2, 3))
            maps += functional.interpolate(layer, x.shape[2:], mode="bilinear")[:, 0]
        return whole, (maps * hole).sum((1, 2)) / hole.sum((1, 2))


def load_lpips(alexnet: str | os.PathLike | None = None) -> LPIPS:
    """Return LPIPS with its weights; ``alexnet`` is a file for AlexNet's, None fetches it.

    The file is a ``state_dict`` of torchvision's ``alexnet``, saved by torch. Raises ``UserError``
    where torchmetrics or the file is missing, the file is not AlexNet's, or cannot be fetched.
    """
    lpips, heads = LPIPS(), load_state_dict(heads_file())
    found = _fetch_alexnet() if alexnet is None else load_state_dict(alexnet)
    state = {name: tensor for name, tensor in found.items() if name.startswith("features.")}
    state |= {f"heads.{n}.weight": heads[f"lin{n}.model.1.weight"] for n in range(len(lpips.heads))}
    check_fits(alexnet or ALEXNET_URL, state, shapes_of(lpips.state_dict()))
    lpips.load_state_dict(state)
    return lpips


def heads_file() -> Path:
    """Return the file of LPIPS's trained heads; raises ``UserError`` without torchmetrics."""
    spec = importlib.util.find_spec("torchmetrics")  # finds without importing
    if spec is None:
        problem = "LPIPS, PSNR and SSIM need torchmetrics, which is not installed"
        raise UserError(f"{problem}: pip install -r requirements-metrics.txt")
    return Path(spec.origin).parent / "functional/image/lpips_models/alex.pth"


def _fetch_alexnet() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            ALEXNET_URL, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        problem = f"AlexNet's weights cannot be fetched ({reason}); --alexnet FILE takes a file"
        raise UserError(problem, path=ALEXNET_URL) from error
