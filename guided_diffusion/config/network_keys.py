"""The YAML keys of network and diffusion chain, which running and training share.

Each key has its type, default, range and one sentence here; checks of several keys together stand
in ``__post_init__``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.config.schema import SIDES, STEPS, WIDTHS, Conf, key, numbers, require

# Width multiplier of each level, by the side in pixels; a classifier's cannot be set otherwise.
CHANNEL_MULT_BY_SIZE = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}

# Keys of ModelConf that may differ between calls of a network that is loaded.
WALK_KEYS = ("timestep_respacing", "clip_denoised", "depth_max", "depth_min", "all_formats")


def widths_with_attention(
    size: int, mult: Sequence[float], channels: int, sides: Sequence[int]
) -> set[int]:
    """Return the widths with attention: those at the listed sides, and always the deepest."""
    widths = [int(m * channels) for m in mult]
    listed = {width for level, width in enumerate(widths) if size >> level in sides}
    return listed | {widths[-1]}


def check_name(name: str, folder: str) -> None:
    """Raise UserError where a run called ``name`` would leave its ``folder``."""
    path = Path(name)
    inside = ".." not in path.parts and not path.is_absolute()
    require(inside, "name", f"would lead out of the folder {folder}")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ModelConf(Conf):
    """The network and its diffusion chain: the keys that running and training share.

    Most of them have to be as they were when the checkpoint was trained.
    """

    image_size: int = key(256, "Side in pixels of the square that the network sees; pictures are "
                          "scaled and cut to it.", low=1, high=8192)
    in_channels: int = key(3, "Channels of the pictures that the network works on: 3 is colour, 1 "
                           "is gray.", choices=(3, 1))
    num_channels: int = key(256, "Base width of the network.", low=32, high=8192, multiple_of=32)
    num_res_blocks: int = key(2, "Residual blocks a level.", low=1, high=100)
    channel_mult: str = key("", "Width multiplier of each level, such as '1,2,4'; empty: by "
                            "image_size.", pattern=WIDTHS)
    attention_resolutions: str = key("32,16,8", "Sides in pixels of the feature maps that attend.",
                                     pattern=SIDES)
    num_heads: int = key(4, "Attention heads; counts if num_head_channels is -1.", low=1)
    num_head_channels: int = key(64, "Channels of an attention head; -1: num_heads decides.",
                                 low=1, special=-1)
    num_heads_upsample: int = key(-1, "Attention heads in the decoder; -1: as num_heads.",
                                  low=1, special=-1)
    use_scale_shift_norm: bool = key(True, "The time scales and shifts the normalised features.")
    resblock_updown: bool = key(True, "Residual blocks resize, not single convolutions.")
    use_new_attention_order: bool = key(False, "Split q, k and v before the heads, not after.")
    norm_groups: int = key(32, "Groups into which each normalisation divides its channels; a new "
                           "network with 32 channels in a level needs fewer, such as 8, for a "
                           "group of one channel loses its mean, and with it the colour.",
                           choices=(1, 2, 4, 8, 16, 32))
    class_cond: bool = key(False, "The network takes a class label.")
    num_classes: int = key(1000, "Number of class labels.", low=1, high=1_000_000)
    learn_sigma: bool = key(True, "The network has twice as many output channels: the noise and "
                            "its variance.")
    use_fp16: bool = key(False, "Convolutions in half precision: on a GPU faster and with about "
                         "half the memory for weights.")
    dropout: float = key(0.0, "Dropout rate in training.", low=0, below=1, affects_results=False)
    use_checkpoint: bool = key(False, "Recompute activations in training, which saves memory and "
                               "costs time.", affects_results=False)
    diffusion_steps: int = key(1000, "Steps of the chain that the network is trained on.",
                               low=1, high=1_000_000)
    noise_schedule: str = key("linear", "How noise grows along the chain.",
                              choices=("linear", "cosine"))
    timestep_respacing: str = key("250", "Steps kept of the chain, in all ('250'), by section "
                                  "('20,30') or evenly ('ddim50'), empty: all; to go faster lower "
                                  "it TOGETHER with schedule_jump_params.t_T, which costs quality.",
                                  pattern=STEPS)
    predict_xstart: bool = key(False, "The network predicts the clean picture, not the noise.")
    predict_v: bool = key(False, "The network predicts the velocity: nearly the noise where there "
                          "is little of it, nearly the negative picture where there is much.")
    clip_denoised: bool = key(True, "Clip predicted pictures to the range of pixels.")
    rescale_timesteps: bool = key(False, "Multiply the network's time by 1000/diffusion_steps.")
    use_kl: bool = key(False, "Train on the variational bound alone.", affects_results=False)
    rescale_learned_sigmas: bool = key(False, "Multiply the variance's part of the training loss "
                                       "by the chain's length over 1000.", affects_results=False)
    depth_max: float = key(0.0, "Value that is white in pictures of more than 8 bits of gray, "
                           "such as 4095; 0: the format's largest.")
    depth_min: float = key(0.0, "Value that is black in pictures of more than 8 bits of gray; "
                           "counts with depth_max.")
    all_formats: bool = key(False, "Take .webp, .tif, .tiff, .bmp, .jfif, .jpe and .avif files of "
                            "folders too; false: where there are no .jpg, .jpeg, .png or .gif.",
                            affects_results=False)
    # fmt: on

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        if not self.timestep_respacing:
            self._set("timestep_respacing", str(self.diffusion_steps))
        problem = "a network predicts one of them, or the noise where both are false"
        fits = not (self.predict_xstart and self.predict_v)
        require(fits, "predict_xstart and predict_v", problem)
        problem = "the first has to be below the second, which has to be stated and not 0"
        fits = self.depth_min < self.depth_max if self.depth_max else not self.depth_min
        require(fits, "depth_min and depth_max", problem)
        if not self.follows_model:
            self._check_network()

    @property
    def follows_model(self) -> bool:
        """Whether the network is another program's, and not described by these keys."""
        return False

    def _check_network(self) -> None:
        problem = "a linear schedule of 20 steps or fewer would need noise above 1"
        fits = self.noise_schedule != "linear" or not 1 < self.diffusion_steps <= 20
        require(fits, "diffusion_steps and noise_schedule", problem)
        sizes = ", ".join(map(str, sorted(CHANNEL_MULT_BY_SIZE)))
        limits = f"an empty channel_mult works for an image_size of {sizes}"
        problem = f"{limits} and not of {self.image_size}: write channel_mult, such as '1,2,4'"
        fits = bool(self.channel_mult) or self.image_size in CHANNEL_MULT_BY_SIZE
        require(fits, "image_size and channel_mult", problem)
        mult = self.channel_mult_list
        unit = 2 ** (len(mult) - 1)
        problem = f"{len(mult)} levels need a side divisible by {unit}, not {self.image_size}"
        require(self.image_size % unit == 0, "image_size and channel_mult", problem)
        widths = [int(m * self.num_channels) for m in mult]
        problem = f"every width has to be a multiple of 32, and they make {widths}"
        fits = all(width and width % 32 == 0 for width in widths)
        require(fits, "num_channels and channel_mult", problem)
        attending = widths_with_attention(
            self.image_size, mult, self.num_channels, self.attention_sides
        )
        heads = ("num_heads", "num_heads_upsample")
        for name in heads if self.num_head_channels == -1 else ("num_head_channels",):
            number = getattr(self, name)  # -1 divides all
            for width in sorted(attending):
                problem = f"{number} does not divide {width}, a width with attention"
                require(width % number == 0, f"{name} and num_channels", problem)

    @property
    def depth(self) -> tuple[float, float] | None:
        """What is black and white in deep gray, if that is stated."""
        return (self.depth_min, self.depth_max) if self.depth_max else None

    @property
    def channel_mult_list(self) -> tuple[float, ...]:
        """Width multiplier of each level, from the full resolution down."""
        return numbers(self.channel_mult, float) or CHANNEL_MULT_BY_SIZE[self.image_size]

    @property
    def attention_sides(self) -> tuple[int, ...]:
        """Sides in pixels of the feature maps with attention."""
        return numbers(self.attention_resolutions, int)
