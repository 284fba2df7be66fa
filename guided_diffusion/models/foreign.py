"""What this program has to know of a network that another program trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ALLOWED_CHANNELS = "3 (colour) or 1 (gray); docs/python.md shows other numbers of channels"


@dataclass(frozen=True)
class Chain:
    """The diffusion that a network was trained on, as ``GaussianDiffusion`` takes it."""

    betas: np.ndarray  # float64, of all steps
    learn_sigma: bool
    fixed_small: bool
    predict_xstart: bool
    predict_v: bool
    clip_denoised: bool = True
    clip_range: float = 1.0


class ForeignModel(Protocol):
    """A network of another program, described by its files."""

    @property
    def name(self) -> str:
        """Its ``model_path``."""

    @property
    def has_chain(self) -> bool:
        """Whether its files state the betas, too."""

    @property
    def chain(self) -> Chain:
        """The diffusion; raises UserError for one that this program does not have."""

    def keys(self) -> dict[str, Any]:
        """Return the YAML keys that its files decide; raises UserError as ``chain``."""

    def check_stated(self, tree: Mapping[str, Any]) -> None:
        """Raise UserError for what a YAML states, or does not state, of what is left to it."""
