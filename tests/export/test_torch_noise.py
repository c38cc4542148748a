"""The runtime's noise in PyTorch, word for word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdiff.export.torch_engine import Options, TorchChainEngine
from cdiff.export.torch_noise import normals, words
from cdiff.runtime.sampling.noise import normal
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.export.networks import BASE, random_network


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("seed", [0, 12345, 2**63 + 7, 2**64 - 1])
def test_words_are_numpys_bit_for_bit(seed: int) -> None:
    """numpy.random.Philox is the oracle; it adds 1 to the counter's first word before each block."""
    counter = (5, 0, (3 << 32) | 24, 2**40 + 1)
    generator = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array(counter, np.uint64))
    expected = generator.random_raw(8).view(np.int64).reshape(2, 4)
    blocks = integers(counter[0] + 1, counter[0] + 2)
    found = words(integers(seed - 2**64 if seed >> 63 else seed), (blocks, *(integers(c) for c in counter[1:])))
    for word in range(4):
        np.testing.assert_array_equal(torch.broadcast_to(found[word], (2,)).numpy(), expected[:, word])


@pytest.mark.parametrize(
    ("size", "canvas", "origins"),
    [((8, 8), (8, 8), [(0, 0)] * 3), ((7, 5), (7, 5), [(0, 0)] * 3), ((8, 9), (33, 31), [(0, 0), (5, 7), (25, 22)])],
    ids=["even", "odd", "tiles"],
)
def test_normals_are_the_runtimes(
    size: tuple[int, int], canvas: tuple[int, int], origins: list[tuple[int, int]]
) -> None:
    slices, levels, runs = (0, 5, 2**40), (1, 2, 4), (0, 24, 3)
    for step in (-1, 7):
        found = normals(
            integers(9), integers(*slices), integers(*levels), integers(*runs), integers(step), torch.tensor(origins), size, canvas
        )  # fmt: skip
        assert found.shape == (3, 1, *size)
        for row in range(3):
            top, left = origins[row]
            expected = normal(9, slices[row], levels[row], runs[row], step, canvas)[
                top : top + size[0], left : left + size[1]
            ]
            np.testing.assert_allclose(found[row, 0].numpy(), expected, atol=1e-6, rtol=0)


def test_a_compiled_engine_draws_the_runtimes_noise_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch 2.11 compiles of it for a CPU draws other numbers."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: 0 * function(*args))
    engine = TorchChainEngine(
        random_network(BASE), NoiseSchedule(BASE.T), options=Options(half=False, compiled="default")
    )
    drawn = engine.noise(*[integers(1)] * 5, torch.zeros(1, 2, dtype=torch.int64), (8, 8), (8, 8))
    np.testing.assert_allclose(drawn[0, 0].numpy(), normal(1, 1, 1, 1, 1, (8, 8)), atol=1e-6, rtol=0)
