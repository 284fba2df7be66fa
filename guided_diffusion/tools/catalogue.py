"""What was published: checkpoints, data, and folders of diffusers; and where each lies."""

from dataclasses import dataclass

from guided_diffusion.errors import UserError

DRIVE = "https://drive.google.com/file/d"
_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
_HUB = "https://huggingface.co/google"
# "see source": the code's licence is known, the terms of the weights or pictures are not.
_CODE, _NC = "MIT (code); weights: see source", "CC BY-NC-SA 4.0"


@dataclass(frozen=True)
class Published:
    """A file that somebody published, or a folder with ``files``."""

    name: str
    address: str
    licence: str
    size: float = 0.0  # GB, from the number of parameters; 0: unknown
    files: tuple[tuple[str, ...], ...] = (("",),)  # of each row one is enough

    @property
    def limit(self) -> int:
        """The most bytes that a file may have, packed or unpacked."""
        return round((1.2 * self.size or 1.0) * 1e9)


_GB = {
    "256x256_diffusion": 2.215, "256x256_classifier": 0.216, "256x256_diffusion_uncond": 2.211,
    "lsun_bedroom": 2.211, "lsun_cat": 2.211, "lsun_horse": 2.211, "lsun_horse_nodropout": 2.211,
    "512x512_diffusion": 2.236, "512x512_classifier": 0.218, "64x64_diffusion": 1.184,
    "64x64_classifier": 0.262, "128x128_diffusion": 1.686, "128x128_classifier": 0.170,
}  # fmt: skip
_DIFFUSERS = (
    ("config.json",),
    ("scheduler_config.json",),
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
)
CATALOGUE = (
    Published("celeba256_250000.pt", f"{DRIVE}/1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", _NC, 2.211),
    Published("places256_300000.pt", f"{DRIVE}/1QEl-btGbzQz6IwkXiFGd49uQNTUtTHsk", _NC, 2.211),
    Published(
        "data.zip", f"{DRIVE}/1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv", f"{_NC}; pictures: see source"
    ),
    *(Published(f"{name}.pt", f"{_OPENAI}/{name}.pt", _CODE, size) for name, size in _GB.items()),
    *(
        Published(name, f"{_HUB}/{name}/resolve/main", "Apache-2.0", 0.455, _DIFFUSERS)
        for kind in ("celebahq", "ema-celebahq", "church", "cat", "bedroom")
        for name in [f"ddpm-{kind}-256"]
    ),
)
DEFAULT = [entry.name for entry in CATALOGUE[:5]]


def look_up(word: str) -> Published:
    """Return what is called ``word``, with or without .pt, .zip or google/; raises UserError."""
    for entry in CATALOGUE:
        stem = entry.name.removesuffix(".pt").removesuffix(".zip")
        if word.removeprefix("google/") in (entry.name, stem):
            return entry
    raise UserError(f"{word} is not a published file; sh download.sh --list names all of them")
