"""The builder's calls, their order and arguments, on doubles of TensorRT 10.16, 11.4 and TensorRT for RTX 1.7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cdiff
from cdiff.export import tensorrt
from cdiff.export.tensorrt import BuildOptions, build_engines
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.engines.trt import LAYERS, RECORD, Flavour, Gpu, Profile, open_or_build
from cdiff.runtime.errors import CdiffError
from tests.export.engine_bundles import pair_bundle
from tests.export.trt_double import Double

H200 = Gpu("NVIDIA H200", "9.0", 139 << 30)
PROFILE = Profile(1, 75, 75, 10)
NATIVE = ("10.16.1.11", "11.4.0.106")
RTX = "1.7.1.116"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return pair_bundle(tmp_path / "bundle", precision="float16")


@pytest.fixture(params=[*NATIVE, RTX])
def double(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    return use(request.param, monkeypatch)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    return use(request.param, monkeypatch)


def use(version: str, monkeypatch: pytest.MonkeyPatch) -> Double:
    made = Double(version)
    monkeypatch.setattr(tensorrt, "load_trt", lambda flavour: made)
    monkeypatch.setattr("cdiff.runtime.engines.trt.load_trt", lambda flavour: made)
    return made


def build(bundle: Bundle, double: Double, **options: Any) -> tuple[Path, Path]:
    flavour: Flavour = "tensorrt-rtx" if double.rtx else "tensorrt"
    target: Any = ("8.9", "12.0") if double.rtx else H200
    return build_engines(bundle, flavour, target, PROFILE, options=BuildOptions(**options))


def test_the_order_of_a_build(bundle: Bundle, double: Double) -> None:
    build(bundle, double)
    order = [name for name, *_ in double.calls]
    first = order[: order.index("build_serialized_network") + 1]
    for earlier, later in (
        ("create_network", "parse_from_file"),
        ("parse_from_file", "create_builder_config"),
        ("set_shape", "add_optimization_profile"),
        ("add_optimization_profile", "build_serialized_network"),
        ("set", "build_serialized_network"),
    ):
        assert first.index(earlier) < first.index(later), first
    assert order.count("build_serialized_network") == 2
    assert [Path(path).name for (path,) in double.called("parse_from_file")] == ["encoder.onnx", "denoiser.onnx"]


def test_networks_are_strongly_typed_and_no_precision_is_left_to_the_builder(bundle: Bundle, double: Double) -> None:
    build(bundle, double)
    strongly = 1 << int(double.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert double.called("create_network") == [(strongly,)] * 2
    assert double.called("clear_flag") == [("TF32",)] * 2
    assert double.called("set_flag") == [("STRICT_NANS",)] * 2
    assert ("set", "profiling_verbosity", double.ProfilingVerbosity.DETAILED) in double.calls


def test_the_shapes_of_both_graphs(bundle: Bundle, double: Double) -> None:
    build(bundle, double)
    shapes = {name: lengths for name, *lengths in double.called("set_shape")}
    assert shapes["image"] == [(1, 1, 16, 16)] * 3
    assert shapes["x"] == [(1, 1, 16, 16), (75, 1, 16, 16), (75, 1, 16, 16)]
    assert shapes["features"] == [(1, 4, 16, 16), (10, 4, 16, 16), (10, 4, 16, 16)]
    assert shapes["row_slice"] == shapes["t"] == shapes["level"] == [(1,), (75,), (75,)]


def test_options_reach_the_builder(bundle: Bundle, native: Double) -> None:
    asked = {"refit": True, "version_compatible": True, "hardware_compatible": "ampere+", "workspace_bytes": 1 << 30}
    build(bundle, native, **asked)
    assert native.called("set_flag") == [("STRICT_NANS",), ("REFIT",), ("VERSION_COMPATIBLE",)] * 2
    assert native.called("set_memory_pool_limit") == [("WORKSPACE", 1 << 30)] * 2
    assert ("set", "hardware_compatibility_level", native.HardwareCompatibilityLevel.AMPERE_PLUS) in native.calls


def test_rtx_is_told_its_targets_and_keeps_no_timings(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    double = use(RTX, monkeypatch)
    build(bundle, double)
    first = double.calls[: double.calls.index(("build_serialized_network",))]
    number = first.index(("set", "num_compute_capabilities", 2))
    assert first[number + 1 : number + 3] == [
        ("set_compute_capability", "SM89", 0),
        ("set_compute_capability", "SM120", 1),
    ]
    assert not double.called("create_timing_cache")
    assert not list(bundle.engines.glob("timings*"))


@pytest.mark.parametrize(
    "options", [{"version_compatible": True}, {"hardware_compatible": "ampere+"}, {"workspace_bytes": 0}]
)
def test_options_that_are_not_to_be_had(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    double = use(RTX, monkeypatch)
    with pytest.raises(CdiffError):
        build(bundle, double, **options)
    assert not double.calls


def test_a_target_that_rtx_refuses_is_not_left_out_in_silence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    double = use(RTX, monkeypatch)
    double.takes_capabilities = False
    with pytest.raises(CdiffError, match=r"refuses compute capability 8\.9"):
        build(bundle, double)
    assert not double.called("build_serialized_network")


def test_a_gpu_that_rtx_does_not_know_is_refused_when_a_run_wants_an_engine_for_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an H200, where a run with --engine tensorrt-rtx builds for the GPU that it finds."""
    double = use(RTX, monkeypatch)
    with pytest.raises(CdiffError, match=r"does not build for compute capability 9\.0.*use --engine tensorrt"):
        open_or_build(bundle, "tensorrt-rtx", H200, PROFILE, build_engines)
    assert not double.calls


