"""What a model repository takes of a bundle that changes, or on a disk that is full, while it is copied."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cdiff.export.triton import write_repository
from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import PART
from tests.runtime.test_segmenter import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with an engine in its cache."""
    folder = make_bundle(tmp_path / "bundle", levels=2)
    (folder / "engines" / "denoiser_x").mkdir(parents=True)
    (folder / "engines" / "denoiser_x" / "denoiser.engine").write_bytes(b"plan")
    return folder


def at_copy_of(name: str, happens: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen before a file of that name is copied."""
    real = shutil.copy2

    def copy(source: Path, target: Path) -> None:
        if source.name == name:
            happens()
        real(source, target)

    monkeypatch.setattr(shutil, "copy2", copy)


def test_an_engine_that_is_not_finished_is_not_served_nor_what_a_link_leads_to(bundle: Path, tmp_path: Path) -> None:
    left = bundle / "engines" / f"{PART}0"
    left.mkdir()
    (left / "denoiser.engine").write_bytes(b"half")
    (bundle / "engines" / f"{PART}1.cache").write_bytes(b"half")
    (tmp_path / "private").write_bytes(b"of another program")
    (bundle / "engines" / "denoiser_x" / "link").symlink_to(tmp_path / "private")
    served = write_repository(open_bundle(bundle), tmp_path / "models") / "1" / "bundle"
    assert [path.name for path in (served / "engines").iterdir()] == ["denoiser_x"]
    (engine,) = (served / "engines" / "denoiser_x").iterdir()
    assert (engine.name, engine.read_bytes()) == ("denoiser.engine", b"plan")


def test_a_name_with_other_signs_becomes_one_that_triton_takes_and_nothing_is_chosen(
    bundle: Path, tmp_path: Path
) -> None:
    opened = open_bundle(bundle)
    named = replace(opened, manifest=replace(opened.manifest, name="Lung nodules (v2.1)"))
    model = write_repository(named, tmp_path / "models")
    assert model == tmp_path / "models" / "Lung-nodules-v2.1-"
    text = (model / "config.pbtxt").read_text()
    assert 'name: "Lung-nodules-v2.1-"\n' in text
    chosen = re.findall('parameters { key: "(.*)" value { string_value: "(.*)" } }', text)
    assert dict(chosen) == {"engine": "auto", "sampler": "", "fast": "false", "batch": ""}


@pytest.mark.parametrize("what", ["replaced", "removed", "engine removed", "disk full", "folder removed"])
def test_what_ends_the_copy_is_one_line_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    opened, models = open_bundle(bundle), tmp_path / "models"

    def happens() -> None:
        if what == "replaced":
            (bundle / "encoder.onnx").write_bytes(b"another")
        elif what == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            gone = {"removed": bundle, "engine removed": bundle / "engines" / "denoiser_x", "folder removed": models}
            shutil.rmtree(gone[what])

    at_copy_of("denoiser.engine" if what in ("engine removed", "disk full") else "denoiser.onnx", happens, monkeypatch)
    says = {
        "replaced": "encoder.onnx has changed since",
        "removed": "has changed since",
        "engine removed": "denoiser.engine was removed while it was copied",
        "disk full": "cannot write to .*no space left",
        "folder removed": "removed while writing",
    }[what]
    with pytest.raises(CdiffError, match=says) as caught:
        write_repository(opened, models)
    assert "\n" not in str(caught.value)
    assert not models.exists() or not any(models.iterdir())
