"""Turns the rows of all cases into the report of an evaluation: means, intervals, calibration, curves (docs/metrics.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import listed
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.calibration import BINS, ece
from cdiff.runtime.scoring.expectation import expectation_bins, rank_correlation
from cdiff.runtime.scoring.journal import SEAL
from cdiff.runtime.scoring.metrics import (
    COVERAGE,
    NINE,
    RESAMPLES,
    SEED,
    bootstrap_over_cases,
    members_of,
    percentile_interval,
    resampled,
)
from cdiff.runtime.scoring.scores import (
    EMPTY,
    PER_CASE,
    PER_CASE_LEVEL,
    PER_CASE_THRESHOLD,
    PER_LEVEL,
    PER_SLICE,
    PER_THRESHOLD,
    REGIONS,
)

Row = dict[str, Any]
"""One case: its name, number of annotators, hash of its files, seconds, settings of the chain that was run, what `CaseTally.row` returns, and the
seal (`journal.sealed`)."""
ROW_KEYS = (
    "case",
    "annotators",
    "inputs",
    "seconds",
    "chain",
    "samples",
    "volumes",
    "reliability",
    "by_runs",
    "case_scores",
    "slices",
    SEAL,
)


def group_names(cases: Sequence[str], pattern: str | None) -> list[str] | None:
    """The group of each case, found in its name by a regular expression: what its first group matches or, without one, the whole match.

    None without a pattern. Raises CdiffError for an invalid pattern, and for a case name in which it finds nothing.
    """
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise CdiffError(f"--group {pattern!r} is not a regular expression: {error}") from None
    names = []
    for case in cases:
        match = expression.search(case)
        name = match and (match[1] if expression.groups else match[0])
        if not name:
            raise CdiffError(f"--group {pattern!r} finds nothing in the case name {case!r}; every case needs a group")
        names.append(name)
    return names


def joined_twins(cases: Sequence[str], pattern: str | None) -> str | None:
    """A warning where a pattern for `group_names` joins cases of the same name from several folders, which may be of different patients.

    None where it does not. Raises CdiffError as `group_names` does.
    """
    groups = group_names(cases, pattern) or cases
    below = Counter((name.partition("/")[2], group) for name, group in zip(cases, groups, strict=True))
    twins = [name for (name, _), count in below.items() if name and count > 1]
    if not twins:
        return None
    return f"--group {pattern!r} joins cases of one name in several folders ({listed(twins)}); are they of one patient?"


def summarise(
    rows: list[Row], header: Mapping[str, Any], left_out: Mapping[str, Any], group: str | None = None
) -> dict[str, Any]:
    """The report of an evaluation.

    header: what the scores depend on. left_out: the cases that were not scored, and why. group: a pattern for `group_names`; cases
    of one group are resampled together. Raises CdiffError as `group_names` does.
    """
    groups = group_names([row["case"] for row in rows], group)
    counts = [len(row["slices"]) for row in rows]
    marked = [sum(scores["false_positive_slices"] is None for scores in row["slices"]) for row in rows]

    def interval(values: list[list[float]]) -> dict[str, Any]:
        return bootstrap_over_cases(values, groups=groups).to_json()

    def column(name: str, place: int | None = None) -> list[list[float]]:
        return [_column(row, name, place) for row in rows]

    def of_cases(name: str, place: int | None = None) -> dict[str, Any]:
        values = [row["case_scores"][name] if place is None else row["case_scores"][name][place] for row in rows]
        return _over_cases([float("nan") if value is None else value for value in values], groups)

    levels = header["model"]["levels"]
    tables = {region: np.array([row["reliability"][region] for row in rows]) for region in REGIONS}
    return {
        "n_slices": sum(counts),
        "n_cases": len(rows),
        **{name: interval(column(name)) for name in PER_SLICE},
        "ged_samples": {
            "model": rows[0]["samples"],
            "annotators": sorted({r["annotators"] for r in rows}),
        },
        PER_THRESHOLD: [{"threshold": h, **interval(column(PER_THRESHOLD, i))} for i, h in enumerate(NINE)],
        **{
            name: [
                {"level": c + 1, **interval(column(name, c)), **(_empties(rows, c) if name.startswith("hd95") else {})}
                for c in range(levels)
            ]
            for name in PER_LEVEL
        },
        **{name: of_cases(name) for name in PER_CASE},
        PER_CASE_THRESHOLD: [{"threshold": h, **of_cases(PER_CASE_THRESHOLD, i)} for i, h in enumerate(NINE)],
        **{name: [{"level": c + 1, **of_cases(name, c)} for c in range(levels)] for name in PER_CASE_LEVEL},
        **_volume_errors(rows, levels, groups),
        "expected_dice_rank": rank_correlation(rows, groups),
        "expected_bins": expectation_bins(rows),
        "ece": _calibration_error(tables["whole"], counts, groups),
        "ece_near": _calibration_error(tables["near"], marked, groups),
        "reliability": {region: _diagram(table.sum(axis=0)) for region, table in tables.items()},
        "by_runs": [
            {
                "runs": runs,
                # A case's mean, repeated for each of its marked slices, so that the result is a mean over slices, as everywhere.
                **{
                    name: interval([[row["by_runs"][name][i]] * n for row, n in zip(rows, marked, strict=True)])
                    for name in ("soft_dice_5", "soft_dice_9")
                },
            }
            for i, runs in enumerate(rows[0]["by_runs"]["runs"])
        ],
        **header,
        "protocol": header["protocol"] | rows[0]["chain"],
        "intervals": {
            "resampled": "groups of cases" if groups else "cases",
            "group": group,
            "units": len(set(groups)) if groups else len(rows),
            "resamples": RESAMPLES,
            "coverage": COVERAGE,
            "seed": SEED,
        },
        "left_out": left_out,
        "cases": [
            {key: row[key] for key in ROW_KEYS[:4]}
            | ({"group": groups[i]} if groups else {})
            | {"means": _means(row, levels)}
            | {key: row[key] for key in ROW_KEYS[4:]}
            for i, row in enumerate(rows)
        ],
    }


def volume_errors(volumes: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """Predicted minus true volume at each level of a case, in voxels and in ml (None where the size of a voxel is not known)."""
    difference = np.subtract(volumes["predicted_voxels"], volumes["true_voxels"])
    ml = volumes["voxel_ml"]
    return {"voxels": difference.astype(float).tolist(), "ml": None if ml is None else (difference * ml).tolist()}


def _column(row: Row, name: str, place: int | None) -> list[float]:
    """One score of each of a case's slices; NaN where it is not defined."""
    values = [scores[name] if place is None else scores[name][place] for scores in row["slices"]]
    return [float("nan") if value is None else value for value in values]


