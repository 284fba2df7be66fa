"""What this program has to know of a network that another program trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALLOWED_CHANNELS = "3 (colour) or 1 (gray); docs/python.md shows other numbers of channels"


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A network of another program, described by its files."""

    name: str  # its model_path
    keys: Mapping[str, Any]  # the YAML keys that its files decide
    levels: int  # of resolution; each halves the side of the one before
    # What the YAML has to state beside them: keys, of which one is enough, and what they mean.
    needed: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    betas: np.ndarray | None = None  # float64, of all steps; None where its files state none
    fixed_small: bool = True  # a variance that is not learned is the posterior's, not beta
    clip_range: float = 1.0  # of predicted pictures, if they are clipped
