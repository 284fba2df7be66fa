"""The YAML schema: every key with its type, default, range and one sentence, checked on loading.

A configuration is a frozen dataclass whose fields are the YAML's keys. What a field's ``key(...)``
says is the only source of its documentation, of its checks and of the JSON Schema that editors
read. A dataclass checks itself whenever it is made, from a file, ``--set`` or ``replace`` alike.
``python guided_diffusion/conf.py`` writes the JSON Schemas into ``confs/``.
"""

import dataclasses
import difflib
import json
import operator
import os
import re
import reprlib
import sys
import textwrap
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import yaml

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from guided_diffusion import UserError

# Width multipliers a level, by the side of the picture; the classifier has no others.
CHANNEL_MULT_BY_SIZE = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
CLASSIFIER_CLASSES = 1000
CLASSIFIER_HEAD_CHANNELS = 64
MASK_FAMILIES = ("thin", "thick", "ev2li", "nn2", "ex64", "genhalf")

# Keys that published YAMLs state and that never had an effect: accepted whatever they hold.
IGNORED_KEYS = {
    "lr_kernel_n_std": "belongs to super-resolution, which this program does not do",
    "num_samples": "every picture of the data set is worked on; see max_len and samples_per_image",
    "n_jobs": "pictures are read as they are needed",
    "print_estimated_vars": "nothing is printed",
    "latex_name": "a label for tables of a paper",
    "method_name": "a label for tables of a paper",
    "data.eval.<set>.ds_conf": "the data set is described by its own keys",
}

MAX_YAML_BYTES = 1 << 20  # a checkpoint given for a YAML is refused without reading all of it
BOUNDS = {  # what key() calls it: (test, words, JSON Schema's word)
    "low": (operator.ge, "at least", "minimum"),
    "above": (operator.gt, "above", "exclusiveMinimum"),
    "high": (operator.le, "at most", "maximum"),
    "below": (operator.lt, "below", "exclusiveMaximum"),
    "multiple_of": (lambda value, unit: value % unit == 0, "a multiple of", "multipleOf"),
}
KIND_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


class Pattern(NamedTuple):
    """A text made of numbers: YAML may give it as text, as one number or as a list of numbers."""

    regex: str
    words: str


def _commas(item: str) -> str:
    return f"(?:{item}(?:,{item})*)"


WIDTHS = Pattern(
    _commas(r"(?:\d{1,4}(?:\.\d{1,9})?|\.\d{1,9})") + "?", "numbers and commas, such as '1,2,4'"
)
SIDES = Pattern(_commas(r"[1-9]\d{0,5}") + "?", "integers and commas, such as '32,16,8'")
RATES = Pattern(_commas(r"(?:0|0?\.\d{1,9})"), "numbers below 1 and commas, such as '0.9999'")
STEPS = Pattern(
    f"(?:{_commas('[1-9][0-9]{0,5}')}|ddim[1-9][0-9]{{0,5}})?", "such as '250', '20,30' or 'ddim50'"
)


def key(
    default: Any = MISSING,
    text: str = "",
    *,
    choices: tuple = (),
    pattern: Pattern | None = None,
    special: int | None = None,
    **bounds: float,
) -> Any:
    """A dataclass field that is a YAML key: without a default it is required.

    ``text`` is its documentation, one sentence. ``bounds`` are those of BOUNDS; ``special`` is a
    value allowed outside them; ``choices`` are the only values there are.
    """
    rules = {"choices": choices, "pattern": pattern, "special": special, "bounds": bounds}
    assert bounds.keys() <= BOUNDS.keys(), bounds
    return dataclasses.field(default=default, metadata={"text": text, **rules})


# --------------------------------------------------------------------------------------------------
# One value
# --------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """``value`` for a message: short whatever it holds, and as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return brief.repr(value)


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return typing.get_args(field.type) or (field.type,)


def _wanted(field: dataclasses.Field) -> str:
    """In words, what a key's value has to be."""
    rules = field.metadata
    if rules["choices"]:
        return " or ".join(c if isinstance(c, str) else _shown(c) for c in rules["choices"])
    if rules["pattern"]:
        return rules["pattern"].words
    bounds = [f"{BOUNDS[name][1]} {limit}" for name, limit in rules["bounds"].items()]
    special = [] if rules["special"] is None else [f"or {rules['special']}"]
    kind = KIND_WORDS.get(_kinds(field)[0], "keys and values")
    return " ".join([kind, " and ".join(bounds), *special]).strip()


def _number(value: Any, kind: type) -> int | float | None:
    """``value`` as an int or float, None if it is neither or not finite.

    Text such as 1e-4 counts: YAML 1.1 takes an exponent without a point for text.
    """
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,18}[eE][-+]?\d{1,3}", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return kind(value) if kind is float or value == int(value) else None


