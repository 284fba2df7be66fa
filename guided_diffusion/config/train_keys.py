"""The YAML keys of train.py alone."""

from dataclasses import dataclass

from guided_diffusion.config.network_keys import ModelConf, check_name
from guided_diffusion.config.schema import RATES, STEPS, key, numbers, require
from guided_diffusion.masks import FAMILIES, MIN_SIZE


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
    all_frames: bool = key(False, "Take every frame of GIF, APNG, WebP and TIFF files; false: the "
                           "first.")
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
    init_from: str | None = key(None, "Checkpoint in guided-diffusion's layout to start from; "
                                "absent: random weights.",
                                path=True)
    # fmt: on

    def __post_init__(self) -> None:
        """Check the keys one by one, then those that have to fit each other."""
        super().__post_init__()
        check_name(self.name, "./runs/")
        self._set("out_dir", self.out_dir or f"./runs/{self.name}")
        self._set("sample_respacing", self.sample_respacing or str(self.diffusion_steps))
        problem = "training in half precision is not stable; write precision: bfloat16 instead"
        require(not self.use_fp16, "use_fp16 and precision", problem)
        limit = f"masks for process pictures have {MIN_SIZE} pixels at least"
        problem = f"{limit}; write sample_interval: 0 to go without"
        fits = self.image_size >= MIN_SIZE or not (self.sample_interval and self.sample_count)
        require(fits, "image_size and sample_interval", problem)

    @property
    def ema_rates(self) -> tuple[float, ...]:
        """Rates of the averaged copies of the weights, without repetitions."""
        return tuple(dict.fromkeys(numbers(self.ema_rate, float)))
