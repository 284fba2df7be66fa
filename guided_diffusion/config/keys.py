"""The YAML keys: each with its type, default, range and one sentence.

To add a key, write one line here and run ``python guided_diffusion/config/docs.py``, which rewrites
the JSON Schemas in ``confs/`` and docs/configuration.md. Checks of several keys together stand here
too, in ``__post_init__``; everything else is schema.py's.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from guided_diffusion.config.folders import NETWORK_KEYS, follow_folder, is_folder
from guided_diffusion.config.schema import (
    RATES,
    SIDES,
    STEPS,
    WIDTHS,
    AnyConf,
    Conf,
    Pattern,
    key,
    load,
    numbers,
    require,
)
from guided_diffusion.masks import FAMILIES

# Width multiplier of each level, by the side in pixels; a classifier's cannot be set otherwise.
CHANNEL_MULT_BY_SIZE = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
CLASSIFIER_CLASSES = 1000
CLASSIFIER_HEAD_CHANNELS = 64
SMALLEST_MASK = 8  # px
HOLES = Pattern(
    "black|zero|color|alpha|#[0-9a-fA-F]{6}", "black, zero, color, alpha or such as '#ff0000'"
)
# Names of the result folders below a run's log folder, by their key in ``paths``.
RESULT_FOLDERS = {
    "srs": "inpainted",
    "lrs": "gt_masked",
    "gts": "gt",
    "gt_keep_masks": "gt_keep_mask",
}
# Options KEY=VALUE for DDNM in 100 network calls.
FAST = (
    "sampler=ddnm",
    "use_ddim=false",
    "inpa_inj_sched_prev_cumnoise=false",
    "timestep_respacing='100'",
    "schedule_jump_params={t_T: 100, jump_n_sample: 1}",
)
# Keys that published YAMLs have and that never had an effect: any value is accepted.
IGNORED_KEYS = {
    "lr_kernel_n_std": "belongs to super-resolution, which this program does not do",
    "num_samples": "a run takes all pictures of the data set; see max_len, samples_per_image",
    "n_jobs": "pictures are read as they are needed",
    "print_estimated_vars": "nothing is printed",
    "latex_name": "a label for the tables of a paper",
    "method_name": "a label for the tables of a paper",
    "data.eval.<set>.ds_conf": "the data set is described by its own keys",
    "record": "what a finished run noted about itself in its run.yml",
}


def _attending(size: int, mult: Sequence[float], channels: int, sides: Sequence[int]) -> set[int]:
    """Return the widths with attention: those at the listed sides, and always the deepest."""
    widths = [int(m * channels) for m in mult]
    listed = {width for level, width in enumerate(widths) if size >> level in sides}
    return listed | {widths[-1]}


# fmt: off
@dataclass(frozen=True, kw_only=True)
class JumpParams(Conf):
    """``schedule_jump_params``: the walk through time, Section 4.2 of the RePaint paper."""

    t_T: int = key(250, "Step at which the walk starts; to go faster lower it TOGETHER with "
                   "timestep_respacing.", low=1)
    n_sample: int = key(1, "Times that each single step is sampled; 1 leaves resampling to the "
                        "jumps.", low=1)
    jump_length: int = key(10, "Steps that a jump climbs back.", low=1)
    jump_n_sample: int = key(10, "Times that each stretch of jump_length steps is denoised; time "
                             "grows with it, and 1 does not resample, which is fastest and fits "
                             "the hole least to its surroundings.", low=1)
    jump2_length: int = key(1, "Steps that a jump of a second, finer level climbs back.", low=1)
    jump2_n_sample: int = key(1, "As jump_n_sample, for the second level; 1 is off.", low=1)
    jump3_length: int = key(1, "Steps that a jump of a third, finest level climbs back.", low=1)
    jump3_n_sample: int = key(1, "As jump_n_sample, for the third level; 1 is off.", low=1)
    start_resampling: int = key(100_000_000, "Resampling starts below this step; above it the walk "
                                "only goes down.", low=0)


@dataclass(frozen=True, kw_only=True)
class OutputPaths(Conf):
    """``data.eval.<set>.paths``: the folders of results, one PNG an image in each."""

    srs: str = key("", "Folder of the inpainted pictures; empty: ./log/<name>/inpainted.",
                   path=True)
    lrs: str = key("", "Folder of the inputs with a black hole; empty: ./log/<name>/gt_masked.",
                   path=True)
    gts: str = key("", "Folder of the inputs as the network saw them; empty: ./log/<name>/gt, or "
                   "not written where another of these folders is set.", path=True)
    gt_keep_masks: str = key("", "Folder of the masks; empty: ./log/<name>/gt_keep_mask.",
                             path=True)

    def filled(self, name: str) -> "OutputPaths":
        """Return a copy in which each missing folder is the one of run ``name``."""
        folders = dict(RESULT_FOLDERS)
        if self != OutputPaths():
            del folders["gts"]
        empty = {k: f"./log/{name}/{v}" for k, v in folders.items() if not getattr(self, k)}
        return dataclasses.replace(self, **empty)


@dataclass(frozen=True, kw_only=True)
class DataConf(Conf):
    """``data.eval.<set>``: the pictures and masks of a run; ``name`` is the set's own key."""

    name: str
    gt_path: str = key(text="Pictures: a folder, taken with its subfolders and sorted by path, or "
                       "one file.", path=True)
    mask_path: str = key(text="Masks, white (255) = known, black (0) = to generate: a folder or "
                         "file, paired with the pictures by name or in sorted order; alpha for "
                         "the pictures' own transparency; or to draw them one of thin, thick, "
                         "ev2li, nn2, ex64, genhalf.", path=True)
    image_size: int | None = key(None, "Has to equal the network's image_size; absent: that.",
                                 low=1)
    batch_size: int = key(1, "Pictures that go through the network at once: more is faster on a "
                          "GPU until its memory is full.", low=1)
    deterministic: bool = key(True, "Work in sorted order; false shuffles the order of work.")
    random_flip: bool = key(False, "Mirror picture and mask together with probability one half.")
    random_crop: bool = key(False, "Must be false: picture and mask would be cut at different "
                            "places.", choices=(False,))
    class_cond: bool = key(False, "Must be false: labels come from cond_y or are drawn, not from "
                           "file names.", choices=(False,))
    drop_last: bool = key(False, "Leave out the last batch if it is not full.")
    return_dict: bool = key(True, "Must be true: batches have one form only.", choices=(True,))
    return_dataloader: bool = key(True, "Must be true: pictures come in batches.", choices=(True,))
    mask_loader: bool = key(True, "Must be true: every picture needs a mask.", choices=(True,))
    offset: int = key(0, "Pictures left out at the start of the sorted list.", low=0)
    max_len: int | None = key(None, "Pictures to work on at most; absent: all.", low=1)
    paths: OutputPaths = key(OutputPaths(), "Folders of results.")  # noqa: RUF009 - it is frozen


