"""The memory of a training step, counted on tensors without content."""

from __future__ import annotations

import json

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


@pytest.mark.slow
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


def test_the_command_explains_itself_and_its_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "KEY=VALUE" in capsys.readouterr().out
    assert main(["papr"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no preset 'papr'")
    assert main(["tiny", "image_size=33"]) == 2
    assert "image_size=33" in capsys.readouterr().err
    assert main(["tiny", "batch=2"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == ["batch=2"]
