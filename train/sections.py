"""The sections of a training run's configuration: network, diffusion, data, training. The names are the paper's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from cdiff.runtime.data.case import ARRAY, MASKS_BY
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.host import MOST_THREADS
from cdiff.runtime.manifest import LONGEST_SIDE, MOST_LEVELS, TARGETS, VARIANCES
from cdiff.runtime.sampling.framing import FramingMode
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.variants import IMPLICIT_ENSEMBLE, variant_called
from cdiff.train.ranges import PUBLISHED, Ranges

WIDEST = 8192
"""Most channels of a feature map. The published networks have at most 512: far more are a slip, and would run out of memory."""
MOST_BLOCKS = 1000
"""Most blocks in a row: making more would take endlessly long."""
MOST_DECAY, MOST_DICE = 1e4, 1e6
"""Largest weight_decay and dice_weight: far larger ones would exceed float32."""


@dataclass(frozen=True)
class NetworkConfig:
    """eps_theta = D(E(F(x_t) + G(I), z), z), z = z_t + z_c from look-up tables (Amit et al. 2023, section 3).

    The U-Net's depth i has channel_mult[i] * base_channels channels at 1/2^i of the image size. `rrdbs` is the number of
    residual-in-residual dense blocks in G; 0 makes G one convolution. `attention_depths` are the depths whose residual
    blocks are each followed by self-attention; the bottleneck always has it. `levels` is C, the number of annotators, `T` the
    number of timesteps. `variant` is what the network learns to draw (`runtime.variants`), and so what z_c tells it.

    Further options of the published code, which an imported checkpoint may need: `heads_up`, the number of heads on the way up (0:
    `heads`); `head_channels`, channels per head, which then decides their number (0: `heads` does); embedding "scale-shift"
    multiplies and shifts the normalised features by z instead of adding it to them (Nichol & Dhariwal 2021, appendix A);
    resample "block" halves and doubles the size inside a residual block instead of by a convolution (Dhariwal & Nichol 2021);
    `outside`, the value of x0 outside a mask: -1, or 0 as in the implicit ensemble's code. Inside it is 1.
    """

    image_size: int = 256
    image_channels: int = 1
    variant: str = "consensus"
    levels: int = 4
    T: int = 100
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 1, 2, 2, 4, 4)
    residual_blocks: int = 3
    attention_depths: tuple[int, ...] = (4, 5)
    heads: int = 4
    heads_up: int = 0
    head_channels: int = 0
    groups: int = 32
    rrdbs: int = 8
    rrdb_channels: int = 64
    rrdb_growth: int = 32
    dropout: float = 0.0
    embedding: str = "add"
    resample: str = "convolution"
    target: str = "eps"
    variance: str = "fixed"
    outside: int = -1

    def __post_init__(self) -> None:
        _one_of(self, target=TARGETS, variance=VARIANCES)
        _one_of(self, embedding=("add", "scale-shift"), resample=("convolution", "block"))
        if self.outside not in (-1, 0):
            raise CdiffError(f"outside={self.outside} must be -1 or 0, what x0 is where a mask is not")
        if variant_called(self.variant) == IMPLICIT_ENSEMBLE and self.rrdbs:
            raise CdiffError(
                f"variant={self.variant} concatenates the image and x_t, which is G as one convolution; set rrdbs=0, not {self.rrdbs}"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise CdiffError(f"channel_mult={list(self.channel_mult)} must be one number of at least 1 a depth")
        if self.stride > LONGEST_SIDE:
            raise CdiffError(
                f"channel_mult has {len(self.channel_mult)} depths, each half as long as the one before, and an image_size of at most "
                f"{LONGEST_SIDE}; take some out"
            )
        check_size(self.image_size, self, "image_size")
        _at_least(self, 1, "image_channels", "levels", "T", "base_channels", "residual_blocks", "heads", "groups")
        _at_least(self, 1, "rrdb_channels", "rrdb_growth")
        _at_least(self, 0, "rrdbs", "heads_up", "head_channels")
        _at_most(self, levels=MOST_LEVELS, residual_blocks=MOST_BLOCKS, rrdbs=MOST_BLOCKS)
        _at_most(self, image_channels=WIDEST, rrdb_channels=WIDEST, rrdb_growth=WIDEST)
        if (widest := self.base_channels * max(self.channel_mult)) > WIDEST:
            raise CdiffError(f"base_channels * channel_mult = {widest} must be at most {WIDEST}")
        if not 0 <= self.dropout < 1:
            raise CdiffError(f"dropout={self.dropout} must lie in [0, 1)")
        bottleneck = len(self.channel_mult) - 1
        for depth, mult in enumerate(self.channel_mult):
            used = ["groups"]
            if depth in self.attention_depths or depth == bottleneck:
                used.append("head_channels" if self.head_channels else "heads")
            if depth in self.attention_depths and not self.head_channels:
                used.append("heads_up")
            for name in used:
                divisor = getattr(self, name)
                if divisor and (self.base_channels * mult) % divisor:
                    raise CdiffError(
                        f"{name}={divisor} must divide base_channels * channel_mult = {self.base_channels * mult}"
                    )
        if any(not 0 <= depth < len(self.channel_mult) for depth in self.attention_depths):
            raise CdiffError(
                f"attention_depths={list(self.attention_depths)} must lie in 0..{len(self.channel_mult) - 1}"
            )

    @property
    def conditions(self) -> int:
        """K, the number of maps per image: one for each level or annotator, or a single one."""
        return variant_called(self.variant).conditions(self.levels)

    @property
    def stride(self) -> int:
        """What the image's sides must be divisible by."""
        return int(2 ** (len(self.channel_mult) - 1))


