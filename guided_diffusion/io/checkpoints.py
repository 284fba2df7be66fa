"""Reading checkpoints: mapped into memory, never executed.

A checkpoint is somebody else's file. Whatever is wrong with it is told in one line. Weights that
stand in a dictionary of other things, or under longer names, are found by names that every network
of this kind has.
"""

import contextlib
import hashlib
import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.archives import (
    DAMAGED,
    ZIP_ERRORS,
    can_be_mapped,
    check_archive,
    once_a_file,
)
from guided_diffusion.io.files import atomic_path, write_checkpoint

# How the files begin that people save in a checkpoint's place.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run git lfs pull"),
    (b"<", "is a web page and not a checkpoint: the download failed, often by a quota"),
    (b"{", "is JSON text and not a checkpoint: of a diffusers model state the folder"),
    (b"\x1f\x8b", "is packed by gzip: unpack it first"),
    (b"\x89HDF", "is an HDF5 file and not a checkpoint saved by torch"),
)
SAFETENSORS = ".safetensors"
NEEDS_SAFETENSORS = "needs safetensors: pip install -r requirements-diffusers.txt"
# Names that a network of this program, or of diffusers, always has.
_LANDMARKS = ("time_embed.0.weight", "input_blocks.0.0.weight", "time_embedding.linear_1.weight")
_WEIGHTS = ("weight", "bias", "positional_embedding")  # how the names of weights end
_COUNTERS = re.compile(
    r"num_updates|decay|n_averaged|initted|(global_|optimization_)?steps?|epoch|iteration|betas"
    r"|alphas.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|lvlb_weights|(p2_)?loss_weight"
)
# Two numbers in a byte, or scales alone: of no use without what belongs to them.
_PACKED = [
    getattr(torch, name) for name in ("float4_e2m1fn_x2", "float8_e8m0fnu") if hasattr(torch, name)
]
_EMA = re.compile(r"(^|[._])(ema|model_ema|averaged?|shadow)([._\d]|$)", re.IGNORECASE)
_USUAL = ("", "model", "state_dict", "module", "net", "unet", "network", "diffusion_model")
# Classes of other programs that stand beside weights: nothing of them is needed, or made.
_HARMLESS = re.compile(
    r"(numpy|omegaconf|pytorch_lightning|lightning|lightning_fabric|pathlib|argparse|datetime"
    r"|ml_collections|easydict|addict)\."
)
_NUMPY = [
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in
      ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "argparse.Namespace"),
    *(f"numpy.dtypes.{name}DType" for name in
      ("Float64", "Float32", "Float16", "Int64", "Int32", "UInt8", "Bool", "Str")),
]  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Tensors by the names that the network gives them, and where in the file they were."""

    tensors: dict[str, Tensor]
    place: str = ""  # the keys and prefix around them; empty: none
    skipped: list[str] = field(default_factory=list)  # names of all else
    left: str = ""  # where weights are that average ones were preferred to

    @property
    def note(self) -> str:
        """What was chosen and left out, as the end of a line; empty where all was taken."""
        parts = []
        if self.place:
            better = f", averaged weights, and not {self.left}" if self.left else ""
            parts.append(f"takes {self.place}{better}")
        if self.skipped:
            more = f" and {len(self.skipped) - 4} more" if len(self.skipped) > 4 else ""
            parts.append(f"skips {listed(self.skipped, 4)}{more}, which are no weights")
        return "; ".join(parts)


def listed(names: list[str], count: int = 4) -> str:
    """Return the first few names, each cut to a length that fits into a line."""
    return ", ".join(short(name) for name in names[:count])


def short(name: object, limit: int = 60) -> str:
    """Return a name, its middle left out where it is longer than ``limit``."""
    text = str(name)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


# ---- Looking at a file ---------------------------------------------------------------------------


def fingerprint(path: str | os.PathLike) -> str:
    """Return a short text that changes with a checkpoint's content, without reading all of it.

    It is made of the checksums in a zip archive's table, of the size and of samples.
    """
    path, table = Path(path), []
    with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
        table = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    size = path.stat().st_size
    digest = hashlib.sha256(repr((size, table)).encode(errors="surrogateescape"))
    with path.open("rb") as stream:
        for place in range(0, size, max(4096, size // 256)):
            stream.seek(place)
            digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def check_beginning(path: str | os.PathLike) -> str:
    """Refuse what is no checkpoint by its first bytes; return its form: zip, pickle, safetensors.

    Raises UserError.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not path.is_dir():
            raise UserError("is a pipe or device and not a file", path=path)
        with path.open("rb") as stream:
            first = stream.read(64)
    except FileNotFoundError:
        raise UserError(f"no such checkpoint{looked_in(path)}", path=path) from None
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read: {reason}", path=path) from error
    header = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and header <= status.st_size - 8:
        return "safetensors"
    beginning = first.lstrip()
    if not beginning:
        raise UserError("is empty", path=path)
    for start, problem in _IMPOSTORS:
        if beginning.startswith(start):
            raise UserError(problem, path=path)
    if path.suffix == SAFETENSORS:
        raise UserError(DAMAGED, path=path)
    is_zip = beginning.startswith(b"PK")
    if not is_zip and not beginning.startswith(b"\x80"):
        raise UserError("is not a checkpoint saved by torch", path=path)
    return "zip" if is_zip else "pickle"


