"""`cdiff import`: turns a checkpoint of the published code into a run of ours with the same outputs (docs/import.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_folder, must_be_new, sha256, write_json
from cdiff.runtime.scans.sources import is_there
from cdiff.train.checkpoint import read_json, save_checkpoint
from cdiff.train.config import Config
from cdiff.train.imported.mapping import convert, links
from cdiff.train.imported.normalisation import intensity_of
from cdiff.train.imported.options import CONSENSUS, IMPLICIT, REPOSITORIES, TABLE, Options
from cdiff.train.imported.trainings import with_training
from cdiff.train.imported.weights import check_fit, read_state_dict, shown, source_of
from cdiff.train.network import ConsensusNet


@dataclass(frozen=True)
class Imported:
    """What was written: the run's folder, its configuration, the options it came from, and what its user should know."""

    path: Path
    config: Config
    options: Options
    step: int
    parameters: int
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    source: str | None = None,
    args: Path | None = None,
    settings: list[str] | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    images: Path | None = None,
) -> Imported:
    """Write the network in `checkpoint`, a state_dict saved by published code, as the run folder `out`, whole or not at all.

    source: "consensus" or "implicit-ensemble"; must agree with the tensors' names, which decide by default. args: the args.json of the
    training, by default the one beside the checkpoint; what it leaves out is read from the tensors, or else takes the code's defaults
    (the implicit-ensemble code writes no args.json; its README's flags stand in). settings: "name=value" options of the published code,
    which override `args`. image_size: the side in pixels that exported graphs will take, by default the published one. mean, std, images:
    see `normalisation.intensity_of`.
    Raises CdiffError, and writes nothing, when the file is not such a checkpoint, its options and tensors contradict each other
    (the wrong tensors are named), or `out` exists.
    """
    must_be_new(out)
    theirs = read_state_dict(checkpoint)
    found = source_of(theirs, checkpoint)
    if source not in (None, found):
        raise CdiffError(
            f"judging by its tensors' names, {checkpoint} is from the {found} code, not {source}; leave out --from"
        )
    source = found
    said = _read_args(checkpoint, args, source, settings or [])
    options = Options.read(source, shown(theirs, source) | said, settings or []).fitted(theirs)
    if options.variant in ("consensus", "annotator") and not (options.annotators or TABLE in theirs):
        raise CdiffError(
            f"{checkpoint} has no table of levels or annotators ({TABLE}), as that training's networks have; was it "
            "--option no_annotator_training=True or soft_label_training=True?"
        )
    step = _step(checkpoint)
    channels = _image_channels(theirs, options)
    intensity = intensity_of(source, mean, std, images)
    if len(intensity.mean) not in (0, 1, channels):
        given = f"{len(intensity.mean)} means are given"
        if images is not None:
            given = f"the images in {images} have {len(intensity.mean)} channels, as their last axis is read"
        raise CdiffError(f"{given}, but the network takes {channels}")
    config = options.config(image_channels=channels, step=step, intensity=intensity, image_size=image_size)
    with torch.device("meta"):
        network = ConsensusNet(config.network)
    check_fit(theirs, links(network, options), options, checkpoint)
    tensors = convert(network, options, theirs)
    network.load_state_dict(tensors, assign=True)
    parameters = sum(value.numel() for value in tensors.values())
    _write(out, config, tensors, network, step, _origin(checkpoint, options))
    notes = _notes(checkpoint, options, config, bool(mean) or images is not None)
    named = {setting.partition("=")[0] for setting in settings or []} | said.keys()
    if assumed := [name for name in options.unseen if name not in named]:
        words = ", ".join(f"{name}={options[name]}" for name in assumed)
        notes.append(
            f"assumed, since no tensor shows them: {words}; if the training used other values, the maps are wrong: give those "
            "with --option"
        )
    return Imported(out, config, options, step, parameters, notes)


