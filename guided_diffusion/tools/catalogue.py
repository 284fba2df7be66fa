"""What was published: checkpoints, data, and folders of diffusers; and where each lies."""

from dataclasses import dataclass

from guided_diffusion.errors import UserError

OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"


@dataclass(frozen=True)
class Published:
    """A file or a folder that somebody published."""

    name: str
    source: str  # drive (Google Drive), http, or hub (a folder on huggingface.co)
    address: str
    licence: str
    network: str = ""  # "model" or "classifier"
    conf: str = ""  # the configuration that describes the network
    size: str = "-"


# "see source": the code's licence is known, the terms of the weights or pictures are not.
_CODE, _REPAINT = "MIT (code); weights: see source", "CC BY-NC-SA 4.0"
CATALOGUE = (
    *(
        Published(f"{name}.pt", "drive", address, _REPAINT, "model", conf, "2.2 GB")
        for name, address, conf in (
            ("celeba256_250000", "1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", "test_c256_thick"),
            ("places256_300000", "1QEl-btGbzQz6IwkXiFGd49uQNTUtTHsk", "test_p256_thick"),
        )
    ),
    Published(
        "data.zip",
        "drive",
        "1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv",
        f"{_REPAINT}; pictures: see source",
    ),
    *(
        Published(f"{name}.pt", "http", OPENAI, _CODE, network, conf)
        for name, network, conf in (
            ("256x256_diffusion", "model", "test_inet256_thick"),
            ("256x256_classifier", "classifier", "test_inet256_thick"),
            ("256x256_diffusion_uncond", "model", "inet256_uncond"),
            ("lsun_bedroom", "model", "lsun_bedroom"),
            ("lsun_cat", "model", "lsun_cat"),
            ("lsun_horse", "model", "lsun_horse"),
            ("lsun_horse_nodropout", "model", "lsun_horse_nodropout"),
            ("512x512_diffusion", "model", "inet512"),
            ("512x512_classifier", "classifier", "inet512"),
            ("64x64_diffusion", "model", "inet64"),
            ("64x64_classifier", "classifier", "inet64"),
            ("128x128_diffusion", "model", "inet128"),
            ("128x128_classifier", "classifier", "inet128"),
        )
    ),
    *(
        Published(name, "hub", f"google/{name}", "Apache-2.0")
        for name in (
            "ddpm-celebahq-256",
            "ddpm-ema-celebahq-256",
            "ddpm-church-256",
            "ddpm-cat-256",
            "ddpm-bedroom-256",
        )
    ),
)
DEFAULT = [entry.name for entry in CATALOGUE[:5]]
# A folder of diffusers is a pipeline with folders in it, or the bare network. Of each row the
# first file that there is will do; without the rows marked True the model is of no use.
HUB_FILES = (
    (True, ("config.json", "unet/config.json")),
    (True, ("scheduler_config.json", "scheduler/scheduler_config.json")),
    (
        True,
        (
            "diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.bin",
        ),
    ),
    (False, ("model_index.json",)),
)


def look_up(word: str) -> Published:
    """Return what is called ``word``, with or without .pt, .zip or owner; raises UserError."""
    for entry in CATALOGUE:
        stem = entry.name.removesuffix(".pt").removesuffix(".zip")
        if word in (entry.name, stem) or (entry.source == "hub" and word == entry.address):
            return entry
    raise UserError(f"{word} is not a published file; bash download.sh --list names them all")