def _text(value: Any, pattern: Pattern | None) -> str | None:
    """``value`` as text, None if it is not one; integers count, and lists where there are numbers.

    Other things that YAML makes of unquoted text (dates, ``yes``, 1.10) have lost how they were
    written and are refused.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if pattern:
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
            return None
        value = ",".join(item if isinstance(item, str) else _shown(item) for item in items)
        value = value.replace(" ", "")
        return value if re.fullmatch(pattern.regex, value) else None
    if is_int and abs(value) < 2**63:
        return str(value)
    if not isinstance(value, str) or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        return None
    return value


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """A key's value in its own type; UserError names the key, what it wants and what it got."""
    rules, kinds = field.metadata, _kinds(field)
    if NoneType in kinds and (value is None or value == ""):
        return None
    wrong = UserError(key=field.name, expected=_wanted(field), got=_shown(value))
    if rules["choices"]:
        if any(type(value) is type(choice) and value == choice for choice in rules["choices"]):
            return value
        if len(rules["choices"]) == 1 and isinstance(value, bool):
            wrong = UserError(rules["text"].rstrip("."), key=field.name, got=_shown(value))
        raise wrong
    if kinds[0] in (int, float):
        number = _number(value, kinds[0])
        tests = [BOUNDS[name][0](number or 0, limit) for name, limit in rules["bounds"].items()]
        if number is None or not (all(tests) or number == rules["special"]):
            raise wrong
        return number
    if kinds[0] is str:
        text = _text(value, rules["pattern"])
        if text is None and not isinstance(value, str) and not rules["pattern"]:
            wrong = UserError("put text in quotes", key=field.name, got=_shown(value))
        if text is None or (not text and field.default is MISSING):
            raise wrong
        return text
    if not isinstance(value, kinds[0]):
        raise wrong
    return value


def _conflict(problem: str, *keys: str) -> UserError:
    """Keys that do not go together; ``keys`` are all named."""
    return UserError(problem, key=" and ".join(keys))