def check_checkpoint(path: str | os.PathLike) -> None:
    """Find what is wrong with a file: its form, its checksums, its numbers; raises UserError.

    All of it is read once, about a second for 2 GB, and then remembered.
    """
    _checked_weights(Path(path))


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, mapped from the file and not copied.

    Weights in a dictionary of other things are found, averaged ones preferred; a warning says what
    was taken and what was left out. Raises UserError for a file that is missing, unreadable,
    damaged, not a checkpoint, would run code, holds something else than one ``state_dict``, or a
    number that is not finite.
    """
    weights = _checked_weights(Path(path))
    if weights.note:
        warnings.warn(f"{path}: {weights.note}", stacklevel=2)
    return weights.tensors


def read_weights(path: Path) -> Weights:
    """Return a checkpoint's weights with what is around them, and no number looked at."""
    return find_weights(path, _read(path, "cpu"))


def state_dict_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape without reading the weights; raises as ``load_state_dict``."""
    weights = find_weights(Path(path), _read(Path(path), "meta"))
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}


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
            raise UserError(
                f"does not fit the network: {short(name)} has another size or is missing",
                path=path,
                key=key,
                expected=expected.get(name, "no such tensor"),
                got=shape or "no such tensor",
            )
        if not is_plain(state[name]):
            wanted = f"{short(name)} as plain floating-point numbers"
            raise UserError(path=path, key=key, expected=wanted, got=state[name].dtype)


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict``, by safetensors where ``path`` ends so; raises as ``atomic_path``."""
    if Path(path).suffix != SAFETENSORS:
        write_checkpoint(path, dict(state))
        return
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError(NEEDS_SAFETENSORS, path=path) from None
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(dict(state), metadata={"format": "pt"}))


# ---- Reading -------------------------------------------------------------------------------------


def _checked_weights(path: Path) -> Weights:
    weights = find_weights(path, _read(path, None))
    with once_a_file(path, "finite") as is_new:
        if is_new:
            _check_finite(path, weights.tensors)
            del weights  # what was looked at leaves the memory
            return find_weights(path, _read(path, None))
    return weights


def _read(path: Path, map_location: str | None) -> Any:
    """Return what is in a file: tensors, and whatever is around them."""
    form = check_beginning(path)
    if form == "safetensors":
        return _read_safetensors(path)
    names, mapped = _NUMPY, None
    if form == "zip":
        with once_a_file(path, "checksums") as is_new:
            if is_new:
                check_archive(path)
        if _is_program(path):  # torch.load of PyTorch 2.4 would load it as one
            problem = "is a TorchScript program, which is never run"
            raise UserError(f"{problem}: save model.state_dict() instead", path=path)
        names, mapped = _NUMPY + _harmless_names(path), can_be_mapped(path) or None
    try:
        with warnings.catch_warnings(), _stand_ins_for(names):
            warnings.simplefilter("ignore")  # what torch warns of before it fails says no more
            return torch.load(
                path, map_location=map_location or "cpu", mmap=mapped, weights_only=True
            )
    except MemoryError:
        raise
    except Exception as error:  # of damaged files torch tells by a dozen types
        is_repacked = form == "zip" and not mapped
        raise _unreadable(path, error, is_repacked=is_repacked) from error


