"""The memory of a training step, counted on tensors without content."""

from __future__ import annotations

import pytest
import torch

from cdiff.benchmarks.training_memory import Alive, main, step_memory
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset


def test_bytes_alive_by_hand() -> None:
    """Views are no memory of their own, and what is dropped is given back."""
    with Alive() as alive:
        a = torch.zeros(1000)
        view = a[:10]
        b = a + 1
        assert alive.now == 8000
        del b
        assert alive.now == 4000
        c = torch.zeros(10)
        assert (alive.now, alive.peak) == (4040, 8000)
        del a
        assert alive.now == 4040, "the view keeps it"
        del view, c
    assert alive.now == 0


def test_a_steps_memory_follows_what_is_kept() -> None:
    config = preset("tiny")
    weights = 4 * sum(p.numel() for p in ConsensusNet(config.network).parameters())
    plain, halves, again = (
        step_memory(config.with_values(change)) for change in ({}, {"accumulate": 2}, {"checkpointing": True})
    )
    # Weights, AdamW's two moments and EMA; the few bytes above are AdamW's step counts and the schedule's tables.
    assert 4 * weights <= plain.kept <= 4 * weights + 5000
    activations = plain.peak - plain.kept
    assert halves.peak - halves.kept < 0.7 * activations
    assert again.peak - again.kept < 0.7 * activations


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "use one of"), (["--help"], "use one of"), (["tiny", "nonsense=1"], "nonsense")]
)
def test_what_is_wrong_with_the_command_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err
    assert "usage: python -m cdiff.benchmarks.training_memory PRESET" in said.err
