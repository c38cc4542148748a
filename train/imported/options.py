"""The published codes' options, from their args.json or command line, and our configuration that is equivalent to them.

Two codes are known: "consensus" (tomeramit/Annotator-Consensus-Prediction, Amit et al. 2023) and "implicit-ensemble"
(JuliaWolleb/Diffusion-based-Segmentation, Wolleb et al. 2022). What is said of them here was read from their scripts.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import MOST_LEVELS
from cdiff.runtime.scans.intensity import Intensity
from cdiff.train.config import Config
from cdiff.train.imported.values import typed, whole_numbers
from cdiff.train.sections import DataConfig, DiffusionConfig, NetworkConfig, TrainingConfig

CONSENSUS, IMPLICIT = "consensus", "implicit-ensemble"
REPOSITORIES = {
    CONSENSUS: "tomeramit/Annotator-Consensus-Prediction",
    IMPLICIT: "JuliaWolleb/Diffusion-based-Segmentation",
}

_BOTH: dict[str, Any] = {
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "learn_sigma": True,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "use_scale_shift_norm": False,
    "class_cond": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "lr": 1e-4,
    "batch_size": 1,
    "weight_decay": 0.0,
    "ema_rate": "0.9999",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    # args.json holds every one of these; the defaults, which are the scripts', are for files of older versions.
    CONSENSUS: _BOTH
    | {
        "image_size": 64,
        "diffusion_steps": 100,
        "learn_sigma": False,
        "sigma_small": False,
        "deeper_net": False,
        "rrdb_blocks": 10,
        "number_of_annotators": 0,
        "condition_input_channel": 1,
        "clip_denoised": True,
        "consensus_training": False,
        "soft_label_training": False,
        "no_annotator_training": False,
        "lr": 2e-5,
    },
    # No args.json is written; these are the flags that its README trains and samples with.
    IMPLICIT: _BOTH
    | {
        "num_heads": 1,
        "num_head_channels": -1,
        "attention_resolutions": "16",
        "channel_mult": "",
        "resblock_updown": False,
        "use_new_attention_order": False,
        "batch_size": 10,
    },
}
"""The options of each code that change the network, its schedule or its training, with their defaults; 0 annotators stand for none."""

_NOT_READ_BY_BOTH = {
    *("data_dir", "schedule_sampler", "lr_anneal_steps", "microbatch", "log_interval", "save_interval"),
    *("resume_checkpoint", "use_fp16", "fp16_scale_growth", "use_checkpoint", "use_kl", "rescale_learned_sigmas"),
}
NOT_READ = {
    CONSENSUS: {
        *_NOT_READ_BY_BOTH,
        *("class_name", "expansion", "seed", "run_without_test", "start_print_iter", "n_gen"),
        *("erosion", "annotators_training"),
    },
    IMPLICIT: _NOT_READ_BY_BOTH,
}
"""The other options of each code's training script. They change nothing of what is imported, so any value is taken."""

