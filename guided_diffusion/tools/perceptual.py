"""LPIPS: how different two pictures look to a network (Zhang et al., CVPR 2018), version 0.1.

Both pictures go through AlexNet. After each of its five convolutions the features of every place
are scaled to length one, their squared differences are weighted by a trained head, and the mean
over all places is the layer's share; LPIPS is the sum over layers. 0 is "the same".

The heads come with torchmetrics (and with lpips, byte for byte the same file); AlexNet's weights
are those of torchvision. Neither torchvision nor lpips is imported: AlexNet's features are five
convolutions, and a torchvision that does not fit its torch cannot be imported at all.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.weights import is_plain

# Where torchvision, and lpips by it, get AlexNet; the name holds the beginning of its SHA-256.
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
_HEADS_FILES = {  # of whichever package is installed
    "torchmetrics": "functional/image/lpips_models/alex.pth",
    "lpips": "weights/v0.1/alex.pth",
}
_CONVOLUTIONS = (0, 3, 6, 8, 10)  # their places in torchvision's alexnet().features
_POOLED_BEFORE = (3, 6)
_SHAPES = {  # AlexNet's convolutions: output and input channels, side
    0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}  # fmt: skip
MIN_SIDE = 31  # pixels; the two poolings of a smaller picture leave nothing


class LPIPS(nn.Module):
    """LPIPS 0.1 with AlexNet.

    ``alexnet`` holds ``features.N.weight`` and ``.bias`` of the five convolutions, ``heads``
    ``linN.model.1.weight`` (1, C, 1, 1), N = 0 to 4. Raises KeyError or RuntimeError where a
    tensor is missing or has another shape.
    """

    def __init__(self, alexnet: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        super().__init__()
        for number, place in enumerate(_CONVOLUTIONS):
            out, into, side, _ = _SHAPES[place]
            stride, padding = (4, 2) if place == 0 else (1, side // 2)
            conv = nn.Conv2d(into, out, side, stride, padding)
            conv.load_state_dict({k: alexnet[f"features.{place}.{k}"] for k in ("weight", "bias")})
            self.add_module(f"conv{number}", conv)
            head = nn.Conv2d(out, 1, 1, bias=False)
            head.load_state_dict({"weight": heads[f"lin{number}.model.1.weight"]})
            self.add_module(f"head{number}", head)
        # ImageNet's mean and deviation, moved from pixels in [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the five layers' features, each place of length one; x is (N, 3, H, W)."""
        h, found = (x - self.shift) / self.scale, []
        for number, place in enumerate(_CONVOLUTIONS):
            if place in _POOLED_BEFORE:
                h = functional.max_pool2d(h, 3, 2)
            h = functional.relu(getattr(self, f"conv{number}")(h))
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
        whole = torch.zeros(len(x), device=x.device)
        maps = torch.zeros(len(x), *x.shape[2:], device=x.device)
        pairs = zip(self.features(x), self.features(y), strict=True)
        for number, (ours, theirs) in enumerate(pairs):
            layer = getattr(self, f"head{number}")((ours - theirs).square())
            whole += layer.mean((1, 2, 3))
            maps += functional.interpolate(layer, x.shape[2:], mode="bilinear")[:, 0]
        return whole, (maps * hole).sum((1, 2)) / hole.sum((1, 2))


# ---- weights -------------------------------------------------------------------------------------


def load_lpips(alexnet: str | os.PathLike | None = None) -> LPIPS:
    """Return LPIPS with its weights; ``alexnet`` is a file for AlexNet's, None fetches it.

    The file is a ``state_dict`` of torchvision's ``alexnet``, saved by torch. Raises ``UserError``
    where a package or file is missing, wrong, or cannot be fetched.
    """
    heads = load_state_dict(heads_file())
    state = _fetch_alexnet() if alexnet is None else read_alexnet(alexnet)
    return LPIPS(state, heads)


def heads_file() -> Path:
    """Return the file of LPIPS's trained heads; raises ``UserError`` if no package has it."""
    for package, name in _HEADS_FILES.items():
        spec = importlib.util.find_spec(package)  # finds without importing
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / name
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == HEADS_SHA256:
                return path
    raise UserError(
        "LPIPS needs the trained heads that torchmetrics ships, which is not installed: "
        "pip install -r requirements-metrics.txt"
    )


def _fetch_alexnet() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            ALEXNET_URL, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        problem = f"AlexNet's weights cannot be fetched ({reason}); --alexnet FILE takes a file"
        raise UserError(problem, path=ALEXNET_URL) from error


def read_alexnet(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return ``features.N.weight`` and ``.bias`` of a file in torchvision's format, in float32.

    Raises ``UserError`` naming the file and the tensor that is missing, has another shape or does
    not hold floating-point numbers.
    """
    state = load_state_dict(path)
    found = {}
    for place, shape in _SHAPES.items():
        for name, wanted in (("weight", shape), ("bias", shape[:1])):
            key = f"features.{place}.{name}"
            got: object = tuple(state[key].shape) if key in state else "none"
            if got == wanted and not is_plain(state[key]):
                got = state[key].dtype
            if got != wanted:
                expected = f"AlexNet's {wanted}, floating-point numbers"
                raise UserError(path=path, key=key, expected=expected, got=got)
            found[key] = state[key].float()
    return found
