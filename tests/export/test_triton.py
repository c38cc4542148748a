"""The model repository for Triton: its configuration as Triton's schema reads it, and its model end to end with a stand-in server."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from typer.testing import CliRunner

import cdiff
from cdiff.cli.app import app
from cdiff.export.triton import write_repository
from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.stack import entropy
from tests.runtime.test_segmenter import make_bundle

STRING, INT32, INT64, BOOL, MESSAGE, ENUM = 9, 5, 3, 8, 11, 14


def model_config() -> Any:
    """The part of Triton's ModelConfig (its model_config.proto) that a Python backend's model uses; what is not in it is refused."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, bool] | tuple[str, int, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, many, *type_name in fields:
            of = {"type_name": f".inference.{type_name[0]}"} if type_name else {}
            made.field.add(name=field, number=number, type=kind, label=3 if many else 1, **of)  # type: ignore[arg-type]

    kinds = file.enum_type.add(name="DataType")
    integers = [f"{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)]
    names = ["INVALID", "BOOL", *integers, "FP16", "FP32", "FP64", "STRING"]
    for number, name in enumerate(names):
        kinds.value.add(name=f"TYPE_{name}", number=number)
    where = file.enum_type.add(name="Kind")
    for number, name in enumerate(("AUTO", "GPU", "CPU", "MODEL")):
        where.value.add(name=f"KIND_{name}", number=number)
    tensor = (("name", 1, STRING, False), ("data_type", 2, ENUM, False, "DataType"))
    message("ModelInput", *tensor, ("dims", 4, INT64, True), ("optional", 8, BOOL, False))
    message("ModelOutput", *tensor, ("dims", 3, INT64, True))
    message(
        "ModelInstanceGroup",
        ("name", 1, STRING, False),
        ("count", 2, INT32, False),
        ("gpus", 3, INT32, True),
        ("kind", 4, ENUM, False, "Kind"),
    )
    message("ModelParameter", ("string_value", 1, STRING, False))
    message(
        "ModelConfig", ("name", 1, STRING, False), ("max_batch_size", 4, INT32, False), ("input", 5, MESSAGE, True, "ModelInput"),
        ("output", 6, MESSAGE, True, "ModelOutput"), ("instance_group", 7, MESSAGE, True, "ModelInstanceGroup"),
        ("parameters", 14, MESSAGE, True, "ModelConfig.ParametersEntry"), ("backend", 17, STRING, False),
    )  # fmt: skip
    entry = file.message_type[-1].nested_type.add(name="ParametersEntry")
    entry.field.add(name="key", number=1, type=STRING, label=1)
    entry.field.add(name="value", number=2, type=MESSAGE, label=1, type_name=".inference.ModelParameter")
    entry.options.map_entry = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def for_the_processor(bundle: Path, folder: Path) -> Path:
    """A repository for a machine without a GPU, as docs/gpu.md has it."""
    model = write_repository(open_bundle(bundle), folder)
    text = (model / "config.pbtxt").read_text()
    assert text.count("KIND_GPU") == 1
    (model / "config.pbtxt").write_text(text.replace("KIND_GPU", "KIND_CPU"))
    return model


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return for_the_processor(tiny_bundle, tmp_path_factory.mktemp("repository"))


def read_config(repository: Path) -> Any:
    return text_format.Parse((repository / "config.pbtxt").read_text(), model_config())


def test_the_configuration_is_tritons(repository: Path) -> None:
    found = read_config(repository)
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "python", 0)
    inputs = {item.name: (item.data_type, list(item.dims), item.optional) for item in found.input}
    assert inputs == {
        "image": (11, [1, -1, -1], False), "seed": (5, [1], True), "runs": (8, [1], True), "steps": (8, [1], True)
    }  # fmt: skip
    outputs = {item.name: (item.data_type, list(item.dims)) for item in found.output}
    assert outputs == {"soft": (11, [-1, -1]), "levels": (11, [3, -1, -1]), "uncertainty": (11, [2, -1, -1])}
    assert [(group.kind, group.count) for group in found.instance_group] == [(2, 1)]
    assert {"engine", "sampler", "fast", "batch"} == set(found.parameters)


