"""The YAML keys of test.py: each with its type, default, range and one sentence.

To add a key, declare it here and run ``python guided_diffusion/config/docs.py``, which rewrites the
JSON Schemas in ``confs/`` and docs/configuration.md. Keys of the network, which training shares,
stand in network_keys.py, those of train.py alone in train_keys.py. ``__post_init__`` checks keys
that have to fit each other; schema.py does everything else.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from guided_diffusion.config.network_keys import (
    CHANNEL_MULT_BY_SIZE,
    WALK_KEYS,
    ModelConf,
    check_name,
    widths_with_attention,
)
from guided_diffusion.config.schema import SIDES, Conf, Pattern, key, keys_of, numbers, require
from guided_diffusion.models.follow import NETWORK_KEYS, follow_model, is_folder, is_lucidrains

CLASSIFIER_CLASSES = 1000
CLASSIFIER_HEAD_CHANNELS = 64
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
# Keys of --fast: DDNM in 25 network calls; docs/quality.md says how they were chosen.
FAST = {
    "sampler": "ddnm",
    "ddnm_eta": 0.85,
    "ddnm_overshoot": 1.0,
    "use_ddim": False,
    "inpa_inj_sched_prev_cumnoise": False,
    "timestep_respacing": "25",
    "schedule_jump_params": {"t_T": 25, "jump_n_sample": 1},
}
# Keys beside those of the network that say which one is loaded, and how it computes.
LOADING_KEYS = ("model_path", "device", "precision", "compile", "check")
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
                   path=True, affects_results=False)
    lrs: str = key("", "Folder of the inputs with a black hole; empty: ./log/<name>/gt_masked.",
                   path=True, affects_results=False)
    gts: str = key("", "Folder of the inputs as the network saw them; empty: ./log/<name>/gt, or "
                   "not written where another of these folders is set.", path=True,
                   affects_results=False)
    gt_keep_masks: str = key("", "Folder of the masks; empty: ./log/<name>/gt_keep_mask.",
                             path=True, affects_results=False)

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
                                 low=1, affects_results=False)
    batch_size: int = key(1, "Pictures that go through the network at once: more is faster on a "
                          "GPU until its memory is full.", low=1, affects_results=False)
    deterministic: bool = key(True, "Work in sorted order; false shuffles the order of work.",
                              affects_results=False)
    random_flip: bool = key(False, "Mirror picture and mask together with probability one half.")
    random_crop: bool = key(False, "Must be false: picture and mask would be cut at different "
                            "places.", choices=(False,))
    class_cond: bool = key(False, "Must be false: labels come from cond_y or are drawn, not from "
                           "file names.", choices=(False,))
    drop_last: bool = key(False, "Leave out the last batch if it is not full.",
                          affects_results=False)
    return_dict: bool = key(True, "Must be true: batches have one form only.", choices=(True,))
    return_dataloader: bool = key(True, "Must be true: pictures come in batches.", choices=(True,))
    mask_loader: bool = key(True, "Must be true: every picture needs a mask.", choices=(True,))
    offset: int = key(0, "Pictures left out at the start of the sorted list.", low=0,
                      affects_results=False)
    max_len: int | None = key(None, "Pictures to work on at most; absent: all.", low=1,
                              affects_results=False)
    paths: OutputPaths = key(OutputPaths(), "Folders of results.")  # noqa: RUF009 - it is frozen


@dataclass(frozen=True, kw_only=True)
class InpaintConf(ModelConf):
    """The YAML of a run of ``test.py``."""

    ignored: ClassVar[dict[str, str]] = IGNORED_KEYS

    name: str = key(text="Name of the run, for its folder ./log/<name>/.", affects_results=False)
    model_path: str = key(text="The network: a checkpoint (.pt, .safetensors) of "
                          "guided-diffusion or denoising-diffusion-pytorch, a folder of "
                          "diffusers, or hf://owner/name.", path=True)
    cond_y: int | None = key(None, "Class label of all pictures; absent: drawn for each at random.",
                             low=0)
    sampler: str = key("repaint", "Where the known pixels come in: repaint puts them into every "
                       "noisy picture, ddnm into every predicted one, with fewer calls.",
                       choices=("repaint", "ddnm"))
    ddnm_eta: float = key(0.85, "Share of fresh noise in a step of sampler: ddnm; 0 adds none.",
                          low=0, high=1)
    ddnm_overshoot: float = key(0.0, "How far sampler: ddnm moves known pixels past their values, "
                                "times the noise's variance: with few steps the rest fits better.",
                                low=0, high=2)
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
    device: str | None = key(None, "cpu, cuda, cuda:1 and so on; absent: a GPU if there is one.",
                             affects_results=False)
    show_progress: bool = key(True, "Show a progress bar.", affects_results=False)
    seed: int | None = key(None, "Makes each result repeatable, whatever the batch size: the "
                           "picture at place k of the sorted list, from 0, uses seed + k; absent: "
                           "other results in every run.", low=0, high=2**31 - 1)
    samples_per_image: int = key(1, "Different results to make of each picture: number j, from 0, "
                                 "uses seed + k + j * 1000003.", low=1, high=1_000_000,
                                 affects_results=False)
    precision: str | None = key(None, "Arithmetic, less exact than float32: tf32 and float16 are "
                                "for GPUs, bfloat16 for GPUs and CPUs with AVX512_BF16; absent: "
                                "float16 with use_fp16, else PyTorch's default, which is float32, "
                                "and TF32 for convolutions on GPUs.",
                                choices=("float32", "tf32", "float16", "bfloat16"))
    compile: bool | str = key("auto", "How calls of the network are made fast: auto, on a CPU by "
                              "kernels of its own, built in seconds at the first run, on a GPU "
                              "by PyTorch's own operations; true, by torch.compile on a GPU "
                              "and as auto on a CPU; false, by PyTorch's own operations.",
                              choices=("auto", True, False), affects_results=False)
    check: str = key("once", "When kernels for CPUs are compared with PyTorch's own operations: "
                     "once, at the first call with inputs of a shape on this machine; always, at "
                     "that of every run.", choices=("once", "always"), affects_results=False)
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
    overview: bool = key(True, "Also write sheets with inputs and results side by side.",
                         affects_results=False)
    save_process: int = key(0, "Pictures to keep of the walk from noise to result; 0: none.", low=0,
                           high=1000, affects_results=False)
    data: DataConf = key(text="`eval:` and in it one data set by its name.", under="eval")  # noqa: RUF009
    # fmt: on

    completed = staticmethod(follow_model)  # with the keys that the network decides

    @property
    def follows_model(self) -> bool:
        """Whether ``model_path`` is of another program and describes its network itself."""
        return is_folder(self.model_path) or is_lucidrains(self.model_path)

    @property
    def without_effect(self) -> Sequence[str]:
        """Keys of guided-diffusion's network where ``model_path`` describes another one."""
        return NETWORK_KEYS if self.follows_model else ()

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        check_name(self.name, "./log/")
        problem = f"label {self.cond_y} of {self.num_classes} classes, which count from 0"
        fits = self.cond_y is None or self.cond_y < self.num_classes
        require(fits, "cond_y and num_classes", problem)
        problem = "the first has no effect while the second is false"
        needed = {"inpa_inj_sched_prev_cumnoise": "inpa_inj_sched_prev"}
        needed |= {"windows": "full_size", "output_format": "full_size"}
        for first, second in needed.items():
            fits = getattr(self, second) or getattr(self, first) in (False, "png")
            require(fits, f"{first} and {second}", problem)
        problem = "a photo that is given back whole is not mirrored"
        keys = f"full_size and data.eval.{self.data.name}.random_flip"
        require(not (self.full_size and self.data.random_flip), keys, problem)
        problem = "a classifier sees squares of one size only"
        require(not (self.windows and self.guided), "windows and classifier_path", problem)
        for name in ("use_ddim", "inpa_inj_sched_prev_cumnoise"):
            problem = f"{name} belongs to sampler: repaint; ddnm_eta: 0 is ddnm without fresh noise"
            fits = self.sampler != "ddnm" or not getattr(self, name)
            require(fits, f"sampler and {name}", problem)
        problem = f"true and {self.precision} contradict each other"
        fits = not self.use_fp16 or self.precision in (None, "float16")
        require(fits, "use_fp16 and precision", problem)
        if self.guided:
            self._check_classifier()
        self._complete_data()

    def _check_classifier(self) -> None:
        problem = f"a classifier knows {CLASSIFIER_CLASSES} classes, not {self.num_classes}"
        fits = self.num_classes <= CLASSIFIER_CLASSES
        require(fits, "num_classes and classifier_path", problem)
        problem = f"there are classifiers for sides of {sorted(CHANNEL_MULT_BY_SIZE)} only"
        fits = self.image_size in CHANNEL_MULT_BY_SIZE
        require(fits, "image_size and classifier_path", problem)
        mult = CHANNEL_MULT_BY_SIZE[self.image_size]
        widths = [int(m * self.classifier_width) for m in mult]
        sides = self.classifier_attention_sides
        attending = widths_with_attention(self.image_size, mult, self.classifier_width, sides)
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
        problem = f"{size} and {self.image_size} have to be equal"
        require(size in (None, self.image_size), f"{prefix}image_size and image_size", problem)
        paths = self.data.paths.filled(self.name)
        self._set("data", dataclasses.replace(self.data, image_size=self.image_size, paths=paths))
        inputs = {"gt_path": self.data.gt_path, "mask_path": self.data.mask_path}
        used = {os.path.realpath(path): name for name, path in inputs.items()}
        for name, path in ((f"paths.{name}", getattr(paths, name)) for name in paths.__dict__):
            first = used.setdefault(os.path.realpath(path), name) if path else name
            problem = f"files in {path} would overwrite one another"
            require(first == name, f"{prefix}{first} and {prefix}{name}", problem)

    @property
    def log_dir(self) -> str:
        """Folder of run.yml: the one that holds all folders of results, else ./log/<name>."""
        folders = {os.path.normpath(path) for path in vars(self.data.paths).values() if path}
        parents = {os.path.dirname(folder) for folder in folders}  # noqa: PTH120 - text in, text out
        return (parents.pop() or ".") if len(parents) == 1 else f"./log/{self.name}"

    @property
    def network(self) -> dict[str, Any]:
        """The keys that say which networks are loaded, and how they compute."""
        names = [name for name in keys_of(type(self)) if name.startswith("classifier_")]
        names += set(keys_of(ModelConf)) - set(WALK_KEYS)
        return {name: getattr(self, name) for name in (*LOADING_KEYS, *names)}

    @property
    def guided(self) -> bool:
        """Whether a classifier guides the sampling."""
        return self.classifier_path is not None and self.classifier_scale > 0

    @property
    def classifier_attention_sides(self) -> tuple[int, ...]:
        """Sides in pixels of the classifier's feature maps with attention."""
        return numbers(self.classifier_attention_resolutions, int)
