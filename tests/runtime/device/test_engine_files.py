"""What TensorRT's runtime may load from a folder: kernels compiled before, and engines that carry code for the host."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.engines.hostcode import TRUST, must_be_trusted, note_own
from cdiff.runtime.engines.jit import JitFile
from cdiff.runtime.engines.trt import user_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, FakeEngine, framed, run, scan

TABLE = sampler_table("ddpm", SCHEDULE, 3)


def compiled(setup: Any) -> list[str]:
    return [call[1] for call in setup.world.named("compile")]


def segment(setup: Any, batch: int = 7) -> None:
    windows = framed(scan((1, SIZE, SIZE)))
    got, want = run(setup.engine, windows, TABLE, batch=batch), run(FakeEngine(), windows, TABLE, batch=batch)
    np.testing.assert_allclose(got[0].level_means, want[0].level_means, rtol=0, atol=2e-6)


def kernel_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("kernels_*.cache"))


def test_kernels_are_compiled_once_for_a_gpu_and_a_shape(make: Any, tmp_path: Path) -> None:
    first = make(rtx=True)
    segment(first)
    assert len(compiled(first)) == 2, "one a graph"
    assert [path.parent.name for path in kernel_files(tmp_path)] == ["denoiser", "encoder"]
    written = {path: path.stat().st_mtime_ns for path in kernel_files(tmp_path)}

    again = make(rtx=True)
    segment(again)
    assert compiled(again) == []
    assert {path: path.stat().st_mtime_ns for path in written} == written, "nothing new, nothing written"

    other = make(rtx=True)
    segment(other, batch=5)
    assert [name.split("-")[0] for name in compiled(other)] == ["denoiser"]
    both = make(rtx=True)
    segment(both, batch=5)
    segment(both)
    assert compiled(both) == [], "the new shape's kernels were added to the old one's"


def test_they_are_kept_before_a_step_is_captured(make: Any) -> None:
    """Nothing of the host's may happen inside a capture, and a capture needs all kernels to be there."""
    setup = make(rtx=True)
    segment(setup)
    names = [call[0] for call in setup.world.calls]
    assert max(i for i, name in enumerate(names) if name == "compile") < names.index("begin capture")


def test_kernels_that_tensorrt_does_not_give_cost_the_scan_nothing(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cdiff")
    setup = make(rtx=True)
    setup.engine._trt.refused = "serialize"
    segment(setup)
    assert kernel_files(tmp_path) == []
    assert any("does not give its compiled kernels" in record.message for record in caplog.records)


def test_tensorrt_itself_keeps_none(make: Any, tmp_path: Path) -> None:
    segment(make())
    assert kernel_files(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        "one byte",
        "cut short",
        "no header",
        "nested without end",
        "no hash",
        "another engine",
        "another GPU",
        "another version",
    ],
)
def test_damaged_and_stale_kernels_are_never_given_to_tensorrt(
    make: Any, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    segment(make(rtx=True))
    path = tmp_path / "denoiser" / "kernels_Double.cache"
    content = path.read_bytes()
    head, _, blob = content.partition(b"\n")
    if change == "one byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "cut short":
        path.write_bytes(content[:-3])
    elif change == "no hash":
        rest = {name: value for name, value in json.loads(head).items() if name != "sha256"}
        path.write_bytes(json.dumps(rest).encode() + b"\n" + blob)
    elif change == "no header":
        path.write_bytes(blob)
    elif change == "nested without end":
        path.write_bytes(b"[" * 100_000 + b"\n" + blob)
    else:
        field = {"another engine": "engine", "another GPU": "gpu", "another version": "version"}[change]
        path.write_bytes(json.dumps(json.loads(head) | {field: "other"}).encode() + b"\n" + blob)
    caplog.set_level(logging.INFO, "cdiff")
    setup = make(rtx=True)
    segment(setup)
    assert [name.split("-")[0] for name in compiled(setup)] == ["denoiser"]
    given = [call[1] for call in setup.world.named("deserialize kernels")]
    assert [name.split("-")[0] for name in given] == ["encoder"], "the bytes did not reach the library"
    assert [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert path.read_bytes() == content, "and they were made anew"


def test_kernels_of_another_driver_are_compiled_again_and_that_is_no_error(make: Any) -> None:
    segment(make(rtx=True))
    newer = make(rtx=True)
    newer.engine._trt.driver = "driver-590"
    segment(newer)
    assert len(compiled(newer)) == 2
    again = make(rtx=True)
    again.engine._trt.driver = "driver-590"
    segment(again)
    assert compiled(again) == []


def test_where_the_engine_s_folder_is_read_only_they_go_to_the_user_s_cache(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.runtime.engines.jit.os.access", lambda path, mode: False)  # root may write anywhere
    segment(make(rtx=True))
    assert all(path.is_relative_to(tmp_path / "user") for path in kernel_files(tmp_path))
    again = make(rtx=True)
    segment(again)
    assert compiled(again) == []


def test_nowhere_to_keep_them_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDIFF_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("cdiff.runtime.engines.jit.os.access", lambda path, mode: False)
    (tmp_path / "file").write_text("a file, so that no folder can be made below it")
    kept = JitFile(tmp_path / "denoiser.engine", "f" * 64, "1.7.1.116", "NVIDIA GeForce RTX 4090")
    kept.write(b"kernels")
    assert kept.read() is None


# Engines that carry code for the host


def own(make: Any, plan: str) -> None:
    note_own(hashlib.sha256(plan.encode()).hexdigest(), Path("engines/it"))


def test_host_code_is_allowed_for_engines_built_here_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make(host_code=True)
    own(make, "encoder+host code")
    with pytest.raises(CdiffError, match=r"denoiser\.engine is version-compatible.*not built by you") as caught:
        segment(setup)
    assert "\n" not in str(caught.value)
    own(make, "denoiser+host code")
    segment(setup)  # the double refuses such a plan unless it was allowed, and allows it for no other
    monkeypatch.setenv(TRUST, "1")
    for path in (user_cache().parent / "own-engines").iterdir():
        path.unlink()
    segment(make(host_code=True))
    segment(make())


def test_it_is_the_loaded_bytes_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDIFF_CACHE", str(tmp_path))
    digest = hashlib.sha256(b"ours").hexdigest()
    note_own(digest, tmp_path / "denoiser.engine")
    must_be_trusted(tmp_path / "denoiser.engine", digest)
    with pytest.raises(CdiffError, match="not built by you"):
        must_be_trusted(tmp_path / "denoiser.engine", hashlib.sha256(b"theirs").hexdigest())