CHANNEL_MULT: dict[str, dict[int, tuple[int, ...]]] = {
    CONSENSUS: {
        **dict.fromkeys((480, 320), (1, 1, 2, 2, 3, 3)),
        **dict.fromkeys((256, 224, 128), (1, 1, 2, 2, 4, 4)),
        64: (1, 2, 3, 4),
        32: (1, 2, 2, 2),
    },
    IMPLICIT: {**dict.fromkeys((512, 256), (1, 1, 2, 2, 4, 4)), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)},
}
DEEPER_256 = (1, 1, 1, 2, 2, 4, 4)
TABLE = "label_emb.weight"
"""The tensor with a row for each level or annotator."""
GROUPS, RRDB_CHANNELS, RRDB_GROWTH = 32, 64, 32
"""Fixed in both codes, and in the consensus code's RRDB."""
BRATS_CROP = 224
"""The implicit-ensemble code's loader cuts BraTS's 240 pixels to the central 224, whatever image_size says. That is taken to have happened
with an image_size of 256, as in its README, of 224, or one that the U-Net cannot halve often enough, such as BraTS's 240; with any other a
changed loader is as likely."""
LARGEST_BETA = 0.8
"""Where the consensus code caps its linear schedule, which the factor 1000/T would take beyond 1 for fewer than 20 steps."""
MOST = {
    **{"image_size": 4096, "num_channels": 4096, "num_res_blocks": 64, "rrdb_blocks": 256, "diffusion_steps": 100_000},
    **{"number_of_annotators": MOST_LEVELS, "batch_size": 1_000_000},
}
"""A larger value is a slip: its network would fill the memory before a tensor is compared, or no run could state it."""
UNSEEN = (
    *("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "predict_xstart"),
    *("noise_schedule", "diffusion_steps", "rescale_timesteps"),
)
"""Options that no tensor's shape shows."""
LONGEST = 300_000
"""The iterations at which the consensus code's training ends."""


@dataclass(frozen=True)
class Options:
    """What a checkpoint was trained with: `source` is one of REPOSITORIES, `values` has every key of DEFAULTS[source].

    level_table: whether the checkpoint has rows for levels or annotators; read only for variants that may have either.
    """

    source: str
    values: dict[str, Any]
    level_table: bool = True

    @classmethod
    def read(cls, source: str, args: dict[str, Any], settings: list[str]) -> Options:
        """The defaults, overridden by `args` (an args.json), overridden by `settings` ("name=value" each).

        Keys of `args` and settings that change nothing here are left out. Raises CdiffError for a setting that does not exist, a value of the
        wrong type, options that the published code itself could not have trained with, and those that have no counterpart here.
        """
        values = dict(DEFAULTS[source])
        values |= {key: typed(key, args[key], values[key]) for key in values if args.get(key) is not None}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise CdiffError(f"--option {setting}: write it as name=value")
            if key in NOT_READ[source]:
                continue
            if key not in values:
                raise CdiffError(
                    f"--option {setting}: the {source} code's options here are {', '.join(sorted(values))}"
                )
            values[key] = typed(key, text, values[key])
        options = cls(source, values)
        options._check()
        return options

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def _check(self) -> None:
        sizes = ("image_size", "num_channels", "condition_input_channel")
        for name in (*sizes, "num_res_blocks", "num_heads", "batch_size"):
            if self.values.get(name, 1) < 1:
                raise CdiffError(f"the published option {name}={self[name]} must be at least 1")
        if self.values.get("number_of_annotators", 0) < 0:
            raise CdiffError(
                f"the published option number_of_annotators={self['number_of_annotators']} must not be negative"
            )
        for name in ("num_heads_upsample", "num_head_channels"):
            if self.values.get(name, -1) < 1 and self.values.get(name, -1) != -1:
                raise CdiffError(
                    f"the published option {name}={self[name]} must be -1, which stands for none, or at least 1"
                )
        if self["diffusion_steps"] < 2:  # it looks up the second timestep's variance
            raise CdiffError(f"the published option diffusion_steps={self['diffusion_steps']} must be at least 2")
        for name, most in MOST.items():
            if self.values.get(name, 0) > most:
                raise CdiffError(f"the published option {name}={self[name]} must be at most {most}")
        if self["num_channels"] % GROUPS:
            raise CdiffError(f"the published option num_channels={self['num_channels']} must be a multiple of {GROUPS}")
        if self["noise_schedule"] not in ("linear", "cosine"):
            raise CdiffError(f"the published option noise_schedule={self['noise_schedule']!r} must be linear or cosine")
        if self.source == CONSENSUS and self["rrdb_blocks"] < 1:
            raise CdiffError("rrdb_blocks=0 cannot be imported: an encoder without RRDBs has no counterpart here")
        if self.source == CONSENSUS and not self.all_timesteps:
            raise CdiffError(
                f"timestep_respacing={self['timestep_respacing']} cannot be imported: the training saw those timesteps alone, and here all "
                f"{self['diffusion_steps']} are drawn; --option timestep_respacing= imports it all the same"
            )
        last = 1000 / self["diffusion_steps"] * DiffusionConfig().beta_end
        if self.source == IMPLICIT and self["noise_schedule"] == "linear" and last >= 1:
            raise CdiffError(
                f"diffusion_steps={self['diffusion_steps']} cannot be imported with noise_schedule=linear: the last beta would be {last:.3g}, "
                "and must be below 1; the published scripts train and sample with 1000 steps"
            )
        if self.source == IMPLICIT and self["class_cond"]:
            raise CdiffError("class_cond=True cannot be imported: the published segmentation scripts give no class")
        if self.source == IMPLICIT and not self["learn_sigma"]:
            raise CdiffError(
                "learn_sigma=False cannot be imported: the published network always has two output channels"
            )
        if self.source == IMPLICIT and (first := self.channel_mult[0]) != 1:
            raise CdiffError(
                f"channel_mult={self['channel_mult']} cannot be imported: with a first width of {first} the published network does not run, "
                "since its last convolution takes num_channels channels"
            )
        self._check_heads()
        if not 0 <= self.ema_rate < 1:
            raise CdiffError(f"the published option ema_rate={self['ema_rate']} must lie in [0, 1)")

    def _check_heads(self) -> None:
        """Raise CdiffError where the channels of an attention cannot be divided among its heads."""
        widths = [self["num_channels"] * self.channel_mult[depth] for depth in (*self.attention_depths, -1)]
        alone = self.values.get("num_head_channels", -1) > 0  # the published code then reads no number of heads
        for name in ("num_head_channels",) if alone else ("num_heads", "num_heads_upsample"):
            among = widths[:-1] if name == "num_heads_upsample" else widths
            if odd := [width for width in among if self[name] > 0 and width % self[name]]:
                raise CdiffError(
                    f"the published option {name}={self[name]} must divide {odd[0]}, the channels that attend"
                )

    @property
    def all_timesteps(self) -> bool:
        """Whether timestep_respacing keeps every timestep: it is empty, or their number, alone or after `ddim`, or lists for each of the code's
        equal sections the number of timesteps that it has."""
        T, kept = self["diffusion_steps"], self["timestep_respacing"].replace(" ", "")
        sections = kept.count(",") + 1
        whole, more = divmod(T, sections)
        return kept in ("", f"ddim{T}", ",".join(str(whole + (place < more)) for place in range(sections)))

    @property
    def variant(self) -> str:
        """Which of the papers' networks it is: consensus, annotator, no-annotator, soft-label or implicit-ensemble."""
        if self.source == IMPLICIT:
            return IMPLICIT
        for variant in ("soft-label", "no-annotator", "consensus"):
            if self[f"{variant.replace('-', '_')}_training"]:
                return variant
        return "annotator"

    @property
    def annotators(self) -> int:
        """Rows of the checkpoint's label_emb; 0 when it has none."""
        if self.source == IMPLICIT or self["no_annotator_training"] or not self.level_table:
            return 0
        return int(self["number_of_annotators"])

    def fitted(self, tensors: Container[str]) -> Options:
        """The same options for a checkpoint with tensors of these names: a soft-label training may make no table of levels, whatever C is."""
        bare = self.variant == "soft-label" and TABLE not in tensors
        return replace(self, level_table=False) if bare else self

    @property
    def levels(self) -> int:
        """C, the number of annotators; 1 for the implicit ensemble, and where the options leave it out."""
        return 1 if self.source == IMPLICIT else int(self["number_of_annotators"]) or 1

    @property
    def channel_mult(self) -> tuple[int, ...]:
        """The U-Net's widths, which the published code chooses by image_size."""
        if text := self.values.get("channel_mult"):
            return whole_numbers("channel_mult", text)
        size, known = self["image_size"], CHANNEL_MULT[self.source]
        if size not in known:
            raise CdiffError(f"the {self.source} code has no network for image_size={size}; it has {sorted(known)}")
        return DEEPER_256 if self.values.get("deeper_net") and size == 256 else known[size]

    @property
    def attention_depths(self) -> tuple[int, ...]:
        """The depths with attention: those where image_size // resolution is the factor 2^depth. So with image_size 224 and resolutions
        16 and 8 (factors 14 and 28) there is none but in the bottleneck."""
        factors = {
            self["image_size"] // n for n in whole_numbers("attention_resolutions", self["attention_resolutions"])
        }
        return tuple(depth for depth in range(len(self.channel_mult)) if 2**depth in factors)

    @property
    def ema_rate(self) -> float:
        """The first of the comma-separated rates at which the code averages its weights."""
        return float(typed("ema_rate", self["ema_rate"].partition(",")[0], 0.0))

    @property
    def unseen(self) -> list[str]:
        """The options that no tensor shows but that change the maps."""
        fixed = () if self["learn_sigma"] else ("sigma_small",)
        # The widths show the size where the code chooses them by size and no other size has the same ones.
        alike = [size for size, widths in CHANNEL_MULT[self.source].items() if widths == self.channel_mult]
        size = ("image_size",) if self.source == IMPLICIT or len(alike) > 1 else ()
        return [name for name in (*size, *UNSEEN, *fixed) if name in self.values]

    @property
    def fixed_large(self) -> bool:
        """Whether the variance is beta_t itself, neither learned nor beta tilde."""
        return not self["learn_sigma"] and not self.values.get("sigma_small", False)

    @property
    def crops_brats(self) -> bool:
        odd = self["image_size"] % 2 ** (len(self.channel_mult) - 1)
        return self.source == IMPLICIT and bool(odd or self["image_size"] in (256, BRATS_CROP))

    def config(self, *, image_channels: int, step: int, intensity: Intensity, image_size: int | None = None) -> Config:
        """Our configuration. image_size: the side in pixels that the network is to see, by default the code's own."""
        T = self["diffusion_steps"]
        learned = self["learn_sigma"] or self.fixed_large
        return Config(
            network=NetworkConfig(
                variant=self.variant,
                image_size=image_size or (BRATS_CROP if self.crops_brats else self["image_size"]),
                image_channels=image_channels,
                levels=self.levels,
                T=T,
                base_channels=self["num_channels"],
                channel_mult=self.channel_mult,
                residual_blocks=self["num_res_blocks"],
                attention_depths=self.attention_depths,
                heads=self["num_heads"],
                heads_up=max(0, self["num_heads_upsample"]),
                head_channels=max(0, self.values.get("num_head_channels", 0)),
                groups=GROUPS,
                rrdbs=self["rrdb_blocks"] if self.source == CONSENSUS else 0,
                rrdb_channels=RRDB_CHANNELS,
                rrdb_growth=RRDB_GROWTH,
                dropout=self["dropout"],
                embedding="scale-shift" if self["use_scale_shift_norm"] else "add",
                resample="block" if self.values.get("resblock_updown") else "convolution",
                target="x0" if self["predict_xstart"] else "eps",
                variance="learned" if learned else "fixed",
                outside=0 if self.source == IMPLICIT else -1,
            ),
            diffusion=self._diffusion(T),
            data=DataConfig(
                framing="centre"
                if self.crops_brats or (self.source == IMPLICIT and image_size == BRATS_CROP)
                else "resize",
                intensity_scope=intensity.scope,
                intensity_method=intensity.method,
                intensity_mean=intensity.mean,
                intensity_std=intensity.std,
            ),
            training=TrainingConfig(
                steps=max(LONGEST, step + 1),
                batch=self["batch_size"],
                lr=self["lr"],
                weight_decay=self["weight_decay"],
                warmup=0,
                ema=self.ema_rate,
                augment=self.source == CONSENSUS,
            ),
        )

    def _diffusion(self, T: int) -> DiffusionConfig:
        if self["noise_schedule"] == "cosine":
            return DiffusionConfig(schedule="cosine")
        plain = DiffusionConfig()
        scale = 1000 / T
        if self.source == CONSENSUS and scale * plain.beta_end > LARGEST_BETA:
            return DiffusionConfig(beta_start=scale * plain.beta_start, beta_end=LARGEST_BETA, scaled=False)
        return plain


def widths_of(channel_mult: tuple[int, ...]) -> dict[str, Any]:
    """The options with which the consensus code makes a network of these widths; of several sizes the one that its scripts train with."""
    if channel_mult == DEEPER_256:
        return {"image_size": 256, "deeper_net": True}
    sizes = [size for size, widths in CHANNEL_MULT[CONSENSUS].items() if widths == channel_mult]
    return {"image_size": 224 if 224 in sizes else sizes[0]} if sizes else {}
