"""Which tensors of a checkpoint are the network's, by their names.

Programs save weights inside a dictionary of other things, or under longer names. They are found by
names that every network of guided-diffusion's layout, or of diffusers, has.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.errors import UserError, printable

_LANDMARKS = (
    *("time_embed.0.weight", "input_blocks.0.0.weight"),  # guided-diffusion
    *("time_embedding.linear_1.weight", "init_conv.weight"),  # diffusers, lucidrains
)
_WEIGHTS = ("weight", "bias", "positional_embedding")  # how the names of weights end
_COUNTERS = re.compile(
    r"num_updates|decay|n_averaged|initted|(global_|optimization_)?steps?|epoch|iteration|betas"
    r"|alphas.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|lvlb_weights|(p2_)?loss_weight"
)
_EMA = re.compile(r"(^|[._])(ema|model_ema|averaged?|shadow)([._\d]|$)", re.IGNORECASE)
_USUAL = ("", "model", "state_dict", "module", "net", "unet", "network", "diffusion_model")
_MAX_NETWORKS = 100  # in one file


@dataclass(frozen=True)
class Weights:
    """Tensors by the network's own names, and where in the file they were."""

    tensors: dict[str, Tensor]
    place: str = ""  # the keys and prefix before their names
    skipped: list[str] = field(default_factory=list)  # tensors among them that are no weights
    plain: str = ""  # the place of the weights of which these are averages

    @property
    def note(self) -> str:
        """What was taken and what was not, for the end of a line; empty if all was taken."""
        parts = []
        if self.place:
            better = f", averaged weights, and not {self.plain}" if self.plain else ""
            parts.append(f"takes {self.place}{better}")
        if self.skipped:
            more = f" and {len(self.skipped) - 4} more" if len(self.skipped) > 4 else ""
            parts.append(f"skips {listed(self.skipped, 4)}{more}, which are no weights")
        return "; ".join(parts)


def listed(names: list[str], count: int = 4) -> str:
    """Return the first few names, each cut to a length that fits into a line."""
    return ", ".join(short(name) for name in names[:count])


def short(name: object, limit: int = 60) -> str:
    """Return a name in printable characters, without its middle if longer than ``limit``."""
    text = printable(str(name))
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def find_weights(path: Path, tree: Any) -> Weights:
    """Return the weights in what a file holds; raises UserError where there is no one set."""
    found = list(itertools.islice(_candidates(tree), _MAX_NETWORKS + 1))
    if not found:
        entries = tree.items() if isinstance(tree, dict) else ()
        if not entries or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
            expected = "a state_dict of named tensors"
            raise UserError(path=path, expected=expected, got=_described(tree))
        return Weights(tree)
    plain: list[Weights] = []
    averaged: list[Weights] = []
    for each in found:
        is_average = _EMA.search(each.place) and "online" not in each.place
        (averaged if is_average else plain).append(each)
    chosen = _most_usual(path, averaged or plain)
    skipped = {name for name, tensor in chosen.tensors.items() if _is_counter(name, tensor)}
    tensors = {name: each for name, each in chosen.tensors.items() if name not in skipped}
    average_of = plain[0].place if averaged and plain else ""
    return Weights(tensors, chosen.place, sorted(skipped), average_of)


def _candidates(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[Weights]:
    """Yield every set of names in a tree that begin alike and have a landmark among them."""
    if not isinstance(tree, Mapping | list | tuple) or len(keys) > 3:
        return
    entries = _entries(tree)
    tensors = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}
    prefixes = {
        name.removesuffix(mark)
        for name in tensors
        for mark in _LANDMARKS
        if name == mark or name.endswith(f".{mark}")
    }
    for prefix in sorted(prefixes)[: _MAX_NETWORKS + 1]:
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        named = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and not name.startswith(longer)
        }
        yield Weights(named, short(".".join([*keys, prefix]).strip(".")))
    for key, value in entries.items():
        yield from _candidates(value, (*keys, str(key)))


def _entries(tree: Any) -> Mapping:
    """Return the values of a dictionary by key, and those of a list by index."""
    return tree if isinstance(tree, Mapping) else dict(enumerate(tree))


