"""PyTorch's settings around a run: it takes none of its caller's that would change what is learned, and gives all of them back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import load_run
from cdiff.train.config import Config
from cdiff.train.machine import arithmetic, as_it_starts
from cdiff.train.presets import preset
from cdiff.train.trainer import train
from tests.double import in_double


def test_attention_is_pytorchs_own_in_a_run(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the cards that PyTorch leaves it to cuDNN for, a shape that cuDNN has no plan for would end the run."""
    seen: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*parts: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*parts)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    train(preset("tiny").with_values({"attention_depths": (1,)}), tiny_data, tmp_path / "run", max_steps=1, quiet=True)
    assert seen
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_deterministic_algorithms_are_asked_for_and_given_back() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with arithmetic(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    with arithmetic(deterministic=False):
        assert torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled() == before
    try:
        for deterministic in (False, True):  # what only warned the program around would have ended it from then on
            torch.use_deterministic_algorithms(True, warn_only=True)
            with arithmetic(deterministic):
                assert torch.is_deterministic_algorithms_warn_only_enabled() != deterministic
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def on_meta() -> Iterator[None]:
    """As a notebook that set the default device to a GPU, of which there is none here."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


AROUND: list[Callable[[], AbstractContextManager[object]]] = [
    functools.partial(torch.autocast, "cpu", torch.bfloat16),
    in_double,
    torch.inference_mode,
    on_meta,
]


@pytest.mark.parametrize("around", AROUND)
def test_what_the_program_around_set_changes_no_step(
    around: Callable[[], AbstractContextManager[object]], tiny_data: Path, tmp_path: Path
) -> None:
    """A caller's autocast trained in half precision what said that it was trained in float32; the others ended in a traceback."""

    def state() -> tuple[object, ...]:
        asked = torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.is_grad_enabled()
        return *asked, torch.get_default_device(), torch.random.initial_seed(), torch.get_rng_state().tolist()

    train(preset("tiny"), tiny_data, tmp_path / "plain", max_steps=2, quiet=True)
    torch.manual_seed(3)
    with around():
        before = state()
        train(preset("tiny"), tiny_data, tmp_path / "run", max_steps=2, quiet=True)
        assert state() == before
    name = "checkpoints/step-0000002/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(("had", "asked", "takes"), [(3, 0, 2), (1, 0, 1), (1, 3, 3)])
def test_threads_are_set_for_a_run_and_given_back(
    had: int, asked: int, takes: int, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are asked for, or PyTorch's, of which a container with a quota of two cores uses no more than two."""
    monkeypatch.setattr("cdiff.train.machine.quota", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(had)
        train(preset("tiny").with_values({"threads": asked}), tiny_data, tmp_path / "run", max_steps=1, quiet=True)
        assert torch.get_num_threads() == had
    finally:
        torch.set_num_threads(before)
    assert load_run(tmp_path / "run").info["machine"]["threads"] == takes


def test_of_two_trainings_in_threads_the_second_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    """Both seeded and drew from one generator: neither run had the weights that it has alone."""

    def second() -> Config:
        with ThreadPoolExecutor() as pool:
            both = pool.submit(train, preset("tiny"), tiny_data, tmp_path / "second", max_steps=1, quiet=True)
        with pytest.raises(
            CdiffError, match=r"^another training is running in this program, .* train in another process$"
        ):
            both.result()
        return preset("tiny")

    train(second, tiny_data, tmp_path / "first", max_steps=1, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"first"}
    assert train(preset("tiny"), tiny_data, tmp_path / "third", max_steps=1, quiet=True).step == 1


def test_the_default_type_that_one_thread_gives_back_another_still_computes_with() -> None:
    """PyTorch has one for all threads: it was the program's again when one model was loaded and the next was still loading, and in the end the
    program had ours."""
    with in_double():
        one, other = as_it_starts(), as_it_starts()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        other.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
