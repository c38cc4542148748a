"""The network is the published one: its size, its arithmetic, and what must not influence what."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cdiff.runtime.errors import CdiffError
from cdiff.train.network import Attention, ConsensusNet, ResidualBlock
from cdiff.train.presets import preset
from cdiff.train.sections import NetworkConfig

SMALL = NetworkConfig(
    image_size=16, levels=3, T=8, base_channels=8, channel_mult=(1, 2), residual_blocks=1, attention_depths=(1,),
    heads=2, groups=4, rrdbs=1, rrdb_channels=8, rrdb_growth=4,
)  # fmt: skip


def randomised(config: NetworkConfig) -> ConsensusNet:
    """A network whose zero-initialised layers are random too, so that every path matters."""
    torch.manual_seed(0)
    network = ConsensusNet(config)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return network.eval()


def test_paper_preset_has_the_published_size_and_cost() -> None:
    # 161 M parameters; 0.773 TFLOP a slice for G; 0.557 TFLOP a row and step for the rest, at 256 x 256.
    config = preset("paper").network
    with torch.device("meta"):
        network = ConsensusNet(config)
        row = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as encoder:
            features = network.encoder(torch.zeros(1, 1, 256, 256))
        with FlopCounterMode(display=False) as denoiser:
            network.denoiser(torch.zeros(1, 1, 256, 256), features, row, row)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 161
    assert encoder.get_total_flops() / 1e12 == pytest.approx(0.773, abs=5e-4)
    assert denoiser.get_total_flops() / 1e12 == pytest.approx(0.557, abs=5e-4)


def test_paper_preset_attends_where_the_paper_does() -> None:
    seen: list[tuple[int, int]] = []
    config = dataclasses.replace(preset("paper").network, base_channels=32, rrdbs=0)
    with torch.device("meta"):
        network = ConsensusNet(config)
        for module in network.denoiser.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape[-2:])))
        row = torch.zeros(1, dtype=torch.long)
        network(torch.zeros(1, 1, 256, 256), torch.zeros(1, 1, 256, 256), row, row)
    # Three blocks down and four up at 16 and at 8, one in the bottleneck at 4.
    assert sorted(set(seen)) == [(4, 4), (8, 8), (16, 16)]
    assert [seen.count(size) for size in ((16, 16), (8, 8), (4, 4))] == [7, 7, 1]


@pytest.mark.parametrize(
    "change",
    [
        *(
            {},
            {"rrdbs": 0},
            {"variance": "learned"},
            {"image_channels": 4},
            {"image_size": 24},
            {"attention_depths": ()},
        ),
        *({"embedding": "scale-shift"}, {"resample": "block"}, {"heads_up": 4}, {"head_channels": 8}),
    ],
)
def test_shapes_of_every_variant(change: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    network = randomised(config)
    n = config.image_size
    out = network(
        torch.randn(2, 1, n, n), torch.randn(2, config.image_channels, n, n), torch.tensor([1, 8]), torch.tensor([1, 3])
    )
    assert out.shape == (2, 2 if config.variance == "learned" else 1, n, n)
    assert torch.isfinite(out).all()


def test_timestep_level_and_image_each_matter_and_rows_do_not_mix() -> None:
    network = randomised(SMALL)
    x, image = torch.randn(1, 1, 16, 16).repeat(4, 1, 1, 1), torch.randn(1, 1, 16, 16).repeat(4, 1, 1, 1)
    image[3] += 0.5
    out = network(x, image, torch.tensor([2, 5, 2, 2]), torch.tensor([1, 1, 3, 1]))
    assert all((out[0] - out[i]).abs().max() > 1e-3 for i in (1, 2, 3))
    alone = network(x[:1], image[:1], torch.tensor([2]), torch.tensor([1]))
    torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-5)


def test_heads_of_every_attention() -> None:
    def heads(**change: object) -> list[int]:
        network = ConsensusNet(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]
        return [module.heads for module in network.denoiser.modules() if isinstance(module, Attention)]

    # One block down, the bottleneck, two blocks up, all 16 channels wide.
    assert heads() == [2, 2, 2, 2]
    assert heads(heads_up=4) == [2, 2, 4, 4]
    assert heads(heads_up=5, attention_depths=()) == [2]  # 5 are no divisor, and none there
    assert heads(head_channels=2) == [8, 8, 8, 8]
    assert heads(heads=3, channel_mult=(1, 3)) == [3, 3, 3, 3]  # nor of 8, which do not attend


def test_a_new_network_begins_as_the_published_ones_do() -> None:
    """It returns 0, each residual block its skip and each attention its input; and the table of timesteps holds their position code."""
    network = ConsensusNet(dataclasses.replace(SMALL, variance="learned", T=50))
    x, image, one = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([1, 3])
    assert not network(x, image, one, one).any()
    h, z = torch.randn(2, 16, 8, 8), torch.randn(2, 32)
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock) and isinstance(m.skip, torch.nn.Identity)]
    same = [block(h, z) for block in blocks if block.conv1.in_channels == 16]
    same += [module(h) for module in network.modules() if isinstance(module, Attention)]
    assert len(same) > 4
    assert all(torch.equal(out, h) for out in same)
    table = network.denoiser.time_table.weight.detach()
    angles = torch.tensor([[t * 1000 / 50 * 1e4 ** (-k / 16) for k in range(16)] for t in range(1, 51)])
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=1e-3)


def test_one_convolution_as_g_equals_concatenating_image_and_x() -> None:
    # conv([I, x]) = conv_I(I) + conv_x(x): the implicit-ensemble network is the same split.
    network = randomised(dataclasses.replace(SMALL, rrdbs=0, image_channels=4))
    image, x = torch.randn(2, 4, 16, 16), torch.randn(2, 1, 16, 16)
    joined = torch.nn.Conv2d(5, SMALL.base_channels, 3, padding=1)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([network.encoder.first.weight, network.denoiser.first.weight], dim=1))
        joined.bias.copy_(network.encoder.first.bias + network.denoiser.first.bias)  # type: ignore[union-attr, operator]
    split = network.encoder(image) + network.denoiser.first(x)
    torch.testing.assert_close(split, joined(torch.cat([image, x], dim=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 30, "channel_mult": (1, 2, 2)}, "multiple of 4"),
        ({"groups": 3}, "groups=3 must divide"),
        ({"heads": 3}, "heads=3 must divide"),
        ({"target": "score"}, "use eps, x0 or v"),
        ({"attention_depths": (5,)}, "must lie in 0..1"),
        ({"levels": 0}, "at least 1"),
        ({"heads_up": 5}, "heads_up=5 must divide"),
        ({"head_channels": 5}, "head_channels=5 must divide"),
        ({"embedding": "concat"}, "use add or scale-shift"),
        ({"resample": "pool"}, "use convolution or block"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(CdiffError, match=says):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