def test_the_check_itself_refuses_what_triton_would(repository: Path) -> None:
    text = (repository / "config.pbtxt").read_text()
    for wrong in (text + 'shape: "none"\n', text.replace("TYPE_FP32", "FP32"), text.replace("dims:", "dim:")):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config())


def test_a_repository_for_gpus(tiny_bundle: Path, tmp_path: Path) -> None:
    model = write_repository(open_bundle(tiny_bundle), tmp_path)
    found = read_config(model)
    assert [(group.kind, group.count) for group in found.instance_group] == [(1, 1)]
    assert open_bundle(model / "1" / "bundle").manifest == open_bundle(tiny_bundle).manifest


def test_only_what_the_manifest_lists_and_engines_are_served(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle comes from elsewhere: a link in it would put a file of this user's, or what a circle holds, before the server's."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (tmp_path / "secret").write_text("a key")
    engine = bundle / "engines/denoiser_x"
    engine.mkdir(parents=True)
    (engine / "denoiser.engine").write_bytes(b"plan")
    for folder in (bundle, engine):
        (folder / "notes.txt").symlink_to(tmp_path / "secret")
        (folder / "circle").symlink_to(bundle)
        os.mkfifo(folder / "pipe")
    (bundle / "README.md").rename(tmp_path / "README.md")
    (bundle / "README.md").symlink_to(tmp_path / "README.md")  # listed, and so checked: as a hub's cache has them
    served = write_repository(open_bundle(bundle), tmp_path / "served") / "1/bundle"
    there = {str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()}
    assert there == {"manifest.json", "engines/denoiser_x/denoiser.engine", *open_bundle(bundle).manifest.files}
    assert not any(path.is_symlink() or path.is_fifo() for path in served.rglob("*"))
    open_bundle(served)


def test_a_name_that_triton_cannot_have_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(CdiffError, match="must be letters"):
        write_repository(replace(bundle, manifest=replace(bundle.manifest, name=".a")), tmp_path)
    assert not list(tmp_path.iterdir())


class Tensor:
    """What triton_python_backend_utils.Tensor does for a model."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values

    @classmethod
    def from_dlpack(cls, name: str, tensor: Tensor) -> Tensor:
        return cls(name, tensor.as_numpy())


class MisreadTensor(Tensor):
    """What a backend built with pybind11 before 2.12 makes of NumPy 2's arrays: every item at the first one's place."""

    @classmethod
    def from_dlpack(cls, name: str, tensor: Tensor) -> Tensor:
        return cls(name, np.zeros_like(tensor.as_numpy()))


class Request(dict[str, np.ndarray]):
    """A request's inputs, and whether its client has gone: from the `patience`-th question on."""

    patience = float("inf")

    def is_cancelled(self) -> bool:
        self.patience -= 1
        return self.patience < 0


class TritonError:
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"

    def __init__(self, message: str, code: str) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


def stand_in() -> ModuleType:
    """A triton_python_backend_utils with the functions and classes that its documentation has and a model here uses."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonError = TritonError

    def response(output_tensors: list[Tensor], error: Any = None) -> Any:
        return SimpleNamespace(output_tensors=lambda: output_tensors, error=error)

    def find(request: Request, name: str) -> Tensor | None:
        return Tensor(name, request[name]) if name in request else None

    module.InferenceResponse, module.get_input_tensor_by_name = response, find
    return module


def arguments(repository: Path, kind: str = "CPU", **parameters: str) -> dict[str, str]:
    """What the server gives `initialize`, with some of the parameters in config.pbtxt changed."""
    config = read_config(repository)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return {
        "model_config": json_format.MessageToJson(config, preserving_proto_field_name=True), "model_instance_kind": kind,
        "model_instance_device_id": "0", "model_repository": str(repository), "model_version": "1",
        "model_name": repository.name, "model_instance_name": f"{repository.name}_0",
    }  # fmt: skip


@pytest.fixture
def served(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The repository's own model.py, loaded and initialised as the server does."""
    return load(repository, monkeypatch)


def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in())
    spec = importlib.util.spec_from_file_location("model", repository / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize(arguments(repository))
    return model


def test_a_request_is_a_slice(served: Any, tiny_bundle: Path) -> None:
    image = np.random.default_rng(3).uniform(0, 200, (1, 40, 30)).astype(np.float32)
    request = Request(
        image=image,
        seed=np.array([2**64 - 1], np.uint64),
        runs=np.array([2], np.int32),
        steps=np.array([5], np.int32),
    )
    (response,) = served.execute([request])
    assert response.error is None
    found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    expected = cdiff.load(tiny_bundle).segment(image[0], runs=2, steps=5, seed=2**64 - 1)
    np.testing.assert_array_equal(found["soft"], expected.soft)
    np.testing.assert_array_equal(found["levels"], np.moveaxis(expected.levels, -1, 0))
    np.testing.assert_array_equal(found["uncertainty"][0], entropy(expected.soft))
    assert all(values.dtype == np.float32 for values in found.values())


def test_one_bad_request_costs_no_other(served: Any) -> None:
    one = np.array([1], np.int32)
    good = Request(image=np.zeros((1, 32, 32), np.float32), runs=one, steps=one)
    bad = [
        Request(),
        Request(image=np.zeros((3, 32, 32), np.float32)),
        Request({**good, "image": np.full((1, 32, 32), np.nan, np.float32)}),
        Request({**good, "runs": np.array([0], np.int32)}),
        Request({**good, "steps": np.array([1001], np.int32)}),
        Request({**good, "seed": np.array([1, 2], np.uint64)}),
    ]
    responses = served.execute([*bad, good])
    said = [response.error.message() for response in responses[:-1]]
    expected = ("no input 'image'", r"takes \[1, H, W\]", "NaN", "runs 0", "1001 steps", "2 values")
    for message, words in zip(said, expected, strict=True):
        assert re.search(words, message), message
    assert {response.error.code() for response in responses[:-1]} == {TritonError.INVALID_ARG}, "the client's fault"
    assert responses[-1].error is None
    served.finalize()
    assert not hasattr(served, "segmenter")


@pytest.mark.parametrize("error", [OutOfMemory("the GPU is out of memory"), MemoryError("Unable to allocate 8 TiB")])
def test_the_engines_fault_is_not_the_clients(served: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(served.segmenter, "segment", refuse)
    (response,) = served.execute([Request(image=np.zeros((1, 32, 32), np.float32))])
    assert str(error) in response.error.message()
    assert response.error.code() == TritonError.INTERNAL


def test_a_request_whose_client_has_gone_is_not_finished(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    denoise = type(served.segmenter.engine.bind(1, 1)).run
    monkeypatch.setattr(
        type(served.segmenter.engine.bind(1, 1)), "run", lambda *args: calls.append(1) or denoise(*args)
    )
    image = np.random.default_rng(5).uniform(0, 200, (1, 16, 16)).astype(np.float32)
    left = Request(image=image, runs=np.array([1], np.int32), steps=np.array([5], np.int32))
    left.patience = 2
    stays = Request(left)
    gone, answered = served.execute([left, stays])
    assert gone.error.code() == TritonError.CANCELLED
    assert len(calls) == 3 + 5, "three steps, of which the third found the client gone, and all five of the other"
    expected = cdiff.load(served.segmenter.bundle.path).segment(image[0], runs=1, steps=5)
    np.testing.assert_array_equal(answered.output_tensors()[0].as_numpy(), expected.soft)


@pytest.mark.parametrize("variant", ["implicit-ensemble", "annotator"])
def test_the_uncertainty_is_the_variants(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "bundle", variant=variant)
    repository = for_the_processor(bundle, tmp_path / "models")
    image = np.random.default_rng(6).uniform(0, 200, (1, 16, 16)).astype(np.float32)
    request = Request(image=image, runs=np.array([3], np.int32), steps=np.array([2], np.int32))
    (response,) = load(repository, monkeypatch).execute([request])
    expected = cdiff.load(bundle).segment(image[0], runs=3, steps=2)
    for tensor, maps in zip(response.output_tensors()[1:], (expected.levels, expected.uncertainty), strict=True):
        np.testing.assert_array_equal(tensor.as_numpy(), np.moveaxis(maps, -1, 0))
    assert open_bundle(bundle).manifest.draws.uncertainty in (repository / "config.pbtxt").read_text()


def test_several_channels_and_what_the_server_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's channels come first, and the parameters are for every request; a name is made one that Triton takes."""
    bundle = make_bundle(tmp_path / "bundle", image_channels=2, name="two of them")
    repository = for_the_processor(bundle, tmp_path / "models")
    assert repository.name == read_config(repository).name == "two-of-them"
    assert list(read_config(repository).input[0].dims) == [2, -1, -1]
    model, steps = load(repository, monkeypatch), []
    model.initialize(arguments(repository, sampler="ddim", batch="2"))
    image = np.random.default_rng(7).uniform(0, 200, (2, 16, 20)).astype(np.float32)
    request = Request(image=image, runs=np.array([2], np.int32), steps=np.array([3], np.int32))
    denoise = type(model.segmenter.engine.bind(1, 1)).run
    monkeypatch.setattr(
        type(model.segmenter.engine.bind(1, 1)), "run", lambda *args: steps.append(len(args[1])) or denoise(*args)
    )
    (response,) = model.execute([request])
    assert set(steps) == {2}, "rows at once"
    wanted = {"runs": 2, "steps": 3, "batch": 2}
    expected = cdiff.load(bundle).segment(np.moveaxis(image, 0, -1), sampler="ddim", **wanted)
    np.testing.assert_array_equal(response.output_tensors()[0].as_numpy(), expected.soft)
    assert expected.soft.std() > 0.01


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"fast": "yes"}, 'fast of config.pbtxt is \'yes\'; use "true" or "false"'),
        ({"batch": "x"}, "batch of config.pbtxt is 'x'; use a whole number"),
        ({"batch": "0"}, "batch of config.pbtxt is '0'; use a whole number"),
        ({"sampler": "foo"}, "sampler 'foo' is not known"),
        ({"engine": "nonsense"}, "engine 'nonsense' is not known"),
        ({"kind": "MODEL"}, "use KIND_GPU or KIND_CPU"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_wrong_parameter_is_told_when_the_model_loads(
    served: Any, repository: Path, parameters: dict[str, str], said: str
) -> None:
    with pytest.raises(CdiffError, match=re.escape(said)):
        served.initialize(arguments(repository, **parameters))


def test_empty_parameters_are_as_left_out_and_true_may_be_capital(served: Any, repository: Path) -> None:
    served.initialize(arguments(repository, engine="", sampler="", fast="True", batch=" "))
    (response,) = served.execute([Request(image=np.eye(16, dtype=np.float32)[None])])
    expected = cdiff.load(repository / "1" / "bundle").segment(np.eye(16, dtype=np.float32), fast=True)
    np.testing.assert_array_equal(response.output_tensors()[0].as_numpy(), expected.soft)


def test_a_server_that_misreads_arrays_loads_no_model(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "Tensor", MisreadTensor)
    with pytest.raises(CdiffError, match=r"built for NumPy 1 .* use Triton Inference Server 24.11 or newer"):
        served.initialize({})


def test_a_gpu_instance_asks_for_its_own_gpu(served: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(*arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(sampling=lambda **_: None)

    monkeypatch.setattr("cdiff.runtime.serving.Segmenter.open", opened)
    served.initialize({**arguments(repository, "GPU", engine="tensorrt"), "model_instance_device_id": "3"})
    assert asked == [(repository / "1" / "bundle", "tensorrt", "cuda:3")]


def test_export_writes_it_beside_the_bundle(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.export.exporter.export_run", lambda *_, **__: open_bundle(tiny_bundle))
    command = ["export", str(tiny_run), "--out", str(tmp_path / "bundle"), "--triton", str(tmp_path / "models"), "-q"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (model,) = (tmp_path / "models").iterdir()
    assert read_config(model).name == model.name
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2, "an older model is not overwritten in silence"