def _keys(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a configuration that are YAML keys."""
    return {field.name: field for field in dataclasses.fields(cls) if "text" in field.metadata}


def _numbers(text: str, kind: type) -> tuple:
    return tuple(kind(item) for item in text.split(",") if item)


# --------------------------------------------------------------------------------------------------
# The keys
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Conf:
    """What all configurations share: each key is brought to its type and checked."""

    def __post_init__(self) -> None:
        for field in _keys(type(self)).values():
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))


@dataclass(frozen=True, kw_only=True)
class JumpParams(_Conf):
    """``schedule_jump_params``: the walk through time, Section 4.2 of the RePaint paper."""

    t_T: int = key(
        250,
        "Step at which the walk starts; to go faster lower it TOGETHER with timestep_respacing.",
        low=1,
    )
    n_sample: int = key(
        1, "Times that each single step is sampled; 1 leaves resampling to the jumps.", low=1
    )
    jump_length: int = key(10, "Steps that a jump climbs back.", low=1)
    jump_n_sample: int = key(
        10,
        "Times that each stretch of jump_length steps is walked down; the time grows with it, and "
        "1 means no resampling, which is fastest and fits the hole least to its surroundings.",
        low=1,
    )
    jump2_length: int = key(1, "Steps that a jump of the second, finer level climbs back.", low=1)
    jump2_n_sample: int = key(1, "As jump_n_sample, for the second level; 1 is off.", low=1)
    jump3_length: int = key(1, "Steps that a jump of the third, finest level climbs back.", low=1)
    jump3_n_sample: int = key(1, "As jump_n_sample, for the third level; 1 is off.", low=1)
    start_resampling: int = key(
        100_000_000, "Resampling starts below this step; above it the walk only goes down.", low=0
    )


@dataclass(frozen=True, kw_only=True)
class OutputPaths(_Conf):
    """``data.eval.<set>.paths``: the folders that results are written to, one PNG an image."""

    srs: str = key("", "Folder of the inpainted pictures; empty: ./log/<name>/inpainted.")
    lrs: str = key(
        "", "Folder of the inputs with the hole blackened; empty: ./log/<name>/gt_masked."
    )
    gts: str = key(
        "",
        "Folder of the inputs as the network saw them; empty: ./log/<name>/gt if `paths` is empty "
        "altogether, else they are not written.",
    )
    gt_keep_masks: str = key("", "Folder of the masks; empty: ./log/<name>/gt_keep_mask.")

    def filled(self, name: str) -> "OutputPaths":
        """The same with the folders of run ``name`` where nothing is stated."""
        folders = {"srs": "inpainted", "lrs": "gt_masked", "gt_keep_masks": "gt_keep_mask"}
        if self == OutputPaths():
            folders["gts"] = "gt"
        empty = {k: f"./log/{name}/{v}" for k, v in folders.items() if not getattr(self, k)}
        return dataclasses.replace(self, **empty)


@dataclass(frozen=True, kw_only=True)
class DataConf(_Conf):
    """``data.eval.<set>``: the pictures and masks of one run; ``name`` is the set's own key."""

    name: str
    gt_path: str = key(
        text="Pictures: a folder, searched with its subfolders and sorted by path, or one file."
    )
    mask_path: str = key(
        text="Masks, white (255) = known and black (0) = to generate: a folder or file paired with "
        "the pictures in sorted order, or one of thin, thick, ev2li, nn2, ex64, genhalf to draw "
        "them."
    )
    image_size: int | None = key(None, "Must equal the network's image_size; absent: that.", low=1)
    batch_size: int = key(
        1,
        "Pictures that run through the network at once: more is faster on a GPU until its memory "
        "is full, and results do not depend on it if a seed is set.",
        low=1,
    )
    deterministic: bool = key(True, "Work in sorted order; false shuffles the order of work.")
    random_flip: bool = key(False, "Mirror picture and mask together with probability one half.")
    random_crop: bool = key(
        False,
        "Must be false: picture and mask would be cut at different places.",
        choices=(False,),
    )
    class_cond: bool = key(
        False,
        "Must be false: labels come from cond_y or are drawn, not from file names.",
        choices=(False,),
    )
    drop_last: bool = key(False, "Leave out the last batch if it is not full.")
    return_dict: bool = key(True, "Must be true: there is one form of batch only.", choices=(True,))
    return_dataloader: bool = key(True, "Must be true: data are always loaded.", choices=(True,))
    mask_loader: bool = key(True, "Must be true: every picture needs a mask.", choices=(True,))
    offset: int = key(0, "Pictures left out at the start of the sorted list.", low=0)
    max_len: int | None = key(None, "Pictures to work on at most; absent: all of them.", low=1)
    paths: OutputPaths = key(OutputPaths(), "Where results go; absent: ./log/<name>/.")


@dataclass(frozen=True, kw_only=True)
class ModelConf(_Conf):
    """The network and its diffusion chain: the keys that running and training share.

    All but those of the sampling itself have to be what the checkpoint was trained with.
    """

    image_size: int = key(
        256,
        "Side in pixels of the square that the network sees; pictures are scaled and cut to it.",
        low=1,
    )
    num_channels: int = key(256, "Width of the network's first level.", low=32, multiple_of=32)
    num_res_blocks: int = key(2, "Residual blocks a level.", low=1)
    channel_mult: str = key(
        "", "Width multiplier a level, such as '1,2,4'; empty: by image_size.", pattern=WIDTHS
    )
    attention_resolutions: str = key(
        "32,16,8", "Sides in pixels of the feature maps that attend.", pattern=SIDES
    )
    num_heads: int = key(4, "Attention heads; counts only if num_head_channels is -1.", low=1)
    num_head_channels: int = key(
        64, "Channels of one attention head; -1: num_heads decides.", low=1, special=-1
    )
    num_heads_upsample: int = key(
        -1, "Attention heads of the decoder; -1: as num_heads.", low=1, special=-1
    )
    use_scale_shift_norm: bool = key(True, "The time embedding scales and shifts the norms.")
    resblock_updown: bool = key(True, "Residual blocks do the resizing instead of convolutions.")
    use_new_attention_order: bool = key(False, "Split q, k and v before the heads, not after.")
    class_cond: bool = key(False, "The network takes a class label.")
    num_classes: int = key(1000, "Number of class labels.", low=1, high=1_000_000)
    learn_sigma: bool = key(True, "The network has 6 outputs: the noise and its variance.")
    use_fp16: bool = key(
        False, "Half-precision convolutions: about half the memory and faster on a GPU."
    )
    dropout: float = key(0.0, "Share of activations dropped in training.", low=0, below=1)
    use_checkpoint: bool = key(False, "Spend time to save memory in training.")
    diffusion_steps: int = key(1000, "Steps of the chain it was trained on.", low=1, high=1_000_000)
    noise_schedule: str = key("linear", "Noise schedule.", choices=("linear", "cosine"))
    timestep_respacing: str = key(
        "250",
        "Steps kept of the chain: '250', by section '20,30', or 'ddim50'; empty: all; to go faster "
        "lower it TOGETHER with schedule_jump_params.t_T, at the cost of quality.",
        pattern=STEPS,
    )
    predict_xstart: bool = key(False, "The network predicts the clean picture, not the noise.")
    clip_denoised: bool = key(True, "Clip the predicted picture to the range of pixels.")
    rescale_timesteps: bool = key(False, "Multiply the network's time by 1000/diffusion_steps.")
    use_kl: bool = key(False, "Train on the variational bound alone.")
    rescale_learned_sigmas: bool = key(
        False, "Train the variance with its term scaled by the length of the chain over 1000."
    )

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        if not self.timestep_respacing:
            object.__setattr__(self, "timestep_respacing", str(self.diffusion_steps))
        if self.noise_schedule == "linear" and 1 < self.diffusion_steps <= 20:
            raise _conflict(
                "20 steps or fewer make a linear schedule's noise exceed 1",
                *("diffusion_steps", "noise_schedule"),
            )
        if not self.channel_mult and self.image_size not in CHANNEL_MULT_BY_SIZE:
            sizes = ", ".join(str(size) for size in sorted(CHANNEL_MULT_BY_SIZE))
            raise _conflict(
                f"channel_mult is empty, which works for image_size {sizes} only, and image_size "
                f"is {self.image_size}: write channel_mult, such as '1,2,4'",
                *("image_size", "channel_mult"),
            )
        self._check_widths()

    def _check_widths(self) -> None:
        mult = self.channel_mult_list
        unit = 2 ** (len(mult) - 1)
        if self.image_size % unit:
            problem = f"{len(mult)} levels need a side divisible by {unit}, not {self.image_size}"
            raise _conflict(problem, "image_size", "channel_mult")
        widths = [int(m * self.num_channels) for m in mult]
        if any(width < 32 or width % 32 for width in widths):
            problem = f"every width has to be a multiple of 32; these make {widths}"
            raise _conflict(problem, "num_channels", "channel_mult")
        sides = [self.image_size >> level for level in range(len(mult))]
        attending = {w for w, s in zip(widths, sides, strict=True) if s in self.attention_sides}
        for width in sorted({*attending, widths[-1]}):
            if self.num_head_channels != -1:
                divisors = {"num_head_channels": self.num_head_channels}
            else:
                divisors = {"num_heads": self.num_heads}
                if self.num_heads_upsample != -1:
                    divisors["num_heads_upsample"] = self.num_heads_upsample
            for name, divisor in divisors.items():
                if width % divisor:
                    raise _conflict(
                        f"a level with attention is {width} wide, not divisible by {divisor}",
                        *(name, "num_channels"),
                    )

    @property
    def channel_mult_list(self) -> tuple[float, ...]:
        """Width multiplier of each level, from the full resolution down."""
        return _numbers(self.channel_mult, float) or CHANNEL_MULT_BY_SIZE[self.image_size]

    @property
    def attention_sides(self) -> tuple[int, ...]:
        """Sides in pixels of the feature maps with attention."""
        return _numbers(self.attention_resolutions, int)


@dataclass(frozen=True, kw_only=True)
class InpaintConf(ModelConf):
    """A run of ``test.py``."""

    name: str = key(text="Name of the run; results go to ./log/<name>/ unless `paths` says else.")
    model_path: str = key(text="Checkpoint of the network: a state_dict saved by torch.")
    cond_y: int | None = key(
        None, "Class label of all pictures; absent: drawn for each at random.", low=0
    )
    use_ddim: bool = key(False, "Deterministic DDIM steps instead of the paper's.")
    inpa_inj_sched_prev: bool = key(
        True, "Put the known pixels, noised, into every step; false inpaints nothing."
    )
    inpa_inj_sched_prev_cumnoise: bool = key(
        False, "Noise the known pixels along one trajectory instead of afresh in every step."
    )
    inpa_inj_time_shift: int = key(
        1, "Added to the step's index where a jump adds noise.", low=0, high=1_000_000
    )
    schedule_jump_params: JumpParams = key(JumpParams(), "The walk through time.")
    classifier_path: str | None = key(
        None, "Checkpoint of a noisy classifier that guides towards the label; absent: no guidance."
    )
    classifier_scale: float = key(
        4.0, "Strength of guidance; 0 is off, which saves about half of the time.", low=0
    )
    classifier_width: int = key(
        128, "Width of the classifier's first level.", low=32, multiple_of=32
    )
    classifier_depth: int = key(2, "Residual blocks a level of the classifier.", low=1)
    classifier_attention_resolutions: str = key(
        "32,16,8", "Sides of the classifier's feature maps that attend.", pattern=SIDES
    )
    classifier_use_scale_shift_norm: bool = key(True, "As use_scale_shift_norm, in the classifier.")
    classifier_resblock_updown: bool = key(True, "As resblock_updown, in the classifier.")
    classifier_pool: str = key(
        "attention",
        "How the classifier gathers its feature maps.",
        choices=("attention", "adaptive", "spatial", "spatial_v2"),
    )
    classifier_use_fp16: bool = key(False, "As use_fp16, in the classifier.")
    device: str | None = key(
        None, "cpu, cuda, cuda:1 and so on; absent: a GPU if there is one, else the CPU."
    )
    show_progress: bool = key(True, "Show a progress bar.")
    seed: int | None = key(
        None,
        "Makes results repeatable, whatever the batch size; absent: other noise in every run.",
        low=0,
        high=2**31 - 1,
    )
    samples_per_image: int = key(1, "Different results made of each picture.", low=1)
    precision: str | None = key(
        None,
        "Arithmetic: tf32, float16 and bfloat16 are faster on a GPU and less exact; absent: "
        "float32, or float16 with use_fp16.",
        choices=("float32", "tf32", "float16", "bfloat16"),
    )
    compile: bool | str = key(
        "auto",
        "Compile the network, which takes a minute at first and then saves time in every step; "
        "auto: where it pays.",
        choices=("auto", True, False),
    )
    paste_known: bool = key(False, "Paste the known pixels unchanged into the result.")
    invert_mask: bool = key(False, "The masks are the other way round: white is to be generated.")
    overview: bool = key(True, "Also write one sheet that shows inputs and results side by side.")
    save_process: int = key(0, "Pictures of the way from noise to result to keep; 0: none.", low=0)
    data: DataConf = key(text="`eval:`, below it the data set's name, below that its keys.")

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        if self.cond_y is not None and self.cond_y >= self.num_classes:
            raise _conflict(
                f"label {self.cond_y} of {self.num_classes} classes, counted from 0",
                *("cond_y", "num_classes"),
            )
        if self.inpa_inj_sched_prev_cumnoise and not self.inpa_inj_sched_prev:
            raise _conflict(
                "the first has no effect while the second is false",
                *("inpa_inj_sched_prev_cumnoise", "inpa_inj_sched_prev"),
            )
        if self.use_fp16 and self.precision not in (None, "float16"):
            raise _conflict(
                f"true and {self.precision} contradict each other", "use_fp16", "precision"
            )
        if self.guided:
            self._check_classifier()
        self._complete_data()

    def _check_classifier(self) -> None:
        if self.num_classes > CLASSIFIER_CLASSES:
            problem = f"the classifier knows {CLASSIFIER_CLASSES} classes, not {self.num_classes}"
            raise _conflict(problem, "num_classes", "classifier_path")
        if self.image_size not in CHANNEL_MULT_BY_SIZE:
            problem = f"there is no classifier for a side of {self.image_size}"
            raise _conflict(problem, "image_size", "classifier_path")
        mult = CHANNEL_MULT_BY_SIZE[self.image_size]
        for level, m in enumerate(mult):
            width, side = int(m * self.classifier_width), self.image_size >> level
            attends = side in self.classifier_attention_sides or level == len(mult) - 1
            unit = CLASSIFIER_HEAD_CHANNELS if attends else 32
            if width % unit:
                problem = f"a level of side {side} is {width} wide, which {unit} does not divide"
                names = ("classifier_width", "classifier_attention_resolutions")
                raise _conflict(problem, *names)

    def _complete_data(self) -> None:
        """Give the data set its size and folders, and see that no folder is used twice."""
        prefix = f"data.eval.{self.data.name}."
        if self.data.image_size not in (None, self.image_size):
            problem = f"{self.data.image_size} and {self.image_size} have to be equal"
            raise _conflict(problem, f"{prefix}image_size", "image_size")
        paths = self.data.paths.filled(self.name)
        data = dataclasses.replace(self.data, image_size=self.image_size, paths=paths)
        object.__setattr__(self, "data", data)
        used = {data.gt_path: "gt_path", data.mask_path: "mask_path"}
        used = {os.path.realpath(path): name for path, name in used.items()}
        for name, path in ((name, getattr(paths, name)) for name in _keys(OutputPaths)):
            other = used.setdefault(os.path.realpath(path), f"paths.{name}") if path else None
            if other not in (None, f"paths.{name}"):
                problem = f"files in {path} would overwrite one another"
                raise _conflict(problem, f"{prefix}{other}", f"{prefix}paths.{name}")

    @property
    def guided(self) -> bool:
        """Whether a classifier guides the sampling."""
        return self.classifier_path is not None and self.classifier_scale > 0

    @property
    def classifier_attention_sides(self) -> tuple[int, ...]:
        """Sides in pixels of the classifier's feature maps with attention."""
        return _numbers(self.classifier_attention_resolutions, int)


@dataclass(frozen=True, kw_only=True)
class TrainConf(ModelConf):
    """A run of ``train.py``."""

    name: str = key(text="Name of the run.")
    data_dir: str = key(
        text="Folder of pictures, searched with its subfolders; with class_cond each subfolder on "
        "the first level is a class."
    )
    out_dir: str = key("", "Folder of checkpoints and process pictures; empty: ./runs/<name>.")
    timestep_respacing: str = key("", "Steps of the chain to train; empty: all.", pattern=STEPS)
    rescale_learned_sigmas: bool = key(
        True, "Train the variance with its term scaled by the length of the chain over 1000."
    )
    batch_size: int = key(8, "Pictures a step, over all GPUs together.", low=1)
    microbatch: int = key(
        -1,
        "Pictures a GPU works on at once: lower it if memory runs out; -1: its whole share.",
        low=1,
        special=-1,
    )
    lr: float = key(1e-4, "Learning rate of AdamW.", above=0)
    lr_anneal_steps: int = key(
        0, "Steps over which the learning rate falls linearly to 0; 0: it stays.", low=0
    )
    warmup_steps: int = key(0, "Steps over which the learning rate rises from 0.", low=0)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", low=0)
    ema_rate: str = key(
        "0.9999",
        "Rates of the averaged copies of the weights, one checkpoint each; shorter trainings want "
        "lower ones, such as '0.999'.",
        pattern=RATES,
    )
    iterations: int = key(100_000, "Steps to train in all.", low=1)
    log_interval: int = key(100, "Steps between lines of the log.", low=1)
    save_interval: int = key(5_000, "Steps between checkpoints, from which a run resumes.", low=1)
    sample_interval: int = key(5_000, "Steps between process pictures; 0: none.", low=0)
    schedule_sampler: str = key(
        "uniform",
        "How the steps to train are drawn: evenly, or more often where the loss is large.",
        choices=("uniform", "loss-second-moment"),
    )
    grad_clip: float = key(0.0, "Largest norm of the gradient; 0: not limited.", low=0)
    random_flip: bool = key(True, "Mirror pictures with probability one half.")
    random_crop: bool = key(False, "Cut pictures at random instead of in the middle.")
    holdout: float = key(
        0.05, "Share of the pictures that are not trained on but tested with.", low=0, below=1
    )
    precision: str = key(
        "float32",
        "Arithmetic: bfloat16 is fastest on a GPU, tf32 in between.",
        choices=("float32", "tf32", "bfloat16"),
    )
    compile: bool | str = key(
        "auto", "Compile the network; auto: where it pays.", choices=("auto", True, False)
    )
    seed: int = key(0, "Makes a training repeatable.", low=0, high=2**31 - 1)
    device: str | None = key(
        None, "cpu, cuda, cuda:1 and so on; absent: a GPU if there is one, else the CPU."
    )
    sample_mask: str = key("thick", "Masks of the process pictures.", choices=MASK_FAMILIES)
    sample_count: int = key(8, "Process pictures made each time; 0: none.", low=0)
    sample_respacing: str = key(
        "50", "As timestep_respacing, for the process pictures: fewer are faster.", pattern=STEPS
    )
    init_from: str | None = key(None, "Checkpoint to start from; absent: random weights.")

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        if not self.out_dir:
            object.__setattr__(self, "out_dir", f"./runs/{self.name}")
        if not self.sample_respacing:
            object.__setattr__(self, "sample_respacing", str(self.diffusion_steps))
        if self.use_fp16:
            problem = "training in half precision is not stable: write precision: bfloat16"
            raise _conflict(problem, "use_fp16", "precision")

    @property
    def ema_rates(self) -> tuple[float, ...]:
        """Rates of the averaged copies, without repetition."""
        return tuple(dict.fromkeys(_numbers(self.ema_rate, float)))


AnyConf = TypeVar("AnyConf", bound=_Conf)


# --------------------------------------------------------------------------------------------------
# From a tree, and back
# --------------------------------------------------------------------------------------------------


def _moved(error: UserError, *, path: object = None, prefix: str = "") -> UserError:
    """The same error seen from further up: in a file, or with ``prefix`` before its keys."""
    moved = error.key and " and ".join(prefix + name for name in error.key.split(" and "))
    return UserError(error.problem, path=path, key=moved, expected=error.expected, got=error.got)


def _mapping(tree: Any, where: str) -> Mapping:
    if not isinstance(tree, Mapping):
        raise UserError(key=where or None, expected="keys and values", got=_shown(tree))
    return tree


def _unknown(name: Any, cls: type, prefix: str, root: type) -> UserError:
    """An unknown key, with the nearest that is known: here first, else anywhere."""
    name = str(name)[:100]

    def likeness(known: str) -> tuple[float, bool]:
        here = known in local
        last = known.rsplit(".", 1)[-1]
        return difflib.SequenceMatcher(None, name.lower(), last.lower()).ratio(), here

    local = [prefix + known for known in _keys(cls)]
    everywhere = [doc.key for doc in describe(root)]
    nearest = max([*local, *everywhere], key=likeness)
    return UserError(f"unknown key; the nearest known key is {nearest}", key=prefix + name)


def _build(cls: type[AnyConf], tree: Any, prefix: str, root: type, **extra: str) -> AnyConf:
    """Make ``cls`` from the part of a tree that lies at ``prefix``; ``extra`` are no YAML keys."""
    generic = re.sub(r"^data\.eval\..*\.$", "data.eval.<set>.", prefix)
    known, values = _keys(cls), dict(extra)
    for name, value in _mapping(tree, prefix.rstrip(".")).items():
        if name not in known and f"{generic}{name}" not in IGNORED_KEYS:
            raise _unknown(name, cls, prefix, root)
        if name not in known or value is None:
            continue  # an empty value is an absent one
        kind = known[name].type
        if kind is DataConf:
            values[name] = _build_data(value, root)
        elif dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, f"{prefix}{name}.", root)
        else:
            values[name] = value
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise UserError(f"missing; {field.metadata['text'].rstrip('.')}", key=prefix + name)
    try:
        return cls(**values)
    except UserError as error:
        raise _moved(error, prefix=prefix) from None