def test_shapes_that_are_refused_are_not_built_without(bundle: Bundle, double: Double) -> None:
    double.takes_profiles = False
    with pytest.raises(CdiffError, match=r"refuses the shapes .*'image': \(1, 1, 1\).* for encoder\.onnx"):
        build(bundle, double)
    assert not double.called("build_serialized_network")


def test_an_engine_of_which_no_layer_is_told_counts_as_no_half_precision(bundle: Bundle, native: Double) -> None:
    """Nobody could say then whether --fp16 gave half precision."""
    native.network_type, native.engine_type = "UNKNOWN", "NONE"
    with pytest.raises(
        CdiffError, match=r"encoder\.onnx holds no convolution that TensorRT .* reports: export it again"
    ):
        build(bundle, native)
    assert not [path for path in bundle.engines.iterdir() if path.is_dir()]


def test_a_graph_with_other_inputs_is_refused(bundle: Bundle, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input without a profile would be of any size, and the builder's own words do not say what to do."""
    monkeypatch.setattr(tensorrt, "ROW_INPUTS", ("x", "row_slice", "t"))
    with pytest.raises(CdiffError, match=r"denoiser\.onnx is not a graph of this version of cdiff"):
        build(bundle, double)


def test_timings_are_kept_and_used_again(bundle: Bundle, native: Double) -> None:
    build(bundle, native)
    # The encoder starts from nothing; what it left serves the denoiser.
    assert native.called("set_timing_cache") == [(b"", False), (b"timings after ", False)]
    (kept,) = bundle.engines.glob("timings*")
    assert native.__version__ in kept.name
    assert "H200" in kept.name


def test_timings_that_do_not_fit_are_made_anew(bundle: Bundle, native: Double) -> None:
    build(bundle, native)
    native.calls.clear()
    native.cache_fits = False
    build(bundle, native, refit=True)
    used = native.called("set_timing_cache")
    assert used[0][0] != b""
    assert used[1] == (b"", False)


def test_a_graph_that_was_replaced_meanwhile_is_not_built_under_the_old_ones_hash(
    bundle: Bundle, native: Double
) -> None:
    opened = open_bundle(bundle.path)
    bundle.denoiser.write_bytes(bundle.denoiser.read_bytes() + b"\0")
    with pytest.raises(CdiffError, match=r"denoiser\.onnx has changed since the bundle was opened"):
        build(opened, native)
    assert not [path for path in bundle.engines.iterdir() if path.is_dir()]


def test_a_graph_that_cannot_be_parsed(bundle: Bundle, double: Double) -> None:
    double.parse_error = ("node_7", "Einsum", "no importer\n registered")
    with pytest.raises(CdiffError, match=r"encoder\.onnx \(Einsum node_7: no importer registered\)"):
        build(bundle, double)
    assert not double.called("build_serialized_network")


def test_a_build_that_fails_says_why_and_leaves_nothing(bundle: Bundle, double: Double) -> None:
    double.plan = None
    with pytest.raises(CdiffError, match=r"no tactics within workspace limit.*larger workspace"):
        build(bundle, double)
    assert not list(bundle.engines.iterdir())


def test_an_engine_that_tensorrt_does_not_load_is_not_kept(bundle: Bundle, native: Double) -> None:
    native.loads = False
    with pytest.raises(CdiffError, match=r"does not load the engine that it has just built"):
        build(bundle, native)
    assert not [path for path in bundle.engines.iterdir() if path.is_dir()]


def test_without_a_gpu_the_builder_does_not_start(bundle: Bundle, native: Double) -> None:
    native.starts = False
    with pytest.raises(CdiffError, match=r"needs an NVIDIA GPU.*error: 35"):
        build(bundle, native)
    with pytest.raises(CdiffError, match="first run"):
        build_engines(bundle, "tensorrt", ("9.0",), PROFILE)


def test_half_precision_that_was_lost_is_an_error(bundle: Bundle, native: Double) -> None:
    native.engine_type = "FLOAT"  # the graph was in half precision, and the engine is not
    with pytest.raises(CdiffError, match=r"only 0% .* \(inspector\)"):
        build(bundle, native)
    native.engine_type, native.network_type = "HALF", "FLOAT"
    with pytest.raises(CdiffError, match=r"only 0% .* \(network\)"):
        build(bundle, native)
    assert not [path for path in bundle.engines.iterdir() if path.is_dir()]


def test_a_float32_bundle_may_be_float32(tmp_path: Path, native: Double) -> None:
    native.engine_type = native.network_type = "FLOAT"
    encoder, _ = build(pair_bundle(tmp_path / "float32"), native)
    assert json.loads((encoder.parent / LAYERS).read_text())["half_share"] == 0


def test_what_lies_beside_an_engine(bundle: Bundle, native: Double) -> None:
    for path in build(bundle, native):
        assert path.read_bytes() == b"plan"
        layers = json.loads((path.parent / LAYERS).read_text())
        assert (layers["read_from"], layers["half_share"]) == ("inspector", 1)
        assert layers["layers"][0]["tactic"] == "sm90_xmma_fprop"
        record = json.loads((path.parent / RECORD).read_text())
        assert record["key"]["gpu"] == "NVIDIA H200"
        assert record["key"]["version"] == native.__version__


def test_what_is_there_is_not_built_again_unless_it_is_damaged(
    bundle: Bundle, native: Double, caplog: pytest.LogCaptureFixture
) -> None:
    paths = build(bundle, native)
    assert build(bundle, native) == paths
    assert len(native.called("build_serialized_network")) == 2
    paths[1].write_bytes(b"plam")
    assert build(bundle, native) == paths
    assert "denoiser.engine is missing or damaged" in caplog.text
    assert len(native.called("build_serialized_network")) == 3
    assert paths[1].read_bytes() == b"plan"


def test_other_options_are_another_engine(bundle: Bundle, native: Double) -> None:
    plain, refit = build(bundle, native)[1], build(bundle, native, refit=True)[1]
    assert plain != refit
    # The runtime, which asks for neither, gets the one with fewer options.
    assert open_or_build(bundle, "tensorrt", H200, PROFILE).denoiser == plain


def test_an_engine_serves_the_gpus_that_it_was_made_compatible_with(bundle: Bundle, native: Double) -> None:
    """And no others: on a GPU that it was not built for, TensorRT would refuse it, or run it in another way."""
    newer, twin, older = Gpu("NVIDIA L4", "8.9", 1), Gpu("NVIDIA H100", "9.0", 1), Gpu("Tesla T4", "7.5", 1)

    def serves(gpu: Gpu) -> bool:
        try:
            return bool(open_or_build(bundle, "tensorrt", gpu, PROFILE))
        except CdiffError:
            return False

    build(bundle, native)
    assert [serves(gpu) for gpu in (H200, newer, twin, older)] == [True, False, False, False]
    build(bundle, native, hardware_compatible="same-capability")
    assert [serves(gpu) for gpu in (H200, newer, twin, older)] == [True, False, True, False]
    build(bundle, native, hardware_compatible="ampere+")
    assert [serves(gpu) for gpu in (H200, newer, twin, older)] == [True, True, True, False]
    with pytest.raises(CdiffError, match="'turing' is not known"):
        build(bundle, native, hardware_compatible="turing")


def test_the_runtime_builds_what_is_missing_and_only_then(bundle: Bundle, native: Double) -> None:
    with pytest.raises(CdiffError, match=r"cdiff export .* --engine tensorrt"):
        open_or_build(bundle, "tensorrt", H200, PROFILE)
    pair = open_or_build(bundle, "tensorrt", H200, PROFILE, build_engines)
    assert pair.profile == PROFILE
    small = Profile(1, 30, 30, 4)
    assert open_or_build(bundle, "tensorrt", H200, small) == pair, "an engine for more rows serves fewer"
    assert len(native.called("build_serialized_network")) == 2
    assert build_engines(bundle, "tensorrt", H200, small)[1] != pair.denoiser, "but whoever asks for one gets it"
    assert len(native.called("build_serialized_network")) == 3  # the encoder has no rows


def test_the_public_face_hands_a_builder_down(bundle: Bundle, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime cannot import the exporter, so `cdiff.load` gives it what builds the engines of a GPU."""
    given: dict[str, Any] = {}

    def open_engine(opened: Bundle, name: str, device: str, **more: Any) -> Any:
        given.update(more, bundle=opened, where=(name, device))

    monkeypatch.setattr("cdiff.runtime.segmenter.open_engine", open_engine)
    cdiff.load(bundle.path, engine="tensorrt", device="cuda:1")
    assert given["where"] == ("tensorrt", "cuda:1")
    flavour: Flavour = "tensorrt-rtx" if double.rtx else "tensorrt"
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
    pair = open_or_build(given["bundle"], flavour, gpu, PROFILE, given["build"])
    assert pair.denoiser.read_bytes() == b"plan"
    own: Any = object()
    cdiff.load(bundle.path, build=own)
    assert (given["build"] is own, given["where"]) == (True, ("auto", "cpu"))


def test_ctrl_c_in_a_build_stops_it(bundle: Bundle, double: Double) -> None:
    """The signal reaches a builder that is busy in C++: its next step is told to stop, and nothing is left behind."""
    import os
    import signal
    import time

    def interrupted(monitor: Any) -> bool:
        monitor.phase_start("Building engine", None, 4)
        assert monitor.step_complete("Building engine", 0)
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 10
        while (going := monitor.step_complete("Building engine", 1)) and time.monotonic() < until:
            time.sleep(0.01)
        return going

    double.on_build = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, double)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(bundle.engines.iterdir())


def test_progress_rises_to_the_end(bundle: Bundle, double: Double) -> None:
    def nested(monitor: Any) -> bool:
        monitor.phase_start("outer", None, 2)
        monitor.phase_start("nothing to do", "outer", 0)
        monitor.phase_finish("nothing to do")
        monitor.phase_start("inner", "outer", 4)
        for step in range(4):
            assert monitor.step_complete("inner", step)
        monitor.phase_finish("inner")
        monitor.step_complete("outer", 0)
        monitor.phase_start("inner", "outer", 1)  # a name may come again
        monitor.phase_finish("inner")
        monitor.step_complete("outer", 1)
        monitor.phase_finish("outer")
        return True

    double.on_build = nested
    told: list[float] = []
    flavour: Flavour = "tensorrt-rtx" if double.rtx else "tensorrt"
    target: Any = ("8.9",) if double.rtx else H200
    build_engines(bundle, flavour, target, PROFILE, progress=lambda done, total: told.append(done / total))
    assert told == sorted(told)
    assert told[:4] == [0.0625, 0.125, 0.1875, 0.25]
    assert told[-1] == 1


def test_a_version_compatible_engine_is_noted_as_the_user_s_own(bundle: Bundle, native: Double) -> None:
    """The runtime lets an engine run code on the host only where it finds this note; a plain engine carries none and needs none."""
    from cdiff.runtime.engines.hostcode import must_be_trusted

    plain, lasting = build(bundle, native)[1], build(bundle, native, version_compatible=True)[1]
    key = json.loads((lasting.parent / RECORD).read_text())
    must_be_trusted(lasting, key["sha256"])
    pair = open_or_build(bundle, "tensorrt", H200, PROFILE)
    assert (pair.denoiser, pair.host_code) == (plain, frozenset())
    for path in plain.parent.iterdir():
        path.unlink()
    assert open_or_build(bundle, "tensorrt", H200, PROFILE).host_code == {lasting}
