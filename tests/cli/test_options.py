"""Blocks of options: spread out where they stood, gathered again for the command, in plain types for the runtime."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cdiff.cli import options
from cdiff.cli.app import app
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.zoom import parse_zooms

seen: list[object] = []


@options.spread
def command(scan: Path, *, model: options.Model, chain: options.Chain, quiet: options.QuietOption = False) -> None:
    """A command with both blocks."""
    seen[:] = [scan, model, chain, quiet]


def test_the_options_stand_where_the_block_stood() -> None:
    names = list(inspect.signature(command).parameters)
    assert names == [
        *("scan", "model", "engine", "device"),
        *("runs", "steps", "sampler", "fast", "levels", "mirror", "zooms", "seed", "quiet"),
    ]


def test_what_was_given_reaches_the_command() -> None:
    only = typer.Typer()
    only.command()(command)
    given = "s.nii --device cuda:1 --sampler dpm++2m --levels vote --no-mirror --zooms 1,1.25 --seed 3 -q"
    result = CliRunner().invoke(only, given)
    assert result.exit_code == 0, result.output
    scan, model, chain, quiet = seen
    assert (scan, quiet) == (Path("s.nii"), True)
    assert model == options.Model(None, "auto", "cuda:1")
    assert isinstance(chain, options.Chain)
    arguments = chain.arguments()
    assert arguments == {
        **{"runs": None, "steps": None, "sampler": "dpm++2m", "fast": False},
        **{"combine": "vote", "mirror": False, "zooms": (1, 1.25), "seed": 3},
    }
    assert type(arguments["sampler"]) is type(arguments["combine"]) is str  # a report writes them as they are


def test_what_was_not_given_is_the_commands_default() -> None:
    only = typer.Typer()
    only.command()(command)
    assert CliRunner().invoke(only, ["s.nii"]).exit_code == 0
    assert seen == [Path("s.nii"), options.Model(), options.Chain(), False]
    assert options.Chain().arguments() == {
        **dict.fromkeys(("runs", "steps", "sampler", "mirror", "zooms")),
        **{"fast": False, "combine": "mean", "seed": 0},
    }


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("segment a.nii -o a --output b", "--output"),
        ("segment a.nii --runs 4 --fast --runs=8", "--runs"),
        ("segment a.nii --mirror --no-mirror", "--mirror/--no-mirror"),
        ("data check folder --labels 1 --labels 4", "--labels"),
    ],
)
def test_an_option_of_one_value_is_given_once(given: str, name: str) -> None:
    """The last counted, and nothing was said of the first."""
    result = CliRunner().invoke(app, given.split())
    assert result.exit_code == 2
    assert f"{name} is given twice; give it once" in result.stderr


def test_options_that_take_several_values_and_switches_may_be_repeated(tmp_path: Path) -> None:
    for given in (f"train --data {tmp_path} --out b --set seed=1 --set lr=1 --dry-run", f"data check -q -q {tmp_path}"):
        result = CliRunner().invoke(app, given.split())
        assert str(tmp_path) in result.stderr
        assert "twice" not in result.stderr


def test_labels_are_whole_numbers_from_one_on() -> None:
    assert options.parse_labels(None) == ()
    assert options.parse_labels("4, 1,") == (4, 1)
    for wrong in (",", "0", "1,0", "-1", "1.5", "1;4", "x"):
        with pytest.raises(CdiffError, match=r"--labels .* is not a list of whole numbers from 1 on, such as 1,4"):
            options.parse_labels(wrong)
    assert options.parse_labels("2147483647") == (2147483647,)
    # The second is beyond a float, with which masks' values are compared.
    for large in ("2147483648", "1," + "1" * 400):
        with pytest.raises(CdiffError, match=rf"--labels {large} has a number above 2147483647; give smaller ones"):
            options.parse_labels(large)


@pytest.mark.parametrize("wrong", ["", "1,", "1;2", "x", "nan", "1,-inf", "1e999"])
def test_zooms_that_are_no_numbers_are_refused(wrong: str) -> None:
    with pytest.raises(CdiffError, match=r"zooms .* cannot be read; give numbers with commas between"):
        parse_zooms(wrong)