def _build_data(tree: Any, root: type) -> DataConf:
    """The one data set of ``data.eval``."""
    for name in _mapping(tree, "data"):
        if name != "eval":
            raise UserError("unknown key; the nearest known key is data.eval", key=f"data.{name}")
    sets = _mapping(tree.get("eval"), "data.eval")
    if len(sets) != 1:
        raise UserError(key="data.eval", expected="one data set", got=_shown(list(sets)))
    [(name, keys)] = sets.items()
    named = _text(name, None)
    if not named:
        raise UserError(key="data.eval", expected="the data set's name", got=_shown(name))
    return _build(DataConf, {} if keys is None else keys, f"data.eval.{named}.", root, name=named)


def conf_from_dict(
    tree: Mapping, cls: type[AnyConf] = InpaintConf, source: object = None
) -> AnyConf:
    """A checked configuration from a tree in the published YAML form.

    ``source`` says where the tree comes from in the UserError that anything wrong raises.
    """
    try:
        return _build(cls, tree, "", cls)
    except UserError as error:
        raise _moved(error, path=source) from None


def conf_to_dict(conf: _Conf) -> dict[str, Any]:
    """The tree in the published YAML form, all keys stated; loading it gives the same again."""
    tree = {}
    for name in _keys(type(conf)):
        value = getattr(conf, name)
        if isinstance(value, DataConf):
            tree[name] = {"eval": {value.name: conf_to_dict(value)}}
        elif isinstance(value, _Conf):
            tree[name] = conf_to_dict(value)
        elif value is not None:
            tree[name] = value
    return tree


