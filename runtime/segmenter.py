"""Turns scans into maps of agreement, with a bundle and an engine that stay loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.engines.base import Engine
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.engines.trt import BuildEngines
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.forked import must_be_of_this_process
from cdiff.runtime.manifest import NAME as MANIFEST
from cdiff.runtime.manifest import ONE_ZOOM, Manifest
from cdiff.runtime.overlap import Outcome, overlapped
from cdiff.runtime.prepared import Clock, Prepared, Slices, about_place, notes, prepare, whole
from cdiff.runtime.report import about_expected, build_report, describe_input, expectation, meaning, volumes
from cdiff.runtime.results import Result
from cdiff.runtime.sampling.batching import Progress, Timings, most_rows_of, rows_per_batch
from cdiff.runtime.sampling.framing import Windows
from cdiff.runtime.sampling.sampler import SamplerTable, sampler_table
from cdiff.runtime.sampling.sums import Gathered
from cdiff.runtime.sampling.zoom import check_zooms, numbered, shared_out, together
from cdiff.runtime.scans.place import At
from cdiff.runtime.scans.scan import Scan, ScanInput, is_one_scan
from cdiff.runtime.sharing import segment_shared
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import Variant

LOG = logging.getLogger("cdiff")
Combine = Literal["mean", "vote"]
RUNS = 25
SAMPLER = "ddpm"


class Segmenter:
    """Call `Segmenter.open(folder)` once, then `.segment(scan)` for any number of scans, from any threads; another process must open its own."""

    def __init__(self, bundle: Bundle, engine: Engine, *more: Engine) -> None:
        """`more` engines share a scan's slices with the first. Raises CdiffError if the bundle has changed since it was opened."""
        self.bundle = bundle
        self.engine, self.engines = engine, (engine, *more)
        self._most_rows: int | None = None
        self._process = os.getpid()
        self.manifest_sha256 = sha256(bundle.path / MANIFEST)
        bundle.must_be_unchanged()  # the engines have read the graphs since their hashes were checked

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        engine: str = "auto",
        device: str = "cpu",
        *,
        build: BuildEngines | None = None,
    ) -> Segmenter:
        """Check the bundle's hashes and load its graphs into an engine.

        engine: a name in `runtime.engines.registry`, or "auto" to pick one; `segmenter.engine.name` tells which was picked.
        device: `cpu`, `cuda:N`, or several GPUs separated by commas, which share a scan's slices.
        build: a function that builds TensorRT engines where none are cached for the GPU, such as `cdiff.export.tensorrt.build_engines`.
        Raises CdiffError when the bundle is not intact, or the engine asked for cannot run on that device.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        devices = device.split(",")
        numbers = [parse_device(one) for one in devices]
        if len(devices) > 1 and (len(set(numbers)) < len(numbers) or None in numbers):
            raise CdiffError(f"device {device!r}: give one device, or several different GPUs such as cuda:0,cuda:1")
        return cls(opened, *(open_engine(opened, engine, one, build=build) for one in devices))

    def __repr__(self) -> str:
        devices = ",".join(engine.device for engine in self.engines)
        return f"<Segmenter {self.manifest.name}: {self.engine.name} {self.engine.version} on {devices}>"

    def __reduce__(self) -> NoReturn:
        """Raise CdiffError: an engine, and what it holds on its device, cannot leave this process."""
        raise CdiffError(
            "a model that is loaded cannot be copied, pickled or sent to another process; open it there, with cdiff.load (threads share one)"
        )

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about its model."""
        return self.bundle.manifest

    def runs(self, asked: int | None = None, fast: bool = False) -> int:
        """The number of runs that `segment` makes for these arguments."""
        return asked if asked is not None else int(self.manifest.fast.get("runs", RUNS)) if fast else RUNS

    def sampling(
        self,
        runs: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        fast: bool = False,
        seed: int = 0,
    ) -> tuple[int, SamplerTable]:
        """The number of runs and the sampler's table that `segment` uses for these arguments. Raises CdiffError for one out of range, or `fast`
        where the bundle states no settings for it."""
        if not 0 <= whole("seed", seed) < 2**64:
            raise CdiffError(f"seed {seed} is out of range; use a whole number from 0 to 2^64 - 1")
        preset = self.manifest.fast if fast else {}
        if fast and not preset.keys() & {"steps", "runs"}:  # the defaults, the whole protocol, would not be fast
            raise CdiffError(
                "this bundle states neither steps nor runs for fast; leave fast out, and give steps and runs"
            )
        runs = whole("runs", self.runs(runs, fast))
        if runs < 1:
            raise CdiffError(f"runs {runs} is out of range; at least one is needed")
        sampler = str(preset.get("sampler", SAMPLER)) if sampler is None else sampler
        steps = int(preset.get("steps", self.manifest.T)) if steps is None else whole("steps", steps)
        return runs, sampler_table(sampler, self.manifest.noise_schedule, steps)

    def segment(
        self,
        scan: ScanInput | Scan | Prepared,
        *,
        runs: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        fast: bool = False,
        combine: str = "mean",
        mirror: bool | None = None,
        zooms: Sequence[float] | None = None,
        seed: int = 0,
        slices: Slices = None,
        slice_axis: int | None = None,
        at: At | None = None,
        shrink: int | None = None,
        series: int | None = None,
        batch: int | None = None,
        keep_runs: bool = False,
        progress: Progress | None = None,
    ) -> Result:
        """Segment a scan: a path (NIfTI, NRRD, MetaImage, PNG, DICOM ...), a NumPy array ([H, W], or three axes) or a nibabel NIfTI
        image; for a model of several channels also a list of paths, one file per modality, in the order of its training. It may also be
        what `read_scan` returned for this model, cut along its axis, or what `prepare` returned; then give `slices`, `slice_axis`,
        `at`, `shrink` and `series` to prepare, and slice_axis and series to read_scan.

        runs, steps, sampler: by default 25 runs of ddpm over all T steps; with `fast`, what the bundle states for it.
        combine: "mean" over runs, or "vote", which rounds each map's mean over runs, as the published code does; only for models
        that draw several maps per slice.
        mirror: let the runs see the slice as it is and mirrored, in turn; by default as the bundle states.
        zooms: let the runs see the slice at these multiples of its size, in turn; by default those that the bundle states. Only models
        of the framing `centre` take any besides 1.
        slices: "A:B", from A to before B; elsewhere the maps are NaN and the mask 0. A slice's maps do not depend on this choice.
        slice_axis: the axis of the array as stored to cut along; by default the bundle's. batch: rows per padded batch.
        at: where the structure is, in a scan larger than the crops that a model of the framing `centre` was trained on: a voxel
        (i, j, k), counted from 0 along the axes of the array as stored; (i, j) in a 2-D image, row and column in a picture; or a
        point in space, such as "L30,P20,S50". The model's window lies around it in every chosen slice, and intensities are
        normalised over a part as large as the slices of the training. Without `slices`, only its slice is segmented.
        shrink: for a structure larger than the window: this many pixels along either axis become one before the model sees them,
        and the maps are resampled back. series: which DICOM series, in a folder that holds several.
        keep_runs: keep every run's maps, uint8, in `result.stack.runs`. progress: called as progress(done, total).
        Raises CdiffError for a scan that cannot be read faithfully, for arguments out of range, and when the network returns a
        value that is not finite.
        """
        must_be_of_this_process(self._process)
        manifest, variant = self.manifest, self.manifest.draws
        if combine not in get_args(Combine):
            raise CdiffError(f"combine {combine!r} is not known; use 'mean' or 'vote'")
        if combine == "vote" and manifest.conditions == 1:
            raise CdiffError(
                f"'vote' rounds each map at one half, but this model ({variant.name}) draws a single map: the soft map would be the mask; use 'mean'"
            )
        runs, table = self.sampling(runs, steps, sampler, fast, seed)
        seed, batch = whole("seed", seed), None if batch is None else whole("batch", batch)
        fast, mirror = bool(fast), manifest.mirror if mirror is None else bool(mirror)
        zooms = manifest.zooms if zooms is None else check_zooms(zooms, manifest.framing)
        if not isinstance(scan, Prepared):
            scan = self.prepare(scan, slices=slices, slice_axis=slice_axis, at=at, shrink=shrink, series=series)
        elif any(given is not None for given in (slices, slice_axis, at, shrink, series)):
            raise CdiffError(
                "this scan was prepared already; give slices, slice_axis, at, shrink and series to prepare"
            )
        clock, read, chosen, windows = Clock(), scan.scan, scan.chosen, scan.windows

        shares = shared_out(runs, zooms)
        seen = [windows.zoomed(zoom) for zoom, _ in shares]
        found, spent, done, rows = [], Timings(), 0, 0
        for view, (zoom, number) in zip(seen, shares, strict=True):
            # On a GPU all zooms use one batch size: another would need new buffers and a newly captured step.
            per_window = manifest.conditions * (number if self.engine.device == "cpu" else shares[0][1])
            most = most_rows_of(self.engines, manifest.features_channels, manifest.image_size)
            fitting = rows_per_batch(len(view) * per_window, self.engine.device, per_window, most)
            results, rows, taken = self._fitting(
                fitting if batch is None else batch,
                view,
                table,
                levels=manifest.conditions,
                runs=number,
                seed=seed,
                slice_ids=numbered(chosen, zoom),
                mirror=mirror,
                keep_runs=keep_runs,
                progress=_part_of(progress, done, number, runs),
            )
            found.append(results)
            spent, done = spent + taken, done + number
        finished = together(found, [number for _, number in shares], [view.covered for view in seen])
        if manifest.outside == 0:
            finished = Gathered.of((one.for_masks_from_zero() for one in finished), len(chosen))
        maps = finished.means
        if combine == "vote":
            maps = (maps >= 0.5).astype(np.float32)
        stack = Stack(maps, finished.spread, finished.kept, variant, manifest.levels, finished.box, finished.shape)
        clock.lap("segment")
        expected = expectation(stack, chosen)
        report = build_report(
            {
                **self._model_report(),
                **_sampling_report(table, runs, combine, mirror, zooms, seed, fast, rows),
                "combine_note": _combine_note(combine, variant),
                "framing": {
                    "mode": manifest.framing,
                    "model_size": list(manifest.image_size),
                    "windows_per_slice": windows.per_slice,
                    **({} if scan.place is None else scan.place.to_json()),
                },
                "input": describe_input(read),
                "slices": {"first": chosen.start, "end": chosen.stop, "of": len(read.slices)},
                "timings": {
                    **scan.seconds,
                    **clock.laps,
                    **{key: round(value, 3) for key, value in asdict(spent).items()},
                },
                "volumes": volumes(stack, read.grid),
                "expected_dice": expected,
                "warnings": [
                    *notes(scan, manifest),
                    *about_place(scan, manifest, stack),
                    *about_expected(expected, variant),
                ],
            }
        )
        window = None if scan.place is None else scan.place.window
        return Result(read.grid, read.slices, chosen, stack, read.name, report, window, read.dicom)

    def prepare(
        self,
        scan: ScanInput | Scan,
        *,
        slices: Slices = None,
        slice_axis: int | None = None,
        at: At | None = None,
        shrink: int | None = None,
        series: int | None = None,
    ) -> Prepared:
        """Read a scan and do everything that does not need the engine, perhaps in another thread; `segment` takes the result.

        Arguments and errors are those of `segment`.
        """
        return prepare(scan, self.manifest, slices, slice_axis, at, series, shrink)

    def segment_many(
        self,
        scans: Iterable[ScanInput],
        *,
        save_to: str | os.PathLike[str] | None = None,
        preview: bool = True,
        page: bool = False,
        dicom_seg: bool = False,
        slices: Slices = None,
        slice_axis: int | None = None,
        series: int | None = None,
        progress: Callable[[ScanInput, int, int], None] | None = None,
        **options: Any,
    ) -> Iterator[Outcome[ScanInput, Result]]:
        """Segment scan after scan; while the engine works, the next scan is read and the last one's files are written.

        Yields, in the order of `scans`, an outcome with `.item` (the scan as given) and either `.value` (its result) or `.error`:
        an error in one scan does not stop the others. The maps and files are those of `segment` and `Result.save`.
        save_to: the folder for the scans' files; without it nothing is written. preview, page, dicom_seg: as for `Result.save`. A
        second scan of the same name gets an error. progress: called as progress(scan, done, total), with the scan as given, because
        the engine may already be done with the next scan when an outcome is yielded. options: any other arguments of `segment`, for
        every scan, except `at` and `shrink`, which are about a single scan. At most three scans and their maps are in memory,
        besides those that the caller keeps. Raises CdiffError for `at` and `shrink`, and for one scan in place of several.
        """
        must_be_of_this_process(self._process)
        if is_one_scan(scans):  # a path's letters and an array's rows would be taken for scans
            raise CdiffError(
                "segment_many takes a list of scans, and this is one scan; put it in a list, or call segment (an array of several scans: list(array))"
            )
        if options.get("at") is not None or options.get("shrink") is not None:
            raise CdiffError("at names a place in one scan, but segment_many takes many; call segment for each scan")
        names: set[str] = set()

        def save(scan: ScanInput, result: Result) -> Result:
            if save_to is None:
                return result
            if result.name in names:
                raise CdiffError(f"another scan is called {result.name} too and was written to {save_to}; rename one")
            names.add(result.name)
            report = result.save(Path(save_to), preview=preview, page=page, dicom_seg=dicom_seg)
            return replace(result, report=report)

        def work(scan: ScanInput, ready: Prepared) -> Result:
            return self.segment(ready, progress=None if progress is None else partial(progress, scan), **options)

        return overlapped(
            scans,
            lambda scan: self.prepare(scan, slices=slices, slice_axis=slice_axis, series=series),
            work,
            save,
        )

    def _fitting(
        self, batch: int, windows: Windows, table: SamplerTable, **options: Any
    ) -> tuple[Gathered, int, Timings]:
        """Segment in batches of `batch` rows, halved until they fit into the device's memory.

        The next scan begins with the size that fitted; each halving is logged once. Returns the results, the batch size and the timings.
        """
        if self._most_rows is not None:
            batch = min(batch, self._most_rows)
        asked = batch
        while True:
            spent = Timings()
            try:
                found = segment_shared(self.engines, windows, table, batch=batch, timings=spent, **options)
            except OutOfMemory as error:
                if batch == 1:  # the batch was not the cause, so the next scan may begin with a whole one
                    raise
                # Logged as text: a log record that holds the error would keep the memory that its frames hold.
                LOG.warning("%s; going on with %d rows per batch instead of %d", str(error), -(-batch // 2), batch)
                batch = -(-batch // 2)
            else:
                if batch < asked:
                    self._most_rows = batch
                return found, batch, spent

    def _model_report(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "bundle": manifest.name,
            "task": manifest.task,
            "manifest_sha256": self.manifest_sha256,
            "variant": manifest.variant,
            "levels": manifest.levels,
            "maps": meaning(manifest.draws),
            "engine": self.engine.name,
            "engine_version": self.engine.version,
            "device": ",".join(engine.device for engine in self.engines),
            "precision": manifest.precision,
        }


def _part_of(progress: Progress | None, before: int, runs: int, of: int) -> Progress | None:
    """Turn the progress of `runs` of a scan's `of` runs, `before` of which are already done, into that of all of them."""
    if progress is None or runs == of:
        return progress
    return lambda done, total: progress((before * total + runs * done) // runs, of * total // runs)


def _sampling_report(
    table: SamplerTable,
    runs: int,
    combine: str,
    mirror: bool,
    zooms: tuple[float, ...],
    seed: int,
    fast: bool,
    batch: int,
) -> dict[str, Any]:
    return {
        "sampler": table.name,
        "steps": len(table),
        "runs": runs,
        "combine": combine,
        "mirror": mirror,
        **({} if zooms == ONE_ZOOM else {"zooms": list(zooms)}),
        "seed": seed,
        "fast": fast,
        "batch": batch,
    }


def _combine_note(combine: str, variant: Variant) -> str:
    steps = ["mean over runs"]
    if combine == "vote":
        steps.append(f"rounded at one half for each {variant.told}")
    if variant.told:
        steps.append(f"then mean over {variant.told}s")
    return ", ".join(steps)