def _unreadable(path: Path, error: Exception, *, is_repacked: bool) -> UserError:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        problem = "holds pickled code, which is never run: save model.state_dict() instead"
        return UserError(problem, path=path)
    if is_repacked:
        problem = f"{DAMAGED}; or, if it was packed anew, save it by torch.save"
        return UserError(problem, path=path)
    return UserError(DAMAGED, path=path)


def _is_program(path: Path) -> bool:
    """Whether an archive is TorchScript, as torch tells it."""
    with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    return False


class _StandIn:
    """Takes the place of what stands beside weights, such as a number of NumPy's; does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


@contextlib.contextmanager
def _stand_ins_for(names: Iterable[str]) -> Iterator[None]:
    """Let ``torch.load`` find a stand-in under each of ``names`` (module.class), and none after.

    PyTorch 2.4 has no other way than its list of what is safe, and looks up how a class is called.
    """
    before = torch.serialization.get_safe_globals()
    places = [name.rpartition(".") for name in dict.fromkeys(names)]
    stand_ins = [type(name, (_StandIn,), {"__module__": module}) for module, _, name in places]
    torch.serialization.add_safe_globals(stand_ins)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _harmless_names(path: Path) -> list[str]:
    """Return the classes that a checkpoint names and for which a stand-in may stand."""
    try:
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            steps = pickletools.genops(archive.read(name))  # read, not run
            named = [place.replace(" ", ".") for code, place, _ in steps if code.name == "GLOBAL"]
    except Exception:  # whatever is wrong, reading the file tells it
        return []
    return [name for name in named if _HARMLESS.match(name)]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(NEEDS_SAFETENSORS, path=path) from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(DAMAGED, path=path) from error


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of floating-point numbers, one after the other, that torch can widen."""
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.dtype not in _PACKED
    )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that has no numbers, or one that is not finite; raises UserError."""
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise UserError(path=path, expected=f"numbers in {short(name)}", got="a meta tensor")
        if not is_plain(tensor) or not tensor.numel():
            continue  # who needs it as a weight says so
        kept = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() > kept:  # a tensor that repeats a few numbers
            tensor = tensor.as_strided((kept,), (1,), 0)
        low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            problem = "holds weights that are NaN or infinite, which no picture survives"
            raise UserError(problem, path=path, got=short(name))


# ---- Finding the weights -------------------------------------------------------------------------


def find_weights(path: Path, tree: Any) -> Weights:
    """Return the weights in what a file holds; raises UserError where there is no one set."""
    found = list(_candidates(tree))
    if not found:
        if _is_state_dict(tree):
            return Weights(tree)
        raise UserError(path=path, expected="a state_dict of named tensors", got=_described(tree))
    averaged = [each for each in found if _is_average(each.label)]
    plain = [each for each in found if each not in averaged]
    averaged += [ema for each in plain for ema in _shadows(tree, each)]
    chosen = _chosen(path, averaged or plain)
    left = plain[0] if averaged and plain else None
    tensors = dict(chosen.tensors)
    if left and tensors.keys() < left.tensors.keys():  # what is not averaged stands once
        tensors = {**left.tensors, **tensors}
    skipped = [name for name in tensors if _is_counter(name, tensors[name])]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    others = [] if left else _beside(tree, chosen)
    return Weights(tensors, chosen.label, skipped + others, left.label if left else "")


def _is_average(label: str) -> bool:
    return bool(_EMA.search(label)) and "online" not in label


@dataclass(frozen=True, eq=False)
class _Candidate:
    place: tuple[str, ...]  # the keys of the dictionaries around
    prefix: str
    tensors: dict[str, Tensor]

    @property
    def label(self) -> str:
        return short(".".join([*self.place, self.prefix]).strip("."))


def _candidates(tree: Any, place: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Yield every set of names in a tree that begin alike and have a landmark among them."""
    if not isinstance(tree, Mapping | list | tuple) or len(place) > 3:
        return
    entries = _entries(tree)
    tensors = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}
    prefixes = {
        name.removesuffix(mark)
        for name in tensors
        for mark in _LANDMARKS
        if name == mark or name.endswith(f".{mark}")
    }
    for prefix in sorted(prefixes):
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and not name.startswith(longer)
        }
        yield _Candidate(place, prefix, own)
    for key, value in entries.items():
        yield from _candidates(value, (*place, str(key)))


