"""A bundle opens only when every listed file is the one that was written, and is written whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from cdiff.runtime.bundle import ELSEWHERE, Bundle, open_bundle, write_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from tests.runtime.graphs import write_pair
from tests.runtime.test_manifest import example

# A card may well speak of a location, which a graph must not.
FILES = {
    "encoder.onnx": b"encoder",
    "denoiser.onnx": b"denoiser",
    "model.safetensors": b"w" * 99,
    "README.md": b"location",
}


def fill(folder: Path) -> Manifest:
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return example(files={})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", fill)


def test_written_bundle_opens_the_same(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert set(opened.manifest.files) == set(FILES)
    assert opened.encoder.read_bytes() == b"encoder"
    assert opened.denoiser.read_bytes() == b"denoiser"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_changed_byte_is_found_and_named(bundle: Bundle, name: str) -> None:
    data = bytearray(FILES[name])
    data[-1] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(CdiffError, match=f"{name} has changed"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_or_missing_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.path / name).write_bytes(FILES[name][:-1])
    with pytest.raises(CdiffError, match=f"{name} has {len(FILES[name]) - 1} bytes"):
        open_bundle(bundle.path)
    (bundle.path / name).unlink()
    with pytest.raises(CdiffError, match=f"{name} is missing"):
        open_bundle(bundle.path)


def test_a_listed_name_that_no_file_can_have_is_one_line(bundle: Bundle) -> None:
    """To Python 3.14 such a file does not exist; before, asking raised."""
    text = (bundle.path / "manifest.json").read_text()
    (bundle.path / "manifest.json").write_text(text.replace("README.md", "n" * 300))
    with pytest.raises(CdiffError, match=r"cannot read .*: File name too long|n{300} is missing"):
        open_bundle(bundle.path)


def test_only_checked_files_are_handed_out(bundle: Bundle) -> None:
    (bundle.path / "other.onnx").write_bytes(b"planted")
    with pytest.raises(CdiffError, match=r"other\.onnx"):
        open_bundle(bundle.path).file("other.onnx")


def test_a_graph_whose_weights_lie_in_another_file_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime would read them, and of a file that the manifest does not list nobody has a hash."""

    def build(folder: Path) -> Manifest:
        for path in write_pair(folder, size=16, T=20, levels=3):
            model = onnx.load(path)
            onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=0)
            ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return example(files={})

    listed = write_bundle(tmp_path / "bundle", build).path
    with pytest.raises(CdiffError, match=r"(encoder|denoiser)\.onnx keeps weights in another file") as error:
        open_bundle(listed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before", [0, (1 << 20) - len(ELSEWHERE) + 1, (1 << 20) - 1, 1 << 20])
def test_the_key_is_found_wherever_it_stands(tmp_path: Path, before: int) -> None:
    def build(folder: Path) -> Manifest:
        manifest = fill(folder)
        (folder / "denoiser.onnx").write_bytes(b"l" * before + ELSEWHERE + b"z" * 9)
        return manifest

    with pytest.raises(CdiffError, match=r"denoiser\.onnx keeps weights"):
        open_bundle(write_bundle(tmp_path / "bundle", build).path)


def test_a_bundle_that_is_replaced_after_it_was_hashed_is_found(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    opened.must_be_unchanged()
    write_bundle(bundle.path, lambda folder: dataclasses.replace(fill(folder), name="second"), replace=True)
    with pytest.raises(CdiffError, match=r"manifest\.json has changed since the bundle was opened"):
        opened.must_be_unchanged()
    again = open_bundle(bundle.path)
    bundle.denoiser.write_bytes(FILES["denoiser.onnx"])  # even with the same bytes: nobody hashed these
    with pytest.raises(CdiffError, match=r"denoiser\.onnx has changed since"):
        again.must_be_unchanged()
    bundle.encoder.unlink()
    with pytest.raises(CdiffError, match=r"encoder\.onnx has changed since|denoiser"):
        again.must_be_unchanged()


def test_what_is_no_bundle_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, word in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no manifest"),
    ):
        with pytest.raises(CdiffError, match=word) as error:
            open_bundle(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> Manifest:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "bundle", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_would_not_open_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="'levels'"):
        write_bundle(tmp_path / "bundle", lambda folder: dataclasses.replace(fill(folder), levels=0))
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_bundle_until_the_new_one_is_whole(bundle: Bundle) -> None:
    with pytest.raises(CdiffError, match="already exists"):
        write_bundle(bundle.path, fill)

    def broken(folder: Path) -> Manifest:
        raise CdiffError("no")

    with pytest.raises(CdiffError, match="no"):
        write_bundle(bundle.path, broken, replace=True)
    assert open_bundle(bundle.path) == bundle
    (bundle.path / "engines").mkdir()
    new = write_bundle(bundle.path, lambda folder: dataclasses.replace(fill(folder), name="second"), replace=True)
    assert open_bundle(bundle.path).manifest.name == new.manifest.name == "second"
    assert not (bundle.path / "engines").exists()


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.png").write_bytes(b"1")
    with pytest.raises(CdiffError, match="not a bundle"):
        write_bundle(folder, fill, replace=True)
    assert (folder / "one.png").read_bytes() == b"1"