@dataclass(frozen=True, kw_only=True)
class ModelConf(Conf):
    """The network and its diffusion chain: the keys that running and training share.

    Most of them have to be as they were when the checkpoint was trained.
    """

    image_size: int = key(256, "Side in pixels of the square that the network sees; pictures are "
                          "scaled and cut to it.", low=1, high=8192)
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
    learn_sigma: bool = key(True, "The network has 6 output channels: the noise and its variance.")
    use_fp16: bool = key(False, "Convolutions in half precision: on a GPU faster and with about "
                         "half the memory for weights.")
    dropout: float = key(0.0, "Dropout rate in training.", low=0, below=1)
    use_checkpoint: bool = key(False, "Recompute activations in training, which saves memory and "
                               "costs time.")
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
    use_kl: bool = key(False, "Train on the variational bound alone.")
    rescale_learned_sigmas: bool = key(False, "Multiply the variance's part of the training loss "
                                       "by the chain's length over 1000.")
    depth_max: float = key(0.0, "Value that is white in pictures of more than 8 bits of gray, "
                           "such as 4095; 0: the format's largest.")
    depth_min: float = key(0.0, "Value that is black in pictures of more than 8 bits of gray; "
                           "counts with depth_max.")
    all_formats: bool = key(False, "Take .webp, .tif, .tiff, .bmp, .jfif, .jpe and .avif files of "
                            "folders too; false: where there are no .jpg, .jpeg, .png or .gif.")
    # fmt: on

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        if not self.timestep_respacing:
            self._set("timestep_respacing", str(self.diffusion_steps))
        require(
            not (self.predict_xstart and self.predict_v),
            "predict_xstart and predict_v",
            "a network predicts one of them, or the noise where both are false",
        )
        require(
            self.depth_min < self.depth_max if self.depth_max else not self.depth_min,
            "depth_min and depth_max",
            "the first has to be below the second, which has to be stated and not 0",
        )
        if not self.follows_folder:
            self._check_network()

    @property
    def follows_folder(self) -> bool:
        """Whether the network is described by a folder, and not by these keys."""
        return False

    def _check_network(self) -> None:
        require(
            self.noise_schedule != "linear" or not 1 < self.diffusion_steps <= 20,
            "diffusion_steps and noise_schedule",
            "a linear schedule of 20 steps or fewer would need noise above 1",
        )
        require(
            bool(self.channel_mult) or self.image_size in CHANNEL_MULT_BY_SIZE,
            "image_size and channel_mult",
            f"channel_mult is empty, which works for an image_size of "
            f"{', '.join(str(size) for size in sorted(CHANNEL_MULT_BY_SIZE))} and not of "
            f"{self.image_size}: write channel_mult, such as '1,2,4'",
        )
        self._check_widths()

    def _check_widths(self) -> None:
        mult = self.channel_mult_list
        unit = 2 ** (len(mult) - 1)
        require(
            self.image_size % unit == 0,
            "image_size and channel_mult",
            f"{len(mult)} levels need a side divisible by {unit}, not {self.image_size}",
        )
        widths = [int(m * self.num_channels) for m in mult]
        require(
            all(width and width % 32 == 0 for width in widths),
            "num_channels and channel_mult",
            f"every width has to be a multiple of 32, and they make {widths}",
        )
        heads = ["num_head_channels"]
        if self.num_head_channels == -1:
            heads = ["num_heads", "num_heads_upsample"]
        attending = _attending(self.image_size, mult, self.num_channels, self.attention_sides)
        for name in heads:
            for width in sorted(attending):
                require(
                    width % getattr(self, name) == 0,  # -1 divides all
                    f"{name} and num_channels",
                    f"{getattr(self, name)} does not divide {width}, a width with attention",
                )

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