def _means(row: Row, levels: int) -> dict[str, Any]:
    """A case's own means over its slices, for readers of the rows; None where no slice has the score."""

    def mean(name: str, place: int | None = None) -> float | None:
        return bootstrap_over_cases([_column(row, name, place)]).mean

    return {
        **{name: mean(name) for name in PER_SLICE},
        **{name: [mean(name, c) for c in range(levels)] for name in PER_LEVEL},
        PER_THRESHOLD: [mean(PER_THRESHOLD, i) for i in range(len(NINE))],
    }


def _empties(rows: list[Row], level: int) -> dict[str, int]:
    """The numbers of slices in which only the model's level map is empty, only the annotators' is, or both are."""
    found = [scores["empty_per_level"][level] for row in rows for scores in row["slices"]]
    return {f"n_{which}_empty": found.count(which) for which in EMPTY.values() if which != "neither"}


def _over_cases(values: list[float], groups: list[str] | None) -> dict[str, Any]:
    """The mean over cases (not slices) of one number per case (NaN where it is not defined), with its interval."""
    found = bootstrap_over_cases([[value] for value in values], groups=groups)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n_cases": found.n_slices}


def _volume_errors(rows: list[Row], levels: int, groups: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    """The mean over cases of the error in volume at each level, in each unit, signed and absolute."""
    errors = [volume_errors(row["volumes"]) for row in rows]

    def entry(unit: str, level: int) -> dict[str, Any]:
        values = [float("nan") if error[unit] is None else error[unit][level] for error in errors]  # type: ignore[index]
        return {
            "level": level + 1,
            "signed": _over_cases(values, groups),
            "absolute": _over_cases(np.abs(values).tolist(), groups),
        }

    return {
        f"volume_error_{unit}_per_level": [entry(unit, level) for level in range(levels)] for unit in ("voxels", "ml")
    }


def _calibration_error(
    tables: NDArray[np.float64], counts: list[int], groups: list[str] | None
) -> dict[str, float | int | None]:
    """The ECE of all pixels of all slices together, and its interval from resampling the cases' (groups') tables [cases, 3, BINS]."""
    if groups:
        tables = np.stack([tables[members].sum(axis=0) for members in members_of(groups)])
    tables = tables[tables[:, 0].any(axis=-1)]  # nothing is near the structure in a case that nobody marked
    result: dict[str, float | int | None] = {"mean": None, "low": None, "high": None, "n_slices": sum(counts)}
    if len(tables):
        result["mean"] = float(ece(tables.sum(axis=0)))
    if len(tables) > 1:
        draws = (resampled(len(tables)) @ tables.reshape(len(tables), -1)).reshape(-1, *tables.shape[1:])
        result["low"], result["high"] = percentile_interval(ece(draws))
    return result


def _diagram(table: NDArray[np.float64]) -> list[dict[str, float | None]]:
    """For each bin of a reliability diagram: its limits, its number of pixels, the mean of the map there, and the mean share of annotators."""
    return [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "pixels": int(pixels),
            "predicted": predicted / pixels if pixels else None,
            "observed": observed / pixels if pixels else None,
        }
        for i, (pixels, predicted, observed) in enumerate(table.T.tolist())
    ]
