"""`cdiff segment`: one scan or a folder of them to maps of agreement."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdiff.cli import options
from cdiff.cli.console import SOME_FAILED, Meter, fail, say, warn
from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.runtime.prepared import Prepared
    from cdiff.runtime.results import Result
    from cdiff.runtime.scans.inputs import NamedScan

FIRST = 3
"""So many scans of a folder are named as those to look at first."""


@options.spread
def segment(
    named: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SCAN",
            help="A scan (.nii.gz, .nrrd, .mha, .png ...), a folder of DICOM files, a folder of scans, a case folder (with a file for "
            "each modality, if the model takes several), a folder of those, or a table (.csv) of images; or several of these.",
            show_default=False,
        ),
    ] = None,
    input_: Annotated[Path | None, options.option("--input -i SCAN", "The same as SCAN, for those used to -i.")] = None,
    output: Annotated[
        Path, options.output_option("--output -o OUT", "Folder for the results; made if it is not there.")
    ] = Path("cdiff_output"),
    slices: Annotated[
        str | None,
        options.option("--slices A:B", "Only slices A to B-1, counted from 0; A or B may be left out.", default="all"),
    ] = None,
    slice_axis: Annotated[
        int | None,
        options.option(
            "--slice-axis AXIS",
            "Which axis of the array as stored to cut slices along.",
            default="as the model was trained",
            min=0,
            max=2,
        ),
    ] = None,
    at: Annotated[
        str | None,
        options.option(
            "--at I,J,K",
            "Where the structure is, in a scan larger than the crops that a model was trained on: a voxel, counted from 0 "
            "along the axes of the array as stored; ROW,COLUMN of a picture; or a point in space as a viewer shows it, in mm, "
            "such as L30,P20,S50. Without --slices, only the slice with that place is segmented.",
            default="the middle of each slice",
        ),
    ] = None,
    shrink: Annotated[
        int | None,
        options.option(
            "--shrink F",
            "With --at, for a structure that fills the model's window or more: the model sees F times as much along either "
            "axis, with F pixels as one.",
            default="1",
            min=1,
        ),
    ] = None,
    series: Annotated[
        int | None,
        options.option("--series NUMBER", "Which DICOM series of a folder that holds several.", default="the only one"),
    ] = None,
    *,
    model: options.Model,
    chain: options.Chain,
    preview: Annotated[bool, options.output_option("--preview/--no-preview", "Write a picture too.")] = True,
    page: Annotated[
        bool,
        options.output_option(
            "--page",
            "Write a web page too, NAME_page.html, on which to browse the slices and maps: one file that loads nothing else.",
        ),
    ] = False,
    dicom_seg: Annotated[
        bool,
        options.output_option(
            "--dicom-seg", "Write the levels as a DICOM segmentation too, NAME_levels.dcm; for scans that are DICOM."
        ),
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Map how many experts would agree, for a scan or a folder of scans.

    Written to OUT for each scan, on the scan's own grid:

    NAME_soft.nii.gz         share of annotators who would include a voxel, 0 to 1
    NAME_levels.nii.gz       one map per level: at least 1, 2 ... C agree
    NAME_uncertainty.nii.gz  entropy in bits; standard deviation over runs
    NAME_mask.nii.gz         1 where the share is one half or more
    NAME_levels.dcm          with --dicom-seg, a DICOM segmentation
    NAME_preview.png         a picture of the result
    NAME_page.html           with --page, a web page to browse the slices
    NAME.json                what was done: hashes, seed, timings, volumes

    Models of other variants write the same files; docs/variants.md says what
    they hold, and `annotator` adds NAME_annotators.nii.gz, one map per annotator.

    Examples:

    cdiff segment scan.nii.gz
    cdiff segment scan.nii.gz -o maps --fast --page
    cdiff segment a.nii.gz b.nii.gz -o maps --fast
    cdiff segment folder -o maps --model my_bundle --steps 20 --sampler ddim
    cdiff segment chest.nii.gz --at 212,180,45 --slices 40:51
    cdiff segment dicom_folder --series 4 --at L30,P20,S50 --dicom-seg
    """
    from cdiff.runtime.dicom_seg import must_allow_dicom_seg
    from cdiff.runtime.files import must_take_files
    from cdiff.runtime.overlap import overlapped
    from cdiff.runtime.pictures.drawing import must_draw
    from cdiff.runtime.results import must_be_free
    from cdiff.runtime.scans.inputs import must_exist, scans_named

    paths = [must_exist(path) for path in _named(named or [], input_)]
    must_take_files(output)
    if preview or page:
        must_draw()
    segmenter = model.load(quiet)
    if hint := chain.hint(segmenter):
        say(hint, quiet)
    notes: list[str] = []
    scans = scans_named(paths, segmenter.manifest.image_channels, segmenter.manifest.modalities, notes)
    for note in notes:
        warn(note)
    for option, given, what in (("--at", at, "a place in one scan"), ("--series", series, "a series of one folder")):
        if given is not None and len(scans) > 1:
            where = f"{paths[0]} holds {len(scans)} scans" if len(paths) == 1 else f"{len(scans)} scans are named"
            raise CdiffError(f"{option} names {what}, but {where}; name one scan alone")
    labels = {item.name: f"{number}/{len(scans)} {item.name}" for number, item in enumerate(scans, start=1)}

    def read(item: NamedScan) -> Prepared:
        # Before hours of work, not after.
        must_be_free(output, item.name, segmenter.manifest.draws, preview=preview, page=page, dicom_seg=dicom_seg)
        ready = segmenter.prepare(item.path, slices=slices, slice_axis=slice_axis, at=at, shrink=shrink, series=series)
        if dicom_seg:
            must_allow_dicom_seg(ready.scan)
        return ready

    def work(item: NamedScan, ready: Prepared) -> Result:
        with Meter(labels[item.name] if len(scans) > 1 else item.name, quiet) as meter:
            return segmenter.segment(ready, **chain.arguments(), progress=meter)

    told: set[str] = set()
    known: dict[str, float] = {}

    def write(item: NamedScan, result: Result) -> None:
        report = result.save(output, item.name, preview=preview, page=page, dicom_seg=dicom_seg)
        for note in report["warnings"]:
            if note not in told:  # once is enough for a folder; each report has its own
                warn(f"{item.name}: {note}")
        told.update(report["warnings"])
        seconds, expected = report["timings"], report["expected_dice"]["mask"]
        if expected is not None:
            known[item.name] = expected
        about = "the mask is empty" if expected is None else f"expected Dice {expected:.2f}"
        say(
            f"{item.name}: {sum(seconds[part] for part in ('read', 'frame', 'segment', 'write')):.1f} s, {about}", quiet
        )
        shown = "page.html" if page else "preview.png" if preview else "soft.nii.gz"
        Meter.show(str(output / f"{item.name}_{shown}"))

    failed = 0
    with closing(overlapped(scans, read, work, write)) as outcomes:
        for outcome in outcomes:
            if outcome.error is None:
                continue
            if len(scans) == 1:
                raise outcome.error
            failed += 1
            fail(f"{outcome.item.name}: {outcome.error}")
    if len(scans) > 1:
        say(f"{len(scans) - failed} of {len(scans)} scans are in {output}", quiet)
        if len(known) > FIRST:
            lowest = sorted(known, key=lambda name: known[name])[:FIRST]
            say(
                f"look first at {', '.join(f'{name} ({known[name]:.2f})' for name in lowest)}: the lowest expected Dice",
                quiet,
            )
    if failed:
        fail(f"{failed} of {len(scans)} scans failed; the lines above say why")
        raise typer.Exit(SOME_FAILED)


def _named(scans: list[Path], input_: Path | None) -> list[Path]:
    """What was named, by either way; a file that is named twice is one. Raises CdiffError when nothing is."""
    named = list(dict.fromkeys([*scans, *([input_] if input_ else [])]))
    if not named:
        raise CdiffError("no scan is named; try: cdiff segment SCAN (see cdiff segment --help)")
    return named