def _most_usual(path: Path, candidates: list[Weights]) -> Weights:
    """Return the one with the most usual name; raises UserError where two are as usual."""

    def rank(candidate: Weights) -> int:
        last = candidate.place.rpartition(".")[2]
        return _USUAL.index(last) if last in _USUAL else len(_USUAL)

    ranked = sorted(candidates, key=rank)
    if len(ranked) > 1 and rank(ranked[0]) == rank(ranked[1]):
        places = " and ".join(candidate.place for candidate in ranked[:2])
        raise UserError("holds several networks; save one", path=path, got=places)
    return ranked[0]


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a counter or table and no weight."""
    last = name.rpartition(".")[2]
    if last in _WEIGHTS:
        return False
    is_number = tensor.ndim == 0 or not tensor.is_floating_point()
    return is_number or bool(_COUNTERS.fullmatch(last))


def _described(tree: Any) -> str:
    """Describe what a file holds instead of weights."""
    if not isinstance(tree, Mapping | list | tuple):
        return type(tree).__name__
    entries = _entries(tree)
    text = f"a dictionary of {listed(list(entries)) or 'nothing'}"
    inner = [name for value in entries.values() if isinstance(value, Mapping) for name in value]
    form = foreign_form([str(name) for name in (*entries, *inner)])
    text = text if isinstance(tree, Mapping) else type(tree).__name__
    return f"{text}: {form}" if form else text


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, and of floating-point numbers."""
    is_dense = tensor.layout == torch.strided and tensor.device.type != "meta"
    return is_dense and tensor.is_floating_point()


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a ``state_dict`` by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_fits(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    key: str | None = None,
) -> None:
    """Refuse weights of other names or shapes than ``expected``, and what are no weights.

    Raises UserError naming the first tensor that differs; ``key`` is the YAML key of ``path``.
    """
    for name in (*expected, *state):
        shape = tuple(state[name].shape) if name in state else None
        if expected.get(name) != shape:
            problem = f"does not fit the network: {short(name)} has another size or is missing"
            wanted, got = expected.get(name, "no such tensor"), shape or "no such tensor"
            raise UserError(problem, path=path, key=key, expected=wanted, got=got)
        if not is_plain(state[name]):
            wanted = f"{short(name)} as plain floating-point numbers"
            raise UserError(path=path, key=key, expected=wanted, got=state[name].dtype)


def filled(
    path: str | os.PathLike, network: nn.Module, state: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    """Return a network that was built without weights with those of ``state``, ready to be called.

    They are on ``device`` and in float32, whatever the precision on disk. Raises UserError as
    ``check_fits``.
    """
    check_fits(path, state, shapes_of(network.state_dict()))
    tensors = {name: tensor.to(device).float().contiguous() for name, tensor in state.items()}
    network.load_state_dict(tensors, assign=True)
    return nn.Module.to(network, device).eval().requires_grad_(False)


# Networks of other programs, by a name that theirs always have.
_FOREIGN = (
    (r"(^|\.)temb\.dense\.0\.", "a network of DDPM's PyTorch port (Ho et al. 2020), whose names are"
     " others: give the diffusers folder that diffusers' convert_ddpm_original_checkpoint makes"),
    (r"(^|\.)(down_blocks\.0\.resnets|time_embedding\.linear_1)\.", "weights of a diffusers network"
     " without its configuration: give the folder that has config.json too"),
    (r"(^|\.)(first_stage_model|cond_stage_model)\.", "a latent diffusion, which does not work on "
     "pixels"),
    (r"(^|\.)downs\.0\.0\.", "a network of denoising-diffusion-pytorch, whose names are others"),
    (r"(^|\.)all_modules\.0\.", "a network of score_sde, whose names are others"),
    (r"(^|\.)enc\.\d+x\d+_", "a network of EDM, whose names are others"),
    (r"(^|\.)(x_embedder|adaLN_modulation)\.", "a transformer (DiT), whose names are others"),
)  # fmt: skip


def foreign_form(names: list[str]) -> str | None:
    """Return which program's network has tensors of these names, or None."""
    for pattern, form in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return form
    return None
