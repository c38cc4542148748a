"""Records what the published codes' networks return, for tests/train/test_imported.py. Run it again only when a case is added.

    git clone https://github.com/tomeramit/Annotator-Consensus-Prediction consensus
    git -C consensus checkout d4f527ee132e4d02ccb4bbe3de3f970cf30098d0
    git clone https://github.com/JuliaWolleb/Diffusion-based-Segmentation implicit
    git -C implicit checkout 676f214035e90edd0357f51feab45841e4aefcfb
    OMP_NUM_THREADS=1 python tests/data/imported/record.py consensus implicit     # from the root of this repository

Both are run as they are, on the CPU in float32, with PyTorch 2.13; modules that neither network needs (mpi4py, visdom ...) are
stood in for. Nothing of either code is kept: weights come from names and shapes (tests/train/published.py), and what is
written is names, shapes and the numbers that came out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from cdiff.runtime.sampling.noise import INITIAL, normal
from tests.train.published import CHAIN_SEED, FOLDER, inputs, weight

STAND_INS = ("mpi4py", "visdom", "torchvision", "torchvision.utils", "blobfile", "matplotlib", "kornia", "git", "cv2")

TINY_CONSENSUS: dict[str, Any] = {
    **{"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "num_heads": 4, "num_heads_upsample": -1},
    **{"attention_resolutions": "16,8", "dropout": 0.1, "rrdb_blocks": 1, "deeper_net": False, "learn_sigma": True},
    **{"sigma_small": False, "class_cond": False, "class_name": "train", "expansion": False, "diffusion_steps": 100},
    **{"noise_schedule": "linear", "timestep_respacing": "", "use_kl": False, "predict_xstart": False},
    **{"rescale_timesteps": False, "rescale_learned_sigmas": False, "use_checkpoint": False, "seed": None},
    **{"use_scale_shift_norm": False, "number_of_annotators": 3, "condition_input_channel": 1},
    **{"soft_label_training": False, "consensus_training": True, "no_annotator_training": False},
    **{"annotators_training": False, "lr": 2e-05, "batch_size": 4, "ema_rate": "0.9999", "weight_decay": 0.0},
}
PUBLISHED_CONSENSUS = TINY_CONSENSUS | {
    **{"image_size": 256, "num_channels": 128, "num_res_blocks": 3, "rrdb_blocks": 10, "deeper_net": True},
    **{"number_of_annotators": 7, "dropout": 0.0},
}
README_IMPLICIT: dict[str, Any] = {
    **{"image_size": 256, "num_channels": 128, "num_res_blocks": 2, "num_heads": 1, "num_heads_upsample": -1},
    **{"num_head_channels": -1, "attention_resolutions": "16", "channel_mult": "", "dropout": 0.0, "class_cond": False},
    **{"use_checkpoint": False, "use_scale_shift_norm": False, "resblock_updown": False, "use_fp16": False},
    **{"use_new_attention_order": False, "learn_sigma": True, "diffusion_steps": 1000, "noise_schedule": "linear"},
    **{"timestep_respacing": "", "use_kl": False, "predict_xstart": False, "rescale_timesteps": False},
    "rescale_learned_sigmas": False,
}
TINY_IMPLICIT = README_IMPLICIT | {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}

OUTPUTS: dict[str, dict[str, Any]] = {
    "consensus": TINY_CONSENSUS,
    "consensus_options": TINY_CONSENSUS
    | {
        **{"use_scale_shift_norm": True, "num_heads_upsample": 2, "condition_input_channel": 4, "num_res_blocks": 2},
        **{"predict_xstart": True, "noise_schedule": "cosine", "rescale_timesteps": True, "diffusion_steps": 50},
        **{"learn_sigma": False, "sigma_small": True, "consensus_training": False, "no_annotator_training": True},
    },
    # Neither learned nor small: the variance is beta_t. Ten steps, where the schedule is cut at 0.8; one map an annotator.
    "consensus_short": TINY_CONSENSUS
    | {"diffusion_steps": 10, "learn_sigma": False, "consensus_training": False, "annotators_training": True},
    "implicit": TINY_IMPLICIT | {"num_heads": 4, "num_heads_upsample": 2, "diffusion_steps": 25},
    "implicit_options": TINY_IMPLICIT
    | {
        **{"resblock_updown": True, "use_scale_shift_norm": True, "num_head_channels": 16, "channel_mult": "1,2,2"},
        **{"use_new_attention_order": True, "attention_resolutions": "16,8", "num_res_blocks": 2},
    },
}
NAMES_ONLY: dict[str, dict[str, Any]] = {
    "consensus_256": PUBLISHED_CONSENSUS,
    "consensus_224": PUBLISHED_CONSENSUS | {"image_size": 224, "condition_input_channel": 4, "number_of_annotators": 3},
    "implicit_256": README_IMPLICIT,
    # The widths of every other size.
    **{f"consensus_{size}": TINY_CONSENSUS | {"image_size": size} for size in (64, 128, 320, 480)},
    **{f"implicit_{size}": TINY_IMPLICIT | {"image_size": size, "channel_mult": ""} for size in (64, 128, 512)},
}
CHAINS = {"consensus_short": 2, "implicit": 2}
"""Reverse chains a level."""


def create(name: str, args: dict[str, Any], clones: dict[str, Path]) -> tuple[Any, Any]:
    """The published network and diffusion of these options, by the published code's own constructor."""
    source = name.partition("_")[0]
    path = str(clones[source])
    if path not in sys.path:
        sys.path.insert(0, path)
    package = {"consensus": "improved_diffusion", "implicit": "guided_diffusion"}[source]
    script = importlib.import_module(f"{package}.script_util")
    keys = script.model_and_diffusion_defaults()
    return script.create_model_and_diffusion(**{key: args[key] for key in keys})