# --------------------------------------------------------------------------------------------------
# From a file
# --------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: no key twice, no aliases that multiply, integers are decimal."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            problem = "an alias may stand for a single value only"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(name, yaml.ScalarNode) and name.value in seen:
                problem = f"the key {name.value} stands here a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
            seen.add(str(name.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            problem = f"this is not a {node.tag.rsplit(':')[-1]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def decimal(self, node: yaml.ScalarNode) -> int | str:
        """An integer; 012, 0x12 and 1:12 stay the text that they are."""
        text = self.construct_scalar(node)
        return int(text) if re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", text) else text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.decimal)


def _parse(text: str) -> Any:
    """What the YAML says; UserError tells line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        where = f"line {mark.line + 1}, column {mark.column + 1}"
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        where, problem = f"line {len(lines)}, column {len(lines[-1]) + 1}", error.reason
    except RecursionError:
        where, problem = "line 1", "nested too deeply"
    raise UserError(f"not readable as YAML: {where}: {problem}")


def _read(path: str | os.PathLike) -> Any:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "a binary file" if b"\0" in raw else f"byte {error.start} is not UTF-8"
        raise UserError(path=path, expected="YAML in UTF-8", got=what) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be read: {reason}", path=path) from None
    if len(raw) > MAX_YAML_BYTES:
        raise UserError(path=path, expected="YAML", got="a file of more than 1 MiB")
    try:
        return _parse(text)
    except UserError as error:
        raise _moved(error, path=path) from None


def _override(tree: dict, option: str, given: dict[str, str]) -> None:
    """Set what ``option``, KEY=VALUE, says in ``tree``; ``given`` notes which key came from it."""
    dotted, equals, text = option.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise UserError(expected="KEY=VALUE", got=_shown(option))
    data = tree.get("data")
    sets = data.get("eval") if isinstance(data, dict) else None
    if parts[0] == "data" and parts[1:2] not in ([], ["eval"]):
        if not isinstance(sets, dict) or len(sets) != 1:
            raise UserError("the YAML has to have a data set for this", expected="data.eval.<set>")
        parts[1:1] = ["eval", *sets]
    elif parts[:2] == ["data", "eval"] and isinstance(sets, dict):
        # A set's name may have dots of its own.
        rest = ".".join(parts[2:])
        named = [name for name in sets if rest.startswith(f"{name}.")]
        parts[2:] = [named[0], *rest[len(str(named[0])) + 1 :].split(".")] if named else parts[2:]
    branch = tree
    for part in parts[:-1]:
        if branch.get(part) is None:
            branch[part] = {}
        branch = branch[part]
        if not isinstance(branch, dict):
            raise UserError(f"{part} has no keys below it")
    branch[parts[-1]] = _parse(text)
    given[".".join(str(part) for part in parts)] = option


def load_conf(
    path: str | os.PathLike, cls: type[AnyConf] = InpaintConf, overrides: Sequence[str] = ()
) -> AnyConf:
    """Read and check a YAML file.

    ``overrides`` are texts KEY=VALUE with dotted keys and values in YAML, as ``--set`` takes them;
    data.gt_path is short for data.eval.<set>.gt_path. Raises UserError, in one line, for all that
    can be wrong with a file, a key or a value.
    """
    tree, given = _read(path), {}
    if not isinstance(tree, dict):
        found = "an empty file" if tree is None else _shown(tree)
        raise UserError(path=path, expected="keys and values", got=found)
    for option in overrides:
        try:
            _override(tree, option, given)
        except UserError as error:
            raise _moved(error, path=f"--set {option}") from None
    try:
        return conf_from_dict(tree, cls, path)
    except UserError as error:
        options = [given[name] for name in (error.key or "").split(" and ") if name in given]
        if not options:
            raise
        raise _moved(error, path=" ".join(f"--set {option}" for option in options)) from None


# --------------------------------------------------------------------------------------------------
# Documentation
# --------------------------------------------------------------------------------------------------


class KeyDoc(NamedTuple):
    """One YAML key for a reader: dotted name, what its value is, default, sentence."""

    key: str
    type: str
    default: str
    text: str


def describe(cls: type[_Conf], prefix: str = "") -> list[KeyDoc]:
    """All keys of a configuration in their order, nested ones with dotted names."""
    docs = []
    for name, field in _keys(cls).items():
        if dataclasses.is_dataclass(field.type):
            below = "data.eval.<set>." if field.type is DataConf else f"{prefix}{name}."
            docs += describe(field.type, below)
            continue
        default = {MISSING: "required", None: "absent", "": "empty"}.get(field.default)
        default = default or (_shown(field.default).strip("'"))
        docs.append(KeyDoc(prefix + name, _wanted(field), default, field.metadata["text"]))
    return docs


def markdown_table(cls: type[_Conf]) -> str:
    """The keys as a Markdown table."""
    rows = [("key", "value", "default", "meaning"), ("---",) * 4]
    rows += [(f"`{doc.key}`", doc.type, f"`{doc.default}`", doc.text) for doc in describe(cls)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def help_text(cls: type[_Conf], width: int = 100) -> str:
    """The keys for a terminal."""
    blocks = []
    for doc in describe(cls):
        text = textwrap.fill(doc.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        blocks.append(f"  {doc.key}  ({doc.type}; {doc.default})\n{text}\n")
    return "".join(blocks)


def _json_key(field: dataclasses.Field) -> dict[str, Any]:
    rules, kinds = field.metadata, _kinds(field)
    schema: dict[str, Any] = {"description": rules["text"]}
    if field.default is not MISSING and field.default is not None:
        schema["default"] = field.default
    absent = [] if field.default is MISSING else [None]  # an empty value is an absent one
    if rules["choices"]:
        return {**schema, "enum": [*rules["choices"], *absent]}
    types = [JSON_TYPES[kinds[0]], *("null" for _ in absent)]
    if kinds[0] is str:
        types += ["integer"]
    if rules["pattern"]:
        types += ["number", "array"]
        schema["pattern"] = f"^{rules['pattern'].regex}$"
    bounds = {BOUNDS[name][2]: limit for name, limit in rules["bounds"].items()}
    if rules["special"] is not None:
        return {**schema, "anyOf": [{"type": types, **bounds}, {"const": rules["special"]}]}
    return {**schema, "type": types, **bounds}


def json_schema(cls: type[_Conf]) -> dict[str, Any]:
    """JSON Schema of a configuration's YAML, for editors that complete and check as one types."""
    properties: dict[str, Any] = {}
    for name, field in _keys(cls).items():
        if field.type is DataConf:
            one = {"type": "object", "minProperties": 1, "maxProperties": 1}
            below: dict[str, Any] = {**one, "additionalProperties": json_schema(DataConf)}
            shape = {"type": "object", "properties": {"eval": below}, "required": ["eval"]}
            properties[name] = {**shape, "additionalProperties": False}
        elif dataclasses.is_dataclass(field.type):
            properties[name] = json_schema(field.type)
        else:
            properties[name] = _json_key(field)
    places = {InpaintConf: "", DataConf: "data.eval.<set>."}
    for ignored, why in IGNORED_KEYS.items():
        place, _, name = ignored.rpartition(".")
        if cls in places and places[cls] == (f"{place}." if place else ""):
            properties[name] = {"description": f"Without effect: {why}."}
    required = [name for name, field in _keys(cls).items() if field.default is MISSING]
    return {
        "type": "object",
        "description": (cls.__doc__ or "").split("\n")[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def main() -> None:
    """Write the JSON Schemas that the YAML files in ``confs/`` name in their first lines."""
    folder = Path(__file__).resolve().parent.parent / "confs"
    for name, cls in {"schema.json": InpaintConf, "train.schema.json": TrainConf}.items():
        text = json.dumps(json_schema(cls), indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    from guided_diffusion import command_line

    command_line(main)