def _read_args(checkpoint: Path, args: Path | None, source: str, settings: list[str]) -> dict[str, Any]:
    beside = checkpoint.parent / "args.json"
    if args is None and beside.is_file():
        args = beside
    said: dict[str, Any] = {}
    if args is not None:
        if not (is_there(args) and args.is_file()):
            what = "is a folder" if is_there(args) and args.is_dir() else "does not exist"
            raise CdiffError(f"{args} {what}; give the args.json that the training wrote")
        # A null is an option that was left out, such as the code's own number_of_annotators.
        said = {name: value for name, value in read_json(args, "it must be an args.json").items() if value is not None}
    if source != CONSENSUS:
        return said
    lacking = (
        f"there is no args.json beside {checkpoint}" if args is None else f"{args} does not say how it was trained"
    )
    return with_training(said, settings, lacking)


def _image_channels(theirs: dict[str, Tensor], options: Options) -> int:
    """The image's channels; the implicit-ensemble code hard-codes four, so that a checkpoint with others is of a changed code."""
    if options.source == CONSENSUS:
        return int(options["condition_input_channel"])
    weight = theirs.get("input_blocks.0.0.weight")
    return weight.shape[1] - 1 if weight is not None and weight.dim() == 4 and weight.shape[1] > 1 else 4


def _step(checkpoint: Path) -> int:
    """The iteration in a file's name (ema_val_0.8067150_0.9999_035000.pt, model_35000.pt); 0 when it has none, as with a longer number, such
    as a date with its time."""
    found = re.search(r"(?:_|savedmodel)([0-9]{1,9})$", checkpoint.stem)
    return int(found[1]) if found else 0


def _origin(checkpoint: Path, options: Options) -> dict[str, Any]:
    return {
        "repository": REPOSITORIES[options.source],
        "from": options.source,
        "variant": options.variant,
        "file": checkpoint.name,
        "sha256": sha256(checkpoint),
        "options": options.values,
    }


def _write(
    out: Path, config: Config, tensors: dict[str, Tensor], network: ConsensusNet, step: int, origin: dict[str, Any]
) -> None:
    settings = config.training
    # The state of a fresh optimiser with the published code's betas, so that `cdiff train --resume` can go on from here.
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.999)
    )
    info = {
        "step": step,
        "seconds": 0.0,
        "best": None,
        "best_window": config.network.image_size,
        "is_best": True,
        "parameters": sum(p.numel() for p in network.parameters()),
        "imported": origin,
    }
    state = {"optimiser": optimiser.state_dict(), "scaler": {}}
    with atomic_folder(out) as stage:
        write_json(stage / "config.json", config.to_json())
        save_checkpoint(stage, network=tensors, ema=tensors, optimiser=state, info=info)


def _notes(checkpoint: Path, options: Options, config: Config, normalised: bool) -> list[str]:
    notes = []
    if not checkpoint.name.startswith("ema"):
        notes.append(f"{checkpoint.name} is not called ema*: the published scores are those of the averaged weights")
    if options.source == CONSENSUS and not normalised:
        notes.append(
            "the published code normalises by its training images' mean and standard deviation, which no checkpoint holds: "
            "each slice's own are used instead; to use theirs, give --images TRAIN_FOLDER, or --mean and --std"
        )
    if options.source == CONSENSUS and not options["clip_denoised"]:
        notes.append(
            "clip_denoised=False: the published scripts turn it on, so x0 is clipped to -1 and 1 here all the same; a script that "
            "was changed to leave it off gives other maps"
        )
    if options.variant in ("soft-label", "no-annotator") and not options["number_of_annotators"]:
        notes.append(
            "neither file says how many annotators there were: give --option number_of_annotators=C, or evaluate takes only cases "
            "of one annotator"
        )
    if config.data.framing == "resize" and options.source == IMPLICIT:
        notes.append(
            f"image_size={options['image_size']}: slices are resampled to it, while the published loader, whatever image_size says, cuts out "
            "the central 224 of BraTS's 240 pixels; if it was used unchanged, import with --image-size 224"
        )
    if options.source == IMPLICIT and options["diffusion_steps"] != 1000:
        notes.append(
            f"diffusion_steps={options['diffusion_steps']}: the published scripts train and sample with 1000 steps, whatever this "
            "option says; a checkpoint of theirs needs 1000"
        )
    if options.source == IMPLICIT and not options.all_timesteps:
        notes.append(
            f"timestep_respacing={options['timestep_respacing']} is a matter of sampling: all {config.network.T} timesteps "
            "are imported, and cdiff segment --steps chooses fewer of them"
        )
    return notes