def noise(size: int, levels: int, run: int, step: int) -> torch.Tensor:
    each = [normal(CHAIN_SEED, 0, level, run, step, (size, size)) for level in range(1, levels + 1)]
    return torch.from_numpy(np.stack(each)[:, None])


@contextlib.contextmanager
def drawn(size: int, levels: int, run: int) -> Iterator[None]:
    """Makes torch.randn_like return the noise of step 0, 1, 2 ..., which is how the published chains draw theirs."""
    steps = iter(range(10_000))
    original = torch.randn_like
    torch.randn_like = lambda like, **_: noise(size, levels, run, next(steps))
    try:
        yield
    finally:
        torch.randn_like = original


def chain(name: str, network: Any, diffusion: Any, image: torch.Tensor, levels: int, runs: int) -> np.ndarray:
    """Mean over runs of clip((x + 1)/2, 0, 1), [levels, H, W]; `image` [1, channels, H, W]."""
    size, total = image.shape[-1], 0
    for run in range(runs):
        x = noise(size, levels, run, INITIAL)
        with drawn(size, levels, run), torch.no_grad():
            if name.startswith("consensus"):
                given = {
                    "number_of_annotators": torch.arange(1, levels + 1, dtype=torch.int),
                    "conditioned_image": torch.cat([image] * levels),
                    **{"inference": True, "first_time_step": diffusion.num_timesteps},
                }
                x = diffusion.p_sample_loop(network, x.shape, noise=x, clip_denoised=True, model_kwargs=given)
            else:  # its own loop is written for 224 x 224; the step is the same
                for t in reversed(range(diffusion.num_timesteps)):
                    joined = torch.cat([image, x], dim=1)
                    x = diffusion.p_sample(network, joined, torch.tensor([t]), clip_denoised=True)["sample"]
        total = total + ((x + 1) / 2).clamp(0, 1)[:, 0].numpy()
    return np.asarray(total / runs, np.float32)


def record(name: str, args: dict[str, Any], clones: dict[str, Path]) -> dict[str, Any]:
    network, diffusion = create(name, args, clones)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict({key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()})
    network.eval()
    T, size = args["diffusion_steps"], args["image_size"]
    channels = args.get("condition_input_channel", 4)
    told = name.startswith("consensus") and not args["no_annotator_training"]
    levels = args["number_of_annotators"] if told else 1
    t, level = np.array([1, T // 2, T]), np.arange(3) % levels + 1
    x, image = (torch.from_numpy(array) for array in inputs(name, len(t), channels, size))
    # The chain hands timesteps through a wrapper that respaces and rescales them; so do we.
    wrapped = diffusion._wrap_model(network)
    steps = torch.from_numpy(t - 1)
    with torch.no_grad():
        if name.startswith("consensus"):
            given = {"number_of_annotators": torch.from_numpy(level)} if told else {}
            output = wrapped(x, steps, conditioned_image=image, **given)
        else:
            output = wrapped(torch.cat([image, x], dim=1), steps)
    found = {"shapes": json.dumps(shapes), "t": t, "level": level, "output": output.numpy()}
    print(f"{name}: output {tuple(output.shape)}, standard deviation {output.std():.2f}")
    if name in CHAINS:
        found["chain"] = chain(name, network, diffusion, image[:1], levels, CHAINS[name])
        found["chain_runs"] = np.array(CHAINS[name])
        print(f"{name}: chain mean {found['chain'].mean():.3f}, standard deviation {found['chain'].std():.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consensus", type=Path)
    parser.add_argument("implicit", type=Path)
    clones = {key: value.resolve() for key, value in vars(parser.parse_args()).items()}
    for module in STAND_INS:
        sys.modules[module] = MagicMock()
    for name, args in OUTPUTS.items():
        np.savez_compressed(FOLDER / f"{name}.npz", args=json.dumps(args), **record(name, args, clones))
    for name, args in NAMES_ONLY.items():
        with torch.device("meta"):
            network, _ = create(name, args, clones)
        shapes = json.dumps({key: tuple(value.shape) for key, value in network.state_dict().items()})
        np.savez_compressed(FOLDER / f"{name}.npz", args=json.dumps(args), shapes=shapes)


if __name__ == "__main__":
    main()
