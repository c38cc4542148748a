"""Widths and heads: those of any network that runs are found, and those with which none runs refused by their published names."""

from __future__ import annotations

import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.intensity import Intensity
from cdiff.train.imported.mapping import links
from cdiff.train.imported.options import Options
from cdiff.train.imported.weights import shown
from cdiff.train.network import ConsensusNet
from tests.train.published import recorded


@pytest.mark.parametrize("widths", ["2,1", "3"])
def test_widths_with_which_the_published_network_does_not_run_are_refused(widths: str) -> None:
    """Its first convolution makes num_channels channels and its last takes as many, but gets the first width's."""
    with pytest.raises(CdiffError, match=f"channel_mult={widths} cannot be imported: .* first width of {widths[0]}"):
        Options.read("implicit-ensemble", {}, [f"channel_mult={widths}"])
    assert Options.read("implicit-ensemble", {}, ["channel_mult=1,3,2"]).channel_mult == (1, 3, 2)


def test_heads_of_no_channels_are_not_taken_for_none_given() -> None:
    for channels in (0, -5):
        with pytest.raises(CdiffError, match=rf"num_head_channels={channels} must be -1, .* or at least 1"):
            Options.read("implicit-ensemble", {}, [f"num_head_channels={channels}"])


@pytest.mark.parametrize("option", ["num_heads=3", "num_heads_upsample=5", "num_head_channels=48"])
def test_heads_that_cannot_share_the_channels_have_their_published_name(option: str) -> None:
    """Of 192 where the U-Net attends on its way down and up, and 256 in its bottleneck."""
    flags = ["num_channels=64", "image_size=64", "attention_resolutions=16", option]
    with pytest.raises(CdiffError, match=f"the published option {option} must divide (192|256), the channels"):
        Options.read("implicit-ensemble", {}, flags)
    assert Options.read("implicit-ensemble", {}, [*flags, "num_head_channels=32"])


def test_a_network_of_one_depth_shows_that_it_has_no_other() -> None:
    """It was taken for one of the README's six depths, and hundreds of tensors were said to be missing."""
    one = Options.read("implicit-ensemble", {"num_channels": 32, "num_res_blocks": 3, "channel_mult": "1"}, [])
    with torch.device("meta"):
        network = ConsensusNet(one.config(image_channels=4, step=0, intensity=Intensity()).network)
        tensors = {link.theirs: torch.empty(link.shape) for link in links(network, one)}
    found = shown(tensors, "implicit-ensemble")
    assert (found["num_res_blocks"], found["channel_mult"]) == (3, "1")
    # Of two depths, one that has lost the convolution between them.
    case = recorded("implicit")
    left = {key: torch.empty(shape, device="meta") for key, shape in case.shapes.items() if ".op." not in key}
    assert not shown(left, case.source).keys() & {"num_res_blocks", "channel_mult"}


def test_an_args_json_of_another_program_may_write_numbers_in_its_own_way() -> None:
    """Each was refused, as no whole number."""
    plain = {"image_size": 64, "attention_resolutions": "16,8", "channel_mult": "1,2", "ema_rate": "0.999"}
    odd = {"image_size": 64.0, "attention_resolutions": [16, 8], "channel_mult": [1, 2], "ema_rate": [0.999]}
    assert Options.read("implicit-ensemble", odd, []) == Options.read("implicit-ensemble", plain, [])
    for wrong in ({"image_size": 64.5}, {"image_size": [64]}, {"attention_resolutions": [16.5]}):
        with pytest.raises(CdiffError, match=f"the published option {next(iter(wrong))}="):
            Options.read("implicit-ensemble", plain | wrong, []).config(image_channels=4, step=0, intensity=Intensity())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("batch_size=0", "must be at least 1"),
        ("batch_size=100000000000000", "must be at most 1000000"),
        ("number_of_annotators=-2", "must not be negative"),
        ("number_of_annotators=1001", "must be at most 1000"),
        ("ema_rate=2", "must lie in"),
    ],
)
def test_options_that_no_run_can_state_have_their_published_name(option: str, says: str) -> None:
    """They had the names of our settings, which no args.json has; a batch_size beyond 2^40 made a run that nothing could read."""
    with pytest.raises(CdiffError, match=f"the published option {option}.* {says}"):
        Options.read("consensus", recorded("consensus").args, [option])