def _entries(tree: Any) -> Mapping:
    """Return what is in a dictionary by its keys, and in a list by its places."""
    return tree if isinstance(tree, Mapping) else dict(enumerate(tree))


def _shadows(tree: Any, plain: _Candidate) -> Iterator[_Candidate]:
    """Yield averages that are kept without the names of the weights they belong to."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        listed = value.get("shadow_params") if isinstance(value, Mapping) else None
        shapes = [tensor.shape for tensor in plain.tensors.values()]
        if isinstance(listed, list) and [getattr(v, "shape", None) for v in listed] == shapes:
            own = dict(zip(plain.tensors, listed, strict=True))
            yield _Candidate((str(key), "shadow_params"), "", own)
    around = _at(tree, plain.place)
    joined = {k.rpartition(".")[2]: v for k, v in around.items() if str(k).startswith("model_ema.")}
    parts = plain.prefix.split(".")
    for begin in range(len(parts)):  # as latent-diffusion's LitEma names them, without points
        outer = "".join(parts[begin:])
        own = {name: joined.get(outer + name.replace(".", "")) for name in plain.tensors}
        if all(isinstance(value, Tensor) for value in own.values()):
            yield _Candidate(plain.place, "model_ema.", own)
            return


def _at(tree: Any, place: tuple[str, ...]) -> Mapping:
    for key in place:
        tree = next(value for name, value in _entries(tree).items() if str(name) == key)
    return _entries(tree)


def _chosen(path: Path, candidates: list[_Candidate]) -> _Candidate:
    """Return the one that is most likely meant: of averages the slowest, else the usual name."""

    def rank(candidate: _Candidate) -> tuple[float, int]:
        numbers = [float(number) for number in re.findall(r"\d\.\d+", candidate.label)]
        last = candidate.label.rpartition(".")[2]
        usual = _USUAL.index(last) if last in _USUAL else len(_USUAL)
        return -max(numbers, default=0), usual

    ranked = sorted(candidates, key=rank)
    if len(ranked) > 1 and rank(ranked[0]) == rank(ranked[1]):
        labels = " and ".join(candidate.label for candidate in ranked[:2])
        raise UserError("holds several networks; save one", path=path, got=labels)
    return ranked[0]


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Whether this counts or tabulates something and is no weight."""
    last = name.rpartition(".")[2]
    if last in _WEIGHTS:
        return False
    is_number = tensor.ndim == 0 or not tensor.is_floating_point()
    return is_number or bool(_COUNTERS.fullmatch(last))


def _beside(tree: Any, chosen: _Candidate) -> list[str]:
    """Return the names of what stands around the chosen weights, from the outside."""
    names, branch = [], _entries(tree)
    for key in (*chosen.place, None):
        inside = [name for name in branch if str(name) == key]
        names += [str(name) for name in branch if name not in inside] if key is not None else []
        branch = _entries(branch[inside[0]]) if inside else branch
    own = {chosen.prefix + name for name in chosen.tensors}
    return names + [str(name) for name in branch if name not in own]


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and bool(tree)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tree.items())
    )


def _described(tree: Any) -> str:
    """Say what a file holds in place of weights."""
    if not isinstance(tree, Mapping | list | tuple):
        return type(tree).__name__
    names = [str(name) for name in _entries(tree)]
    text = f"a dictionary of {listed(names) or 'nothing'}"
    if not isinstance(tree, Mapping):
        text = type(tree).__name__
    for key, value in _entries(tree).items():
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            names = [str(name) for name in value]
            text += f", whose {short(key, 30)} holds {listed(names, 2)}"
            break
    form = foreign_form(names)
    return f"{text}: {form}" if form else text


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