# fmt: off
@dataclass(frozen=True, kw_only=True)
class InpaintConf(ModelConf):
    """The YAML of a run of ``test.py``."""

    ignored: ClassVar[dict[str, str]] = IGNORED_KEYS

    name: str = key(text="Name of the run, for its folder ./log/<name>/.")
    model_path: str = key(text="The network: a checkpoint (.pt, .safetensors), a folder of "
                          "diffusers, or hf://owner/name.", path=True)
    cond_y: int | None = key(None, "Class label of all pictures; absent: drawn for each at random.",
                             low=0)
    sampler: str = key("repaint", "Where the known pixels come in: repaint puts them into every "
                       "noisy picture, ddnm into every predicted one, with fewer calls.",
                       choices=("repaint", "ddnm"))
    ddnm_eta: float = key(0.85, "Share of fresh noise in a step of sampler: ddnm; 0 adds none.",
                          low=0, high=1)
    use_ddim: bool = key(False, "DDIM steps, which add no noise, instead of the paper's steps.")
    inpa_inj_sched_prev: bool = key(True, "Put the known pixels, noised to its level, into every "
                                    "step; false makes a new picture instead of inpainting.")
    inpa_inj_sched_prev_cumnoise: bool = key(False, "Noise the known pixels along one trajectory "
                                             "instead of independently in every step.")
    inpa_inj_time_shift: int = key(1, "Added to a step's index where a jump adds noise.", low=0,
                                   high=1_000_000)
    schedule_jump_params: JumpParams = key(JumpParams(), "The walk.")  # noqa: RUF009 - it is frozen
    classifier_path: str | None = key(None, "Checkpoint of a classifier of noisy pictures, which "
                                      "guides towards the class label; absent: no guidance.",
                                      path=True)
    classifier_scale: float = key(4.0, "Strength of the guidance; 0 is off and saves its time.",
                                  low=0)
    classifier_width: int = key(128, "As num_channels, for the classifier.", low=32, high=8192,
                                multiple_of=32)
    classifier_depth: int = key(2, "As num_res_blocks, for the classifier.", low=1, high=100)
    classifier_attention_resolutions: str = key("32,16,8", "As attention_resolutions, for the "
                                                "classifier.", pattern=SIDES)
    classifier_use_scale_shift_norm: bool = key(True, "As use_scale_shift_norm, for the "
                                                "classifier.")
    classifier_resblock_updown: bool = key(True, "As resblock_updown, for the classifier.")
    classifier_pool: str = key("attention", "How the classifier pools its features.",
                               choices=("attention", "adaptive", "spatial", "spatial_v2"))
    classifier_use_fp16: bool = key(False, "As use_fp16, for the classifier.")
    device: str | None = key(None, "cpu, cuda, cuda:1 and so on; absent: a GPU if there is one.")
    show_progress: bool = key(True, "Show a progress bar.")
    seed: int | None = key(None, "Makes each result repeatable, whatever the batch size: the "
                           "picture at place k of the sorted list, from 0, uses seed + k; absent: "
                           "other results in every run.", low=0, high=2**31 - 1)
    samples_per_image: int = key(1, "Different results to make of each picture: number j, from 0, "
                                 "uses seed + k + j * 1000003.", low=1, high=1_000_000)
    precision: str | None = key(None, "Arithmetic: tf32, float16 and bfloat16 are for GPUs, and "
                                "less exact; absent: float16 with use_fp16, else PyTorch's "
                                "default, which is float32, and TF32 for convolutions on GPUs.",
                                choices=("float32", "tf32", "float16", "bfloat16"))
    compile: bool | str = key("auto", "How calls of the network are made fast: auto, on a CPU by "
                              "kernels of its own, built in seconds at the first run, on a GPU "
                              "by PyTorch's own operations; true, on a GPU by Triton, CUDA "
                              "graphs or torch.compile, which wait for measurement; false, "
                              "not beyond PyTorch.",
                              choices=("auto", True, False))
    paste_known: bool = key(False, "Paste the known pixels unchanged into the result.")
    invert_mask: bool = key(False, "The masks are the other way round: white is to generate.")
    mask_hole: str = key("black", "What is hole in mask files: black, as far as it is; zero, only "
                         "what is exactly 0; color, what is not gray; '#ff0000', what has about "
                         "this colour; alpha, what is transparent.", pattern=HOLES)
    mask_grow: int = key(0, "Pixels of the photo by which holes are enlarged to every side, before "
                         "anything is scaled.", low=0, high=10_000)
    mask_hard: bool = key(False, "Every pixel that a hole touches is hole: no soft rims, and no "
                          "thin lines that fade when they are scaled.")
    full_size: bool = key(False, "Give each photo back at its own size: holes are cut out with "
                          "what is around them, inpainted and put back; all but the hole and "
                          "feather pixels around it stays, in 8 bits a channel.")
    feather: int = key(8, "With full_size: pixels of the photo around a hole where old and new "
                       "are blended; 0: none.", low=0, high=1000)
    windows: bool = key(False, "With full_size: the network sees a hole at the photo's own "
                        "resolution, in overlapping windows, which takes many calls.")
    output_format: str = key("png", "With full_size: png, or same: a JPEG for a JPEG, compressed "
                             "anew.", choices=("png", "same"))
    overview: bool = key(True, "Also write sheets with inputs and results side by side.")
    save_process: int = key(0, "Pictures to keep of the walk from noise to result; 0: none.", low=0,
                           high=1000)
    data: DataConf = key(text="`eval:` and in it one data set by its name.", under="eval")  # noqa: RUF009
    # fmt: on

    @classmethod
    def completed(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the tree with the keys that the folder at ``model_path`` decides."""
        return follow_folder(tree)

    @property
    def follows_folder(self) -> bool:
        """Whether ``model_path`` is a folder, which describes its network itself."""
        return is_folder(self.model_path)

    @property
    def without_effect(self) -> Sequence[str]:
        """Keys of a network that is described by a folder."""
        return NETWORK_KEYS if self.follows_folder else ()

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        _check_name(self.name, "./log/")
        require(
            self.cond_y is None or self.cond_y < self.num_classes,
            "cond_y and num_classes",
            f"label {self.cond_y} of {self.num_classes} classes, which count from 0",
        )
        require(
            self.inpa_inj_sched_prev or not self.inpa_inj_sched_prev_cumnoise,
            "inpa_inj_sched_prev_cumnoise and inpa_inj_sched_prev",
            "the first has no effect while the second is false",
        )
        require(
            not (self.full_size and self.data.random_flip),
            f"full_size and data.eval.{self.data.name}.random_flip",
            "a photo that is given back whole is not mirrored",
        )
        require(
            not self.windows or self.full_size,
            "windows and full_size",
            "the first has no effect while the second is false",
        )
        require(
            self.output_format == "png" or self.full_size,
            "output_format and full_size",
            "the first has no effect while the second is false",
        )
        require(
            not (self.windows and self.guided),
            "windows and classifier_path",
            "a classifier sees squares of one size only",
        )
        for name in ("use_ddim", "inpa_inj_sched_prev_cumnoise"):
            require(
                self.sampler != "ddnm" or not getattr(self, name),
                f"sampler and {name}",
                f"{name} belongs to sampler: repaint; ddnm_eta: 0 is ddnm without fresh noise",
            )
        require(
            not self.use_fp16 or self.precision in (None, "float16"),
            "use_fp16 and precision",
            f"true and {self.precision} contradict each other",
        )
        if self.guided:
            self._check_classifier()
        self._complete_data()

    def _check_classifier(self) -> None:
        require(
            self.num_classes <= CLASSIFIER_CLASSES,
            "num_classes and classifier_path",
            f"a classifier knows {CLASSIFIER_CLASSES} classes, not {self.num_classes}",
        )
        require(
            self.image_size in CHANNEL_MULT_BY_SIZE,
            "image_size and classifier_path",
            f"there are classifiers for sides of {sorted(CHANNEL_MULT_BY_SIZE)} only",
        )
        mult = CHANNEL_MULT_BY_SIZE[self.image_size]
        widths = [int(m * self.classifier_width) for m in mult]
        attending = _attending(
            self.image_size, mult, self.classifier_width, self.classifier_attention_sides
        )
        require(
            all(width % 32 == 0 for width in widths)
            and all(width % CLASSIFIER_HEAD_CHANNELS == 0 for width in attending),
            "classifier_width and classifier_attention_resolutions",
            f"every width has to be a multiple of 32, with attention of {CLASSIFIER_HEAD_CHANNELS},"
            f" and they make {widths}",
        )

    def _complete_data(self) -> None:
        """Set the data set's size and folders; refuse a folder that is used twice."""
        prefix, size = f"data.eval.{self.data.name}.", self.data.image_size
        require(
            size in (None, self.image_size),
            f"{prefix}image_size and image_size",
            f"{size} and {self.image_size} have to be equal",
        )
        paths = self.data.paths.filled(self.name)
        self._set("data", dataclasses.replace(self.data, image_size=self.image_size, paths=paths))
        inputs = {"gt_path": self.data.gt_path, "mask_path": self.data.mask_path}
        used = {os.path.realpath(path): name for name, path in inputs.items()}
        for name, path in ((f"paths.{name}", getattr(paths, name)) for name in paths.__dict__):
            first = used.setdefault(os.path.realpath(path), name) if path else name
            require(
                first == name,
                f"{prefix}{first} and {prefix}{name}",
                f"files in {path} would overwrite one another",
            )

    @property
    def log_dir(self) -> str:
        """Folder of run.yml: the one that holds all folders of results, else ./log/<name>."""
        folders = {os.path.normpath(path) for path in vars(self.data.paths).values() if path}
        parents = {os.path.dirname(folder) for folder in folders}  # noqa: PTH120 - text in, text out
        return (parents.pop() or ".") if len(parents) == 1 else f"./log/{self.name}"

    @property
    def guided(self) -> bool:
        """Whether a classifier guides the sampling."""
        return self.classifier_path is not None and self.classifier_scale > 0

    @property
    def classifier_attention_sides(self) -> tuple[int, ...]:
        """Sides in pixels of the classifier's feature maps with attention."""
        return numbers(self.classifier_attention_resolutions, int)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class TrainConf(ModelConf):
    """The YAML of a run of ``train.py``."""

    name: str = key(text="Name of the run, for its folder ./runs/<name>.")
    data_dir: str = key(text="Folder of pictures, taken with its subfolders; with class_cond each "
                        "subfolder on its first level is a class.", path=True)
    out_dir: str = key("", "Folder of checkpoints and process pictures; empty: ./runs/<name>.",
                       path=True)
    timestep_respacing: str = key("", "Steps of the chain to train; empty: all.", pattern=STEPS)
    rescale_learned_sigmas: bool = key(True, "Multiply the variance's part of the training loss "
                                       "by the chain's length over 1000.")
    batch_size: int = key(8, "Pictures a step, over all GPUs together.", low=1, high=1_000_000)
    microbatch: int = key(-1, "Pictures that a GPU works on at once, to be lowered if memory runs "
                          "out; -1: its whole share of the batch.", low=1, special=-1)
    lr: float = key(1e-4, "Learning rate.", above=0)
    lr_anneal_steps: int = key(0, "Last steps of the training, over which the learning rate falls "
                               "to 0; 0: it stays.", low=0)
    warmup_steps: int = key(0, "Steps over which the learning rate rises from 0.", low=0)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", low=0)
    ema_rate: str = key("0.9999", "Rates of the averaged copies of the weights, with a checkpoint "
                        "each, the first for process pictures; a short training wants lower ones, "
                        "such as '0.999'.", pattern=RATES)
    iterations: int = key(100_000, "Steps to train in all.", low=1)
    log_interval: int = key(100, "Steps between lines of the log.", low=1)
    save_interval: int = key(5_000, "Steps between checkpoints, from which a run goes on.", low=1)
    sample_interval: int = key(5_000, "Steps between process pictures; 0: none.", low=0)
    schedule_sampler: str = key("uniform", "Timesteps to train on are drawn uniformly, or more "
                                "often where the loss is large.",
                                choices=("uniform", "loss-second-moment"))
    grad_clip: float = key(0.0, "Largest norm of the gradient; 0: no limit.", low=0)
    random_flip: bool = key(True, "Mirror pictures with probability one half.")
    random_crop: bool = key(False, "Cut pictures at random places instead of the centre.")
    cache_gb: float = key(4.0, "Memory in GiB, on each machine, for decoded pictures; those that "
                          "do not fit are read again every time.", low=0)
    holdout: float = key(0.05, "Share of the pictures that is kept out of training, to test with.",
                         low=0, below=1)
    precision: str = key("float32", "Arithmetic; tf32, for GPUs, and bfloat16, for GPUs and CPUs "
                         "with AVX-512 BF16 or AMX, are faster and less exact.",
                         choices=("float32", "tf32", "bfloat16"))
    compile: bool | str = key("auto", "Compile the network, which takes minutes at the start to "
                              "make each step faster; auto: do not, because the gain is not "
                              "measured.",
                              choices=("auto", True, False))
    seed: int = key(0, "Makes a training repeatable.", low=0, high=2**31 - 1)
    device: str | None = key(None, "cpu, cuda, cuda:1 and so on; absent: a GPU if there is one.")
    sample_mask: str = key("thick", "Masks of the process pictures.", choices=FAMILIES)
    sample_count: int = key(8, "Process pictures to make each time; 0: none.", low=0)
    sample_respacing: str = key("50", "As timestep_respacing, for the process pictures: fewer "
                                "steps are faster and less good.", pattern=STEPS)
    init_from: str | None = key(None, "Checkpoint to start from; absent: random weights.",
                                path=True)
    # fmt: on

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        _check_name(self.name, "./runs/")
        self._set("out_dir", self.out_dir or f"./runs/{self.name}")
        self._set("sample_respacing", self.sample_respacing or str(self.diffusion_steps))
        require(
            not self.use_fp16,
            "use_fp16 and precision",
            "training in half precision is not stable; write precision: bfloat16 instead",
        )
        require(
            self.image_size >= SMALLEST_MASK or not (self.sample_interval and self.sample_count),
            "image_size and sample_interval",
            f"masks for process pictures have {SMALLEST_MASK} pixels at least; write "
            "sample_interval: 0 to go without",
        )

    @property
    def ema_rates(self) -> tuple[float, ...]:
        """Rates of the averaged copies of the weights, without repetitions."""
        return tuple(dict.fromkeys(numbers(self.ema_rate, float)))


def _check_name(name: str, folder: str) -> None:
    path = Path(name)
    inside = ".." not in path.parts and not path.is_absolute()
    require(inside, "name", f"would lead out of the folder {folder}")


def load_conf(
    path: str | os.PathLike, cls: type[AnyConf] = InpaintConf, overrides: Sequence[str] = ()
) -> AnyConf:
    """Read and check a YAML file, as ``schema.load`` does."""
    return load(path, cls, overrides)