def _one_of(section: Any, **choices: tuple[str, ...]) -> None:
    """Raise CdiffError unless each of these settings of a section is one of its words."""
    for name, words in choices.items():
        if getattr(section, name) not in words:
            raise CdiffError(
                f"{name}={getattr(section, name)!r} is not known; use {', '.join(words[:-1])} or {words[-1]}"
            )


def _at_least(section: Any, low: int, *names: str) -> None:
    """Raise CdiffError unless each of these settings of a section is `low` or more."""
    for name in names:
        if not getattr(section, name) >= low:  # NaN is not
            raise CdiffError(f"{name}={getattr(section, name)} must {'be at least 1' if low else 'not be negative'}")


def _at_most(section: Any, **limits: float) -> None:
    """Raise CdiffError where one of these settings of a section is above its limit."""
    for name, high in limits.items():
        if getattr(section, name) > high:
            raise CdiffError(f"{name}={getattr(section, name)} must be at most {high:g}")


def check_size(size: int, network: NetworkConfig, name: str) -> None:
    """Raise CdiffError unless `size` pixels can be halved as often as the U-Net does, and are at most what a bundle may state."""
    if size < network.stride or size % network.stride:
        raise CdiffError(
            f"{name}={size} must be a multiple of {network.stride} (the U-Net has {len(network.channel_mult)} depths)"
        )
    if size > LONGEST_SIDE:
        raise CdiffError(f"{name}={size} must be at most {LONGEST_SIDE}; larger slices can be cut (framing=tile)")


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, "linear" or "cosine", and the linear one's ends; see NoiseSchedule for `scaled`.

    The cosine schedule has no ends and no scale: other values than the defaults with it are an error.
    """

    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    scaled: bool = True

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if self.schedule == "cosine" and part.name != "schedule" and value != part.default:
                raise CdiffError(f"{part.name}={value} is the linear schedule's; set schedule=linear, or leave it out")


@dataclass(frozen=True)
class DataConfig:
    """How scans become training slices.

    layout, task, labels, masks_by: how the data is read, which structure, which values of a mask are inside, and whether masks are
    laid on their image voxel by voxel ("array") or by their headers ("header"); see `find_cases`.
    framing: "resize" brings every slice to image_size; "tile" keeps the pixel grid and cuts windows; "centre" looks only at
    the central image_size pixels of a slice, for crops that someone centred on the structure. `crop` is the side of
    the training window under "tile" (0: image_size); small windows make early steps cheap, and the last `late` share of training
    uses windows of image_size. A window smaller than its slice is placed at random within `jitter` pixels of the structure's centre.
    intensity_...: how raw intensities become the network's input; see `runtime.scans.intensity.Intensity`.
    missing_raters: what happens to a case with fewer masks than C: "skip" it, take its masks "as-is" (levels above its
    number of masks are then empty; the other variants learn from the masks there are, and `annotator` cannot), or "error".
    empty_slices: keep slices that no annotator marked. val_fraction: the share of the cases held out where the data has no
    validation split of its own.
    """

    task: str = ""
    layout: str = "auto"
    labels: tuple[int, ...] = ()
    masks_by: str = ARRAY
    slice_axis: int = 2
    framing: str = "resize"
    crop: int = 0
    jitter: int = 12
    late: float = 0.25
    intensity_scope: str = "slice"
    intensity_lower: float = 0.5
    intensity_upper: float = 99.5
    intensity_method: str = "percentile"
    intensity_mean: tuple[float, ...] = ()
    intensity_std: tuple[float, ...] = ()
    missing_raters: str = "skip"
    empty_slices: bool = True
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        _one_of(self, framing=get_args(FramingMode), missing_raters=("skip", "as-is", "error"), masks_by=MASKS_BY)
        if any(label < 1 for label in self.labels):
            raise CdiffError(f"labels={list(self.labels)} must be whole numbers from 1 on; 0 is outside")
        if self.slice_axis not in (0, 1, 2):
            raise CdiffError(f"slice_axis={self.slice_axis} must be 0, 1 or 2")
        _at_least(self, 0, "crop", "jitter")
        if not 0 <= self.late <= 1:
            raise CdiffError(f"late={self.late} must lie in 0..1, a share of the run")
        if not 0 < self.val_fraction < 1:
            raise CdiffError(f"val_fraction={self.val_fraction} must lie between 0 and 1, a share of the cases")
        _ = self.intensity  # an impossible one is an error before any data is read

    @property
    def intensity(self) -> Intensity:
        return Intensity(
            self.intensity_scope,
            self.intensity_lower,
            self.intensity_upper,
            self.intensity_method,
            self.intensity_mean,
            self.intensity_std,
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The optimiser, and how training is run.

    steps: optimiser steps in all. batch: images per step, over all processes; late_batch: the same in the late phase, when windows
    have grown from `crop` to image_size (0: `batch`). rows_per_image: (t, c, noise) draws per image, which share its encoding. seed:
    of everything random.

    augment: random affine maps and flips. rotation (degrees), zoom and shift (shares) are their ranges, as published; contrast,
    brightness and pixel_noise, which change the intensities, are off unless given. See `train.ranges.Ranges`.

    lr, weight_decay: AdamW's. lr warms up linearly over `warmup` steps and then, with decay="cosine", falls to zero at `steps`; "none"
    keeps it. minutes > 0 ends the run after that many minutes of training, the decay following the clock (such a run is not
    reproducible step for step). clock: which time counts for `minutes`, "wall", or "cpu" for the processor time that this process (the
    first of several) used: fair where other programs run on the machine. clip: the norm above which gradients are scaled down to it.
    ema: the largest share of the averaged weights that a step keeps (less in the first steps).

    dice_weight: the weight of 1 - soft Dice of the predicted x0, added to the squared error, which alone is mostly the background's
    where structures are small. t_power p draws t with a density that grows as t^(p - 1): 1 is the papers' uniform draw; 2 favours the
    noisy end, where a chain of few steps settles the shape.

    val_every: steps between validations; val_slices, val_steps, val_runs: their slices, DDIM steps, and runs per slice. save_every_s:
    seconds between checkpoints, besides those at validations. log_every: steps between rows of the log.

    amp: "auto" is bf16 on a GPU that has it, float32 elsewhere; "bf16" and "fp16" (with loss scaling) compute in mixed precision on
    any device, "off" in float32.
    accumulate: parts in which a process works through its share of a step one after another, to need less memory. Neither it nor the
    number of processes changes what a step learns from: learning rate, warm-up and EMA count optimiser steps.
    checkpointing: compute activations again for the gradient instead of keeping them. compile: torch.compile. deterministic: only
    algorithms that give the same result each time, or an error. prefetch: steps prepared ahead in threads; -1: 2 for a GPU, 0 for a CPU.
    threads: how many PyTorch uses on a CPU; 0: its own choice, within a container's quota. peak_tflops: the device's peak TFLOP/s, for
    the MFU in the log; 0: from a table of GPUs (train/mfu.py).
    """

    steps: int = 60_000
    batch: int = 4
    late_batch: int = 0
    rows_per_image: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 500
    decay: str = "none"
    ema: float = 0.9999
    clip: float = 1.0
    dice_weight: float = 0.0
    t_power: float = 1.0
    amp: str = "auto"
    seed: int = 0
    augment: bool = True
    rotation: float = PUBLISHED.rotation
    zoom: float = PUBLISHED.zoom
    shift: float = PUBLISHED.shift
    contrast: float = PUBLISHED.contrast
    brightness: float = PUBLISHED.brightness
    pixel_noise: float = PUBLISHED.pixel_noise
    threads: int = 0
    minutes: float = 0.0
    clock: str = "wall"
    val_every: int = 1000
    val_slices: int = 64
    val_steps: int = 10
    val_runs: int = 4
    save_every_s: float = 120.0
    log_every: int = 50
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    prefetch: int = -1
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch", "rows_per_image", "accumulate", "log_every")
        _at_least(self, 1, "val_every", "val_slices", "val_steps", "val_runs")
        _at_least(self, 0, "late_batch", "weight_decay", "warmup", "minutes", "dice_weight")
        _at_least(self, 0, "seed", "threads", "save_every_s", "peak_tflops")
        # A step of AdamW moves each weight by about lr: an lr above 1 is a slip, and weights would exceed float32 in the end.
        _at_most(self, lr=1, weight_decay=MOST_DECAY, dice_weight=MOST_DICE, threads=MOST_THREADS)
        if self.seed >= 2**32:  # a step's seed is the seed times about a million, plus its number, in PyTorch's 64 bits
            raise CdiffError(f"seed={self.seed} must be below 2^32")
        for name in ("lr", "clip", "t_power"):
            if not getattr(self, name) > 0:
                raise CdiffError(f"{name}={getattr(self, name)} must be positive")
        _one_of(self, decay=("none", "cosine"), clock=("wall", "cpu"), amp=("auto", "off", "bf16", "fp16"))
        if not -1 <= self.prefetch <= 64:
            raise CdiffError(f"prefetch={self.prefetch} must lie in 0..64, or be -1 for the device's own")
        if not 0 <= self.ema < 1:
            raise CdiffError(f"ema={self.ema} must lie in [0, 1)")
        _ = self.ranges  # impossible ones are an error before any data is read

    @property
    def ranges(self) -> Ranges | None:
        """How far training windows are changed; None without augmentation."""
        given = Ranges(**{part.name: getattr(self, part.name) for part in dataclasses.fields(Ranges)})
        if not self.augment and given != PUBLISHED:
            raise CdiffError(
                "augment=false leaves every window as it is; leave out its ranges (rotation, zoom, ...), or set augment=true"
            )
        return given if self.augment else None
