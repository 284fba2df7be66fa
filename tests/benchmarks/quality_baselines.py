"""Two ways to fill a hole without a network call, for quality.py to compare with."""

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images
from guided_diffusion.io.images import load_crop

FACES = Path(__file__).resolve().parents[2] / "data" / "faces"


class Nearest:
    """The training picture with the smallest square error on the known pixels, pasted in."""

    def __init__(self, folder: str, size: int) -> None:
        paths = tqdm(list_images(folder, key="--train"), "training pictures", leave=False, delay=2)
        self._pictures = np.stack([load_crop(path, size) for path in paths])

    def __call__(self, gt: np.ndarray, holes: np.ndarray) -> np.ndarray:
        """Fill the holes, bool (N, S, S), of the pictures, uint8 (N, S, S, 3)."""
        best, results = np.full(len(gt), np.inf), gt.copy()
        for picture in self._pictures:
            errors = ((gt.astype(np.float32) - picture) ** 2).sum(axis=3)
            error = np.where(holes, 0, errors).sum(axis=(1, 2))
            is_nearer = error < best
            best[is_nearer] = error[is_nearer]
            results[is_nearer] = picture
        return np.where(holes[..., None], results, gt)


class Posterior:
    """Another drawn face with the same known pixels, as data/faces/posterior.mjs draws it."""

    def __init__(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise UserError("node is not installed", key="--settings", got="posterior")
        self._program = subprocess.Popen(
            [node, "posterior.mjs"],
            cwd=FACES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, names: Sequence[str], gt: np.ndarray, holes: np.ndarray) -> np.ndarray:
        """Fill the holes, bool (N, S, S), of faces, uint8 (N, S, S, 3), whose names are seeds.

        Raises UserError for a picture that is not such a face.
        """
        faces = list(zip(names, gt, holes, strict=True))
        return np.stack([self._draw(*face) for face in tqdm(faces, "faces", leave=False, delay=2)])

    def _draw(self, name: str, gt: np.ndarray, hole: np.ndarray) -> np.ndarray:
        stem = Path(name).stem
        if not (stem.isascii() and stem.isdigit()):
            problem = "is not a face of make.mjs"
            raise UserError(problem, path=name, expected="its seed as its name")
        pixels, hidden = (base64.b64encode(array.tobytes()).decode() for array in (gt, hole))
        face = {"seed": int(stem), "size": len(gt), "picture": pixels, "hole": hidden}
        print(json.dumps(face), file=self._program.stdin, flush=True)
        answer = self._program.stdout.readline()
        if not answer:
            raise UserError("has ended; its message is above", path=FACES / "posterior.mjs")
        tree = json.loads(answer)
        if "error" in tree:
            raise UserError(tree["error"], path=name)
        return np.frombuffer(base64.b64decode(tree["picture"]), np.uint8).reshape(gt.shape)
